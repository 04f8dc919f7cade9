//! What a recipe does to the lengths of answers (arXiv 2503.24000, section 4.3).
//!
//! `D = (L_f16 − L_recipe) / L_f16`, positive where answers become shorter. No value is dropped, however large (the paper's
//! plot leaves out answers that became three times as long). Answers that were cut at the most tokens allowed have no length:
//! where only the recipe's was cut it is at least so much longer, where f16's was nothing is known. They are counted apart.

use serde::{Deserialize, Serialize};

use super::bootstrap::{Interval, interval};
use crate::percentiles::median;

/// Edges of the histogram of D, from longer to shorter; what is beyond is in the first or the last bin.
const EDGES: [f64; 13] =
    [-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, -0.05, 0.05, 0.25, 0.5, 0.75, 0.9, 1.0];

/// A change of half.
const LARGE: f64 = 0.5;

/// Lengths of answers to one sample, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Under f16.
    pub baseline: usize,
    /// Under the recipe.
    pub recipe: usize,
    /// Whether these were cut at the most tokens allowed.
    pub capped: (bool, bool),
}

/// What is known of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shift {
    /// D.
    Known(f64),
    /// D is at most this.
    AtMost(f64),
    /// Nothing.
    Unknown,
}

impl Lengths {
    /// D of the sample. An answer of no tokens counts as one.
    pub fn shift(&self) -> Shift {
        let baseline = self.baseline.max(1) as f64;
        let d = (baseline - self.recipe.max(1) as f64) / baseline;
        match self.capped {
            (false, false) => Shift::Known(d),
            (false, true) => Shift::AtMost(d),
            (true, _) => Shift::Unknown,
        }
    }
}

/// How lengths of all samples changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LengthShift {
    /// Samples whose both answers ended by themselves.
    pub known: usize,
    /// Samples whose answer under the recipe alone was cut.
    pub capped_recipe: usize,
    /// Samples whose answer under f16 was cut.
    pub capped_baseline: usize,
    /// Mean D of the known ones.
    pub mean: f64,
    /// Of the mean.
    pub interval: Option<Interval>,
    /// Median D of the known ones.
    pub median: f64,
    /// Share of answers at least half as long again, of those whose D is known or bounded to be so.
    pub longer: f64,
    /// Share of answers at most half as long, of the same.
    pub shorter: f64,
    /// Mean length under the recipe by mean length under f16, known ones.
    pub length_ratio: f64,
    /// How many D are below each edge but not below the one before; the last has those above.
    pub histogram: Vec<(f64, usize)>,
}

impl LengthShift {
    /// Of some samples. O(samples · drawings of the interval).
    pub fn of(samples: &[Lengths]) -> Self {
        let (mut known, mut bounded, mut capped_baseline) = (Vec::new(), Vec::new(), 0);
        let mut sums = [0usize; 2];
        for sample in samples {
            match sample.shift() {
                Shift::Known(d) => {
                    known.push(d);
                    sums[0] += sample.baseline;
                    sums[1] += sample.recipe;
                }
                Shift::AtMost(d) => bounded.push(d),
                Shift::Unknown => capped_baseline += 1,
            }
        }
        // What is cut and not yet half as long again may be anything beyond that.
        let certain = bounded.iter().filter(|d| **d <= -LARGE).count();
        let of = (known.len() + certain).max(1) as f64;
        let longer = known.iter().filter(|d| **d <= -LARGE).count() + certain;
        let shorter = known.iter().filter(|d| **d >= LARGE).count();
        let mut histogram: Vec<(f64, usize)> = EDGES.iter().map(|edge| (*edge, 0)).collect();
        for d in &known {
            let bin = EDGES.iter().position(|edge| d < edge).unwrap_or(EDGES.len() - 1);
            histogram[bin].1 += 1;
        }
        Self {
            known: known.len(),
            capped_recipe: bounded.len(),
            capped_baseline,
            mean: known.iter().sum::<f64>() / known.len().max(1) as f64,
            interval: interval(&known),
            median: median(&known),
            longer: longer as f64 / of,
            shorter: shorter as f64 / of,
            length_ratio: sums[1] as f64 / sums[0].max(1) as f64,
            histogram,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(baseline: usize, recipe: usize, capped: (bool, bool)) -> Lengths {
        Lengths { baseline, recipe, capped }
    }

    #[test]
    fn shifts_by_hand() {
        let ended = (false, false);
        assert_eq!(lengths(100, 50, ended).shift(), Shift::Known(0.5));
        assert_eq!(lengths(100, 150, ended).shift(), Shift::Known(-0.5));
        // Far beyond what the paper's plot drops.
        assert_eq!(lengths(10, 1000, ended).shift(), Shift::Known(-99.0));
        assert_eq!(lengths(0, 1, ended).shift(), Shift::Known(0.0));
        assert_eq!(lengths(100, 256, (false, true)).shift(), Shift::AtMost(-1.56));
        assert_eq!(lengths(256, 256, (true, true)).shift(), Shift::Unknown);
        assert_eq!(lengths(256, 9, (true, false)).shift(), Shift::Unknown);
    }

    #[test]
    fn nothing_is_dropped_and_what_was_cut_is_counted_apart() {
        let ended = (false, false);
        let samples = [
            lengths(100, 100, ended),
            lengths(100, 160, ended),
            lengths(100, 900, ended),
            lengths(100, 40, ended),
            // At least half as long again.
            lengths(100, 256, (false, true)),
            // May be.
            lengths(200, 256, (false, true)),
            lengths(256, 100, (true, false)),
        ];
        let shift = LengthShift::of(&samples);
        assert_eq!((shift.known, shift.capped_recipe, shift.capped_baseline), (4, 2, 1));
        // 0, -.6, -8, .6
        assert!((shift.mean + 2.0).abs() < 1e-12 && (shift.median + 0.3).abs() < 1e-12);
        assert!((shift.longer - 3.0 / 5.0).abs() < 1e-12);
        assert!((shift.shorter - 1.0 / 5.0).abs() < 1e-12);
        assert!((shift.length_ratio - 3.0).abs() < 1e-12);
        assert_eq!(shift.histogram.iter().map(|(_, n)| n).sum::<usize>(), 4);
        assert_eq!(shift.histogram[0], (-2.0, 1));
    }

    #[test]
    fn no_samples_are_no_change() {
        let shift = LengthShift::of(&[]);
        assert_eq!((shift.known, shift.mean, shift.longer, shift.interval), (0, 0.0, 0.0, None));
    }
}
