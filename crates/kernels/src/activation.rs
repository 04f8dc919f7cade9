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

const SQRT_2_OVER_PI: f32 = 0.797_884_6;

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
    for (g, u) in gate.iter_mut().zip(up) {
        let x = *g;
        let inner = SQRT_2_OVER_PI * mul_add::<FMA>(0.044_715 * x * x, x, x);
        // tanh(y) = 1 - 2 / (1 + e^{2y}), so 0.5 (1 + tanh(y)) = 1 - 1 / (1 + e^{2y}).
        *g = x * (1.0 - 1.0 / (1.0 + exp::<FMA>(2.0 * inner))) * *u;
    }
}

dispatch! {
    /// `x = gelu(x)`, by the tanh approximation, element by element.
    pub fn gelu / gelu_on(x: &mut [f32]) = gelu_alone_body;
}
dispatch! {
    /// The same, and `slopes = gelu'(x)`.
    ///
    /// # Panics
    /// If there are fewer slopes.
    pub fn gelu_with_slopes / gelu_with_slopes_on(x: &mut [f32], slopes: &mut [f32]) = slopes_body;
}

#[inline(always)]
fn gelu_alone_body<const FMA: bool>(x: &mut [f32]) {
    for x in x {
        let inner = SQRT_2_OVER_PI * mul_add::<FMA>(0.044_715 * *x * *x, *x, *x);
        *x *= 1.0 - 1.0 / (1.0 + exp::<FMA>(2.0 * inner));
    }
}

#[inline(always)]
fn slopes_body<const FMA: bool>(x: &mut [f32], slopes: &mut [f32]) {
    let slopes = &mut slopes[..x.len()];
    for (x, slope) in x.iter_mut().zip(slopes) {
        let inner = SQRT_2_OVER_PI * mul_add::<FMA>(0.044_715 * *x * *x, *x, *x);
        let share = 1.0 - 1.0 / (1.0 + exp::<FMA>(2.0 * inner));
        // d inner / d x, and share' = 2 · share · (1 - share) · inner'.
        let rise = SQRT_2_OVER_PI * mul_add::<FMA>(3.0 * 0.044_715 * *x, *x, 1.0);
        *slope = mul_add::<FMA>(2.0 * *x * share * (1.0 - share), rise, share);
        *x *= share;
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
    fn slopes_are_differences() {
        let xs: Vec<f32> = (-300..300).map(|i| i as f32 * 0.05).collect();
        let exact = |x: f64| {
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + y.tanh())
        };
        for isa in Isa::available() {
            let (mut alone, mut both, mut slopes) = (xs.clone(), xs.clone(), xs.clone());
            gelu_on(isa, &mut alone);
            gelu_with_slopes_on(isa, &mut both, &mut slopes);
            assert_eq!(alone, both);
            for (i, x) in xs.iter().map(|x| f64::from(*x)).enumerate() {
                assert!((f64::from(alone[i]) - exact(x)).abs() < 2e-5, "{isa} {x}");
                let slope = (exact(x + 1e-5) - exact(x - 1e-5)) / 2e-5;
                assert!((f64::from(slopes[i]) - slope).abs() < 2e-5, "{isa} slope at {x}");
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
