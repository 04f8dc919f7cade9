//! The paths of x86 processors with AVX-512, by the form of inputs.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::packed::{HALF, TILE};
use super::product::Target;

pub(super) mod pairs;
pub(super) mod quads;
pub(super) mod rounding;

/// How far ahead of a narrow product its tile is fetched: memory answers in about 400 cycles.
const PREFETCH_BYTES: usize = 4096;

/// Fetches what a narrow product will read [`PREFETCH_BYTES`] after `at`.
#[inline(always)]
fn prefetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        // SAFETY: a prefetch never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(PREFETCH_BYTES + line).cast()) };
    }
}

/// 32 f16 as two registers of f32.
///
/// # Safety
/// The processor has AVX-512; 64 bytes are readable.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
unsafe fn widen(from: *const u8) -> [__m512; 2] {
    // SAFETY: 64 bytes are readable by contract.
    unsafe {
        [
            _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
            _mm512_cvtph_ps(_mm256_loadu_si256(from.add(2 * HALF).cast())),
        ]
    }
}

/// Puts products where they go.
///
/// # Safety
/// The processor has AVX-512; `out` has MR rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
unsafe fn put<const MR: usize>(sums: &[[__m512; 2]; MR], out: &Target<'_>) {
    // What nearly all are stays in registers; the rest is not worth its place in every kernel.
    if out.features < TILE || out.bias.is_some() {
        // SAFETY: by contract.
        return unsafe { put_part(sums, out) };
    }
    for i in 0..MR {
        for h in 0..2 {
            // SAFETY: a whole tile is two registers of a row.
            unsafe {
                let row = out.start.add(i * out.stride + HALF * h);
                let before = if out.add { _mm512_loadu_ps(row) } else { _mm512_setzero_ps() };
                _mm512_storeu_ps(row, _mm512_add_ps(before, sums[i][h]));
            }
        }
    }
}

/// [`put`] with a bias, or of fewer features.
///
/// # Safety
/// As [`put`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline(never)]
unsafe fn put_part(sums: &[[__m512; 2]], out: &Target<'_>) {
    let bias = out.bias.map(<[f32]>::as_ptr);
    for h in 0..2 {
        let at = HALF * h;
        let whole = out.features >= at + HALF;
        let own = (1u32 << out.features.saturating_sub(at).min(HALF)) - 1;
        let mask = own as u16;
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: the features of the mask are the row's, and the bias's.
            unsafe {
                let row = out.start.add(i * out.stride).wrapping_add(at);
                let mut v = sums[h];
                if let Some(bias) = bias {
                    v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias.wrapping_add(at)));
                }
                if out.add {
                    v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, row), v);
                }
                // A masked store takes longer.
                if whole {
                    _mm512_storeu_ps(row, v);
                } else {
                    _mm512_mask_storeu_ps(row, mask, v);
                }
            }
        }
    }
}

/// Calls a kernel that is generic over the number of rows.
macro_rules! by_rows {
    ($rows:expr, $kernel:ident :: <_ $(, $generic:tt)*> ($($arg:expr),*)) => {
        match $rows {
            1 => $kernel::<1 $(, $generic)*>($($arg),*),
            2 => $kernel::<2 $(, $generic)*>($($arg),*),
            3 => $kernel::<3 $(, $generic)*>($($arg),*),
            4 => $kernel::<4 $(, $generic)*>($($arg),*),
            5 => $kernel::<5 $(, $generic)*>($($arg),*),
            _ => $kernel::<6 $(, $generic)*>($($arg),*),
        }
    };
}
use by_rows;
