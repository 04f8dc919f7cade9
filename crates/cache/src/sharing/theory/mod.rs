//! What the fusion tree will give at a threshold, predicted from a sample of pairs of blocks.
//!
//! With m blocks per request, B requests, and p the probability that a cross-request pair is above the
//! threshold:
//!
//! - A right representative survives a merge if it matches none of the n left ones, probability
//!   `(1 − p)ⁿ ≈ exp(−n p)`. So n goes from m to `n (1 + exp(−n p))` at each level (over the actual
//!   halves where B is no power of two), and the ratio is `B m ÷ n` at the root. Nothing happens until
//!   `B m p ≈ 1`; later n grows like a logarithm: the representatives are a codebook of a few ÷ p.
//! - Blocks with the same content are a class of their own, with match probability near 1. A content
//!   that a request holds with probability q has at most about one representative, not many: its
//!   survivors are counted per content ([`RepeatedContent`]).
//! - A match has the mean cosine of the best of the candidates above the threshold, and a
//!   representative that gets k right ones becomes a star ([`distortion::star_cosines`]). Cosines of
//!   successive merges multiply. The relative error of a block is `2 − 2 cos`.
//! - After more than one merge a block may be farther than the threshold from its representative. The
//!   final check then sends it back, redirected blocks nearly always: such chains end at about τ².
//!
//! On isotropic blocks ratio and key distortion are within 4 % of the real tree's, value distortion
//! within 10 %, as means over batches; a batch of a few hundred blocks scatters by as much again
//! (tests). The limit is independence, which the paper assumes too. Blocks that have a direction in
//! common, and lean to it more or less, break it: a few that lean most match each other and many
//! others, so that redirects absorb fewer than predicted (in a test the ratio is half), while means
//! lean still more and absorb more. Take the mean out of blocks before comparing them. The check of
//! values is not modelled.

mod cosines;
pub mod distortion;
pub mod gaussian;
mod rate;
mod recursion;
mod sample;
#[cfg(test)]
mod tests;

use std::fmt;

pub use rate::{
    RepeatedContent, Workload, expected_matches, no_fusion_probability, num_cross_pairs,
    threshold_for_matches,
};
pub use sample::{ClassSample, MeanCosines, PairCosines, PairSample, Tail};

use self::recursion::{Expected, Recursion};
use crate::sharing::tree::Representation;

/// Mean relative squared errors of cached blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distortion {
    /// Of their keys.
    pub keys: f64,
    /// Of their values, which follow the keys and are compared by nobody.
    pub values: f64,
}

/// A point of the operating curve, predicted or measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Key cosine above which blocks share.
    pub threshold: f64,
    /// Blocks ÷ representatives, without the bytes of gains and tables.
    pub ratio: f64,
    /// What it costs.
    pub distortion: Distortion,
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Distortion { keys, values } = self.distortion;
        write!(
            f,
            "threshold {:.4}: ratio {:.3}, error of keys {keys:.5}, of values {values:.5}",
            self.threshold, self.ratio
        )
    }
}

/// A prediction beside what was measured; prints as two lines and the ratio's error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// By a model.
    pub predicted: Prediction,
    /// By fusing.
    pub measured: Prediction,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let off = 100.0 * (self.predicted.ratio / self.measured.ratio - 1.0);
        writeln!(f, "predicted: {} ({off:+.1} % in ratio)", self.predicted)?;
        write!(f, "measured:  {}", self.measured)
    }
}

/// Everything a prediction follows from.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Similarities of one layer.
    pub sample: PairSample,
    /// The batch. It says how many pairs have the same content, whatever the sample's share of them.
    pub workload: Workload,
    /// What blocks share.
    pub representation: Representation,
    /// How the sample's tail is read.
    pub tail: Tail,
}

impl Model {
    /// Ratio and distortion of the fusion tree at a threshold, after the final check of keys.
    pub fn predict(&self, threshold: f64) -> Prediction {
        let root = self.root(threshold);
        let checked = root.cosines.check(threshold, self.sample.other().key_deviation());
        let representatives = root.representatives(self) + checked.rejected;
        self.point(threshold, &root, representatives, checked.cosine)
    }

    /// The same without a final check, as the paper's tree has none.
    pub fn predict_unchecked(&self, threshold: f64) -> Prediction {
        let root = self.root(threshold);
        self.point(threshold, &root, root.representatives(self), root.cosines.mean())
    }

    fn root(&self, threshold: f64) -> Expected {
        Recursion::new(self, threshold).subtree(self.workload.requests())
    }

    fn point(
        &self,
        threshold: f64,
        root: &Expected,
        representatives: f64,
        cosine: MeanCosines,
    ) -> Prediction {
        let blocks = root.cosines.num_blocks();
        // More cannot be sent back than went in.
        let ratio = if blocks > 0.0 { blocks / representatives.min(blocks) } else { 1.0 };
        let distortion = Distortion {
            keys: distortion::own_norm_error(cosine.key),
            values: distortion::own_norm_error(cosine.value),
        };
        Prediction { threshold, ratio, distortion }
    }

    /// The predictions at these thresholds.
    pub fn operating_curve(&self, thresholds: &[f64]) -> Vec<Prediction> {
        thresholds.iter().map(|t| self.predict(*t)).collect()
    }

    /// The lowest threshold, hence the highest ratio, from which on both distortions are within the
    /// budget. Without a budget (negative, NaN) nothing is shared: threshold 1. Costs some hundred
    /// predictions, each over the pairs above the threshold, twice a level: some ten thousand pairs do.
    pub fn choose_threshold(&self, budget: Distortion) -> Prediction {
        /// Steps from 1 down to 0, then halvings of the step that breaks the budget.
        const STEPS: usize = 100;
        const HALVINGS: usize = 30;
        let within = |p: &Prediction| {
            p.distortion.keys <= budget.keys && p.distortion.values <= budget.values
        };
        let mut best = self.predict(1.0);
        for step in (0..STEPS).rev() {
            let mut too_low = step as f64 / STEPS as f64;
            let next = self.predict(too_low);
            if within(&next) {
                best = next;
                continue;
            }
            for _ in 0..HALVINGS {
                let middle = self.predict(0.5 * (too_low + best.threshold));
                if within(&middle) {
                    best = middle;
                } else {
                    too_low = middle.threshold;
                }
            }
            break;
        }
        best
    }
}
