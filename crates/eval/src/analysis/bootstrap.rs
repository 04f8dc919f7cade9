//! Intervals without assumptions (Efron 1979): a statistic of many samples drawn, with replacement, from those that there are.

use serde::{Deserialize, Serialize};

use crate::percentiles::percentile;
use crate::random::SplitMix64;

/// Drawings.
const DRAWINGS: usize = 2000;

/// Bounds of the middle 95 %.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// 2.5th percentile.
    pub low: f64,
    /// 97.5th percentile.
    pub high: f64,
}

/// The interval of the mean of `values`; none if there are no values. The same for the same values. O(values · drawings).
pub fn interval(values: &[f64]) -> Option<Interval> {
    if values.is_empty() {
        return None;
    }
    let mut random = SplitMix64::new(values.len() as u64);
    let mut means: Vec<f64> = (0..DRAWINGS)
        .map(|_| {
            let draw = |_| values[(random.next() % values.len() as u64) as usize];
            (0..values.len()).map(draw).sum::<f64>() / values.len() as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    Some(Interval { low: percentile(&means, 0.025)?, high: percentile(&means, 0.975)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_normal_law() {
        // 30 of 100: deviation of the mean √(.3 · .7 / 100) = .0458, and 1.96 of those.
        let values: Vec<f64> = (0..100).map(|i| f64::from(u8::from(i < 30))).collect();
        let found = interval(&values).unwrap();
        assert!((found.low - (0.3 - 0.0898)).abs() < 0.015, "{found:?}");
        assert!((found.high - (0.3 + 0.0898)).abs() < 0.015, "{found:?}");
        assert_eq!(interval(&values), Some(found));
    }

    #[test]
    fn nothing_and_what_is_always_so() {
        assert_eq!(interval(&[]), None);
        assert_eq!(interval(&[0.0; 9]), Some(Interval { low: 0.0, high: 0.0 }));
        assert_eq!(interval(&[1.0]), Some(Interval { low: 1.0, high: 1.0 }));
    }
}
