//! HOT PATH. The body of the function above it, 16 tokens at a time.

use std::arch::x86_64::*;

use super::{LANES, Rows};

/// Coefficients of `(2^f - 1) / f` for |f| ≤ ½, highest power first (Cephes `exp2f`).
const POLYNOMIAL: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1];

/// `2^x` for x ≤ 0 to about 2e-7 relative; -inf gives 0.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    let x = _mm512_max_ps(x, _mm512_set1_ps(-160.0));
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let f = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*c));
    }
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0));
    _mm512_scalef_ps(p, n)
}

/// See [`super::body`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(super) fn body(tokens: usize, factors: &[f32], rows: &mut Rows<'_>) {
    assert!(tokens.is_multiple_of(LANES) && factors.len() >= tokens);
    let Rows { scores, states, bytes, scales, stride, sums, sums_stride, mass } = rows;
    let rows = scores.chunks_mut(*stride).zip(bytes.chunks_mut(*stride));
    let rows = rows.zip(states.iter_mut()).zip(sums.chunks_mut(*sums_stride));
    for ((((scores, bytes), state), sums), scale) in rows.zip(scales.iter_mut()) {
        assert!(scores.len() >= tokens && bytes.len() >= tokens);
        let (scores, bytes) = (scores.as_mut_ptr(), bytes.as_mut_ptr());
        let log2e = _mm512_set1_ps(std::f32::consts::LOG2_E);
        // SAFETY: 16 elements from each multiple of 16 below `tokens` on are in bounds.
        unsafe {
            let mut most = _mm512_set1_ps(f32::NEG_INFINITY);
            for t in (0..tokens).step_by(LANES) {
                most = _mm512_max_ps(_mm512_loadu_ps(scores.add(t)), most);
            }
            let max = state.raise(_mm512_reduce_max_ps(most), sums);
            let max = _mm512_set1_ps(max * std::f32::consts::LOG2_E);
            let (mut total, mut most) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for t in (0..tokens).step_by(LANES) {
                let p = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores.add(t)), log2e, max));
                total = _mm512_add_ps(total, p);
                let weight = _mm512_mul_ps(p, _mm512_loadu_ps(factors.as_ptr().add(t)));
                most = _mm512_max_ps(weight, most);
                _mm512_storeu_ps(scores.add(t), weight);
            }
            let total = _mm512_reduce_add_ps(total);
            state.add(total);
            sums[*mass] += total;
            let most = _mm512_reduce_max_ps(most);
            let sized = most > f32::MIN_POSITIVE;
            *scale = if sized { most / 255.0 } else { 0.0 };
            let inverse = _mm512_set1_ps(if sized { 255.0 / most } else { 0.0 });
            for t in (0..tokens).step_by(LANES) {
                let weight = _mm512_mul_ps(_mm512_loadu_ps(scores.add(t)), inverse);
                let rounded = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(weight));
                _mm_storeu_epi8(bytes.add(t).cast(), rounded);
            }
        }
    }
}
