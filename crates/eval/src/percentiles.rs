//! Percentiles of what was measured.

use serde::Serialize;

/// The middle, and what one in ten and one in a hundred exceed.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Percentiles {
    /// Half of the values are above.
    pub p50: f64,
    /// A tenth of the values is above.
    pub p90: f64,
    /// A hundredth of the values is above.
    pub p99: f64,
}

impl Percentiles {
    /// Percentiles of `values`, in their unit; `None` of nothing.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share| percentile(&sorted, share);
        Some(Self { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)? })
    }
}

/// The value that `share` (0 to 1) of `sorted` is below, on the line between its neighbours, as numpy does.
pub(crate) fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted.get(place.floor() as usize)?, sorted.get(place.ceil() as usize)?);
    Some(below + (above - below) * place.fract())
}

/// The middle value, or the mean of the middle two; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    Percentiles::of(values).map_or(0.0, |percentiles| percentiles.p50)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_values_as_in_numpy() {
        let values: Vec<f64> = (1..=10).rev().map(f64::from).collect();
        let found = Percentiles::of(&values).unwrap();
        for (found, expected) in [(found.p50, 5.5), (found.p90, 9.1), (found.p99, 9.91)] {
            assert!((found - expected).abs() < 1e-12, "{found}");
        }
        assert_eq!(Percentiles::of(&[7.0]), Some(Percentiles { p50: 7.0, p90: 7.0, p99: 7.0 }));
        assert_eq!(Percentiles::of(&[]), None);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
