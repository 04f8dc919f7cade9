//! Samples that a recipe fails although the uncompressed cache does not ("Rethinking Key-Value Cache Compression", arXiv 2503.24000).
//!
//! A sample is *benign* if its score under f16 is at least its dataset's mean, and above 0. At θ it is a *negative* of a set of
//! recipes if it is benign and every one of them scores at most `1 − θ` of that. The paper's scripts take the median in
//! one place and count benign samples of score 0, which no recipe can fail; both make most of their counts (of
//! 488 negatives of KIVI 102 remain). Here every share has the number of benign samples beside it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bootstrap::{Interval, interval};

/// Losses that are looked at.
pub const THETAS: [f64; 10] = [0.01, 0.02, 0.04, 0.08, 0.10, 0.16, 0.24, 0.32, 0.48, 1.0];

/// The loss that tables show.
pub const THETA: f64 = 0.10;

/// Scores are sums of few fractions: what is nearer is equal.
const EQUAL: f64 = 1e-9;

/// The scores of a sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// What it is compared with others of.
    pub dataset: String,
    /// Datasets that are alike.
    pub family: String,
    /// Score under f16, 0 to 1.
    pub baseline: f64,
    /// Scores under recipes, in an order that is the same for all samples.
    pub scores: Vec<f64>,
}

/// How many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Negatives.
    pub negatives: usize,
    /// Of how many benign samples.
    pub benign: usize,
    /// Of the share; none of nothing.
    pub interval: Option<Interval>,
}

impl Share {
    /// Negatives by benign samples; 0 of nothing.
    pub fn share(&self) -> f64 {
        self.negatives as f64 / self.benign.max(1) as f64
    }
}

/// Samples, and which of them are benign.
#[derive(Debug)]
pub struct Negatives<'a> {
    samples: &'a [Scored],
    benign: Vec<usize>,
}

impl<'a> Negatives<'a> {
    /// Finds the benign ones. O(samples).
    pub fn new(samples: &'a [Scored]) -> Self {
        let mut sums: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
        for sample in samples {
            let (sum, n) = sums.entry(&sample.dataset).or_default();
            *sum += sample.baseline;
            *n += 1;
        }
        let benign = |sample: &Scored| {
            let (sum, n) = sums[&*sample.dataset];
            sample.baseline > 0.0 && sample.baseline >= sum / n as f64 - EQUAL
        };
        let benign = (0..samples.len()).filter(|i| benign(&samples[*i])).collect();
        Self { samples, benign }
    }

    /// Numbers of the benign samples.
    pub fn benign(&self) -> &[usize] {
        &self.benign
    }

    /// Whether a benign sample is a negative of all of `recipes`, numbers of scores.
    fn fails(&self, sample: usize, recipes: &[usize], theta: f64) -> bool {
        let sample = &self.samples[sample];
        let most = (1.0 - theta) * sample.baseline + EQUAL;
        recipes.iter().all(|recipe| sample.scores[*recipe] <= most)
    }

    /// Numbers of the negatives, the largest loss of the first of the recipes first.
    pub fn list(&self, recipes: &[usize], theta: f64) -> Vec<usize> {
        let fail = |sample: &&usize| self.fails(**sample, recipes, theta);
        let mut found: Vec<usize> = self.benign.iter().filter(fail).copied().collect();
        if let Some(recipe) = recipes.first() {
            let kept = |i: usize| self.samples[i].scores[*recipe] / self.samples[i].baseline;
            found.sort_by(|a, b| kept(*a).total_cmp(&kept(*b)).then(a.cmp(b)));
        }
        found
    }

    /// How many of all samples, or of one family's.
    pub fn share(&self, recipes: &[usize], theta: f64, family: Option<&str>) -> Share {
        let of_family = |i: &&usize| family.is_none_or(|f| self.samples[**i].family == f);
        let fails = |i: &usize| f64::from(u8::from(self.fails(*i, recipes, theta)));
        let fails: Vec<f64> = self.benign.iter().filter(of_family).map(fails).collect();
        let negatives = fails.iter().filter(|fails| **fails > 0.0).count();
        Share { negatives, benign: fails.len(), interval: interval(&fails) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(dataset: &str, baseline: f64, scores: &[f64]) -> Scored {
        let (dataset, family) = (dataset.to_owned(), dataset[..1].to_owned());
        Scored { dataset, family, baseline, scores: scores.to_vec() }
    }

    #[test]
    fn benign_are_those_at_their_datasets_mean_and_above_nothing() {
        let samples = [
            sample("a1", 0.2, &[0.2]),
            sample("a1", 0.6, &[0.6]),
            // Its mean is 0, and nobody can fail.
            sample("a2", 0.0, &[0.0]),
            sample("b", 0.5, &[0.5]),
            sample("b", 0.5, &[0.5]),
        ];
        assert_eq!(Negatives::new(&samples).benign(), [1, 3, 4]);
        assert_eq!(Negatives::new(&[]).share(&[0], 0.1, None).benign, 0);
    }

    #[test]
    fn negatives_lose_the_share_or_more() {
        let samples = [
            sample("a", 1.0, &[0.9, 1.0]),
            sample("a", 1.0, &[0.91, 0.0]),
            sample("a", 1.0, &[0.0, 0.5]),
            sample("b", 0.7, &[0.63, 0.63]),
        ];
        let negatives = Negatives::new(&samples);
        // .9 of 1 and .63 of .7 are losses of a tenth, to the last digit or not.
        assert_eq!(negatives.list(&[0], 0.1), [2, 0, 3]);
        assert_eq!(negatives.list(&[1], 0.1), [1, 2, 3]);
        assert_eq!(negatives.list(&[0, 1], 0.1), [2, 3]);
        assert_eq!(negatives.list(&[0, 1], 0.5), [2]);
        assert_eq!(negatives.list(&[0], 1.0), [2]);
        let share = negatives.share(&[0], 0.1, Some("a"));
        assert_eq!((share.negatives, share.benign), (2, 3));
        assert!((share.share() - 2.0 / 3.0).abs() < 1e-12 && share.interval.is_some());
        let share = negatives.share(&[0], 0.1, Some("none"));
        assert_eq!((share.negatives, share.benign, share.interval), (0, 0, None));
    }
}
