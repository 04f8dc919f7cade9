//! HOT PATH. 16 coefficients to a register, four tokens to a lane: no sum runs across lanes.

use std::arch::x86_64::*;

use super::{BoostedValues, Weights};
use crate::trellis::{Boosts, SEGMENT};

/// Query rows summed together, over three segments each.
const ROWS: usize = 9;

/// See [`super::add_values`].
///
/// # Safety
/// Slices must have the lengths that `add_values_on` asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn add_values(
    weights: &Weights<'_>,
    levels: &[u8],
    shape: (usize, usize, usize),
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    let rows = weights.scales.len();
    let mut row = 0;
    while row < rows {
        let n = ROWS.min(rows - row);
        let mut segment = 0;
        while segment < segments {
            let taken = if segments - segment >= 3 { 3 } else { 1 };
            // SAFETY: rows `row .. row + n` and segments `segment .. segment + taken` are in bounds.
            unsafe {
                let levels = levels.as_ptr().add(segment * shape.1 * SEGMENT);
                let sums = sums.as_mut_ptr().add(row * stride + segment * SEGMENT);
                match taken {
                    3 => pick::<3>(weights, levels, shape, (row, n), sums, stride),
                    _ => pick::<1>(weights, levels, shape, (row, n), sums, stride),
                }
            }
            segment += taken;
        }
        row += n;
    }
}

/// # Safety
/// Rows `row .. row + n` (at most 9), and `S` segments must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn pick<const S: usize>(
    weights: &Weights<'_>,
    levels: *const u8,
    shape: (usize, usize, usize),
    (row, n): (usize, usize),
    sums: *mut f32,
    stride: usize,
) {
    // SAFETY: by contract.
    unsafe {
        match n {
            9 => tile::<9, S>(weights, levels, shape, row, sums, stride),
            8 => tile::<8, S>(weights, levels, shape, row, sums, stride),
            7 => tile::<7, S>(weights, levels, shape, row, sums, stride),
            6 => tile::<6, S>(weights, levels, shape, row, sums, stride),
            5 => tile::<5, S>(weights, levels, shape, row, sums, stride),
            4 => tile::<4, S>(weights, levels, shape, row, sums, stride),
            3 => tile::<3, S>(weights, levels, shape, row, sums, stride),
            2 => tile::<2, S>(weights, levels, shape, row, sums, stride),
            _ => tile::<1, S>(weights, levels, shape, row, sums, stride),
        }
    }
}

/// # Safety
/// `R` rows from `row` on, and `S` segments from `levels` on must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn tile<const R: usize, const S: usize>(
    weights: &Weights<'_>,
    levels: *const u8,
    (blocks, block_tokens, block_bytes): (usize, usize, usize),
    row: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); S]; R];
        let bytes = weights.bytes.as_ptr().add(row * weights.stride);
        for block in 0..blocks {
            let levels = levels.add(block * block_bytes);
            let bytes = bytes.add(block * block_tokens);
            for quad in 0..block_tokens / 4 {
                let mut own = [_mm512_setzero_si512(); S];
                for (s, own) in own.iter_mut().enumerate() {
                    let at = levels.add((s * block_tokens + 4 * quad) * SEGMENT);
                    *own = _mm512_loadu_epi8(at.cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let w = bytes.add(r * weights.stride + 4 * quad).cast::<i32>();
                    let w = _mm512_set1_epi32(w.read_unaligned());
                    for (sum, own) in sums.iter_mut().zip(own) {
                        *sum = _mm512_dpbusd_epi32(*sum, w, own);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let scale = _mm512_set1_ps(*weights.scales.as_ptr().add(row + r));
            for (s, sum) in sums.iter().enumerate() {
                let out = out.add(r * stride + SEGMENT * s);
                let sum = _mm512_cvtepi32_ps(*sum);
                _mm512_storeu_ps(out, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(out)));
            }
        }
    }
}

/// Query rows whose sums of a segment are kept in registers while its boosts are added.
const BOOSTED_ROWS: usize = 12;

/// See [`super::add_boosted_values`].
///
/// # Safety
/// Slices must have the lengths that `add_boosted_values_on` asserts, boosts their rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn add_boosted_values(
    values: &BoostedValues<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    let rows = values.weights.len() / values.stride;
    let mut row = 0;
    while row < rows {
        let n = BOOSTED_ROWS.min(rows - row);
        for segment in 0..values.segments {
            // SAFETY: rows `row .. row + n` are in bounds.
            unsafe {
                let out = sums.as_mut_ptr().add(row * stride + segment * SEGMENT);
                match n {
                    12 => boosted::<12>(values, segment, row, out, stride),
                    11 => boosted::<11>(values, segment, row, out, stride),
                    10 => boosted::<10>(values, segment, row, out, stride),
                    9 => boosted::<9>(values, segment, row, out, stride),
                    8 => boosted::<8>(values, segment, row, out, stride),
                    7 => boosted::<7>(values, segment, row, out, stride),
                    6 => boosted::<6>(values, segment, row, out, stride),
                    5 => boosted::<5>(values, segment, row, out, stride),
                    4 => boosted::<4>(values, segment, row, out, stride),
                    3 => boosted::<3>(values, segment, row, out, stride),
                    2 => boosted::<2>(values, segment, row, out, stride),
                    _ => boosted::<1>(values, segment, row, out, stride),
                }
            }
        }
        row += n;
    }
}

/// # Safety
/// `R` rows from `row` on, `segment`, and the rows of its boosts must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn boosted<const R: usize>(
    values: &BoostedValues<'_>,
    segment: usize,
    row: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); R];
        for (r, sum) in sums.iter_mut().enumerate() {
            *sum = _mm512_loadu_ps(out.add(r * stride));
        }
        let weights = values.weights.as_ptr().add(row * values.stride);
        for (block, boosts) in values.boosts.iter().enumerate() {
            let levels = values.levels.as_ptr().add(block * values.block_bytes);
            let levels = levels.add(segment * values.block_tokens * SEGMENT);
            let weights = weights.add(block * values.block_tokens);
            let mut tokens = boosts.rows(segment);
            while let Some(token) = Boosts::next(&mut tokens) {
                let quads = _mm512_loadu_epi8(levels.add(token / 4 * 4 * SEGMENT).cast());
                let left = _mm_cvtsi32_si128(24 - 8 * (token % 4) as i32);
                let level = _mm512_srai_epi32::<24>(_mm512_sll_epi32(quads, left));
                let factor = _mm512_set1_ps(boosts.factor(token) - 1.0);
                let level = _mm512_mul_ps(_mm512_cvtepi32_ps(level), factor);
                for (r, sum) in sums.iter_mut().enumerate() {
                    let weight = _mm512_set1_ps(*weights.add(r * values.stride + token));
                    *sum = _mm512_fmadd_ps(weight, level, *sum);
                }
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            _mm512_storeu_ps(out.add(r * stride), *sum);
        }
    }
}
