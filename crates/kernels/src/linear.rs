//! Linear layers.
//!
//! Weights are f32 rows for now. What is behind [`Linear`] is private, so packed 4- and 8-bit
//! weights can replace it without touching a caller.

use rayon::prelude::*;

use crate::gemm::gemm_nt_raw;
use crate::isa::Isa;

/// Tokens per pass over the weights: 192 rows of 576 f32 inputs are 432 KiB, which fits a core's L2
/// beside the weights passing through.
const TOKENS_PER_PASS: usize = 192;
/// Output features per task.
const FEATURES_PER_TASK: usize = 64;

/// `y = x Wᵀ + b` with `W: [out_features, in_features]`.
#[derive(Debug)]
pub struct Linear {
    weight: Vec<f32>, // [out_features, in_features]
    bias: Option<Vec<f32>>,
    in_features: usize,
    out_features: usize,
}

/// A pointer that tasks may share because they write disjoint columns.
#[derive(Clone, Copy)]
struct Columns(*mut f32);
// SAFETY: see the use in `forward`: every task writes its own columns only.
unsafe impl Send for Columns {}
// SAFETY: as above.
unsafe impl Sync for Columns {}

impl Columns {
    fn get(self) -> *mut f32 {
        self.0
    }
}

impl Linear {
    /// Takes a row-major weight `[out_features, in_features]` and an optional bias
    /// `[out_features]`.
    ///
    /// # Panics
    /// If the lengths disagree: shapes are checked where tensors are read.
    pub fn new(
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
    ) -> Self {
        assert_eq!(weight.len(), in_features * out_features, "weight of {out_features} rows");
        assert!(bias.as_ref().is_none_or(|b| b.len() == out_features), "bias length");
        Self { weight, bias, in_features, out_features }
    }

    /// Length of an input row.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Length of an output row.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes of the weights as held in memory.
    pub fn num_bytes(&self) -> usize {
        4 * (self.weight.len() + self.bias.as_ref().map_or(0, Vec::len))
    }

    /// One row of the weight: an embedding, when the matrix is an embedding table.
    ///
    /// # Panics
    /// If `row` is not below `out_features`.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.weight[row * self.in_features..(row + 1) * self.in_features]
    }

    /// `out = x Wᵀ + b`; `x`: `[tokens, in_features]`, `out`: `[tokens, out_features]`. Row
    /// invariant. Uses the current rayon pool.
    ///
    /// # Panics
    /// If the lengths are not whole rows of equal number.
    pub fn forward(&self, x: &[f32], out: &mut [f32]) {
        let (k, n) = (self.in_features, self.out_features);
        let tokens = x.len() / k;
        assert_eq!(x.len(), tokens * k, "input rows of {k}");
        assert_eq!(out.len(), tokens * n, "output rows of {n} for {tokens} tokens");
        let isa = Isa::best();
        let columns = Columns(out.as_mut_ptr());
        for first in (0..tokens).step_by(TOKENS_PER_PASS) {
            let m = TOKENS_PER_PASS.min(tokens - first);
            let x = &x[first * k..(first + m) * k];
            (0..n.div_ceil(FEATURES_PER_TASK)).into_par_iter().for_each(|task| {
                let j = task * FEATURES_PER_TASK;
                let nn = FEATURES_PER_TASK.min(n - j);
                let w = &self.weight[j * k..(j + nn) * k];
                // SAFETY: `x` and `w` are checked slices; the task writes columns j..j + nn of rows
                // first..first + m, which lie inside `out` (asserted above) and belong to no other
                // task; `out` is exclusively borrowed for the whole call.
                unsafe {
                    let out = columns.get().add(first * n + j);
                    gemm_nt_raw(isa, (m, nn, k), x.as_ptr(), k, w.as_ptr(), k, out, n);
                }
            });
        }
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(n) {
                crate::add_assign(row, bias);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forward_equals_the_definition() {
        let (k, n, tokens) = (37, 150, 200);
        let value = |i: usize, scale: usize| ((i * 7919) % scale) as f32 / scale as f32 - 0.5;
        let weight: Vec<f32> = (0..n * k).map(|i| value(i, 1009)).collect();
        let bias: Vec<f32> = (0..n).map(|i| value(i, 97)).collect();
        let x: Vec<f32> = (0..tokens * k).map(|i| value(i, 613)).collect();
        let linear = Linear::new(weight.clone(), Some(bias.clone()), k, n);
        let mut out = vec![0.0; tokens * n];
        linear.forward(&x, &mut out);
        for t in [0, 1, 191, 192, 199] {
            for j in [0, 63, 64, 149] {
                let exact: f64 = f64::from(bias[j])
                    + (0..k)
                        .map(|i| f64::from(x[t * k + i]) * f64::from(weight[j * k + i]))
                        .sum::<f64>();
                assert!((f64::from(out[t * n + j]) - exact).abs() < 1e-5);
            }
        }
        let mut alone = vec![0.0; n];
        linear.forward(&x[195 * k..196 * k], &mut alone);
        assert_eq!(alone, out[195 * n..196 * n]);
    }
}
