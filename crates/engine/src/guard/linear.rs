//! A weight for each feature, standardised, and one for a constant.

use serde::{Deserialize, Serialize};

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// In the order of a row.
    pub features: Vec<Weight>,
    /// Added always.
    pub constant: f64,
}

/// One feature's.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    /// The feature's name; empty where nobody asks.
    pub name: String,
    /// Taken off first.
    pub mean: f64,
    /// Then multiplied by.
    pub scale: f64,
    /// Then by this.
    pub weight: f64,
    /// The least that was seen: what is below counts as this. Of what nobody has seen nothing is said.
    pub low: f64,
    /// The largest.
    pub high: f64,
}

impl Linear {
    /// The number, or the logarithm of the odds. Features that are no numbers, or that the row lacks, count as their means.
    pub fn sum(&self, row: &[f64]) -> f64 {
        let all = self.features.iter().zip(row);
        let known = all.filter(|(_, x)| x.is_finite());
        let part =
            |(f, x): (&Weight, &f64)| (x.max(f.low).min(f.high) - f.mean) * f.scale * f.weight;
        self.constant + known.map(part).sum::<f64>()
    }

    /// The chance, of a model of chances.
    pub fn chance(&self, row: &[f64]) -> f64 {
        chance(self.sum(row))
    }
}

/// Of the logarithm of odds.
pub fn chance(log_odds: f64) -> f64 {
    1.0 / (1.0 + (-log_odds).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_by_hand() {
        let name = String::new;
        let one = |mean, scale, weight| Weight {
            name: name(),
            mean,
            scale,
            weight,
            low: -5.0,
            high: 10.0,
        };
        let model =
            Linear { features: vec![one(1.0, 2.0, 3.0), one(0.0, 1.0, -1.0)], constant: 0.5 };
        assert_eq!(model.sum(&[2.0, 4.0]), 0.5 + 6.0 - 4.0);
        assert_eq!(model.sum(&[2.0]), 6.5);
        assert_eq!((model.sum(&[1e9]), model.sum(&[-6.0])), (0.5 + 54.0, 0.5 - 36.0));
        assert_eq!(model.sum(&[2.0, f64::NAN]), 6.5);
        assert_eq!(Linear::default().chance(&[]), 0.5);
        assert_eq!((chance(1000.0), chance(-1000.0)), (1.0, 0.0));
    }
}
