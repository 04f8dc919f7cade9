//! What this machine can do at most: what kernels are measured against.

use std::hint::black_box;
use std::time::Instant;

use crate::threads::{num_threads, parallel_for};

/// A kind of product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// f32 multiply-adds.
    F32,
    /// Products of bf16, summed in f32.
    Bf16,
    /// Products of bytes, summed in 32 bits.
    Int8,
}

/// Bytes that no cache holds.
const READ_BYTES: usize = 256 << 20;
/// Vector instructions of a measurement, by thread: some 20 ms.
const ROUNDS: usize = 6_000_000;
/// Independent sums: enough to hide an instruction's latency.
const SUMS: usize = 12;

/// Most operations a second (a multiply-add is two) of all current threads together, by the widest
/// instructions that the kernels of this crate use. `None` where this processor has no such instruction.
/// Takes some 100 ms.
pub fn peak_operations(product: Product) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        let (run, operations): (unsafe fn(), usize) = match product {
            Product::F32 if has(&["avx512f"]) => (x86::f32_avx512, 32),
            Product::F32 if has(&["fma"]) => (x86::f32_avx2, 16),
            Product::Bf16 if has(&["avx512f", "avx512bf16"]) => (x86::bf16, 64),
            Product::Int8 if has(&["avx512f", "avx512vnni"]) => (x86::int8, 128),
            _ => return None,
        };
        let threads = num_threads();
        let mut best = f64::MAX;
        for _ in 0..5 {
            let clock = Instant::now();
            // SAFETY: the features were found.
            parallel_for(threads, |_, _| unsafe { run() });
            best = best.min(clock.elapsed().as_secs_f64());
        }
        Some((threads * ROUNDS * operations) as f64 / best)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = product;
        None
    }
}

#[cfg(target_arch = "x86_64")]
fn has(features: &[&str]) -> bool {
    features.iter().all(|feature| match *feature {
        "avx512f" => std::is_x86_feature_detected!("avx512f"),
        "fma" => std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma"),
        "avx512bf16" => std::is_x86_feature_detected!("avx512bf16"),
        "avx512vnni" => std::is_x86_feature_detected!("avx512vnni"),
        _ => false,
    })
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

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{ROUNDS, SUMS};

    /// Chains of one instruction over [`SUMS`] registers, with operands the compiler does not know.
    macro_rules! chains {
        ($name:ident, $features:literal, $zero:expr, $operand:expr, $step:expr) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name() {
                let (a, b) = (black_box($operand), black_box($operand));
                let mut sums = [$zero; SUMS];
                for _ in 0..ROUNDS / SUMS {
                    for sum in &mut sums {
                        *sum = $step(*sum, a, b);
                    }
                }
                black_box(sums);
            }
        };
    }

    chains!(f32_avx512, "avx512f", _mm512_setzero_ps(), _mm512_set1_ps(0.5), |sum, a, b| {
        _mm512_fmadd_ps(a, b, sum)
    });
    chains!(f32_avx2, "avx2,fma", _mm256_setzero_ps(), _mm256_set1_ps(0.5), |sum, a, b| {
        _mm256_fmadd_ps(a, b, sum)
    });
    chains!(
        bf16,
        "avx512f,avx512bf16",
        _mm512_setzero_ps(),
        _mm512_set1_epi16(0x3f00),
        |sum, a: __m512i, b: __m512i| {
            // SAFETY: both are 64 bytes of any bits.
            let [a, b] = [a, b].map(|x| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) });
            _mm512_dpbf16_ps(sum, a, b)
        }
    );
    chains!(
        int8,
        "avx512f,avx512vnni",
        _mm512_setzero_si512(),
        _mm512_set1_epi8(1),
        |sum, a, b| _mm512_dpbusd_epi32(sum, a, b)
    );
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
                for product in [Product::F32, Product::Bf16, Product::Int8] {
                    println!("{threads} {product:?} {:?}", peak_operations(product));
                }
                println!("{threads} {:.1} GB/s", peak_read_bytes() * 1e-9);
            });
        }
    }
}
