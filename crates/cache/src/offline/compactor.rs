//! How much of a context's worth a share of its tokens keeps (Compactor, arXiv 2507.08143, context-calibrated compression).
//!
//! Kept quality at a share ρ follows `f(ρ) = (e^{ρb} − 1) / (e^b − 1)`, which is 0 for nothing and 1 for everything; b falls
//! the fewer tokens a context can do with, and is linear in how much it surprises the model, `b = slope · NLL + intercept`.
//!
//! The paper fits the scores of benchmarks, and published no code for it. Here quality is what of the context's worth is
//! left: the nats that it takes off the text after it, which no benchmark has to be at hand for. All shares of all
//! contexts are fitted at once, in nats, so that a context that hardly helps says as little; likelihoods beyond those that
//! were seen count as the nearest one.

use super::{Tensor, Tensors};

/// Bounds of b: beyond them the curve is a step.
const STEEPEST: f64 = 60.0;

/// Bounds of the slope, in parts of b per nat.
const MOST_SLOPE: f64 = 30.0;

/// Sides of the grid that is searched, each of the rounds around the best point of the one before.
const GRID: usize = 40;
const ROUNDS: usize = 6;

/// What was measured of one context.
#[derive(Debug, Clone, PartialEq)]
pub struct ContextWorth {
    /// Mean negative log likelihood of its own tokens, in nats.
    pub nll: f64,
    /// Nats that it takes off the text after it.
    pub worth: f64,
    /// Shares of it, and the nats that they take off.
    pub kept: Vec<(f64, f64)>,
}

/// The curve of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CompactorTable {
    slope: f32,
    intercept: f32,
    /// Least and largest likelihood that was seen.
    seen: [f32; 2],
}

impl CompactorTable {
    /// Fits what was measured. Contexts that take nothing off say nothing; without any others quality falls as the share does.
    /// O(contexts · shares).
    pub fn fit(contexts: &[ContextWorth]) -> Self {
        let told: Vec<&ContextWorth> = contexts.iter().filter(|c| c.worth > 0.0).collect();
        let seen = told.iter().fold([f32::INFINITY, f32::NEG_INFINITY], |[least, most], c| {
            [least.min(c.nll as f32), most.max(c.nll as f32)]
        });
        if told.is_empty() {
            return Self { slope: 0.0, intercept: 0.0, seen: [0.0; 2] };
        }
        let middle = f64::from(seen[0] + seen[1]) / 2.0;
        let of = |slope: f64, at_middle: f64| Self {
            slope: slope as f32,
            intercept: (at_middle - slope * middle) as f32,
            seen,
        };
        let scale: f64 = told.iter().map(|c| c.worth.powi(2)).sum();
        let error = |table: Self| -> f64 {
            let context = |c: &&ContextWorth| -> f64 {
                let b = table.b(c.nll);
                let of_share =
                    |(share, nats): &(f64, f64)| (c.worth * kept(b, *share) - nats).powi(2);
                c.kept.iter().map(of_share).sum()
            };
            // A slope that nothing asks for is 0.
            let slope = 1e-9 * scale * (f64::from(table.slope) / MOST_SLOPE).powi(2);
            told.iter().map(context).sum::<f64>() + slope
        };
        let (mut centre, mut spans) = ([0.0, 0.0], [MOST_SLOPE, STEEPEST]);
        let mut best = (error(of(0.0, 0.0)), centre);
        for _ in 0..ROUNDS {
            let at = |i: usize, axis: usize| {
                centre[axis] + spans[axis] * (2.0 * i as f64 / GRID as f64 - 1.0)
            };
            for i in 0..=GRID {
                for j in 0..=GRID {
                    let point = [
                        at(i, 0).clamp(-MOST_SLOPE, MOST_SLOPE),
                        at(j, 1).clamp(-STEEPEST, STEEPEST),
                    ];
                    let found = error(of(point[0], point[1]));
                    if found < best.0 {
                        best = (found, point);
                    }
                }
            }
            centre = best.1;
            spans = spans.map(|span| span / 4.0);
        }
        of(best.1[0], best.1[1])
    }

    fn b(&self, nll: f64) -> f64 {
        let nll = nll.max(self.seen[0].into()).min(self.seen[1].into());
        (f64::from(self.slope) * nll + f64::from(self.intercept)).clamp(-STEEPEST, STEEPEST)
    }

    /// The least share of a context of this mean likelihood, in nats, that keeps `quality` of its worth: both above 0
    /// and at most 1.
    pub fn share(&self, nll: f64, quality: f64) -> f64 {
        let b = self.b(nll);
        match b.abs() < 1e-6 {
            true => quality,
            false => ((quality * b.exp_m1()).ln_1p() / b).clamp(0.0, 1.0),
        }
    }

    pub(super) fn to_tensors(self) -> Vec<Tensor> {
        let data = vec![self.slope, self.intercept, self.seen[0], self.seen[1]];
        vec![Tensor { name: "curve".to_owned(), shape: vec![4], data }]
    }

    pub(super) fn from_tensors(source: &Tensors) -> Result<Self, String> {
        let curve = source.get("curve", &[4])?;
        let table = Self { slope: curve[0], intercept: curve[1], seen: [curve[2], curve[3]] };
        match table.seen[0] <= table.seen[1] {
            true => Ok(table),
            false => Err(format!("likelihoods from {} to {}", table.seen[0], table.seen[1])),
        }
    }
}

/// `f`, the quality that a share keeps.
fn kept(b: f64, share: f64) -> f64 {
    if b.abs() < 1e-6 { share } else { (share * b).exp_m1() / b.exp_m1() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(nll: f64, worth: f64, b: f64) -> ContextWorth {
        let shares = [0.05, 0.1, 0.25, 0.5, 0.75];
        ContextWorth { nll, worth, kept: shares.map(|s| (s, worth * kept(b, s))).to_vec() }
    }

    #[test]
    fn the_curve_goes_through_both_ends_and_back() {
        for b in [-60.0, -7.0, -0.1, 0.0, 1e-9, 0.1, 5.0, 60.0] {
            assert!(kept(b, 0.0).abs() < 1e-12 && (kept(b, 1.0) - 1.0).abs() < 1e-12, "{b}");
            let table = CompactorTable { slope: 0.0, intercept: b as f32, seen: [0.0; 2] };
            for quality in [0.01, 0.5, 0.9, 0.95, 1.0] {
                let share = table.share(3.0, quality);
                assert!((kept(b, share) - quality).abs() < 1e-5, "{b}: {share} for {quality}");
            }
        }
        // From the definition, by hand: e^-2 = .1353, e^-4 = .0183.
        assert!((kept(-4.0, 0.5) - (1.0 - 0.135_335) / (1.0 - 0.018_316)).abs() < 1e-5);
    }

    #[test]
    fn a_known_line_is_found_whatever_its_contexts_are_worth() {
        let line = |nll: f64| 3.0 * nll - 14.0;
        let contexts: Vec<ContextWorth> = (0..8)
            .map(|i| 1.5 + 0.3 * f64::from(i))
            .map(|nll| context(nll, 1.0 / nll, line(nll)))
            .collect();
        let table = CompactorTable::fit(&contexts);
        for nll in [1.5, 2.0, 3.6] {
            assert!((table.b(nll) - line(nll)).abs() < 0.05, "{} of {}", table.b(nll), line(nll));
        }
        // Beyond what was seen, the nearest.
        assert_eq!(table.b(0.1), table.b(1.5));
        assert_eq!(table.b(9.0), table.b(3.6));
        assert!(table.share(3.6, 0.95) > table.share(1.5, 0.95));
    }

    #[test]
    fn what_is_worth_nothing_says_nothing() {
        let useless = ContextWorth { nll: 9.0, worth: -0.2, kept: vec![(0.5, 3.0)] };
        assert_eq!(CompactorTable::fit(std::slice::from_ref(&useless)).share(2.0, 0.9), 0.9);
        let told = [context(2.0, 0.5, -6.0), context(2.0, 0.1, -6.0)];
        let with: Vec<ContextWorth> = told.iter().cloned().chain([useless]).collect();
        let table = CompactorTable::fit(&told);
        assert_eq!(CompactorTable::fit(&with), table);
        assert!((table.b(5.0) + 6.0).abs() < 0.05 && table.slope.abs() < 1e-3, "{table:?}");
    }
}
