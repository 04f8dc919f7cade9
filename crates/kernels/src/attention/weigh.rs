//! From scores to weights.

use super::kind::{Kind, by_kind};
use super::{LANES, Part, ROWS};
use crate::simd::{Lanes, Portable, compiled};
use crate::softmax::OnlineSoftmax;

/// Coefficients of `(2^f - 1) / f` for |f| ≤ ½, highest power first (Cephes `exp2f`).
const POLYNOMIAL: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1];

/// Below it `2^x` is taken to be 0, so that results are never denormal by more than a bit.
const LEAST: f32 = -126.0;

/// `2^x` to about 2e-7 relative for x ≤ 0, 0 for x < [`LEAST`]. NaN stays.
#[inline(always)]
pub(super) fn exp2<S: Lanes>(s: S, x: S::F) -> S::F {
    let n = s.round(x);
    let f = s.sub(x, n);
    let mut p = s.splat(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        p = s.fma(p, f, s.splat(*coefficient));
    }
    p = s.fma(p, f, s.splat(1.0));
    s.select(s.lt(x, s.splat(LEAST)), s.zero(), s.scale(p, n))
}

/// The same of one number, alike on all sets.
pub(super) fn exp2_of_one(x: f32) -> f32 {
    exp2(Portable, [x; LANES])[0]
}

/// Lanes of vector `v` that are tokens of a range.
#[inline(always)]
fn seen<S: Lanes>(s: S, (from, to): (usize, usize), v: usize) -> S::M {
    let below = |end: usize| (1u32 << end.saturating_sub(v * LANES).min(LANES)) - 1;
    s.mask((below(to) & !below(from)) as u16)
}

by_kind! {
    /// Turns scores into weights relative to the new maxima (in place; as pairs they take the first half of a row's
    /// vectors), and updates the states; `factors` become what the rows' sums are to be multiplied with. Sums of weights
    /// are of those that are not rounded.
    fn weigh(part: &Part, visible: &[(usize, usize); ROWS], scores: &mut [f32], states: &mut [OnlineSoftmax], factors: &mut [f32; ROWS]) = weigh_body;
}

#[inline(always)]
fn weigh_body<S: Lanes>(
    s: S,
    kind: impl Kind<S>,
    part: &Part,
    visible: &[(usize, usize); ROWS],
    scores: &mut [f32],
    states: &mut [OnlineSoftmax],
    factors: &mut [f32; ROWS],
) {
    let &Part { n, tokens, vectors, .. } = part;
    assert!(vectors.1 * LANES <= tokens && scores.len() >= n * tokens);
    assert!(n <= ROWS && states.len() >= n);
    let (log2e, hidden) = (s.splat(std::f32::consts::LOG2_E), s.splat(f32::NEG_INFINITY));
    let scores = scores.as_mut_ptr();
    for first in (0..n).step_by(4) {
        let rows = 4.min(n - first);
        let row = |r: usize| scores.wrapping_add((first + r) * tokens);
        let mut largest = [hidden; 4];
        for r in 0..4 {
            if r < rows {
                for v in vectors.0..vectors.1 {
                    // SAFETY: the asserts cover all vectors of a row.
                    unsafe {
                        let at = row(r).add(v * LANES);
                        let x = s.select(seen(s, visible[first + r], v), s.load(at), hidden);
                        // A score that is no number is passed over, as by `f32::max`.
                        largest[r] = s.max(x, largest[r]);
                        s.store(at, x);
                    }
                }
            }
        }
        let mut old = [OnlineSoftmax::default(); 4];
        old[..rows].copy_from_slice(&states[first..first + rows]);
        let old_max = s.four([old[0].max, old[1].max, old[2].max, old[3].max]);
        let old_sum = s.four([old[0].sum, old[1].sum, old[2].sum, old[3].sum]);
        let max = s.max(s.largest4(largest), old_max);
        let base = s.select(s.lt(max, s.splat(f32::MIN)), s.zero(), max);
        let factor = exp2(s, s.mul(s.sub(old_max, base), log2e));
        let mut bases = [0.0f32; LANES];
        // SAFETY: a whole vector.
        unsafe { s.store(bases.as_mut_ptr(), base) };
        let mut lanes = [s.zero(); 4];
        for r in 0..4 {
            if r < rows {
                for v in vectors.0..vectors.1 {
                    // SAFETY: as above; what is put stays behind what is still to be read.
                    unsafe {
                        let x = s.sub(s.load(row(r).add(v * LANES)), s.splat(bases[r]));
                        let weight = exp2(s, s.mul(x, log2e));
                        let to = row(r).add(vectors.0 * LANES);
                        kind.put(s, to, (v - vectors.0) * LANES, weight, LANES);
                        lanes[r] = s.add(lanes[r], weight);
                    }
                }
            }
        }
        let sum = s.fma(old_sum, factor, s.sum4(lanes));
        let (mut maxima, mut sums, mut all) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
        // SAFETY: whole vectors.
        unsafe {
            s.store(maxima.as_mut_ptr(), max);
            s.store(sums.as_mut_ptr(), sum);
            s.store(all.as_mut_ptr(), factor);
        }
        for r in 0..rows {
            states[first + r] = OnlineSoftmax { max: maxima[r], sum: sums[r] };
            factors[first + r] = all[r];
        }
    }
}

compiled! {
    /// `columns[t] += Σ_i e^(scores[i, t] − max_i) / sum_i` over the tokens that row i sees, in order of rows.
    pub(super) fn add_weights(part: &Part, visible: &[(usize, usize); ROWS], scores: &[f32], states: &[OnlineSoftmax], columns: &mut [f32]) = add_weights_body
        for [Avx512, Avx2];
}

#[inline(always)]
fn add_weights_body<S: Lanes>(
    s: S,
    part: &Part,
    visible: &[(usize, usize); ROWS],
    scores: &[f32],
    states: &[OnlineSoftmax],
    columns: &mut [f32],
) {
    let &Part { n, tokens, vectors, .. } = part;
    assert!(scores.len() >= n * tokens && vectors.1 * LANES <= tokens && states.len() >= n);
    let log2e = s.splat(std::f32::consts::LOG2_E);
    for v in vectors.0..vectors.1 {
        let end = columns.len().min((v + 1) * LANES);
        let column = &mut columns[v * LANES..end];
        // SAFETY: as many columns as that, and vector `v` of every row.
        unsafe {
            let mut sum = s.load_first(column.as_ptr(), column.len());
            for (i, state) in states.iter().enumerate().take(n) {
                let x = s.load(scores.as_ptr().add(i * tokens + v * LANES));
                let weight = exp2(s, s.mul(s.sub(x, s.splat(state.max)), log2e));
                let weight = s.select(seen(s, visible[i], v), weight, s.zero());
                sum = s.fma(weight, s.splat(state.normaliser()), sum);
            }
            s.store_first(column.as_mut_ptr(), sum, column.len());
        }
    }
}
