//! HOT PATH. A segment's coefficients in one register.

use std::arch::x86_64::*;

use super::{CANDIDATES, LIMIT, Magnitudes, STEPS, Search, Terms};
use crate::trellis::{MAX_SEGMENTS, SEGMENT};

#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32; SEGMENT]) -> __m512 {
    // SAFETY: 16 numbers.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// See [`super::sum`].
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn sum(v: __m512) -> f32 {
    let half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
    let quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
    let pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
}

/// See [`super::magnitudes`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn magnitudes(search: &Search, z: &[f32], x: &mut Magnitudes) -> [f32; MAX_SEGMENTS] {
    let z = z.as_chunks::<SEGMENT>().0;
    let (unit, limit) = (_mm512_set1_ps(search.unit), _mm512_set1_ps(LIMIT));
    let mut squares = [0.0; MAX_SEGMENTS];
    for ((terms, x), square) in search.segments.iter().zip(x).zip(&mut squares) {
        let z = load(&z[terms.index]);
        // Neither NaN nor infinite.
        let finite = !_mm512_fpclass_ps_mask::<0x99>(z);
        let scaled = _mm512_maskz_mul_ps(finite, _mm512_abs_ps(z), unit);
        let scaled = _mm512_min_ps(scaled, limit);
        // SAFETY: 16 numbers.
        unsafe { _mm512_storeu_ps(x.as_mut_ptr(), scaled) };
        *square = sum(_mm512_mul_ps(scaled, scaled));
    }
    squares
}

/// See [`super::errors`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn errors(
    segments: &[Terms],
    x: &Magnitudes,
    factors: &[f32; CANDIDATES],
    most: usize,
) -> [f32; CANDIDATES] {
    let squares = factors.map(|f| 1.0 / (f * f));
    let mut lanes = [_mm512_setzero_ps(); CANDIDATES];
    for (i, (terms, x)) in segments.iter().zip(x).enumerate() {
        let x = load(x);
        for c in 0..STEPS.len() {
            lanes[c] = _mm512_add_ps(lanes[c], lane_errors(terms, x, factors[c], squares[c]));
        }
        if i != most {
            for c in STEPS.len()..CANDIDATES {
                lanes[c] = _mm512_add_ps(lanes[c], lane_errors(terms, x, factors[c], squares[c]));
            }
        }
    }
    let mut errors = [0.0; CANDIDATES];
    for (error, lanes) in errors.iter_mut().zip(lanes) {
        *error = sum(lanes);
    }
    errors
}

/// See [`super::error`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn error(terms: &Terms, x: &[f32; SEGMENT], factor: f32) -> f32 {
    sum(lane_errors(terms, load(x), factor, 1.0 / (factor * factor)))
}

/// What [`super::add_error`] adds.
#[inline]
#[target_feature(enable = "avx512f")]
fn lane_errors(terms: &Terms, x: __m512, factor: f32, inverse_square: f32) -> __m512 {
    let (reach, spread) = terms.at(factor, inverse_square);
    let within = _mm512_min_ps(x, _mm512_set1_ps(reach));
    let beyond = _mm512_sub_ps(x, within);
    let square = _mm512_mul_ps(within, within);
    let fourth = _mm512_mul_ps(_mm512_mul_ps(square, _mm512_set1_ps(spread)), square);
    _mm512_add_ps(fourth, _mm512_mul_ps(beyond, beyond))
}
