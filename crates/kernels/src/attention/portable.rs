//! The loops that every instruction set runs, and the reference of the AVX-512 ones.

use super::exp2::exp2;
use super::{LANES, Part, ROWS};
use crate::gemm::sum_lanes;
use crate::isa::{dispatch_on, mul_add};
use crate::softmax::OnlineSoftmax;

dispatch_on! {
    /// Rotates rows of a head's queries, `group` of which share a token; `place` is the number of the
    /// first one, and `group`. `cos`, `sin`: `[tokens, dim / 2]` from row 0's token on.
    pub(super) fn turn_on(rows: &[f32], place: (usize, usize), dim: usize, cos: &[f32], sin: &[f32], out: &mut [f32]) = turn_body;
}
dispatch_on! {
    /// Scores of a part's rows in its vectors: `scores[i, t] = Σ_c queries[i, c] · keys[c, t]`.
    pub(super) fn scores_on(part: &Part, keys: &[f32], queries: &[f32], scores: &mut [f32]) = scores_body;
}
dispatch_on! {
    /// Turns scores into weights relative to the new maxima, and updates the states. `factors`: of the sums
    /// so far.
    pub(super) fn weights_on(part: &Part, visible: &[(usize, usize); ROWS], scores: &mut [f32], states: &mut [OnlineSoftmax], factors: &mut [f32; ROWS]) = weights_body;
}
dispatch_on! {
    /// `sums[i] = sums[i] · factors[i] + Σ_t weights[i, t] · values[t]`.
    pub(super) fn mix_on(part: &Part, weights: &[f32], factors: &[f32; ROWS], values: &[f32], sums: &mut [f32], stride: usize) = mix_body;
}

#[inline(always)]
fn turn_body<const FMA: bool>(
    rows: &[f32],
    (first, group): (usize, usize),
    dim: usize,
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
) {
    let pairs = dim / 2;
    for (i, (row, out)) in rows.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
        let at = (first + i) / group * pairs;
        let (cos, sin) = (&cos[at..at + pairs], &sin[at..at + pairs]);
        let (a, b) = row.split_at(pairs);
        let (out_a, out_b) = out.split_at_mut(pairs);
        for j in 0..pairs {
            out_a[j] = mul_add::<FMA>(a[j], cos[j], -(b[j] * sin[j]));
            out_b[j] = mul_add::<FMA>(b[j], cos[j], a[j] * sin[j]);
        }
    }
}

#[inline(always)]
fn scores_body<const FMA: bool>(part: &Part, keys: &[f32], queries: &[f32], scores: &mut [f32]) {
    let &Part { dim, n, tokens, vectors, .. } = part;
    for i in 0..n {
        let query = &queries[i * dim..(i + 1) * dim];
        for v in vectors.0..vectors.1 {
            let mut sums = [0.0f32; LANES];
            for (q, keys) in query.iter().zip(keys.chunks_exact(tokens)) {
                let keys = &keys[v * LANES..(v + 1) * LANES];
                for l in 0..LANES {
                    sums[l] = mul_add::<FMA>(*q, keys[l], sums[l]);
                }
            }
            scores[i * tokens + v * LANES..][..LANES].copy_from_slice(&sums);
        }
    }
}

#[inline(always)]
fn weights_body<const FMA: bool>(
    part: &Part,
    visible: &[(usize, usize); ROWS],
    scores: &mut [f32],
    states: &mut [OnlineSoftmax],
    factors: &mut [f32; ROWS],
) {
    let &Part { tokens, vectors, .. } = part;
    for (i, (row, state)) in scores.chunks_exact_mut(tokens).zip(states).enumerate() {
        let (from, to) = visible[i];
        row[vectors.0 * LANES..from.max(vectors.0 * LANES)].fill(f32::NEG_INFINITY);
        row[to.max(vectors.0 * LANES)..vectors.1 * LANES].fill(f32::NEG_INFINITY);
        let row = &mut row[vectors.0 * LANES..vectors.1 * LANES];
        let max = row.iter().fold(state.max, |a, b| a.max(*b));
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let mut lanes = [0.0f32; LANES];
        for chunk in row.chunks_exact_mut(LANES) {
            for l in 0..LANES {
                chunk[l] = exp2::<FMA>((chunk[l] - base) * std::f32::consts::LOG2_E);
                lanes[l] += chunk[l];
            }
        }
        factors[i] = exp2::<FMA>((state.max - base) * std::f32::consts::LOG2_E);
        *state =
            OnlineSoftmax { max, sum: mul_add::<FMA>(state.sum, factors[i], sum_lanes(&lanes)) };
    }
}

#[inline(always)]
fn mix_body<const FMA: bool>(
    part: &Part,
    weights: &[f32],
    factors: &[f32; ROWS],
    values: &[f32],
    sums: &mut [f32],
    stride: usize,
) {
    let &Part { dim, n, tokens, from, to, .. } = part;
    for i in 0..n {
        let sums = &mut sums[i * stride..i * stride + dim];
        for sum in &mut *sums {
            *sum *= factors[i];
        }
        for t in from..to {
            let weight = weights[i * tokens + t];
            for (sum, value) in sums.iter_mut().zip(&values[t * dim..(t + 1) * dim]) {
                *sum = mul_add::<FMA>(weight, *value, *sum);
            }
        }
    }
}
