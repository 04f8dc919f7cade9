//! HOT PATH. RMS norm.

use crate::gemm::sum_lanes;
use crate::isa::{dispatch, mul_add};

dispatch! {
    /// `out = x / sqrt(mean(x²) + eps) · weight` for one row.
    pub fn rms_norm / rms_norm_on(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = body;
}

#[inline(always)]
fn body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0.0f32; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for l in 0..16 {
            lanes[l] = mul_add::<FMA>(chunk[l], chunk[l], lanes[l]);
        }
    }
    for (l, x) in rest.iter().enumerate() {
        lanes[l] = mul_add::<FMA>(*x, *x, lanes[l]);
    }
    let mean = sum_lanes(&lanes) / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = *x * factor * *weight;
    }
}

/// [`rms_norm`] of every row of `weight.len()` elements. `x` and `out`: `[rows, weight.len()]`.
pub fn rms_norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        rms_norm(x, weight, eps, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn equals_the_definition_on_every_isa() {
        let x: Vec<f32> = (0..71).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let weight: Vec<f32> = (0..71).map(|i| 1.0 + i as f32 * 0.01).collect();
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 71.0;
        for isa in Isa::available() {
            let mut out = vec![0.0; 71];
            rms_norm_on(isa, &x, &weight, 1e-5, &mut out);
            for i in 0..71 {
                let exact = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(out[i]) - exact).abs() < 1e-5, "{isa} {i}");
            }
        }
    }
}
