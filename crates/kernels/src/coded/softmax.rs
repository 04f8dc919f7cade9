//! HOT PATH. Scores to weights, and weights to bytes.

use crate::OnlineSoftmax;
use crate::coded::ByteIsa;
use crate::gemm::sum_lanes;
use crate::softmax::exp;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Query rows at their softmax.
#[derive(Debug)]
pub struct Rows<'a> {
    /// Scores; then weights times factors. `[rows, stride]`.
    pub scores: &'a mut [f32],
    /// The same, rounded. `[rows, stride]`.
    pub bytes: &'a mut [u8],
    /// What a byte is worth: `[rows]`.
    pub scales: &'a mut [f32],
    /// See `scores` and `bytes`.
    pub stride: usize,
    /// `[rows]`.
    pub states: &'a mut [OnlineSoftmax],
    /// Sums so far, which are brought to the new maximum: `[rows, sums_stride]`.
    pub sums: &'a mut [f32],
    /// See `sums`.
    pub sums_stride: usize,
    /// Column of the sums that gains the sum of a row's weights, without factors.
    pub mass: usize,
}

/// Takes `tokens` scores of each row into its softmax: they become weights, times `factors` (`[tokens]`, not
/// negative), as numbers and as bytes.
///
/// # Panics
/// If `tokens` is no multiple of 16, or a slice is shorter than its shape says.
pub fn soft_weights(tokens: usize, factors: &[f32], rows: &mut Rows<'_>) {
    soft_weights_on(ByteIsa::best(), tokens, factors, rows);
}

pub(super) fn soft_weights_on(isa: ByteIsa, tokens: usize, factors: &[f32], rows: &mut Rows<'_>) {
    assert!(tokens.is_multiple_of(LANES) && factors.len() >= tokens, "{tokens} tokens");
    assert!(rows.stride >= tokens && rows.sums_stride > rows.mass, "{tokens} of {}", rows.stride);
    #[cfg(target_arch = "x86_64")]
    if isa == ByteIsa::Vnni {
        // SAFETY: `ByteIsa` names only what the processor has.
        return unsafe { x86::body(tokens, factors, rows) };
    }
    let _ = isa;
    body(tokens, factors, rows);
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

/// The definition.
fn body(tokens: usize, factors: &[f32], rows: &mut Rows<'_>) {
    let Rows { scores, states, bytes, scales, stride, sums, sums_stride, mass } = rows;
    let rows = scores.chunks_mut(*stride).zip(bytes.chunks_mut(*stride));
    let rows = rows.zip(states.iter_mut()).zip(sums.chunks_mut(*sums_stride));
    for ((((scores, bytes), state), sums), scale) in rows.zip(scales.iter_mut()) {
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
                let p = exp::<false>(scores[l] - max);
                total[l] += p;
                scores[l] = p * factors[l];
                most[l] = larger(scores[l], most[l]);
            }
        }
        let total = sum_lanes(&total);
        state.add(total);
        sums[*mass] += total;
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
