//! What this machine can do at most: what kernels are measured against.

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::isa::{Isa, Set};
use crate::simd::amx::{self, Amx};
use crate::simd::{LANES, Simd, compiled};
use crate::threads::{num_threads, parallel_for};

/// A kind of product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// f32 multiply-adds.
    F32,
    /// Products of bf16, summed in f32.
    Bf16,
    /// Products of codes of 4 bits with bytes, summed in 16 or 32 bits.
    Codes,
    /// Products of bytes, summed in 32 bits.
    Bytes,
    /// Products of tiles of bf16, summed in f32.
    Tiles,
}

impl Product {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::Codes, Self::Bytes, Self::Tiles];

    /// Multiply-adds of a vector, or a tile.
    fn of_vector(self) -> usize {
        match self {
            Self::Tiles => amx::PRODUCTS,
            Self::F32 => LANES,
            Self::Bf16 => 2 * LANES,
            Self::Codes | Self::Bytes => 4 * LANES,
        }
    }
}

/// Bytes that no cache holds.
const READ_BYTES: usize = 256 << 20;
/// Vectors of products of a measurement, by thread: some 10 ms.
const ROUNDS: usize = 3_000_000;
/// The same where it must not take long.
const FEW_ROUNDS: usize = 30_000;

/// Most operations a second (a multiply-add is two) of all current threads together, by the instructions that kernels use
/// for such products on these instruction sets. `None` where they have no instruction for it. Takes some 100 ms.
pub fn peak_operations(isa: Isa, product: Product) -> Option<f64> {
    if product == Product::Bf16 && !isa.has(Set::Avx512Bf16) {
        return None;
    }
    let threads = num_threads();
    let (seconds, rounds) = if product == Product::Tiles {
        if !isa.has(Set::Amx) {
            return None;
        }
        // A tile takes sixteen times as long as a vector.
        let rounds = ROUNDS / 16;
        let seconds = least(|| {
            // SAFETY: an `Isa` names only sets that the processor has.
            parallel_for(threads, |_, _| unsafe { Amx::new(amx::ROWS).multiply_only(rounds) });
        });
        (seconds, rounds)
    } else {
        (least(|| parallel_for(threads, |_, _| products(isa, product, ROUNDS))), ROUNDS)
    };
    let operations = 2 * threads * rounds * product.of_vector();
    Some(operations as f64 / seconds.as_secs_f64())
}

fn least(run: impl Fn()) -> Duration {
    let time = |_| {
        let clock = Instant::now();
        run();
        clock.elapsed()
    };
    (0..5).map(time).min().unwrap_or_default()
}

/// Whether products of bf16 are faster than those of f32 here. Where they are instructions of their own they
/// are twice as fast on some processors and half as fast on others, so that some 100 µs of either tell.
pub(crate) fn bf16_is_fast(isa: Isa) -> bool {
    static FAST: OnceLock<bool> = OnceLock::new();
    isa.has(Set::Avx512Bf16)
        && *FAST.get_or_init(|| {
            let isa = Isa::detected();
            let time = |product: Product| {
                let rounds = FEW_ROUNDS * 2 * LANES / product.of_vector();
                least(|| products(isa, product, rounds))
            };
            time(Product::Bf16) < time(Product::F32)
        })
}

compiled! {
    /// So many vectors of products.
    fn products(product: Product, rounds: usize) = products_body
        for [Avx512Bf16, Avx512Vnni, Avx512, AvxVnni, Avx2, Sse2];
}

#[inline(always)]
fn products_body<S: Simd>(s: S, product: Product, rounds: usize) {
    // As many sums as hide an instruction's latency, and leave registers for operands.
    match S::REGISTERS {
        32 => chains::<S, 12>(s, product, rounds),
        8 => chains::<S, 6>(s, product, rounds),
        _ => chains::<S, 3>(s, product, rounds),
    }
}

/// Chains of products over `N` sums, with operands that the compiler does not know, a new one for each sum: it would compute what
/// does not change once.
#[inline(always)]
fn chains<S: Simd, const N: usize>(s: S, product: Product, rounds: usize) {
    let (x, a) = (s.splat(black_box(0.5)), s.isplat(black_box(0x0101_0101)));
    let (mut ys, mut bs) = ([s.splat(0.25); N], [s.isplat(0x0101_0101); N]);
    let (mut floats, mut sums) = ([s.zero(); N], [s.izero(); N]);
    let (pairs, bytes) = (s.pairs(a), s.bytes(a));
    macro_rules! chain {
        ($sums:ident, |$i:ident| $next:expr) => {
            for _ in 0..rounds / N {
                black_box((&mut ys, &mut bs));
                for $i in 0..N {
                    $sums[$i] = $next;
                }
            }
        };
    }
    match product {
        Product::F32 => chain!(floats, |i| s.fma(x, ys[i], floats[i])),
        Product::Bf16 => chain!(floats, |i| s.dot_pairs(floats[i], pairs, s.pairs(bs[i]))),
        Product::Codes => chain!(sums, |i| s.dot_codes(sums[i], a, bs[i])),
        Product::Bytes => chain!(sums, |i| s.dot_bytes(sums[i], bytes, bs[i])),
        // No vectors have them.
        Product::Tiles => {}
    }
    black_box((floats, sums));
}

/// Most bytes a second that all current threads together read from memory. Takes 256 MiB and some 100 ms.
pub fn peak_read_bytes() -> f64 {
    let data = vec![1u64; READ_BYTES / 8];
    let threads = num_threads();
    let part = data.len() / threads;
    let mut best = f64::MAX;
    for _ in 0..5 {
        let clock = Instant::now();
        parallel_for(threads, |task, _| {
            let part = &data[task * part..(task + 1) * part];
            let mut sums = [0u64; 32];
            for chunk in part.as_chunks::<32>().0 {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum ^= x;
                }
            }
            black_box(sums);
        });
        best = best.min(clock.elapsed().as_secs_f64());
    }
    (threads * part * 8) as f64 / best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `cargo test --release -p kvasir-kernels peaks -- --ignored --nocapture`
    #[test]
    #[ignore = "prints speeds"]
    fn peaks() {
        for threads in [1, 2] {
            crate::Threads::new(threads).unwrap().run(|| {
                for isa in Isa::available() {
                    for product in Product::ALL {
                        let peak = peak_operations(isa, product).unwrap_or(0.0);
                        println!("{threads} {isa} {product:?} {:.0}", peak * 1e-9);
                    }
                }
                println!("{threads} {:.1} GB/s", peak_read_bytes() * 1e-9);
            });
        }
    }
}
