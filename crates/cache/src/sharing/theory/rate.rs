//! How many pairs match, and the workload whose blocks they are.

use std::collections::{HashMap, HashSet};

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

    /// A batch of `requests` that are like those of a sample, each a list of its blocks' contents by name.
    ///
    /// What repeats is taken for one kind of content: how often two requests hold the same one, and how many different ones
    /// the sample has, say how many there are and how often a request holds each; what is left occurs once. Contents that
    /// are held more and less often than that average make the ratio of a much larger batch too small. What
    /// repeats within a request is not modelled, and counts once. O(blocks).
    pub fn of_sample(requests: usize, sample: &[Vec<u64>]) -> Self {
        let mut holders: HashMap<u64, f64> = HashMap::new();
        let mut blocks = 0.0;
        for request in sample {
            let contents: HashSet<u64> = request.iter().copied().collect();
            blocks += contents.len() as f64;
            for content in contents {
                *holders.entry(content).or_default() += 1.0;
            }
        }
        let n = sample.len() as f64;
        let blocks_per_request = blocks / n.max(1.0);
        let pairs = 0.5 * n * (n - 1.0);
        // Sums in an order of their own, whatever the hasher's.
        let mut counts: Vec<f64> = holders.values().copied().collect();
        counts.sort_by(f64::total_cmp);
        let equal: f64 = counts.iter().map(|k| 0.5 * k * (k - 1.0)).sum::<f64>() / pairs.max(1.0);
        let distinct = counts.len() as f64;
        let of = |appearance: f64| {
            let contents = equal / appearance.powi(2);
            Self {
                requests,
                blocks_per_request,
                repeated: vec![RepeatedContent { contents, appearance }],
            }
        };
        if equal == 0.0 {
            return Self { requests, blocks_per_request, repeated: Vec::new() };
        }
        // Requests cannot repeat more than they hold. The rarer the contents, the fewer distinct ones account for the equal
        // pairs.
        let (mut low, mut high) = (equal / blocks_per_request, 1.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            let stored = Self { requests: sample.len(), ..of(middle) }.stored();
            if stored < distinct { low = middle } else { high = middle }
        }
        of(0.5 * (low + high))
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
        let (stored, blocks) = (self.stored(), self.requests as f64 * self.blocks_per_request);
        if stored > 0.0 { blocks / stored } else { 1.0 }
    }

    /// Different contents of the batch, expected.
    fn stored(&self) -> f64 {
        let requests = self.requests as f64;
        let distinct =
            |r: &RepeatedContent| r.contents * (1.0 - (1.0 - r.appearance).powf(requests));
        requests * self.unique_blocks() + self.repeated.iter().map(distinct).sum::<f64>()
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

    /// Requests of `m` blocks: each holds a content of `contents` with a chance, the rest occur once.
    fn drawn(requests: usize, m: usize, contents: u64, chance: f64, seed: u64) -> Vec<Vec<u64>> {
        let mut state = seed;
        let mut unit = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        (0..requests as u64)
            .map(|request| {
                let mut blocks: Vec<u64> = (0..contents).filter(|_| unit() < chance).collect();
                let own = (blocks.len() as u64..m as u64).map(|i| 1_000_000 + request * 1000 + i);
                blocks.extend(own);
                blocks
            })
            .collect()
    }

    #[test]
    fn samples_foretell_whole_batches() {
        let ratio = |requests: &[Vec<u64>]| {
            let all: usize = requests.iter().map(Vec::len).sum();
            let distinct: HashSet<u64> = requests.iter().flatten().copied().collect();
            all as f64 / distinct.len() as f64
        };
        for (contents, chance) in [(10, 1.0), (40, 0.3), (200, 0.05)] {
            let whole = drawn(400, 30, contents, chance, 7);
            let workload = Workload::of_sample(400, &whole[..60]);
            let (predicted, counted) = (workload.copies_ratio(), ratio(&whole));
            assert!((predicted / counted - 1.0).abs() < 0.1, "{chance}: {predicted} {counted}");
            assert!(ratio(&whole[..60]) < counted, "a sample shares less than the whole");
            let found = workload.repeated()[0];
            assert!((found.appearance / chance - 1.0).abs() < 0.25, "{chance}: {found:?}");
        }
        let apart = drawn(50, 8, 0, 0.0, 1);
        assert_eq!(Workload::of_sample(500, &apart).copies_ratio(), 1.0);
        assert_eq!(Workload::of_sample(5, &[]).copies_ratio(), 1.0);
        assert_eq!(Workload::of_sample(5, &[vec![1, 2]]).copies_ratio(), 1.0);
        // All alike: as many as one of them has.
        let same = vec![vec![1, 2, 3]; 4];
        assert!((Workload::of_sample(100, &same).copies_ratio() - 100.0).abs() < 1e-3);
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
