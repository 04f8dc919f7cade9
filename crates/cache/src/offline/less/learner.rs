//! One network in training: forward, backward, and Adam (arXiv 1412.6980).

use kvasir_kernels::{gelu_with_slopes, gemm_nn_acc, gemm_nt};

use super::{FEATURES, Features, Kind, mixed};

/// Adam's.
const DECAY: [f32; 2] = [0.9, 0.999];

/// A network in training.
pub(super) struct Learner {
    pub(super) features: Features,
    pub(super) gradient: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
}

/// What of a forward pass the backward pass needs.
pub(super) struct Trace {
    rows: Vec<f32>,          // [n, dim]
    hidden: Vec<f32>,        // [n, hidden]
    hidden_slopes: Vec<f32>, // [n, hidden]
    second: Vec<f32>,        // [n, FEATURES]
    second_slopes: Vec<f32>, // [n, FEATURES]
    /// Before the absolute value.
    signed: Vec<f32>, // [n, FEATURES]
    pub(super) out: Vec<f32>, // [n, FEATURES]
}

/// `[rows, columns]` to `[columns, rows]`.
pub(super) fn transposed(x: &[f32], columns: usize) -> Vec<f32> {
    let rows = x.len() / columns.max(1);
    let mut out = vec![0.0; x.len()];
    for (r, row) in x.chunks_exact(columns).enumerate() {
        row.iter().enumerate().for_each(|(c, x)| out[c * rows + r] = *x);
    }
    out
}

impl Learner {
    pub(super) fn new(features: Features) -> Self {
        let zeros = || vec![0.0; features.weights.len()];
        Self { gradient: zeros(), mean: zeros(), square: zeros(), features }
    }

    /// As [`Features::of`], with everything that a backward pass needs.
    pub(super) fn forward(&self, rows: Vec<f32>) -> Trace {
        let Features { dim, hidden: width, kind, .. } = self.features;
        let n = rows.len() / dim;
        let w = self.features.weights();
        let (mut hidden, mut hidden_slopes) = (vec![0.0; n * width], vec![0.0; n * width]);
        gemm_nt((n, width, dim), &rows, dim, w.first, dim, &mut hidden, width);
        gelu_with_slopes(&mut hidden, &mut hidden_slopes);
        let (mut second, mut second_slopes) = (vec![0.0; n * FEATURES], vec![0.0; n * FEATURES]);
        gemm_nt((n, FEATURES, width), &hidden, width, w.second, width, &mut second, FEATURES);
        gelu_with_slopes(&mut second, &mut second_slopes);
        let mut signed = second.clone();
        match kind {
            Kind::Queries => signed.iter_mut().for_each(|x| *x *= w.rest[0]),
            Kind::Keys => {
                let (mix, d1, d2) = w.mix();
                for row in signed.chunks_exact_mut(FEATURES) {
                    row.iter_mut().zip(d1).for_each(|(x, d)| *x *= d.abs());
                    let mixed = mixed(row, mix);
                    row.iter_mut().zip(mixed).zip(d2).for_each(|((x, mixed), d)| *x += mixed * d);
                }
            }
        }
        let out = signed.iter().map(|x| x.abs()).collect();
        Trace { rows, hidden, hidden_slopes, second, second_slopes, signed, out }
    }

    /// Adds to the gradient. `slopes`: of the loss by what came out, `[n, FEATURES]`.
    pub(super) fn backward(&mut self, trace: &Trace, slopes: &[f32]) {
        let Features { dim, hidden: width, kind, .. } = self.features;
        let n = trace.rows.len() / dim;
        let w = self.features.weights();
        let mut below: Vec<f32> =
            slopes.iter().zip(&trace.signed).map(|(slope, x)| slope * x.signum()).collect();
        let (to_first, rest) = self.gradient.split_at_mut(width * dim);
        let (to_second, to_rest) = rest.split_at_mut(FEATURES * width);
        match kind {
            // The scale stays as it is.
            Kind::Queries => below.iter_mut().for_each(|x| *x *= w.rest[0]),
            Kind::Keys => {
                let (mix, d1, d2) = w.mix();
                let (to_mix, to_gains) = to_rest.split_at_mut(FEATURES * FEATURES);
                let (to_d1, to_d2) = to_gains.split_at_mut(FEATURES);
                let rows = below.chunks_exact_mut(FEATURES);
                for (slopes, second) in rows.zip(trace.second.chunks_exact(FEATURES)) {
                    let u: [f32; FEATURES] = std::array::from_fn(|r| second[r] * d1[r].abs());
                    let mixed = mixed(&u, mix);
                    let after: [f32; FEATURES] = std::array::from_fn(|r| slopes[r] * d2[r]);
                    for r in 0..FEATURES {
                        to_d2[r] += slopes[r] * mixed[r];
                    }
                    for s in 0..FEATURES {
                        let mut slope = slopes[s];
                        for r in 0..FEATURES {
                            to_mix[s * FEATURES + r] += u[s] * after[r];
                            slope += after[r] * mix[s * FEATURES + r];
                        }
                        to_d1[s] += d1[s].signum() * slope * second[s];
                        slopes[s] = slope * d1[s].abs();
                    }
                }
            }
        }
        below.iter_mut().zip(&trace.second_slopes).for_each(|(x, slope)| *x *= slope);
        let columns = transposed(&below, FEATURES);
        gemm_nn_acc((FEATURES, width, n), &columns, n, &trace.hidden, width, to_second, width);
        let mut hidden = vec![0.0; n * width];
        gemm_nn_acc((n, width, FEATURES), &below, FEATURES, w.second, width, &mut hidden, width);
        hidden.iter_mut().zip(&trace.hidden_slopes).for_each(|(x, slope)| *x *= slope);
        let columns = transposed(&hidden, width);
        gemm_nn_acc((width, dim, n), &columns, n, &trace.rows, dim, to_first, dim);
    }

    /// One step of Adam (arXiv 1412.6980), number `step` from 1 on.
    pub(super) fn learn(&mut self, rate: f32, step: usize) {
        let [first, second] = DECAY.map(|decay| 1.0 - decay.powi(step as i32));
        let moments = self.mean.iter_mut().zip(&mut self.square);
        let weights = self.features.weights.iter_mut().zip(&mut self.gradient);
        for ((weight, gradient), (mean, square)) in weights.zip(moments) {
            *mean += (1.0 - DECAY[0]) * (*gradient - *mean);
            *square += (1.0 - DECAY[1]) * (*gradient * *gradient - *square);
            *weight -= rate * (*mean / first) / ((*square / second).sqrt() + 1e-8);
            *gradient = 0.0;
        }
    }
}
