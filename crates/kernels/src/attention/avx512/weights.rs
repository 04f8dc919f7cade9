//! From scores to weights.

use std::arch::x86_64::*;

use super::super::exp2::{LEAST, POLYNOMIAL};
use super::super::{LANES, Part, ROWS};
use super::pair_rows::put_rounded;
use crate::softmax::OnlineSoftmax;

/// See [`super::super::portable::weights_on`]. If `bf16`, weights are rounded to it, and a row's lie together from the
/// start of its first vector on; sums are of weights that are not rounded.
pub(in crate::attention) fn weights(
    bf16: bool,
    part: &Part,
    visible: &[(usize, usize); ROWS],
    scores: &mut [f32],
    states: &mut [OnlineSoftmax],
    factors: &mut [f32; ROWS],
) {
    let &Part { n, tokens, vectors, .. } = part;
    assert!(vectors.1 * LANES <= tokens && tokens <= 64 && scores.len() >= n * tokens);
    let scores = &mut scores[vectors.0 * LANES..];
    // Bits of the tokens that a row sees, from the first vector on.
    let mut masks = [0u64; ROWS];
    for (mask, (from, to)) in masks[..n].iter_mut().zip(visible) {
        let below = |end: usize| 1u64.checked_shl(end as u32).unwrap_or(0).wrapping_sub(1);
        *mask = (below(*to) & !below(*from)) >> (vectors.0 * LANES);
    }
    for first in (0..n).step_by(4) {
        let rows = 4.min(n - first);
        let scores = &mut scores[first * tokens..];
        let (masks, states) = (&masks[first..first + rows], &mut states[first..first + rows]);
        let factors = &mut factors[first..first + rows];
        // SAFETY: the processor has AVX-512; `rows` rows of the vectors asked for lie in `scores`.
        unsafe {
            let scores = scores.as_mut_ptr();
            match (vectors.1 - vectors.0, bf16) {
                (1, false) => weights4_f32::<1>(scores, tokens, masks, states, factors),
                (2, false) => weights4_f32::<2>(scores, tokens, masks, states, factors),
                (3, false) => weights4_f32::<3>(scores, tokens, masks, states, factors),
                (_, false) => weights4_f32::<4>(scores, tokens, masks, states, factors),
                (1, true) => weights4_bf16::<1>(scores, tokens, masks, states, factors),
                (2, true) => weights4_bf16::<2>(scores, tokens, masks, states, factors),
                (3, true) => weights4_bf16::<3>(scores, tokens, masks, states, factors),
                (_, true) => weights4_bf16::<4>(scores, tokens, masks, states, factors),
            }
        }
    }
}

macro_rules! weights4 {
    ($name:ident, $features:literal, $put:path) => {
        /// One to four rows of NV vectors.
        ///
        /// # Safety
        /// The processor must have AVX-512; `scores` points to as many rows as there are masks, of NV vectors every
        /// `stride`; states and factors are as many.
        #[target_feature(enable = $features)]
        unsafe fn $name<const NV: usize>(
            scores: *mut f32,
            stride: usize,
            masks: &[u64],
            states: &mut [OnlineSoftmax],
            factors: &mut [f32],
        ) {
            let rows = masks.len();
            let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
            // Rows beyond the last are that one again.
            let row = |r: usize| r.min(rows - 1);
            let mut old = [OnlineSoftmax::default(); 4];
            let mut xs = [[hidden; NV]; 4];
            let mut largest = [hidden; 4];
            for r in 0..4 {
                old[r] = states[row(r)];
                for v in 0..NV {
                    let mask = (masks[row(r)] >> (v * LANES)) as __mmask16;
                    // SAFETY: row and vector exist by contract.
                    let x = unsafe { _mm512_loadu_ps(scores.add(row(r) * stride + v * LANES)) };
                    xs[r][v] = _mm512_mask_mov_ps(hidden, mask, x);
                    // A score that is no number is passed over, as by `f32::max`.
                    largest[r] = _mm512_max_ps(xs[r][v], largest[r]);
                }
            }
            let old_max = _mm_setr_ps(old[0].max, old[1].max, old[2].max, old[3].max);
            let old_sum = _mm_setr_ps(old[0].sum, old[1].sum, old[2].sum, old[3].sum);
            let max = _mm_max_ps(fold4::<true>(largest), old_max);
            let none = _mm_cmp_ps_mask::<_CMP_EQ_OQ>(max, _mm512_castps512_ps128(hidden));
            let base = _mm_mask_mov_ps(max, none, _mm_setzero_ps());
            let factor = exp2(_mm512_castps128_ps512(_mm_mul_ps(
                _mm_sub_ps(old_max, base),
                _mm_set1_ps(std::f32::consts::LOG2_E),
            )));
            let factor = _mm512_castps512_ps128(factor);
            let mut bases = [0.0f32; 4];
            // SAFETY: four floats.
            unsafe { _mm_storeu_ps(bases.as_mut_ptr(), base) };
            let mut lanes = [_mm512_setzero_ps(); 4];
            for r in 0..4 {
                for v in 0..NV {
                    let x = _mm512_sub_ps(xs[r][v], _mm512_set1_ps(bases[r]));
                    let weight = exp2(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
                    // SAFETY: as for the load; a row beyond the last is written as that one again. Scores were all read
                    // before.
                    unsafe { $put(scores.add(row(r) * stride), v, weight) };
                    lanes[r] = _mm512_add_ps(lanes[r], weight);
                }
            }
            let sum = _mm_fmadd_ps(old_sum, factor, fold4::<false>(lanes));
            let (mut maxima, mut sums, mut all) = ([0.0f32; 4], [0.0f32; 4], [0.0f32; 4]);
            // SAFETY: four floats each.
            unsafe {
                _mm_storeu_ps(maxima.as_mut_ptr(), max);
                _mm_storeu_ps(sums.as_mut_ptr(), sum);
                _mm_storeu_ps(all.as_mut_ptr(), factor);
            }
            for r in 0..rows {
                states[r] = OnlineSoftmax { max: maxima[r], sum: sums[r] };
                factors[r] = all[r];
            }
        }
    };
}

weights4!(weights4_f32, "avx512f,avx512bw,avx512dq,avx512vl,fma", put_f32);
weights4!(weights4_bf16, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma", put_bf16);

/// # Safety
/// The processor must have AVX-512; vector `v` of the row exists.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn put_f32(row: *mut f32, v: usize, weights: __m512) {
    // SAFETY: by contract.
    unsafe { _mm512_storeu_ps(row.add(v * LANES), weights) };
}

/// # Safety
/// The processor must have AVX-512 with BF16; vector `v` of the row exists.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn put_bf16(row: *mut f32, v: usize, weights: __m512) {
    // SAFETY: by contract; 16 of bf16 take half a vector.
    unsafe { put_rounded(row.add(v * LANES / 2).cast(), weights) };
}

/// `2^x`; see [`super::super::exp2::exp2`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let f = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*coefficient));
    }
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0));
    let seen = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(LEAST));
    _mm512_maskz_scalef_ps(seen, p, n)
}

/// Folds the 16 lanes of each of four vectors, to the largest or to their sum: halves, quarters, pairs, as
/// `sum_lanes`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn fold4<const MAX: bool>(vectors: [__m512; 4]) -> __m128 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    #[inline]
    fn op<const MAX: bool>(a: __m128, b: __m128) -> __m128 {
        if MAX { _mm_max_ps(a, b) } else { _mm_add_ps(a, b) }
    }
    let mut quarters = [_mm_setzero_ps(); 4];
    for i in 0..4 {
        let v = vectors[i];
        let even = op::<MAX>(_mm512_castps512_ps128(v), _mm512_extractf32x4_ps::<2>(v));
        let odd = op::<MAX>(_mm512_extractf32x4_ps::<1>(v), _mm512_extractf32x4_ps::<3>(v));
        quarters[i] = op::<MAX>(even, odd);
    }
    let [a, b, c, d] = quarters;
    let (ab_lo, ab_hi) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    let (cd_lo, cd_hi) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    // Lane i of each.
    let t0 = _mm_movelh_ps(ab_lo, cd_lo);
    let t1 = _mm_movehl_ps(cd_lo, ab_lo);
    let t2 = _mm_movelh_ps(ab_hi, cd_hi);
    let t3 = _mm_movehl_ps(cd_hi, ab_hi);
    op::<MAX>(op::<MAX>(t0, t2), op::<MAX>(t1, t3))
}
