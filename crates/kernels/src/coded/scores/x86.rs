//! HOT PATH. 16 tokens to a register, four coefficients to a lane: no sum runs across lanes.

use std::arch::x86_64::*;

use super::{SEGMENT, Scores};

/// Query rows that meet a block together: with two registers of tokens each.
const ROWS: usize = 9;

/// See [`super::add_scores`].
///
/// # Safety
/// Slices must have the lengths that `add_scores_on` asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn add_scores(s: &Scores<'_>, out: &mut [f32], out_stride: usize) {
    let rows = s.scales.len();
    let mut t = 0;
    while t < s.tokens {
        let groups = if s.tokens - t >= 32 { 2 } else { 1 };
        let mut row = 0;
        while row < rows {
            let n = ROWS.min(rows - row);
            // SAFETY: rows `row .. row + n`, tokens `t .. t + 16 · groups` are in bounds.
            unsafe {
                let out = out.as_mut_ptr().add(row * out_stride + t);
                match groups {
                    2 => pick::<2>(s, (row, n), t, out, out_stride),
                    _ => pick::<1>(s, (row, n), t, out, out_stride),
                }
            }
            row += n;
        }
        t += 16 * groups;
    }
}

/// # Safety
/// Rows `row .. row + n` (at most 9), and 16 `G` tokens from `t` on must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn pick<const G: usize>(
    s: &Scores<'_>,
    (row, n): (usize, usize),
    t: usize,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: by contract.
    unsafe {
        match n {
            9 => tile::<9, G>(s, row, t, out, out_stride),
            8 => tile::<8, G>(s, row, t, out, out_stride),
            7 => tile::<7, G>(s, row, t, out, out_stride),
            6 => tile::<6, G>(s, row, t, out, out_stride),
            5 => tile::<5, G>(s, row, t, out, out_stride),
            4 => tile::<4, G>(s, row, t, out, out_stride),
            3 => tile::<3, G>(s, row, t, out, out_stride),
            2 => tile::<2, G>(s, row, t, out, out_stride),
            _ => tile::<1, G>(s, row, t, out, out_stride),
        }
    }
}

/// # Safety
/// `R` rows from `row` on, and 16 `G` tokens from `t` on must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn tile<const R: usize, const G: usize>(
    s: &Scores<'_>,
    row: usize,
    t: usize,
    out: *mut f32,
    out_stride: usize,
) {
    // SAFETY: segments are within levels and queries, as `add_scores_on` asserts; rows and tokens by
    // contract.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); G]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            // Levels are 128 too large.
            *sums = [_mm512_set1_epi32(s.sums.as_ptr().add(row + r).read().wrapping_mul(-128)); G];
        }
        for segment in s.segments {
            let first = usize::from(*segment) * SEGMENT;
            for k in 0..SEGMENT / 4 {
                let c = first + 4 * k;
                let at = s.levels.as_ptr().add(c * s.tokens + 4 * t);
                let mut levels = [_mm512_setzero_si512(); G];
                for (g, levels) in levels.iter_mut().enumerate() {
                    *levels = _mm512_loadu_epi8(at.add(64 * g).cast());
                }
                let query = s.queries.as_ptr().add(row * s.stride + c);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let q = query.add(r * s.stride).cast::<i32>().read_unaligned();
                    let q = _mm512_set1_epi32(q);
                    for (sum, levels) in sums.iter_mut().zip(levels) {
                        *sum = _mm512_dpbusd_epi32(*sum, levels, q);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let scale = _mm512_set1_ps(*s.scales.as_ptr().add(row + r));
            for (g, sum) in sums.iter().enumerate() {
                let factors = _mm512_loadu_ps(s.factors.as_ptr().add(t + 16 * g));
                let out = out.add(r * out_stride + 16 * g);
                let factor = _mm512_mul_ps(scale, factors);
                let sum = _mm512_cvtepi32_ps(*sum);
                _mm512_storeu_ps(out, _mm512_fmadd_ps(factor, sum, _mm512_loadu_ps(out)));
            }
        }
    }
}
