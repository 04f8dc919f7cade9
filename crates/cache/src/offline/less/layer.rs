//! One step of a layer: what attention makes of a cut text with and without the sums, and the gradients of the difference.

use std::ops::Range;

use half::f16;
use kvasir_kernels::{OnlineSoftmax, gemm_nn_acc, gemm_nt};

use super::learner::{Learner, Trace, transposed};
use super::training::LessSamples;
use super::{FEATURES, Random};
use crate::frame::Frame;
use crate::geometry::LayerGeometry;
use crate::select::top;

/// Queries behind a cut.
const QUERIES: usize = 48;

/// Queries before it that say which tokens stay.
const OBSERVED: usize = 32;

/// Texts with fewer tokens are not cut.
pub(super) const LEAST_TOKENS: usize = 4 * QUERIES;

/// One layer in training.
pub(super) struct LayerTraining<'a> {
    pub(super) l: &'a LayerGeometry,
    pub(super) frame: &'a Frame,
    /// What the model can count to.
    pub(super) positions: usize,
    pub(super) samples: &'a LessSamples,
    /// `WᵀW` of the output projection: `[query_heads · head_dim]` squared.
    pub(super) output: &'a [f32],
    pub(super) queries: Vec<Learner>,
    pub(super) keys: Vec<Learner>,
}

/// What a step is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// First token of the text, among all.
    pub(super) first: usize,
    /// Its tokens before the cut; [`QUERIES`] follow.
    pub(super) before: usize,
    /// What positions are shifted by.
    pub(super) shift: usize,
    /// Most attended tokens that stay, and newest ones.
    pub(super) heavy: usize,
    pub(super) newest: usize,
}

/// One query head in a step.
struct HeadStep {
    /// Of the tokens that stay: sums of weights and of weighted values, relative to `max`.
    weights: Vec<f32>, // [QUERIES]
    sums: Vec<f32>, // [QUERIES, head_dim]
    /// `e^-max`.
    scale: Vec<f32>, // [QUERIES]
    trace: Trace,
}

/// One KV head in a step.
struct GroupStep {
    /// Of the tokens that were given up.
    trace: Trace,
    values: Vec<f32>, // [n, head_dim]
    state: State,
}

/// What tokens that were given up are remembered as.
struct State {
    sums: Vec<f32>,    // [FEATURES, head_dim]
    weights: Vec<f32>, // [FEATURES]
}

impl LayerTraining<'_> {
    /// Rows of a head, turned: tokens `first ..` of `all`, which has `heads` heads a token.
    fn turned(
        &self,
        all: &[f16],
        heads: usize,
        head: usize,
        cut: Cut,
        tokens: Range<usize>,
    ) -> Vec<f32> {
        let dim = self.l.head_dim;
        let mut row = vec![0.0; dim];
        let mut out = vec![0.0; tokens.len() * dim];
        for (t, out) in tokens.zip(out.chunks_exact_mut(dim)) {
            let at = ((cut.first + t) * heads + head) * dim;
            row.iter_mut().zip(&all[at..at + dim]).for_each(|(to, x)| *to = x.to_f32());
            self.frame.rotate(self.l.rope, cut.shift + t, &row, out);
        }
        out
    }

    fn values(&self, kv_head: usize, cut: Cut, tokens: usize) -> Vec<f32> {
        let (dim, heads) = (self.l.head_dim, self.l.kv_heads);
        let row = |t: usize| {
            let at = ((cut.first + t) * heads + kv_head) * dim;
            self.samples.values[at..at + dim].iter().map(|x| x.to_f32())
        };
        (0..tokens).flat_map(row).collect()
    }

    /// Weights of attention, relative to each row's maximum, and the maxima: queries are tokens `cut.before - OBSERVED ..`.
    fn weights(&self, queries: &[f32], keys: &[f32], cut: Cut) -> (Vec<f32>, Vec<f32>) {
        let (dim, tokens) = (self.l.head_dim, keys.len() / self.l.head_dim);
        let rows = queries.len() / dim;
        let mut weights = vec![0.0; rows * tokens];
        gemm_nt((rows, tokens, dim), queries, dim, keys, dim, &mut weights, tokens);
        let scale = self.l.score_scale * self.frame.score_factor(self.l.rope);
        let mut maxima = Vec::with_capacity(rows);
        for (row, weights) in weights.chunks_exact_mut(tokens).enumerate() {
            let visible = cut.before - OBSERVED + row + 1;
            weights[visible..].fill(0.0);
            let weights = &mut weights[..visible];
            for x in weights.iter_mut() {
                *x *= scale;
                if let Some(cap) = self.l.score_cap {
                    *x = cap * (*x / cap).tanh();
                }
            }
            maxima.push(weights.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b)));
            OnlineSoftmax::default().push(weights, &mut []);
        }
        (weights, maxima)
    }

    /// One step's gradients. Returns the loss, and that of the policy alone, both as shares of the output's square.
    pub(super) fn step(&mut self, cut: Cut) -> [f64; 2] {
        let l = self.l;
        let (dim, group) = (l.head_dim, l.query_heads / l.kv_heads);
        let (tokens, width) = (cut.before + QUERIES, l.query_heads * dim);
        let mut heads = Vec::new();
        let mut groups = Vec::new();
        let mut exact = vec![0.0; QUERIES * width];
        for kv_head in 0..l.kv_heads {
            let keys = self.turned(&self.samples.keys, l.kv_heads, kv_head, cut, 0..tokens);
            let values = self.values(kv_head, cut, tokens);
            let seen = |g: usize| {
                let head = kv_head * group + g;
                let from = cut.before - OBSERVED;
                self.turned(&self.samples.queries, l.query_heads, head, cut, from..tokens)
            };
            let queries: Vec<Vec<f32>> = (0..group).map(seen).collect();
            let weights: Vec<_> = queries.iter().map(|q| self.weights(q, &keys, cut)).collect();
            let mut scores = vec![0.0; cut.before - cut.newest];
            for (weights, _) in &weights {
                for row in weights.chunks_exact(tokens).take(OBSERVED) {
                    let by = 1.0 / row.iter().sum::<f32>();
                    scores.iter_mut().zip(row).for_each(|(score, weight)| *score += by * weight);
                }
            }
            let mut gone = vec![true; scores.len()];
            top(&scores, cut.heavy).into_iter().for_each(|t| gone[t as usize] = false);
            let gone: Vec<usize> = (0..gone.len()).filter(|t| gone[*t]).collect();
            let gather = |rows: &[f32]| -> Vec<f32> {
                gone.iter().flat_map(|t| &rows[t * dim..(t + 1) * dim]).copied().collect()
            };
            let gone_values = gather(&values);
            let trace = self.keys[kv_head].forward(gather(&keys));
            let mut state = State { sums: vec![0.0; FEATURES * dim], weights: vec![0.0; FEATURES] };
            let columns = transposed(&trace.out, FEATURES);
            let n = gone.len();
            gemm_nn_acc((FEATURES, dim, n), &columns, n, &gone_values, dim, &mut state.sums, dim);
            for row in trace.out.chunks_exact(FEATURES) {
                state.weights.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            for (g, (queries, (mut weights, maxima))) in
                queries.into_iter().zip(weights).enumerate()
            {
                let own = &mut weights[OBSERVED * tokens..];
                let head = kv_head * group + g;
                let mut sums = vec![0.0; QUERIES * dim];
                gemm_nn_acc((QUERIES, dim, tokens), own, tokens, &values, dim, &mut sums, dim);
                for (t, (row, sums)) in
                    own.chunks_exact(tokens).zip(sums.chunks_exact(dim)).enumerate()
                {
                    let by = 1.0 / row.iter().sum::<f32>();
                    let to = &mut exact[t * width + head * dim..][..dim];
                    to.iter_mut().zip(sums).for_each(|(to, sum)| *to = by * sum);
                }
                for row in own.chunks_exact_mut(tokens) {
                    gone.iter().for_each(|t| row[*t] = 0.0);
                }
                sums.fill(0.0);
                gemm_nn_acc((QUERIES, dim, tokens), own, tokens, &values, dim, &mut sums, dim);
                let weights = own.chunks_exact(tokens).map(|row| row.iter().sum()).collect();
                let scale = maxima[OBSERVED..].iter().map(|max| (-max).exp()).collect();
                let trace = self.queries[head].forward(queries[OBSERVED * dim..].to_vec());
                heads.push(HeadStep { weights, sums, scale, trace });
            }
            groups.push(GroupStep { trace, state, values: gone_values });
        }
        // What comes out without and with the state, less what should.
        let mut wrong = [vec![0.0; QUERIES * width], vec![0.0; QUERIES * width]];
        for (head, step) in heads.iter().enumerate() {
            let state = &groups[head / group].state;
            for t in 0..QUERIES {
                let features = &step.trace.out[t * FEATURES..][..FEATURES];
                let at = t * width + head * dim;
                let exact = &exact[at..at + dim];
                let sums = &step.sums[t * dim..][..dim];
                for (wrong, on) in wrong.iter_mut().zip([0.0, step.scale[t]]) {
                    let (mut all, mut values) = (step.weights[t], sums.to_vec());
                    for (r, feature) in features.iter().enumerate() {
                        all += on * feature * state.weights[r];
                        let own = &state.sums[r * dim..][..dim];
                        values.iter_mut().zip(own).for_each(|(sum, x)| *sum += on * feature * x);
                    }
                    let to = wrong[at..at + dim].iter_mut().zip(&values).zip(exact);
                    to.for_each(|((to, sum), exact)| *to = sum / all - exact);
                }
            }
        }
        let mut slopes = vec![0.0; QUERIES * width];
        let mut squares = |x: &[f32]| -> Vec<f64> {
            gemm_nt((QUERIES, width, width), x, width, self.output, width, &mut slopes, width);
            let rows = x.chunks_exact(width).zip(slopes.chunks_exact(width));
            rows.map(|(x, y)| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum()).collect()
        };
        // Every query counts the same, however long its output is.
        let whole = squares(&exact);
        let least = (whole.iter().sum::<f64>() / (20 * QUERIES) as f64).max(1e-30);
        let by: Vec<f64> = whole.iter().map(|x| 1.0 / (QUERIES as f64 * x.max(least))).collect();
        let mut loss =
            |x: &[f32]| squares(x).iter().zip(&by).map(|(square, by)| square * by).sum::<f64>();
        let policy = loss(&wrong[0]);
        let losses = [loss(&wrong[1]), policy];
        for (slopes, by) in slopes.chunks_exact_mut(width).zip(&by) {
            slopes.iter_mut().for_each(|x| *x *= (2.0 * by) as f32);
        }
        self.descend(&heads, &groups, &wrong[1], &exact, &slopes);
        losses
    }

    /// Adds a step's gradients. `wrong` and `exact`: what came out less what should, and that; `slopes`: of the loss by what
    /// came out; `[QUERIES, query_heads, head_dim]` each.
    fn descend(
        &mut self,
        heads: &[HeadStep],
        groups: &[GroupStep],
        wrong: &[f32],
        exact: &[f32],
        slopes: &[f32],
    ) {
        let (dim, group) = (self.l.head_dim, self.l.query_heads / self.l.kv_heads);
        let width = self.l.query_heads * dim;
        for (kv_head, own) in groups.iter().enumerate() {
            let GroupStep { trace, state, values } = own;
            let mut sums = vec![0.0; FEATURES * dim];
            let mut weights = vec![0.0; FEATURES];
            for (g, step) in heads[kv_head * group..(kv_head + 1) * group].iter().enumerate() {
                let head = kv_head * group + g;
                let mut to_features = vec![0.0; QUERIES * FEATURES];
                for t in 0..QUERIES {
                    let features = &step.trace.out[t * FEATURES..][..FEATURES];
                    let at = t * width + head * dim;
                    let scale = step.scale[t];
                    let all = step.weights[t]
                        + scale
                            * features.iter().zip(&state.weights).map(|(x, y)| x * y).sum::<f32>();
                    // By the sums and by the weights of the state.
                    let by = scale / all;
                    let slope: Vec<f32> = slopes[at..at + dim].iter().map(|x| by * x).collect();
                    let out = wrong[at..at + dim].iter().zip(&exact[at..at + dim]);
                    let to_all = -slope.iter().zip(out).map(|(s, (w, e))| s * (w + e)).sum::<f32>();
                    for (r, feature) in features.iter().enumerate() {
                        let own = &state.sums[r * dim..][..dim];
                        to_features[t * FEATURES + r] =
                            slope.iter().zip(own).map(|(x, y)| x * y).sum::<f32>()
                                + to_all * state.weights[r];
                        let to = sums[r * dim..][..dim].iter_mut().zip(&slope);
                        to.for_each(|(to, x)| *to += feature * x);
                        weights[r] += feature * to_all;
                    }
                }
                self.queries[head].backward(&step.trace, &to_features);
            }
            let n = values.len() / dim;
            let mut to_features = vec![0.0; n * FEATURES];
            gemm_nt((n, FEATURES, dim), values, dim, &sums, dim, &mut to_features, FEATURES);
            for row in to_features.chunks_exact_mut(FEATURES) {
                row.iter_mut().zip(&weights).for_each(|(x, w)| *x += w);
            }
            self.keys[kv_head].backward(trace, &to_features);
        }
    }

    /// A cut through a text of `tokens` tokens, at random.
    pub(super) fn cut(&self, first: usize, tokens: usize, random: &mut Random) -> Cut {
        let least = LEAST_TOKENS - QUERIES;
        let before = least + random.below(tokens - QUERIES - least + 1);
        let share = (-3.0 * random.uniform()).exp() * 0.5;
        let kept = ((share * before as f32) as usize).max(2);
        let longest = self.positions.saturating_sub(tokens);
        Cut {
            first,
            before,
            shift: random.below(longest + 1),
            heavy: kept / 2,
            newest: kept - kept / 2,
        }
    }

    /// Mean weight of tokens that are given up, as a logarithm, of every query head.
    pub(super) fn mean_weights(&self, cuts: &[Cut]) -> Vec<f32> {
        let (dim, group) = (self.l.head_dim, self.l.query_heads / self.l.kv_heads);
        let mut logarithms = vec![0.0; self.l.query_heads];
        for cut in cuts {
            let tokens = cut.before + QUERIES;
            for (head, logarithm) in logarithms.iter_mut().enumerate() {
                let from = cut.before - OBSERVED;
                let (heads, kv_heads) = (self.l.query_heads, self.l.kv_heads);
                let queries = self.turned(&self.samples.queries, heads, head, *cut, from..tokens);
                let keys = self.turned(&self.samples.keys, kv_heads, head / group, *cut, 0..tokens);
                debug_assert_eq!(keys.len(), tokens * dim);
                let (weights, maxima) = self.weights(&queries, &keys, *cut);
                let rows = weights.chunks_exact(tokens).zip(maxima).skip(OBSERVED);
                let means = rows.map(|(row, max)| {
                    // Half of them, which leaves the heaviest out.
                    let mut row = row[..cut.before].to_vec();
                    row.sort_by(f32::total_cmp);
                    let half = &row[..row.len() * 3 / 4];
                    max + (half.iter().sum::<f32>() / half.len() as f32).max(1e-30).ln()
                });
                *logarithm += means.sum::<f32>() / (QUERIES * cuts.len()) as f32;
            }
        }
        logarithms
    }
}
