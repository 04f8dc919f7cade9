//! What this machine can do at most: what kernels are measured against.

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::isa::{Isa, Set};
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
}

impl Product {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Codes, Self::Bytes];

    /// Multiply-adds of a vector.
    fn of_vector(self) -> usize {
        match self {
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
    let seconds = least(|| parallel_for(threads, |_, _| products(isa, product, ROUNDS)));
    let operations = 2 * threads * ROUNDS * product.of_vector();
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
    if S::WIDE { chains::<S, 12>(s, product, rounds) } else { chains::<S, 4>(s, product, rounds) }
}

/// Chains of products over `N` sums, with operands that the compiler does not know.
#[inline(always)]
fn chains<S: Simd, const N: usize>(s: S, product: Product, rounds: usize) {
    let (x, y) = (s.splat(black_box(0.5)), s.splat(black_box(0.25)));
    let (a, b) = (s.isplat(black_box(0x0101_0101)), s.isplat(black_box(0x0101_0101)));
    match product {
        Product::F32 => {
            let mut sums = [s.zero(); N];
            for _ in 0..rounds / N {
                for sum in &mut sums {
                    *sum = s.fma(x, y, *sum);
                }
            }
            black_box(sums);
        }
        Product::Bf16 => {
            let (a, b) = (s.pairs(a), s.pairs(b));
            let mut sums = [s.zero(); N];
            for _ in 0..rounds / N {
                for sum in &mut sums {
                    *sum = s.dot_pairs(*sum, a, b);
                }
            }
            black_box(sums);
        }
        Product::Codes => {
            let mut sums = [s.izero(); N];
            for _ in 0..rounds / N {
                for sum in &mut sums {
                    *sum = s.dot_codes(*sum, a, b);
                }
            }
            black_box(sums);
        }
        Product::Bytes => {
            let a = s.bytes(a);
            let mut sums = [s.izero(); N];
            for _ in 0..rounds / N {
                for sum in &mut sums {
                    *sum = s.dot_bytes(*sum, a, b);
                }
            }
            black_box(sums);
        }
    }
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
