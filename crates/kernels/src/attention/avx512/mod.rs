//! The AVX-512 way: as [`super::portable`], bit for bit, in register blocks.

use std::arch::x86_64::*;

use half::f16;

mod mix;
mod pair_rows;
mod pairs;
mod rows;
mod scores;
mod weights;

pub(super) use mix::mix;
pub(super) use pair_rows::{pair_keys, pair_values, round};
pub(super) use pairs::{mix_pairs, mix_stored_pairs, scores_of_pairs, scores_of_stored_pairs};
pub(super) use rows::{Turned, transpose, transpose_stored, turn, widen};
pub(super) use scores::{scores_of_stored, scores_of_tile};
pub(super) use weights::weights;

/// Runs `$call` with the constant `$R` set to each of the sizes, largest first, while as many rows are
/// left; 1 is among them.
macro_rules! by_rows {
    ($rows:expr, [$($size:literal),*], |$R:ident, $first:ident| $call:expr) => {{
        let rows = $rows;
        let mut $first = 0;
        $(while rows - $first >= $size {
            const $R: usize = $size;
            $call;
            $first += $size;
        })*
    }};
}

use by_rows;

/// Fetches what will be read later.
pub(super) fn fetch(bytes: &[u8]) {
    Fetch::new(bytes, 1).step();
}

/// Cache lines to fetch, some at every step: into L2, which takes twice as many at a time as L1 (12 and 22 GB/s
/// here), and leaves L1 to the block in hand.
struct Fetch {
    at: *const i8,
    lines: usize,
    per_step: usize,
}

impl Fetch {
    fn new(bytes: &[u8], steps: usize) -> Self {
        let lines = bytes.len().div_ceil(64);
        Self { at: bytes.as_ptr().cast(), lines, per_step: lines.div_ceil(steps.max(1)) }
    }

    #[inline(always)]
    fn step(&mut self) {
        let now = self.per_step.min(self.lines);
        for _ in 0..now {
            // SAFETY: a hint, which reads nothing; the instruction is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at) };
            self.at = self.at.wrapping_add(64);
        }
        self.lines -= now;
    }
}

/// 8 channels of 16 tokens: element `t` of the `c`-th result is channel `c` of token `t`.
///
/// # Safety
/// The processor must have AVX-512; `keys` points to 8 f16 of the first of 16 rows, `dim` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
unsafe fn transposed(keys: *const u16, dim: usize) -> [__m256i; 8] {
    // The halves of the i-th register are tokens i and 8 + i.
    let mut a = [_mm256_setzero_si256(); 8];
    for i in 0..8 {
        // SAFETY: rows up to 15 of 8 elements each, by contract.
        unsafe {
            let row = keys.add(i * dim);
            let low = _mm256_castsi128_si256(_mm_loadu_si128(row.cast()));
            a[i] = _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(row.add(8 * dim).cast()));
        }
    }
    // 8 × 8 elements in each half: pairs of tokens × channels 0-3 and 4-7, ...
    let mut b = a;
    for i in 0..4 {
        b[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    // ... fours × channels 01, 23, 45, 67, ...
    for i in 0..2 {
        let (x, y) = ([b[4 * i], b[4 * i + 1]], [b[4 * i + 2], b[4 * i + 3]]);
        for half in 0..2 {
            a[4 * i + 2 * half] = _mm256_unpacklo_epi32(x[half], y[half]);
            a[4 * i + 2 * half + 1] = _mm256_unpackhi_epi32(x[half], y[half]);
        }
    }
    // ... and eights × one channel.
    for i in 0..4 {
        b[2 * i] = _mm256_unpacklo_epi64(a[i], a[4 + i]);
        b[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[4 + i]);
    }
    b
}

/// What rows are stored as.
pub(in crate::attention) trait Element: Copy {
    /// One vector of floats.
    ///
    /// # Safety
    /// The processor must have AVX-512, and `at` point to 16 elements.
    unsafe fn load(at: *const Self) -> __m512;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load(at: *const Self) -> __m512 {
        // SAFETY: forwarded from the caller.
        unsafe { _mm512_loadu_ps(at) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load(at: *const Self) -> __m512 {
        // SAFETY: forwarded from the caller.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
}
