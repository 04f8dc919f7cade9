//! How many pairs match, and the workload whose blocks they are.

use super::gaussian::upper_tail_inverse;
use crate::sharing::SharingError;

/// Pairs of blocks of different requests: `C(B, 2) · m²`.
pub fn num_cross_pairs(requests: usize, blocks_per_request: f64) -> f64 {
    let requests = requests as f64;
    0.5 * requests * (requests - 1.0).max(0.0) * blocks_per_request.powi(2)
}

/// Mean number of matching pairs, and of the Poisson distribution that their number nearly has.
pub fn expected_matches(num_pairs: f64, match_probability: f64) -> f64 {
    num_pairs * match_probability
}

/// Probability that no pair matches, so that nothing is fused.
pub fn no_fusion_probability(num_pairs: f64, match_probability: f64) -> f64 {
    (-expected_matches(num_pairs, match_probability)).exp()
}

/// The threshold at which `target` of the pairs are expected to match, for normal cosines:
/// `μ + s Q⁻¹(target ÷ pairs)`, about `μ + s √(2 ln(pairs ÷ target))`.
pub fn threshold_for_matches(mean: f64, deviation: f64, num_pairs: f64, target: f64) -> f64 {
    mean + deviation * upper_tail_inverse(target / num_pairs)
}

/// Blocks of contents that more than one request may hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RepeatedContent {
    /// How many such contents there are, in blocks.
    pub contents: f64,
    /// Probability that a request holds a given one of them. 1: a prefix of all requests.
    pub appearance: f64,
}

/// The blocks of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    requests: usize,
    blocks_per_request: f64,
    repeated: Vec<RepeatedContent>,
}

impl Workload {
    /// Requests with so many blocks each, of which some repeat and the rest occur once.
    ///
    /// # Errors
    /// If an appearance is no probability, or requests would repeat more blocks than they have.
    pub fn new(
        requests: usize,
        blocks_per_request: f64,
        repeated: Vec<RepeatedContent>,
    ) -> Result<Self, SharingError> {
        let held: f64 = repeated.iter().map(|r| r.contents * r.appearance).sum();
        let sound = |r: &RepeatedContent| {
            r.contents >= 0.0 && r.contents.is_finite() && (0.0..=1.0).contains(&r.appearance)
        };
        let enough = blocks_per_request.is_finite() && held <= blocks_per_request * (1.0 + 1e-9);
        if !repeated.iter().all(sound) || !enough {
            let what = format!("{held} repeated blocks among {blocks_per_request} of a request");
            return Err(SharingError::Sample { what });
        }
        Ok(Self { requests, blocks_per_request, repeated })
    }

    /// Requests without common contents: their pairs are all of one class.
    ///
    /// # Errors
    /// If the number of blocks is negative or not a number.
    pub fn unrelated(requests: usize, blocks_per_request: f64) -> Result<Self, SharingError> {
        Self::new(requests, blocks_per_request, Vec::new())
    }

    /// The number of requests, B.
    pub fn requests(&self) -> usize {
        self.requests
    }

    /// Mean blocks of a request, m.
    pub fn blocks_per_request(&self) -> f64 {
        self.blocks_per_request
    }

    /// What repeats.
    pub fn repeated(&self) -> &[RepeatedContent] {
        &self.repeated
    }

    /// Blocks of one request that no other has.
    pub fn unique_blocks(&self) -> f64 {
        let held: f64 = self.repeated.iter().map(|r| r.contents * r.appearance).sum();
        (self.blocks_per_request - held).max(0.0)
    }

    /// Part of all cross-request pairs that has the same content: what a random sample would find.
    pub fn same_content_share(&self) -> f64 {
        let held: f64 = self.repeated.iter().map(|r| r.contents * r.appearance.powi(2)).sum();
        held / self.blocks_per_request.powi(2).max(f64::MIN_POSITIVE)
    }

    /// The ratio from exact copies alone: what hashes of contents give, and the least that fusion gives
    /// if copies always match.
    pub fn copies_ratio(&self) -> f64 {
        let requests = self.requests as f64;
        let distinct =
            |r: &RepeatedContent| r.contents * (1.0 - (1.0 - r.appearance).powf(requests));
        let stored =
            requests * self.unique_blocks() + self.repeated.iter().map(distinct).sum::<f64>();
        let blocks = requests * self.blocks_per_request;
        if stored > 0.0 { blocks / stored } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_poisson_and_the_threshold_inverts_them() {
        let pairs = num_cross_pairs(64, 32.0);
        assert_eq!(pairs, 2016.0 * 1024.0);
        assert_eq!((num_cross_pairs(1, 32.0), num_cross_pairs(0, 32.0)), (0.0, 0.0));
        assert!((no_fusion_probability(pairs, 1.0 / pairs) - (-1f64).exp()).abs() < 1e-12);
        let threshold = threshold_for_matches(0.1, 0.02, pairs, 5.0);
        let p = super::super::gaussian::upper_tail((threshold - 0.1) / 0.02);
        assert!((expected_matches(pairs, p) - 5.0).abs() < 1e-6);
        let rough = 0.1 + 0.02 * (2.0 * (pairs / 5.0).ln()).sqrt();
        assert!((threshold - rough).abs() < 0.02);
    }

    #[test]
    fn workloads_know_their_copies() {
        let prefix = RepeatedContent { contents: 8.0, appearance: 1.0 };
        let workload = Workload::new(16, 32.0, vec![prefix]).unwrap();
        assert_eq!((workload.unique_blocks(), workload.same_content_share()), (24.0, 8.0 / 1024.0));
        assert_eq!(workload.copies_ratio(), 16.0 * 32.0 / (16.0 * 24.0 + 8.0));
        let passages = RepeatedContent { contents: 8.0, appearance: 0.5 };
        let workload = Workload::new(8, 4.0, vec![passages]).unwrap();
        assert!((workload.copies_ratio() - 32.0 / (8.0 * (1.0 - 0.5f64.powi(8)))).abs() < 1e-12);
        assert_eq!(Workload::unrelated(8, 4.0).unwrap().copies_ratio(), 1.0);
        assert!(Workload::new(8, 3.0, vec![passages]).is_err());
        let wrong = RepeatedContent { contents: 1.0, appearance: 1.5 };
        assert!(Workload::new(8, 3.0, vec![wrong]).is_err());
        assert!(Workload::unrelated(8, f64::NAN).is_err());
        assert!(Workload::unrelated(8, -1.0).is_err());
    }
}
