//! HOT PATH (rotations). Rotary position embedding.
//!
//! One convention everywhere: pair `i` of a head is `(x[i], x[i + dim / 2])` ("NeoX" order). GGUF
//! stores Llama weights for adjacent pairs; the loader reorders their rows, so that no kernel has
//! to know.

use crate::isa::{dispatch, mul_add};

/// How frequencies are changed to reach longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every position divided by the factor.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// Every pair has its own divisor (`rope_freqs.weight` of GGUF, Llama 3).
    Factors(Vec<f32>),
    /// Llama 3's rule, from config.json.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f32,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original / high` stay.
        high_freq_factor: f32,
        /// Context length of pre-training.
        original_context: f32,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Divisor of the long wavelengths.
        factor: f32,
        /// Context length of pre-training.
        original_context: f32,
        /// Rotations above which a pair is left alone.
        beta_fast: f32,
        /// Rotations below which a pair is interpolated.
        beta_slow: f32,
        /// Factor of rotated queries and keys; `None` is 0.1 ln(factor) + 1 for factors above 1.
        attention_factor: Option<f32>,
    },
}

/// Cosines and sines of `distance · frequency` for distances `0..len`.
///
/// The cache needs distances inside a block (keys) and from a block's start to a query; both are
/// non-negative, so one table serves. It grows on demand: 8 · pairs bytes per distance.
#[derive(Debug, Clone)]
pub struct RopeTable {
    inv_freq: Vec<f64>, // [pairs]
    cos: Vec<f32>,      // [len, pairs]
    sin: Vec<f32>,      // [len, pairs]
    score_factor: f32,
}

impl RopeTable {
    /// A table for heads of `head_dim` (even) channels, holding `len` distances.
    pub fn new(head_dim: usize, base: f32, scaling: &RopeScaling, len: usize) -> Self {
        let pairs = head_dim / 2;
        let plain: Vec<f64> =
            (0..pairs).map(|i| f64::from(base).powf(-((2 * i) as f64) / head_dim as f64)).collect();
        let mut score_factor = 1.0;
        let inv_freq = match scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => {
                plain.iter().map(|f| f / f64::from(*factor)).collect()
            }
            RopeScaling::Factors(factors) => {
                plain.iter().zip(factors).map(|(f, factor)| f / f64::from(*factor)).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let original = f64::from(*original_context);
                plain
                    .iter()
                    .map(|f| {
                        let turns = original * f / std::f64::consts::TAU;
                        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                        (1.0 - smooth) * f / f64::from(*factor) + smooth * f
                    })
                    .collect()
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
            } => {
                // Dimension at which `turns` full rotations fit into the original context.
                let dim_of = |turns: f32| {
                    head_dim as f64
                        * (f64::from(*original_context)
                            / (f64::from(turns) * std::f64::consts::TAU))
                            .ln()
                        / (2.0 * f64::from(base).ln())
                };
                let low = dim_of(*beta_fast).floor().max(0.0);
                let high = dim_of(*beta_slow).ceil().min(head_dim as f64 - 1.0);
                let span = (high - low).max(0.001);
                let default = if *factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
                // Keys and queries are both scaled, so scores get the square.
                let attention = attention_factor.unwrap_or(default);
                score_factor = attention * attention;
                plain
                    .iter()
                    .enumerate()
                    .map(|(i, f)| {
                        let ramp = ((i as f64 - low) / span).clamp(0.0, 1.0);
                        ramp * f / f64::from(*factor) + (1.0 - ramp) * f
                    })
                    .collect()
            }
        };
        let mut table = Self { inv_freq, cos: Vec::new(), sin: Vec::new(), score_factor };
        table.grow(len);
        table
    }

    /// Number of (cos, sin) pairs.
    pub fn pairs(&self) -> usize {
        self.inv_freq.len()
    }

    /// The first pair from which on all turn by at most `angle` from one position to the next.
    pub fn slow_pairs(&self, angle: f32) -> usize {
        let fast = self.inv_freq.iter().rposition(|f| *f > f64::from(angle));
        fast.map_or(0, |last| last + 1)
    }

    /// Number of distances held.
    pub fn len(&self) -> usize {
        self.cos.len() / self.pairs().max(1)
    }

    /// Whether no distance is held.
    pub fn is_empty(&self) -> bool {
        self.cos.is_empty()
    }

    /// What attention scores are multiplied with (1 but for YaRN): rotations stay pure.
    pub fn score_factor(&self) -> f32 {
        self.score_factor
    }

    /// Makes distances below `len` available.
    pub fn grow(&mut self, len: usize) {
        for distance in self.len()..len {
            for f in &self.inv_freq {
                let (sin, cos) = (distance as f64 * f).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// (cosines, sines) of one distance, `[pairs]` each.
    ///
    /// # Panics
    /// If the distance is not held.
    #[inline]
    pub fn at(&self, distance: usize) -> (&[f32], &[f32]) {
        self.span(distance, 1)
    }

    /// (cosines, sines) of `len` distances from `first` on, `[len, pairs]` each.
    ///
    /// # Panics
    /// If one of them is not held.
    #[inline]
    pub fn span(&self, first: usize, len: usize) -> (&[f32], &[f32]) {
        let range = first * self.pairs()..(first + len) * self.pairs();
        (&self.cos[range.clone()], &self.sin[range])
    }
}

dispatch! {
    /// Rotates a head `[2 · pairs]` in place.
    pub fn rotate / rotate_on(x: &mut [f32], cos: &[f32], sin: &[f32]) = rotate_body;
}
dispatch! {
    /// Rotates a head into another buffer.
    pub fn rotate_into / rotate_into_on(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) = rotate_into_body;
}

#[inline(always)]
fn rotate_body<const FMA: bool>(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, b) = x.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (mul_add::<FMA>(*a, *c, -(*b * *s)), mul_add::<FMA>(*b, *c, *a * *s));
    }
}

#[inline(always)]
fn rotate_into_body<const FMA: bool>(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let (a, b) = x.split_at(cos.len());
    let (out_a, out_b) = out.split_at_mut(cos.len());
    for (((((a, b), c), s), oa), ob) in a.iter().zip(b).zip(cos).zip(sin).zip(out_a).zip(out_b) {
        *oa = mul_add::<FMA>(*a, *c, -(*b * *s));
        *ob = mul_add::<FMA>(*b, *c, *a * *s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn scores_depend_on_the_distance_only() {
        let table = RopeTable::new(16, 10_000.0, &RopeScaling::None, 200);
        let q: Vec<f32> = (0..16).map(|i| (i as f32).sin()).collect();
        let k: Vec<f32> = (0..16).map(|i| (i as f32 * 1.7).cos()).collect();
        let score = |m: usize, n: usize| {
            let (mut q, mut k) = (q.clone(), k.clone());
            rotate(&mut q, table.at(m).0, table.at(m).1);
            rotate(&mut k, table.at(n).0, table.at(n).1);
            q.iter().zip(&k).map(|(a, b)| a * b).sum::<f32>()
        };
        assert!((score(150, 140) - score(10, 0)).abs() < 1e-4);
        assert!((score(150, 140) - score(11, 0)).abs() > 1e-3);
    }

    #[test]
    fn isas_agree() {
        let table = RopeTable::new(64, 500_000.0, &RopeScaling::None, 8);
        let x: Vec<f32> = (0..64).map(|i| (i as f32 * 0.3).sin()).collect();
        let (cos, sin) = table.at(7);
        for isa in Isa::available() {
            let mut inplace = x.clone();
            rotate_on(isa, &mut inplace, cos, sin);
            let mut out = vec![0.0; 64];
            rotate_into_on(isa, &x, cos, sin, &mut out);
            assert_eq!(inplace, out);
            for i in 0..32 {
                let exact = x[i] * cos[i] - x[i + 32] * sin[i];
                assert!((out[i] - exact).abs() < 1e-6, "{isa}");
            }
        }
    }

    #[test]
    fn growing_keeps_what_was_there() {
        let mut table = RopeTable::new(8, 10_000.0, &RopeScaling::None, 3);
        let before = table.at(2).0.to_vec();
        table.grow(10);
        assert_eq!(table.len(), 10);
        assert_eq!(table.at(2).0, before);
        table.grow(5);
        assert_eq!(table.len(), 10);
    }

    #[test]
    fn llama3_scaling_keeps_fast_pairs_and_divides_slow_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let plain = RopeTable::new(128, 500_000.0, &RopeScaling::None, 1);
        let scaled = RopeTable::new(128, 500_000.0, &scaling, 1);
        assert_eq!(plain.inv_freq[0], scaled.inv_freq[0]);
        assert!((plain.inv_freq[63] / scaled.inv_freq[63] - 8.0).abs() < 1e-9);
    }

    #[test]
    fn yarn_scales_scores_and_slow_pairs() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_context: 32768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
        };
        let plain = RopeTable::new(128, 1e6, &RopeScaling::None, 1);
        let scaled = RopeTable::new(128, 1e6, &scaling, 1);
        assert_eq!(plain.inv_freq[0], scaled.inv_freq[0]);
        assert!((plain.inv_freq[63] / scaled.inv_freq[63] - 4.0).abs() < 1e-9);
        let factor = 0.1f32 * 4.0f32.ln() + 1.0;
        assert!((scaled.score_factor() - factor * factor).abs() < 1e-6);
    }
}
