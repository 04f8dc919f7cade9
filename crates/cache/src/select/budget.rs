//! How much of a prompt stays.

use super::options::Options;
use crate::error::Result;

/// The share of a prompt's tokens, or of something else, that stays, in thousandths: above 0, at most 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Budget(u16);

impl Budget {
    /// Half of them.
    pub const HALF: Self = Self(500);
    /// A quarter of them.
    pub(crate) const QUARTER: Self = Self(250);
    /// Three quarters of them.
    pub(crate) const THREE_QUARTERS: Self = Self(750);
    /// Six tenths of them.
    pub(crate) const SIX_TENTHS: Self = Self(600);

    /// Reads the number after a policy's name.
    ///
    /// # Errors
    /// [`crate::CacheError::Option`] if it is missing, no number, or out of range.
    pub(crate) fn parse(options: &mut Options<'_>) -> Result<Self> {
        let share = options
            .number("a share above 0 and at most 1", |share| (0.001..=1.0).contains(&share))?;
        Ok(Self((share * 1000.0).round() as u16))
    }

    /// At least `share` of the tokens, in the steps that there are.
    pub(crate) fn at_least(share: f64) -> Self {
        Self((share * 1000.0).ceil().clamp(1.0, 1000.0) as u16)
    }

    /// Everything.
    pub(crate) const WHOLE: Self = Self(1000);

    /// As a number.
    pub(crate) fn share(self) -> f32 {
        f32::from(self.0) / 1000.0
    }

    /// Tokens that stay of `tokens`: rounded down as kvpress does, but never none.
    pub(crate) fn of(self, tokens: usize) -> usize {
        (tokens / 1000 * usize::from(self.0) + tokens % 1000 * usize::from(self.0) / 1000)
            .clamp(tokens.min(1), tokens)
    }

    /// The same of something short, rounded up: what goes is rounded down.
    pub(crate) fn of_rounded_up(self, n: usize) -> usize {
        n - n * usize::from(1000 - self.0) / 1000
    }

    /// Whether everything stays.
    pub(crate) fn is_whole(self) -> bool {
        self.0 >= 1000
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.share())
    }
}
