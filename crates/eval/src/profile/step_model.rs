//! How long a step takes, from what it computes.
//!
//! A sum of terms that are not negative, one recipe's coefficients fitted to its own measured steps (never one recipe's scaled to another, as
//! in the predictor of arXiv 2503.24000, whose tables per algorithm are one table times constants). What rows cost is a
//! line between knots, since products of one row are bound by memory and those of many by arithmetic.

use kvasir_engine::StepWork;
use serde::{Deserialize, Serialize};

use super::nnls;

/// Numbers of rows between which a step's time is a line.
const KNOTS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// Terms beside the knots.
const OTHERS: usize = 7;

/// Weight of bends at knots, relative to a measured step.
const SMOOTH: f64 = 0.02;

/// A recipe's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepModel {
    /// Seconds of a step of as many rows as each of the knots.
    rows: Vec<f64>,
    /// Seconds for each of the other counts, in the order of [`terms`].
    others: Vec<f64>,
}

/// The share of the two knots around a number of rows. Beyond the last knot the last piece goes on.
fn knots(rows: usize) -> [f64; KNOTS.len()] {
    let mut shares = [0.0; KNOTS.len()];
    let rows = rows.max(KNOTS[0]) as f64;
    let above = KNOTS.iter().position(|knot| rows <= *knot as f64).unwrap_or(KNOTS.len() - 1);
    if above == 0 {
        shares[0] = 1.0;
        return shares;
    }
    let (low, high) = (KNOTS[above - 1] as f64, KNOTS[above] as f64);
    let share = (rows - low) / (high - low);
    shares[above - 1] = 1.0 - share;
    shares[above] = share;
    shares
}

fn terms(work: &StepWork) -> [f64; OTHERS] {
    [
        work.logit_rows as f64,
        work.sequences as f64,
        work.prefill_pairs as f64,
        work.prefill_context as f64,
        work.decode_context as f64,
        work.sealed_blocks as f64,
        work.completed_tokens as f64,
    ]
}

impl StepModel {
    /// Fits measured steps: their work, and the seconds they took. O(steps).
    pub fn fit(steps: &[(StepWork, f64)]) -> Self {
        let row = |(work, _): &(StepWork, f64)| [&knots(work.rows)[..], &terms(work)].concat();
        let rows: Vec<Vec<f64>> = steps.iter().map(row).collect();
        let times: Vec<f64> = steps.iter().map(|(_, seconds)| *seconds).collect();
        // Knots that no step is near lie on the line between their neighbours.
        let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
        let weight = SMOOTH * (times.len() as f64).sqrt() / mean.max(1e-9);
        let bends = KNOTS.windows(3).enumerate().map(|(i, knots)| {
            let [a, b, c] = [knots[0] as f64, knots[1] as f64, knots[2] as f64];
            let mut row = vec![0.0; KNOTS.len() + OTHERS];
            row[i] = -weight * (c - b) / (c - a);
            row[i + 1] = weight;
            row[i + 2] = -weight * (b - a) / (c - a);
            row
        });
        let mut found = nnls::solve(&rows, &times, &bends.collect::<Vec<_>>());
        let others = found.split_off(KNOTS.len().min(found.len()));
        Self { rows: found, others }
    }

    /// Seconds of a step.
    pub fn seconds(&self, work: &StepWork) -> f64 {
        let of = |shares: &[f64], costs: &[f64]| -> f64 {
            shares.iter().zip(costs).map(|(share, cost)| share * cost).sum()
        };
        of(&knots(work.rows), &self.rows) + of(&terms(work), &self.others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    #[test]
    fn what_follows_the_law_is_predicted() {
        let law = |work: &StepWork| {
            let rows = work.rows as f64;
            0.003
                + 0.0002 * rows.min(6.0)
                + 0.0005 * (rows - 6.0).max(0.0)
                + 4e-7 * work.decode_context as f64
                + 2e-8 * work.prefill_pairs as f64
                + 1e-4 * work.sealed_blocks as f64
        };
        let mut random = SplitMix64::new(3);
        let mut step = || {
            let mut work = StepWork::default();
            for _ in 0..random.next() % 12 + 1 {
                work.add((random.next() % 2000) as usize, 1, 0, 32);
            }
            if random.next().is_multiple_of(2) {
                work.add(
                    (random.next() % 1000) as usize,
                    (random.next() % 400 + 2) as usize,
                    0,
                    32,
                );
            }
            work
        };
        let seen: Vec<(StepWork, f64)> = (0..300).map(|_| step()).map(|w| (w, law(&w))).collect();
        let model = StepModel::fit(&seen);
        for _ in 0..100 {
            let work = step();
            let error = (model.seconds(&work) / law(&work) - 1.0).abs();
            assert!(error < 0.05, "{work:?}: {} {}", model.seconds(&work), law(&work));
        }
    }

    #[test]
    fn knots_share_a_row_and_go_on_beyond() {
        assert_eq!(knots(1)[..2], [1.0, 0.0]);
        assert_eq!(knots(0), knots(1));
        assert_eq!(knots(48)[5..7], [0.5, 0.5]);
        assert_eq!(knots(512)[8..], [0.0, 1.0]);
        assert_eq!(knots(768)[8..], [-1.0, 2.0]);
        assert_eq!(StepModel::fit(&[]).seconds(&StepWork::default()), 0.0);
    }
}
