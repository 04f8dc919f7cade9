//! HOT PATH. Scores to weights, and weights to bytes.

use crate::OnlineSoftmax;
use crate::coded::ByteIsa;
use crate::gemm::sum_lanes;
use crate::softmax::exp;

/// Weights as bytes.
#[derive(Debug)]
pub struct Weights<'a> {
    /// `[rows, stride]`.
    pub bytes: &'a mut [u8],
    /// See `bytes`.
    pub stride: usize,
    /// What a byte is worth: `[rows]`.
    pub scales: &'a mut [f32],
}

/// Takes `tokens` scores of each row into its softmax: `scores` (`[rows, tokens]` with stride
/// `weights.stride`) become weights times `factors` (`[tokens]`), as numbers and as bytes. `sums`:
/// `[rows, stride]`, the sums so far, which are brought to the new maximum; column `mass` of them
/// gains the sum of the row's weights, without factors.
///
/// # Panics
/// If `tokens` is no multiple of 16, or a slice is shorter than its shape says.
#[allow(clippy::too_many_arguments)]
pub fn soft_weights(
    tokens: usize,
    scores: &mut [f32],
    factors: &[f32],
    states: &mut [OnlineSoftmax],
    weights: &mut Weights<'_>,
    sums: &mut [f32],
    stride: usize,
    mass: usize,
) {
    let isa = ByteIsa::best();
    soft_weights_on(isa, tokens, scores, factors, states, weights, sums, stride, mass);
}

#[allow(clippy::too_many_arguments)]
pub(super) fn soft_weights_on(
    isa: ByteIsa,
    tokens: usize,
    scores: &mut [f32],
    factors: &[f32],
    states: &mut [OnlineSoftmax],
    weights: &mut Weights<'_>,
    sums: &mut [f32],
    stride: usize,
    mass: usize,
) {
    assert!(tokens.is_multiple_of(LANES) && factors.len() >= tokens, "{tokens} tokens");
    assert!(weights.stride >= tokens && stride > mass, "strides {}, {stride}", weights.stride);
    #[cfg(target_arch = "x86_64")]
    if isa == ByteIsa::Vnni {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma")]
        #[allow(clippy::too_many_arguments)]
        fn avx512(
            tokens: usize,
            scores: &mut [f32],
            factors: &[f32],
            states: &mut [OnlineSoftmax],
            weights: &mut Weights<'_>,
            sums: &mut [f32],
            stride: usize,
            mass: usize,
        ) {
            body::<true>(tokens, scores, factors, states, weights, sums, stride, mass);
        }
        // SAFETY: `ByteIsa` names only what the processor has.
        return unsafe {
            avx512(tokens, scores, factors, states, weights, sums, stride, mass);
        };
    }
    let _ = isa;
    body::<false>(tokens, scores, factors, states, weights, sums, stride, mass);
}

const LANES: usize = 16;

#[inline(always)]
fn largest(lanes: &[f32; LANES]) -> f32 {
    let mut most = *lanes;
    for width in [8, 4, 2, 1] {
        for l in 0..width {
            most[l] = larger(most[l], most[l + width]);
        }
    }
    most[0]
}

/// The second where the first is not larger: one instruction, unlike `f32::max`.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn body<const FMA: bool>(
    tokens: usize,
    scores: &mut [f32],
    factors: &[f32],
    states: &mut [OnlineSoftmax],
    weights: &mut Weights<'_>,
    sums: &mut [f32],
    stride: usize,
    mass: usize,
) {
    let rows = scores.chunks_mut(weights.stride).zip(weights.bytes.chunks_mut(weights.stride));
    let rows = rows.zip(states).zip(sums.chunks_mut(stride)).zip(weights.scales.iter_mut());
    for ((((scores, bytes), state), sums), scale) in rows {
        let (scores, _) = scores[..tokens].as_chunks_mut::<LANES>();
        let (bytes, _) = bytes[..tokens].as_chunks_mut::<LANES>();
        let (factors, _) = factors[..tokens].as_chunks::<LANES>();
        let mut most = [f32::NEG_INFINITY; LANES];
        for scores in scores.iter() {
            for l in 0..LANES {
                most[l] = larger(scores[l], most[l]);
            }
        }
        let max = state.raise(largest(&most), sums);
        let mut total = [0.0f32; LANES];
        let mut most = [0.0f32; LANES];
        for (scores, factors) in scores.iter_mut().zip(factors) {
            for l in 0..LANES {
                let p = exp::<FMA>(scores[l] - max);
                total[l] += p;
                scores[l] = p * factors[l];
                most[l] = larger(scores[l], most[l]);
            }
        }
        let total = sum_lanes(&total);
        state.add(total);
        sums[mass] += total;
        let most = largest(&most);
        let inverse = if most > f32::MIN_POSITIVE { 255.0 / most } else { 0.0 };
        *scale = if most > f32::MIN_POSITIVE { most / 255.0 } else { 0.0 };
        // Adding 2^23 rounds to an integer, which the low bits then hold.
        const ROUND: f32 = 8_388_608.0;
        for (scores, bytes) in scores.iter().zip(bytes) {
            for l in 0..LANES {
                bytes[l] = (scores[l] * inverse + ROUND).to_bits() as u8;
            }
        }
    }
}
