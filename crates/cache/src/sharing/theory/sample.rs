//! What is known about a workload: cosines of random pairs of blocks of different requests.

use super::gaussian::{hazard, upper_tail};
use crate::sharing::SharingError;

/// Cosines of one pair of blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairCosines {
    /// Of their keys.
    pub key: f32,
    /// Of their values.
    pub value: f32,
}

/// How probabilities beyond a threshold are read from a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// By counting. Sees nothing rarer than one pair of the sample.
    Empirical,
    /// By a normal distribution with the sample's moments. Reaches as far as one likes, but a mode of
    /// near copies is not in it: sample those as a class of their own.
    Gaussian,
}

/// Mean cosines of pairs that match.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeanCosines {
    /// Of their keys.
    pub key: f64,
    /// Of their values.
    pub value: f64,
}

/// Pairs of one class.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassSample {
    /// By key cosine, the largest first.
    pairs: Vec<PairCosines>,
    mean: MeanCosines,
    key_deviation: f64,
    /// Rise of the value cosine with the key cosine (least squares).
    value_slope: f64,
}

impl ClassSample {
    fn new(pairs: &[PairCosines]) -> Result<Self, SharingError> {
        // Rounding takes a cosine a little beyond 1.
        let cosine = |x: f32| (-1.001..=1.001).contains(&x);
        for (index, pair) in pairs.iter().enumerate() {
            if let Some(found) = [pair.key, pair.value].into_iter().find(|x| !cosine(*x)) {
                return Err(SharingError::Cosine { index, found });
            }
        }
        let mut pairs: Vec<PairCosines> = pairs
            .iter()
            .map(|p| PairCosines { key: p.key.clamp(-1.0, 1.0), value: p.value.clamp(-1.0, 1.0) })
            .collect();
        pairs.sort_by(|a, b| b.key.total_cmp(&a.key));
        let n = pairs.len().max(1) as f64;
        let mean_of = |f: &dyn Fn(&PairCosines) -> f64| pairs.iter().map(f).sum::<f64>() / n;
        let key = mean_of(&|p| f64::from(p.key));
        let value = mean_of(&|p| f64::from(p.value));
        let variance = mean_of(&|p| (f64::from(p.key) - key).powi(2));
        let covariance = mean_of(&|p| (f64::from(p.key) - key) * (f64::from(p.value) - value));
        let value_slope = if variance > 0.0 { covariance / variance } else { 0.0 };
        let mean = MeanCosines { key, value };
        Ok(Self { pairs, mean, key_deviation: variance.sqrt(), value_slope })
    }

    /// Mean cosines of all pairs; 0 if there are none.
    pub fn mean(&self) -> MeanCosines {
        self.mean
    }

    /// Standard deviation of the key cosine. `1 ÷ its square` is the effective dimension of the keys.
    pub fn key_deviation(&self) -> f64 {
        self.key_deviation
    }

    fn num_above(&self, threshold: f64) -> usize {
        self.pairs.partition_point(|p| f64::from(p.key) > threshold)
    }

    /// Probability that a pair's key cosine is above the threshold; 0 without pairs, and from 1 on.
    pub fn exceedance(&self, threshold: f64, tail: Tail) -> f64 {
        if self.pairs.is_empty() || threshold >= 1.0 {
            return 0.0;
        }
        match tail {
            Tail::Empirical => self.num_above(threshold) as f64 / self.pairs.len() as f64,
            Tail::Gaussian if self.key_deviation == 0.0 => {
                f64::from(u8::from(self.mean.key > threshold))
            }
            Tail::Gaussian => upper_tail((threshold - self.mean.key) / self.key_deviation),
        }
    }

    /// Mean cosines of the best of so many candidates, given that its key cosine is above the
    /// threshold. One candidate: `E[S | S > τ]`, for normal S `μ + s · φ(z) ÷ Q(z)`, z = (τ − μ) ÷ s.
    ///
    /// Where nothing is above the threshold, the key's is the threshold.
    pub fn best_match(&self, threshold: f64, candidates: f64, tail: Tail) -> MeanCosines {
        let candidates = candidates.max(1.0);
        match tail {
            Tail::Empirical => self.best_counted(threshold, candidates),
            Tail::Gaussian => {
                let key = self.best_gaussian(threshold, candidates).clamp(-1.0, 1.0);
                let value = self.mean.value + self.value_slope * (key - self.mean.key);
                MeanCosines { key, value: value.clamp(-1.0, 1.0) }
            }
        }
    }

    fn best_counted(&self, threshold: f64, candidates: f64) -> MeanCosines {
        let n = self.pairs.len() as f64;
        let (mut key, mut value, mut weights) = (0.0, 0.0, 0.0);
        let mut none_above = 1.0;
        for (i, pair) in self.pairs[..self.num_above(threshold)].iter().enumerate() {
            // The best is this pair: no candidate is above it, but not all are below it.
            let none_from_here = (1.0 - (i + 1) as f64 / n).powf(candidates);
            let weight = none_above - none_from_here;
            none_above = none_from_here;
            key += weight * f64::from(pair.key);
            value += weight * f64::from(pair.value);
            weights += weight;
        }
        if weights > 0.0 {
            MeanCosines { key: key / weights, value: value / weights }
        } else {
            MeanCosines { key: threshold, value: self.mean.value }
        }
    }

    fn best_gaussian(&self, threshold: f64, candidates: f64) -> f64 {
        let (mean, deviation) = (self.mean.key, self.key_deviation);
        if deviation == 0.0 {
            return mean.max(threshold);
        }
        let z = (threshold - mean) / deviation;
        if candidates == 1.0 {
            return mean + deviation * hazard(z);
        }
        // E[max | max > τ] = τ + ∫ P(max > s) ds ÷ P(max > τ), s from τ on. Beyond the last s nothing
        // is left: the tail falls by e in less than a deviation ÷ z, or starts where the best ones are.
        let any_above = |z: f64| -(candidates * (-upper_tail(z)).ln_1p()).exp_m1();
        let total = any_above(z);
        if total <= 0.0 {
            return mean + deviation * hazard(z);
        }
        const STEPS: usize = 200;
        let typical = (2.0 * candidates.ln()).sqrt();
        let width = if z > typical { 40.0 / z.max(1.0) } else { typical - z + 8.0 };
        let step = width / STEPS as f64;
        let simpson = |i: usize| match i {
            0 | STEPS => 1.0,
            _ if i % 2 == 1 => 4.0,
            _ => 2.0,
        };
        let sum: f64 = (0..=STEPS).map(|i| simpson(i) * any_above(z + i as f64 * step)).sum();
        threshold + deviation * sum * step / 3.0 / total
    }
}

/// Pairs of blocks of different requests (or chunks), by whether their contents are the same.
///
/// Sample each layer by itself. Blocks of the same text at the same offset are a mode near 1 that no
/// single distribution describes, hence two classes.
#[derive(Debug, Clone, PartialEq)]
pub struct PairSample {
    same: ClassSample,
    other: ClassSample,
    same_share: f64,
}

impl PairSample {
    /// `same`: pairs of blocks with the same tokens; `other`: all others; `same_share`: what part of
    /// all pairs are `same`, which need not be the sample's (the class is rare, and worth sampling).
    ///
    /// # Errors
    /// If a number is no cosine, or the share not between 0 and 1.
    pub fn new(
        same: &[PairCosines],
        other: &[PairCosines],
        same_share: f64,
    ) -> Result<Self, SharingError> {
        if !(0.0..=1.0).contains(&same_share) {
            let what = format!("{same_share} is not a share of pairs");
            return Err(SharingError::Sample { what });
        }
        let (same, other) = (ClassSample::new(same)?, ClassSample::new(other)?);
        Ok(Self { same, other, same_share })
    }

    /// Pairs whose contents are not known, or all different.
    ///
    /// # Errors
    /// If a number is no cosine.
    pub fn unclassified(pairs: &[PairCosines]) -> Result<Self, SharingError> {
        Self::new(&[], pairs, 0.0)
    }

    /// Pairs of the same content.
    pub fn same(&self) -> &ClassSample {
        &self.same
    }

    /// All other pairs.
    pub fn other(&self) -> &ClassSample {
        &self.other
    }

    /// Part of all pairs that has the same content.
    pub fn same_share(&self) -> f64 {
        self.same_share
    }

    /// Probability that a random pair's key cosine is above the threshold.
    pub fn exceedance(&self, threshold: f64, tail: Tail) -> f64 {
        self.same_share * self.same.exceedance(threshold, tail)
            + (1.0 - self.same_share) * self.other.exceedance(threshold, tail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::conformance::gaussian;

    fn pairs(n: usize, mean: f32, deviation: f32) -> Vec<PairCosines> {
        let (x, y) = (gaussian(n, 1), gaussian(n, 2));
        (x.iter().zip(&y))
            .map(|(x, y)| PairCosines {
                key: mean + deviation * x,
                value: 0.2 + 0.05 * x + 0.02 * y,
            })
            .collect()
    }

    #[test]
    fn both_tails_agree_where_the_sample_is_dense() {
        let sample = PairSample::unclassified(&pairs(200_000, 0.5, 0.05)).unwrap();
        let class = sample.other();
        assert!(
            (class.mean().key - 0.5).abs() < 1e-3 && (class.key_deviation() - 0.05).abs() < 1e-3
        );
        for threshold in [0.4, 0.5, 0.55, 0.6] {
            let [counted, normal] =
                [Tail::Empirical, Tail::Gaussian].map(|t| class.exceedance(threshold, t));
            assert!((counted / normal - 1.0).abs() < 0.05, "{threshold}: {counted} {normal}");
            for candidates in [1.0, 3.0, 30.0] {
                let [a, b] = [Tail::Empirical, Tail::Gaussian]
                    .map(|t| class.best_match(threshold, candidates, t));
                assert!((a.key - b.key).abs() < 0.002, "{threshold} {candidates}: {a:?} {b:?}");
                assert!((a.value - b.value).abs() < 0.004, "{threshold} {candidates}: {a:?} {b:?}");
            }
        }
        // What is left above 3 deviations: μ + s φ/Q.
        let far = class.best_match(0.65, 1.0, Tail::Gaussian).key;
        assert!((far - (0.5 + 0.05 * 3.283)).abs() < 1e-3);
        // A hundred thousand deviations out nothing over- or underflows.
        let class = PairSample::unclassified(&pairs(1000, 0.0, 1e-5)).unwrap();
        let best = class.other().best_match(0.99, 64.0, Tail::Gaussian);
        assert!((best.key - 0.99).abs() < 1e-6);
        assert_eq!(class.exceedance(0.99, Tail::Gaussian), 0.0);
    }

    #[test]
    fn the_best_of_few_pairs_is_counted_exactly() {
        let keys = [0.875f32, 0.75, 0.125, 0.0];
        let pairs: Vec<PairCosines> =
            keys.iter().map(|k| PairCosines { key: *k, value: 1.0 - k }).collect();
        let sample = PairSample::unclassified(&pairs).unwrap();
        let best = sample.other().best_match(0.5, 2.0, Tail::Empirical);
        // Two draws of four: the best is the first in 7 of 16 cases, the second in 5.
        let key = (7.0 * 0.875 + 5.0 * 0.75) / 12.0;
        assert!((best.key - key).abs() < 1e-6 && (best.value - (1.0 - key)).abs() < 1e-6);
        assert_eq!(sample.exceedance(0.75, Tail::Empirical), 0.25);
        assert_eq!(sample.other().best_match(0.95, 2.0, Tail::Empirical).key, 0.95);
    }

    #[test]
    fn classes_add_up_and_wrong_numbers_are_refused() {
        let pair = |key: f32| PairCosines { key, value: 0.5 };
        let sample = PairSample::new(&[pair(1.0)], &[pair(0.2), pair(0.6)], 0.25).unwrap();
        assert_eq!(sample.exceedance(0.5, Tail::Empirical), 0.25 + 0.75 * 0.5);
        let normal = 0.25 + 0.75 * upper_tail(1.5);
        assert!((sample.exceedance(0.7, Tail::Gaussian) - normal).abs() < 1e-6);
        assert_eq!(sample.exceedance(1.0, Tail::Gaussian), 0.0);
        assert!(PairSample::new(&[], &[], 1.5).is_err());
        let refused = PairSample::unclassified(&[pair(0.0), pair(f32::NAN)]).unwrap_err();
        assert!(matches!(refused, SharingError::Cosine { index: 1, .. }));
        let none = PairSample::unclassified(&[]).unwrap();
        assert_eq!(none.exceedance(0.1, Tail::Gaussian), 0.0);
    }
}
