//! StreamingLLM (arXiv 2309.17453): the first tokens (attention sinks) and the newest ones, of constant size however
//! long a text gets.
//!
//! Keys are read as if the cache were one short text: a query's distance to a sink is counted in cached tokens. In the
//! block-relative frame that is another rotation of the query for the sinks' block, and nothing is
//! rotated again. Prompts are computed whole; from their end on every query sees sinks and window only.

use super::Budget;
use super::options::Options;
use super::policy::{Choice, LayerView, Observed, Policy, Recent};
use crate::error::Result;
use crate::table::Stays;

/// How many tokens stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Size {
    Share(Budget),
    /// Sinks and window together.
    Tokens(u16),
}

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Streaming {
    size: Size,
    sinks: u16,
}

impl Streaming {
    pub(crate) const NAME: &str = "streaming";
    pub(crate) const USAGE: &str = "streaming:SHARE[:sinks=4] or streaming:tokens=N[:sinks=4]";
    /// Half of a prompt.
    pub const HALF: Self = Self { size: Size::Share(Budget::HALF), sinks: 4 };

    /// Of a budget, with the usual parameters.
    pub(super) const fn of(budget: Budget) -> Self {
        Self { size: Size::Share(budget), ..Self::HALF }
    }

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let sinks = options.whole("sinks", Self::HALF.sinks, 0..=32)?;
        let size = match options.has_number() {
            true => Size::Share(Budget::parse(&mut options)?),
            false => Size::Tokens(options.whole("tokens", 1024, sinks + 1..=u16::MAX)?),
        };
        options.done(Self::USAGE)?;
        Ok(Self { size, sinks })
    }

    /// Tokens of a cache, and the sinks among them; at least one is the query's own.
    fn sizes(&self, prompt: usize) -> (usize, usize) {
        let all = match self.size {
            Size::Share(budget) => budget.of(prompt),
            Size::Tokens(tokens) => usize::from(tokens),
        };
        (all, usize::from(self.sinks).min(all.saturating_sub(1)))
    }
}

impl std::fmt::Display for Streaming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.size {
            Size::Share(budget) => write!(f, "{}:{budget}", Self::NAME)?,
            Size::Tokens(tokens) => write!(f, "{}:tokens={tokens}", Self::NAME)?,
        }
        if self.sinks == Self::HALF.sinks { Ok(()) } else { write!(f, ":sinks={}", self.sinks) }
    }
}

impl Policy for Streaming {
    fn observed(&self) -> Observed {
        Observed::Nothing
    }

    fn least_prompt(&self) -> usize {
        match self.size {
            Size::Share(_) => 1,
            // All sinks are there then.
            Size::Tokens(_) => usize::from(self.sinks) + 1,
        }
    }

    fn most_kept(&self, prompt: usize) -> usize {
        self.sizes(prompt).0.min(prompt)
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        let (all, sinks) = self.sizes(layer.tokens);
        let kept = all.min(layer.tokens);
        let sinks = sinks.min(kept);
        let positions = (0..sinks).chain(layer.tokens - (kept - sinks)..layer.tokens);
        Ok(Choice::alike(layer.kv_heads, positions.map(|p| p as u32).collect()))
    }

    fn recent(&self, prompt: usize) -> Option<Recent> {
        let (all, sinks) = self.sizes(prompt);
        let whole = matches!(self.size, Size::Share(budget) if budget.is_whole());
        (!whole).then_some(Recent {
            first: sinks,
            stays: Stays::AsSink(all.saturating_sub(1)),
            window: all - sinks,
            scored: false,
        })
    }
}
