//! From scores to weights.

use super::integers;
use super::kind::{Kind, whole};
use super::numbers::by_numbers;
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

/// The number of each lane.
pub(super) const NUMBERS: [f32; LANES] =
    [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

/// Of vector `v` of a row the tokens that it sees, and `hidden` elsewhere.
#[inline(always)]
fn seen<S: Lanes>(s: S, (from, to): (usize, usize), v: usize, x: S::F, hidden: S::F) -> S::F {
    let [from, to] = [s.splat(from as i32 as f32), s.splat(to as i32 as f32)];
    // SAFETY: a whole vector.
    let tokens = s.add(unsafe { s.load(NUMBERS.as_ptr()) }, s.splat((v * LANES) as i32 as f32));
    s.select(s.lt(tokens, from), hidden, s.select(s.lt(tokens, to), x, hidden))
}

by_numbers! {
    /// Turns scores into weights relative to the new maxima (in place; as pairs they take the first half of a row's
    /// vectors), and updates the states; the first of `to` becomes what the rows' sums are to be multiplied with. Sums of weights
    /// are of those that are not rounded. Where numbers are whole, values are worth `worth`, and the second of `to` becomes
    /// what products of weights with them are.
    pub(super) fn weigh(part: &Part, visible: &[(usize, usize); ROWS], worth: &[f32], scores: &mut [f32], states: &mut [OnlineSoftmax], to: (&mut [f32; ROWS], &mut [f32; ROWS])) = weigh_body;
}

#[inline(always)]
fn weigh_body<S: Lanes>(
    s: S,
    kind: impl Kind<S>,
    part: &Part,
    visible: &[(usize, usize); ROWS],
    worth: &[f32],
    scores: &mut [f32],
    states: &mut [OnlineSoftmax],
    (factors, shares): (&mut [f32; ROWS], &mut [f32; ROWS]),
) {
    let &Part { n, tokens, vectors, .. } = part;
    assert!(vectors.1 * LANES <= tokens && scores.len() >= n * tokens);
    assert!(n <= ROWS && states.len() >= n);
    assert!(!whole(s, kind) || worth.len() >= tokens);
    let rows = (scores.as_mut_ptr(), tokens);
    for first in (0..n).step_by(4) {
        let end = n.min(first + 4);
        let (visible, states) = (&visible[first..end], &mut states[first..end]);
        let to = (&mut factors[first..end], &mut shares[first..end]);
        // SAFETY: the asserts cover all vectors of these rows, and of worths.
        unsafe {
            let rows = (rows.0.add(first * tokens), tokens);
            let worth = worth.as_ptr();
            match vectors.1 - vectors.0 {
                1 => weigh_four::<S, _, 1>(s, kind, rows, vectors, visible, worth, states, to),
                2 => weigh_four::<S, _, 2>(s, kind, rows, vectors, visible, worth, states, to),
                4 => weigh_four::<S, _, 4>(s, kind, rows, vectors, visible, worth, states, to),
                _ => weigh_four::<S, _, 0>(s, kind, rows, vectors, visible, worth, states, to),
            }
        }
    }
}

/// One to four rows, every `stride`, of `NV` vectors, which stay in registers, or, if that is 0, of any number.
///
/// # Safety
/// Vectors `first .. end` of as many rows are there as `visible`, states and factors have, and of worths where numbers are whole.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn weigh_four<S: Lanes, K: Kind<S>, const NV: usize>(
    s: S,
    kind: K,
    (scores, stride): (*mut f32, usize),
    (first, end): (usize, usize),
    visible: &[(usize, usize)],
    worth: *const f32,
    states: &mut [OnlineSoftmax],
    (factors, shares): (&mut [f32], &mut [f32]),
) {
    let (rows, vectors) = (states.len(), if NV > 0 { NV } else { end - first });
    let log2e = s.splat(std::f32::consts::LOG2_E);
    let hidden = s.splat(f32::NEG_INFINITY);
    let mut old = [OnlineSoftmax::default(); 4];
    let (mut xs, mut largest) = ([[hidden; NV]; 4], [hidden; 4]);
    for r in 0..4 {
        if r < rows {
            old[r] = states[r];
            for v in 0..vectors {
                // SAFETY: by contract.
                let x = unsafe { s.load(scores.add(r * stride + (first + v) * LANES)) };
                let x = seen(s, visible[r], first + v, x, hidden);
                // A score that is no number is passed over, as by `f32::max`.
                largest[r] = s.max(x, largest[r]);
                if NV > 0 {
                    xs[r][v] = x;
                }
            }
        }
    }
    let old_max = s.four([old[0].max, old[1].max, old[2].max, old[3].max]);
    let old_sum = s.four([old[0].sum, old[1].sum, old[2].sum, old[3].sum]);
    let max = s.max(s.largest4(largest), old_max);
    let base = s.select(s.lt(max, s.splat(f32::MIN)), s.zero(), max);
    let factor = exp2(s, s.mul(s.sub(old_max, base), log2e));
    let mut bases = [0.0f32; LANES];
    // SAFETY: a whole vector.
    unsafe { s.store(bases.as_mut_ptr(), base) };
    let (mut lanes, mut whole) = ([s.zero(); 4], [s.zero(); 4]);
    for r in 0..4 {
        if r < rows {
            for v in 0..vectors {
                // SAFETY: by contract; what is put stays behind what is still to be read.
                unsafe {
                    let row = scores.add(r * stride + first * LANES);
                    let x = match NV {
                        0 => {
                            let x = s.load(row.add(v * LANES));
                            seen(s, visible[r], first + v, x, hidden)
                        }
                        _ => xs[r][v],
                    };
                    let weight = exp2(s, s.mul(s.sub(x, s.splat(bases[r])), log2e));
                    lanes[r] = s.add(lanes[r], weight);
                    if K::WHOLE {
                        let value = s.mul(weight, s.load(worth.add((first + v) * LANES)));
                        whole[r] = s.add(whole[r], value);
                        s.store(row.add(v * LANES), value);
                    } else {
                        kind.put(s, row, v * LANES, weight, LANES);
                    }
                }
            }
        }
    }
    if K::WHOLE {
        let (mut of, mut share) = ([0.0f32; LANES], [0.0f32; LANES]);
        let [by, one] = integers::worths(s, s.sum4(whole));
        // SAFETY: whole vectors.
        unsafe {
            s.store(of.as_mut_ptr(), by);
            s.store(share.as_mut_ptr(), one);
        }
        for r in 0..rows {
            shares[r] = share[r];
            for v in 0..vectors {
                // SAFETY: by contract; what is put stays behind what is still to be read.
                unsafe {
                    let row = scores.add(r * stride + first * LANES);
                    let value = s.mul(s.load(row.add(v * LANES)), s.splat(of[r]));
                    kind.put(s, row, v * LANES, value, LANES);
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
        states[r] = OnlineSoftmax { max: maxima[r], sum: sums[r] };
        factors[r] = all[r];
    }
}

compiled! {
    /// `columns[t] += Σ_i e^(scores[i, t] − max_i) / sum_i` over the tokens that row i sees, in order of rows.
    pub(super) fn add_weights(part: &Part, visible: &[(usize, usize); ROWS], scores: &[f32], states: &[OnlineSoftmax], columns: &mut [f32]) = add_weights_body
        for [Avx512, Avx2, Sse2];
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
                let weight = seen(s, visible[i], v, weight, s.zero());
                sum = s.fma(weight, s.splat(state.normaliser()), sum);
            }
            s.store_first(column.as_mut_ptr(), sum, column.len());
        }
    }
}
