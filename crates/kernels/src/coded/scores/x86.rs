//! HOT PATH. 16 tokens to a register, four coefficients to a lane: no sum runs across lanes.

use std::arch::x86_64::*;

use super::{SEGMENT, Scores};
use crate::trellis::levels::x86::KeyLevels;
use crate::trellis::segment_bytes;

/// Query rows that meet 16 tokens together, with an integer and a floating sum each.
const ROWS: usize = 9;

/// See [`super::add_scores`].
///
/// # Safety
/// Slices must have the lengths that `add_scores_on` asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn add_scores(s: &Scores<'_>, out: &mut [f32], out_stride: usize) {
    let rows = s.scales.len();
    let mut row = 0;
    while row < rows {
        let n = ROWS.min(rows - row);
        for t in (0..s.tokens).step_by(16) {
            // SAFETY: rows `row .. row + n` and 16 tokens from `t` on are in bounds.
            unsafe {
                let out = out.as_mut_ptr().add(row * out_stride + t);
                match n {
                    9 => tile::<9>(s, row, t, out, out_stride),
                    8 => tile::<8>(s, row, t, out, out_stride),
                    7 => tile::<7>(s, row, t, out, out_stride),
                    6 => tile::<6>(s, row, t, out, out_stride),
                    5 => tile::<5>(s, row, t, out, out_stride),
                    4 => tile::<4>(s, row, t, out, out_stride),
                    3 => tile::<3>(s, row, t, out, out_stride),
                    2 => tile::<2>(s, row, t, out, out_stride),
                    _ => tile::<1>(s, row, t, out, out_stride),
                }
            }
        }
        row += n;
    }
}

/// # Safety
/// `R` rows from `row` on, and 16 tokens from `t` on must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn tile<const R: usize>(
    s: &Scores<'_>,
    row: usize,
    t: usize,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: segments are within slot, factors and queries, as `add_scores_on` asserts; rows and
    // tokens by contract.
    unsafe {
        let mut all = [_mm512_setzero_ps(); R];
        let queries = s.queries.as_ptr().add(row * s.stride);
        let offsets = s.offsets.as_ptr().add(row * s.stride / 4);
        for (segment, (bits, _, offset)) in s.layout.segments(s.tokens).take(s.segments).enumerate()
        {
            let first = segment * SEGMENT;
            let mut sums = [_mm512_setzero_si512(); R];
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_set1_epi32(*offsets.add((r * s.stride + first) / 4));
            }
            let codes = s.slot.as_ptr().add(offset + t * segment_bytes(bits));
            // Pasted, not called: what is summed must stay in registers.
            macro_rules! add {
                ($bits:literal) => {{
                    let levels = KeyLevels::<$bits>::new();
                    let codes = levels.codes(codes);
                    for k in 0..SEGMENT / 4 {
                        let level = levels.levels(codes, k);
                        let query = queries.add(first + 4 * k);
                        for (r, sum) in sums.iter_mut().enumerate() {
                            let q = query.add(r * s.stride).cast::<i32>().read_unaligned();
                            *sum = _mm512_dpbusd_epi32(*sum, level, _mm512_set1_epi32(q));
                        }
                    }
                }};
            }
            match bits {
                0 => continue,
                1 => add!(1),
                2 => add!(2),
                3 => add!(3),
                4 => add!(4),
                5 => add!(5),
                _ => add!(6),
            }
            let factors = _mm512_loadu_ps(s.factors.as_ptr().add(segment * s.tokens + t));
            for (all, sum) in all.iter_mut().zip(sums) {
                *all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factors, *all);
            }
        }
        for (r, all) in all.iter().enumerate() {
            let out = out.add(r * out_stride);
            let scale = _mm512_set1_ps(*s.scales.as_ptr().add(row + r));
            _mm512_storeu_ps(out, _mm512_fmadd_ps(*all, scale, _mm512_loadu_ps(out)));
        }
    }
}
