//! HOT PATH. Scores to weights, and weights to bytes.

use crate::simd::{LANES, Simd, compiled};
use crate::{Isa, OnlineSoftmax};

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
    soft_weights_on(Isa::best(), tokens, factors, rows);
}

pub(super) fn soft_weights_on(isa: Isa, tokens: usize, factors: &[f32], rows: &mut Rows<'_>) {
    assert!(tokens.is_multiple_of(LANES) && factors.len() >= tokens, "{tokens} tokens");
    assert!(rows.stride >= tokens && rows.sums_stride > rows.mass, "{tokens} of {}", rows.stride);
    soft_weights_checked(isa, tokens, factors, rows);
}

compiled! {
    fn soft_weights_checked(tokens: usize, factors: &[f32], rows: &mut Rows<'_>) = body for [Avx512, Avx2];
}

/// Coefficients of `(2^f - 1) / f` for |f| ≤ ½, highest power first (Cephes `exp2f`).
const POLYNOMIAL: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1];

/// `2^x` for x ≤ 0 to about 2e-7 relative; 0 below -126, so that no weight is denormal.
#[inline(always)]
fn exp2<S: Simd>(set: S, x: S::F) -> S::F {
    let nothing = set.lt(x, set.splat(-126.0));
    let x = set.max(x, set.splat(-126.0));
    let n = set.round(x);
    let f = set.sub(x, n);
    let mut p = set.splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = set.fma(p, f, set.splat(*c));
    }
    let power = set.scale(set.fma(p, f, set.splat(1.0)), n);
    set.select(nothing, set.zero(), power)
}

#[inline(always)]
fn body<S: Simd>(set: S, tokens: usize, factors: &[f32], rows: &mut Rows<'_>) {
    let Rows { scores, states, bytes, scales, stride, sums, sums_stride, mass } = rows;
    let rows = scores.chunks_mut(*stride).zip(bytes.chunks_mut(*stride));
    let rows = rows.zip(states.iter_mut()).zip(sums.chunks_mut(*sums_stride));
    for ((((scores, bytes), state), sums), scale) in rows.zip(scales.iter_mut()) {
        assert!(scores.len() >= tokens && bytes.len() >= tokens);
        let (scores, bytes) = (scores.as_mut_ptr(), bytes.as_mut_ptr());
        let log2e = set.splat(std::f32::consts::LOG2_E);
        // SAFETY: 16 elements from each multiple of 16 below `tokens` on are in bounds.
        unsafe {
            let mut most = set.splat(f32::NEG_INFINITY);
            for t in (0..tokens).step_by(LANES) {
                most = set.max(set.load(scores.add(t)), most);
            }
            let max = state.raise(set.largest(most), sums);
            let max = set.splat(max * std::f32::consts::LOG2_E);
            let (mut total, mut most) = (set.zero(), set.zero());
            for t in (0..tokens).step_by(LANES) {
                let p = exp2(set, set.fms(set.load(scores.add(t)), log2e, max));
                total = set.add(total, p);
                let weight = set.mul(p, set.load(factors.as_ptr().add(t)));
                most = set.max(weight, most);
                set.store(scores.add(t), weight);
            }
            let total = set.sum(total);
            state.add(total);
            sums[*mass] += total;
            let most = set.largest(most);
            let sized = most > f32::MIN_POSITIVE;
            *scale = if sized { most / 255.0 } else { 0.0 };
            let inverse = set.splat(if sized { 255.0 / most } else { 0.0 });
            for t in (0..tokens).step_by(LANES) {
                let weight = set.mul(set.load(scores.add(t)), inverse);
                set.store_low_bytes(bytes.add(t), set.to_int(weight));
            }
        }
    }
}
