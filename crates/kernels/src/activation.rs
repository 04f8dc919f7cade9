//! HOT PATH. Gated activations of feed-forward layers.

use crate::isa::{dispatch, mul_add};
use crate::softmax::exp;

/// The activation of a feed-forward gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · σ(x)` (Llama, Qwen).
    Silu,
    /// GELU by its tanh approximation (Gemma).
    GeluTanh,
}

dispatch! {
    fn silu_gated / silu_gated_on(gate: &mut [f32], up: &[f32]) = silu_body;
}
dispatch! {
    fn gelu_gated / gelu_gated_on(gate: &mut [f32], up: &[f32]) = gelu_body;
}

#[inline(always)]
fn silu_body<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp::<FMA>(-*g)) * *u;
    }
}

#[inline(always)]
fn gelu_body<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    for (g, u) in gate.iter_mut().zip(up) {
        let x = *g;
        let inner = SQRT_2_OVER_PI * mul_add::<FMA>(0.044_715 * x * x, x, x);
        // tanh(y) = 1 - 2 / (1 + e^{2y}), so 0.5 (1 + tanh(y)) = 1 - 1 / (1 + e^{2y}).
        *g = x * (1.0 - 1.0 / (1.0 + exp::<FMA>(2.0 * inner))) * *u;
    }
}

/// `gate = activation(gate) · up`, element by element.
#[inline]
pub(crate) fn gated(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => silu_gated(gate, up),
        Activation::GeluTanh => gelu_gated(gate, up),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn equal_the_definitions_on_every_isa() {
        let xs: Vec<f32> = (-400..400).map(|i| i as f32 * 0.05).collect();
        let up = vec![1.5f32; xs.len()];
        for isa in Isa::available() {
            let (mut silu, mut gelu) = (xs.clone(), xs.clone());
            silu_gated_on(isa, &mut silu, &up);
            gelu_gated_on(isa, &mut gelu, &up);
            for (i, x) in xs.iter().enumerate() {
                let x = f64::from(*x);
                let exact = x / (1.0 + (-x).exp()) * 1.5;
                assert!((f64::from(silu[i]) - exact).abs() < 1e-5, "{isa} silu {x}");
                let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                let exact = 0.5 * x * (1.0 + y.tanh()) * 1.5;
                assert!((f64::from(gelu[i]) - exact).abs() < 2e-5, "{isa} gelu {x}");
            }
        }
    }

    #[test]
    fn extremes_stay_finite() {
        let mut gate = vec![-1e30, -200.0, 200.0, 1e4];
        gated(Activation::Silu, &mut gate, &[1.0; 4]);
        assert_eq!(gate, [0.0, 0.0, 200.0, 1e4]);
        let mut gate = vec![-1e4, -200.0, 200.0, 1e4];
        gated(Activation::GeluTanh, &mut gate, &[1.0; 4]);
        assert_eq!(gate, [0.0, 0.0, 200.0, 1e4]);
    }
}
