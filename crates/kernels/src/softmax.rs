//! HOT PATH. Exponentials, online softmax, log-sum-exp.

use crate::gemm::sum_lanes;
use crate::isa::{dispatch, mul_add};

/// `e^x` to about 1e-7 relative, branch free so that loops over it vectorise: range reduction by
/// ln 2 in two parts, polynomial of degree 6 (coefficients of Cephes `expf`). Below -87 it is 0
/// (so that -inf gives 0), above 88 infinite.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    // Adding 1.5 · 2^23 rounds to an integer without a rounding instruction.
    const ROUND: f32 = 12_582_912.0;
    let rounded = mul_add::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = mul_add::<FMA>(n, -LN2_LO, mul_add::<FMA>(n, -LN2_HI, clamped));
    let mut p = 1.987_569_1e-4;
    p = mul_add::<FMA>(p, r, 1.398_2e-3);
    p = mul_add::<FMA>(p, r, 8.333_452e-3);
    p = mul_add::<FMA>(p, r, 4.166_579_6e-2);
    p = mul_add::<FMA>(p, r, 1.666_666_5e-1);
    p = mul_add::<FMA>(p, r, 5e-1);
    let y = mul_add::<FMA>(p, r * r, r) + 1.0;
    // The integer is in the low bits; a cast would be checked lane by lane.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    let scale = f32::from_bits(n.wrapping_add(127) << 23);
    let y = y * scale;
    if x < -87.0 {
        0.0
    } else if x > 88.0 {
        f32::INFINITY
    } else {
        y
    }
}

dispatch! {
    fn exp_minus_and_sum / exp_minus_and_sum_on(scores: &mut [f32], max: f32) -> f32 = exp_body;
}

/// `scores = e^(scores - max)`; returns their sum, added by lanes so that trailing zeros do not
/// change it.
#[inline(always)]
fn exp_body<const FMA: bool>(scores: &mut [f32], max: f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let mut chunks = scores.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for l in 0..16 {
            chunk[l] = exp::<FMA>(chunk[l] - max);
            lanes[l] += chunk[l];
        }
    }
    for (l, s) in chunks.into_remainder().iter_mut().enumerate() {
        *s = exp::<FMA>(*s - max);
        lanes[l] += *s;
    }
    sum_lanes(&lanes)
}

/// Running maximum and sum of one query's softmax (Milakov & Gimelshein, arXiv 1805.02867).
#[derive(Debug, Clone, Copy)]
pub struct OnlineSoftmax {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

impl Default for OnlineSoftmax {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl OnlineSoftmax {
    /// Of one token.
    #[inline]
    pub const fn of_one(score: f32) -> Self {
        Self { max: score, sum: 1.0 }
    }

    /// Turns a tile's scores (masked ones are -inf) into weights relative to the new running
    /// maximum, rescales `acc` if the maximum moved, and returns whether any score was visible.
    /// If none was, scores are set to 0 and nothing else changes.
    #[inline]
    pub fn push(&mut self, scores: &mut [f32], acc: &mut [f32]) -> bool {
        let tile_max = scores.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        if tile_max == f32::NEG_INFINITY {
            scores.fill(0.0);
            return false;
        }
        let max = self.raise(tile_max, acc);
        self.sum += exp_minus_and_sum(scores, max);
        true
    }

    /// Raises the running maximum to at least `max`, rescaling the sum and `acc`, and returns it.
    #[inline]
    pub(crate) fn raise(&mut self, max: f32, acc: &mut [f32]) -> f32 {
        if max > self.max {
            if self.sum > 0.0 {
                let factor = (self.max - max).exp();
                self.sum *= factor;
                crate::scale_in_place(acc, factor);
            }
            self.max = max;
        }
        self.max
    }

    /// Adds weights that are relative to the running maximum.
    #[inline]
    pub(crate) fn add(&mut self, weights: f32) {
        self.sum += weights;
    }

    /// 1 / Σ, or 0 if nothing was visible.
    #[inline]
    pub fn normaliser(&self) -> f32 {
        if self.sum > 0.0 { 1.0 / self.sum } else { 0.0 }
    }
}

/// `ln Σ e^x` in f64: a whole vocabulary in f32 would lose digits.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    if !max.is_finite() {
        return f64::from(max);
    }
    // Chunks keep the f32 partial sums short; exp is the vectorised one.
    let mut sum = 0.0f64;
    let mut chunk = [0.0f32; 256];
    for part in logits.chunks(256) {
        let chunk = &mut chunk[..part.len()];
        chunk.copy_from_slice(part);
        sum += f64::from(exp_minus_and_sum(chunk, max));
    }
    f64::from(max) + sum.ln()
}

dispatch! {
    /// Index of the largest number; of equals the first; 0 if there is none but NaN.
    pub fn argmax / argmax_on(x: &[f32]) -> usize = argmax_body;
}

#[inline(always)]
fn argmax_body<const FMA: bool>(x: &[f32]) -> usize {
    let mut lanes = [f32::NEG_INFINITY; 64];
    let (chunks, rest) = x.as_chunks::<64>();
    for chunk in chunks {
        for l in 0..64 {
            // A comparison that NaN loses.
            lanes[l] = if chunk[l] > lanes[l] { chunk[l] } else { lanes[l] };
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    // Chunks are compared whole, which vectorises; a search for the first would not.
    let chunk =
        chunks.iter().position(|chunk| chunk.iter().fold(false, |any, x| any | (*x == max)));
    let from = chunk.map_or(64 * chunks.len(), |chunk| 64 * chunk);
    x[from..].iter().position(|x| *x == max).map_or(0, |at| from + at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn argmax_is_the_first_of_the_largest() {
        for isa in Isa::available() {
            for n in [1, 63, 64, 65, 300] {
                let mut x: Vec<f32> = (0..n).map(|i| ((i * 37) % 101) as f32 - 200.0).collect();
                for at in [0, n / 2, n - 1] {
                    let before = std::mem::replace(&mut x[at], 7.0);
                    assert_eq!(argmax_on(isa, &x), at, "{isa} {n}");
                    let last = std::mem::replace(&mut x[n - 1], 7.0);
                    assert_eq!(argmax_on(isa, &x), at, "{isa} {n}");
                    (x[n - 1], x[at]) = (last, before);
                }
            }
            assert_eq!(argmax_on(isa, &[f32::NAN, 1.0, f32::NAN, 2.0]), 3);
            assert_eq!(argmax_on(isa, &[f32::NAN; 70]), 0);
            assert_eq!(argmax_on(isa, &[f32::NEG_INFINITY; 70]), 0);
            assert_eq!(argmax_on(isa, &[]), 0);
        }
    }

    #[test]
    fn exp_is_accurate_on_every_isa() {
        for isa in Isa::available() {
            let xs: Vec<f32> = (-8000..=0).map(|i| i as f32 * 0.01).collect();
            let mut ys = xs.clone();
            exp_minus_and_sum_on(isa, &mut ys, 0.0);
            for (x, y) in xs.iter().zip(&ys) {
                let exact = f64::from(*x).exp();
                let error = (f64::from(*y) - exact).abs();
                assert!(error <= exact * 3e-7 + 1e-38, "{isa} exp({x}) = {y}, not {exact}");
            }
        }
    }

    #[test]
    fn exp_at_its_limits() {
        assert_eq!(exp::<false>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<false>(-100.0), 0.0);
        assert_eq!(exp::<false>(0.0), 1.0);
        assert_eq!(exp::<false>(100.0), f32::INFINITY);
    }

    #[test]
    fn online_equals_two_pass_whatever_the_tiles() {
        let scores: Vec<f32> = (0..50).map(|i| ((i * 37) % 19) as f32 * 0.7 - 5.0).collect();
        let max = scores.iter().fold(f32::MIN, |a, b| a.max(*b));
        let exact: f64 = scores.iter().map(|s| f64::from(s - max).exp()).sum();
        for tile in [1, 7, 16, 50] {
            let mut state = OnlineSoftmax::default();
            let mut acc = [0.0f32];
            for part in scores.chunks(tile) {
                let mut part = part.to_vec();
                state.push(&mut part, &mut acc);
                acc[0] += part.iter().sum::<f32>();
            }
            assert!((f64::from(state.sum) - exact).abs() < 1e-5);
            assert!((acc[0] * state.normaliser() - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn masked_tiles_change_nothing() {
        let mut state = OnlineSoftmax::default();
        let mut acc = [2.0f32];
        let mut scores = [f32::NEG_INFINITY; 3];
        assert!(!state.push(&mut scores, &mut acc));
        assert_eq!(scores, [0.0; 3]);
        assert_eq!(acc, [2.0]);
        assert_eq!(state.normaliser(), 0.0);
    }

    #[test]
    fn log_sum_exp_of_equal_logits() {
        let logits = vec![3.0f32; 1000];
        assert!((log_sum_exp(&logits) - (3.0 + 1000f64.ln())).abs() < 1e-6);
    }
}
