//! Tiles of AMX: eight registers of 16 rows of 64 bytes, and products of two of them.
//!
//! The intrinsics are not stable in Rust 1.95, so what uses tiles is written in assembly. No tile lives from one block of it to
//! the next; what does is how they are configured, while an [`Amx`] is there.
//!
//! **Order of sums.** `tdpbf16ps` adds the products of the first inputs of all 16 pairs in one chain, those of the second ones in
//! another, each from zero; then the two, and that to the sum that was there; numbers that are not normal count as 0 (Intel's
//! manual, volume 2). Rows do not meet. So a row's sums are the same in whatever tile it lies, but not those of products of pairs
//! on other sets. [`add_products`] is the definition.

#[cfg(not(target_arch = "x86_64"))]
mod absent;
#[cfg(target_arch = "x86_64")]
mod tiles;

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use absent::Amx;
#[cfg(target_arch = "x86_64")]
pub(crate) use tiles::Amx;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;
/// Pairs of words in a tile's row.
const PAIRS: usize = 16;
/// Words of a tile of weights.
pub(crate) const WORDS: usize = 2 * ROWS * PAIRS;
/// Multiply-adds of a product of two tiles.
pub(crate) const PRODUCTS: usize = SUMS * 2 * PAIRS;
/// Sums of a tile.
pub(crate) const SUMS: usize = ROWS * ROWS;

/// Whether there are tiles with products of bf16, and the system lets this process use them: Linux wants to be asked, once for all
/// threads.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) fn is_granted() -> bool {
    /// CPUID 7.0, EDX: products of bf16, tiles.
    const FEATURES: u32 = 1 << 22 | 1 << 24;
    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`; see Documentation/arch/x86/xstate.rst.
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    if std::arch::x86_64::__cpuid_count(7, 0).edx & FEATURES != FEATURES {
        return false;
    }
    let mut result = ARCH_PRCTL;
    // SAFETY: the system call has two numbers and touches no memory of ours.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
pub(crate) fn is_granted() -> bool {
    false
}

/// A bf16 as f32; what is not normal is 0.
fn widened(word: u16) -> f32 {
    let x = f32::from_bits(u32::from(word) << 16);
    if x.is_subnormal() { 0.0 } else { x }
}

/// Adds the products of 16 features with `rows` rows to `sums`, as tiles do. `weights`: `[16 features, 32]`; `inputs`: `[16 pairs,
/// rows, 2]`; `sums`: `[16 features, 16 rows]`.
pub(crate) fn add_products(weights: &[u16], inputs: &[u16], rows: usize, sums: &mut [f32]) {
    for (weights, sums) in weights.chunks_exact(2 * PAIRS).zip(sums.chunks_exact_mut(ROWS)) {
        for (row, sum) in sums.iter_mut().enumerate().take(rows) {
            let mut chains = [0.0f32; 2];
            for (pair, weights) in weights.chunks_exact(2).enumerate() {
                for (e, chain) in chains.iter_mut().enumerate() {
                    let input = inputs[2 * (pair * rows + row) + e];
                    // A product of two bf16 is exact.
                    *chain += widened(weights[e]) * widened(input);
                }
            }
            *sum += chains[0] + chains[1];
        }
    }
}
