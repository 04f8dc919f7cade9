//! Whether and how blocks are shared: `--kv-sharing`.

use crate::error::{CacheError, Result};

/// Where candidates for sharing come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SharingMode {
    /// Nothing is shared but equal prefixes.
    #[default]
    Off,
    /// Blocks of the same token ids, at any position.
    Tokens,
    /// Blocks whose sketch (signs of random projections) is close, too.
    Sketch,
    /// The paper's tree over all requests of a batch.
    Tree,
}

impl SharingMode {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Off, "off"),
        (Self::Tokens, "tokens"),
        (Self::Sketch, "sketch"),
        (Self::Tree, "tree"),
    ];

    /// As in `--kv-sharing`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(mode, _)| *mode == self).map_or("off", |(_, name)| name)
    }
}

/// A mode, and how different what is shared may be.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sharing {
    /// Where candidates come from.
    pub mode: SharingMode,
    /// `tokens` and `sketch`: largest relative squared error beyond the codec's own, of keys and of
    /// values each; 0 shares equal blocks only. `tree`: least cosine of keys. `None` is the default.
    pub limit: Option<f32>,
}

impl Sharing {
    /// Nothing is shared but equal prefixes.
    pub const OFF: Self = Self { mode: SharingMode::Off, limit: None };

    /// What plain rows may differ by: a cosine of .98.
    pub const LIMIT: f32 = 0.04;
    /// What coefficients may differ by. More than plain rows, because the mean, which is most of a key
    /// and alike in all, is not in the denominator any more. Measured on SmolLM2's retrieval workload at
    /// 3 bits, .04 · .1 · .15 give ratios of 10 · 13.6 · 15.2 at the same divergence.
    pub const COEFFICIENT_LIMIT: f32 = 0.15;
    /// The paper's threshold.
    pub const TREE_THRESHOLD: f32 = 0.7;

    /// Most relative squared error of a shared block whose own codec would leave `own_error`; of
    /// `coefficients`, or of plain rows.
    pub(crate) fn most_error(self, own_error: f32, coefficients: bool) -> f32 {
        let default = if coefficients { Self::COEFFICIENT_LIMIT } else { Self::LIMIT };
        match self.limit {
            Some(0.0) => 0.0,
            limit => own_error + limit.unwrap_or(default.max(own_error)),
        }
    }

    /// Threshold of the tree.
    pub fn threshold(self) -> f32 {
        self.limit.unwrap_or(Self::TREE_THRESHOLD)
    }
}

impl std::str::FromStr for Sharing {
    type Err = CacheError;

    /// `MODE` or `MODE:LIMIT`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, limit) = match text.split_once(':') {
            Some((name, limit)) => (name, Some(limit)),
            None => (text, None),
        };
        let mode = SharingMode::ALL.iter().find(|(_, known)| *known == name).map(|(mode, _)| *mode);
        let bad = || CacheError::UnknownSharing { given: text.to_owned() };
        let mode = mode.ok_or_else(bad)?;
        let limit = match limit {
            Some(limit) => {
                let limit: Option<f32> = limit.parse().ok();
                let fits = |l: &f32| (0.0..1.0).contains(l) && mode != SharingMode::Off;
                Some(limit.filter(fits).ok_or_else(bad)?)
            }
            None => None,
        };
        Ok(Self { mode, limit })
    }
}

impl std::fmt::Display for Sharing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.mode.name())?;
        self.limit.map_or(Ok(()), |limit| write!(f, ":{limit}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for text in ["off", "tokens", "sketch:0.1", "tree:0.7", "tokens:0"] {
            assert_eq!(text.parse::<Sharing>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_limits_and_modes_are_refused() {
        for text in
            ["", "on", "tokens:", "tokens:1", "tokens:-0.1", "tokens:x", "off:0.1", "tree:NaN"]
        {
            let error = text.parse::<Sharing>().unwrap_err().to_string();
            assert!(error.contains("off, tokens, sketch, tree"), "{error}");
        }
    }
}
