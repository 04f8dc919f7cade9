//! ClusterKV (arXiv 2412.03213): a prompt's keys are clustered, and every query attends to the clusters that it points
//! to.
//!
//! When the prompt is complete, the post-RoPE keys of each KV head but the first 16 are clustered by direction (k-means,
//! 80 tokens a cluster on average, 20 iterations at most); the means stay resident, the rows move, in f16 and sorted by cluster,
//! into a file that is read as memory ([`super::cold`]). A query head takes clusters in order of `q · mean` until they have as
//! many tokens as the budget, of the last as many as fit, and attends to those, to the sinks and to everything generated. The
//! first two layers keep everything.
//!
//! Differences from the released code: one choice per query head over clusters of its KV head without repeating keys; tokens
//! that are generated are not clustered (as in the authors' accuracy script); seeds of clusters are tokens at even distances.

use super::Budget;
use super::options::Options;
use super::policy::{Choice, LayerView, Observed, Policy};
use crate::error::Result;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClusterKv {
    budget: Budget,
    /// Tokens of a cluster, on average.
    size: u16,
    sinks: u16,
    /// Leading layers that keep everything.
    whole: u16,
}

impl ClusterKv {
    pub(crate) const NAME: &str = "clusterkv";
    pub(crate) const USAGE: &str = "clusterkv:SHARE[:size=80][:sinks=16][:whole=2]";
    /// A quarter of a prompt's tokens at a time.
    pub const QUARTER: Self = Self { budget: Budget::QUARTER, size: 80, sinks: 16, whole: 2 };

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let budget = Budget::parse(&mut options)?;
        let size = options.whole("size", Self::QUARTER.size, 1..=4096)?;
        let sinks = options.whole("sinks", Self::QUARTER.sinks, 1..=4096)?;
        let whole = options.whole("whole", Self::QUARTER.whole, 0..=4096)?;
        options.done(Self::USAGE)?;
        Ok(Self { budget, size, sinks, whole })
    }

    /// Clusters of `tokens` tokens.
    pub(crate) fn clusters(self, tokens: usize) -> usize {
        tokens.div_ceil(usize::from(self.size))
    }

    /// Clustered tokens of a prompt that a query attends to.
    pub(crate) fn tokens(self, prompt: usize) -> usize {
        self.budget.of(prompt).saturating_sub(usize::from(self.sinks))
    }

    /// Tokens of a prompt that are not clustered, in layers that are.
    pub(crate) fn sinks(self, prompt: usize) -> usize {
        usize::from(self.sinks).min(prompt)
    }
}

impl std::fmt::Display for ClusterKv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", Self::NAME, self.budget)?;
        let usual = Self::QUARTER;
        for (name, value, usual) in [
            ("size", self.size, usual.size),
            ("sinks", self.sinks, usual.sinks),
            ("whole", self.whole, usual.whole),
        ] {
            if value != usual {
                write!(f, ":{name}={value}")?;
            }
        }
        Ok(())
    }
}

impl Policy for ClusterKv {
    fn observed(&self) -> Observed {
        Observed::Nothing
    }

    fn most_kept(&self, prompt: usize) -> usize {
        prompt
    }

    fn varies(&self) -> bool {
        true
    }

    fn clusters(&self) -> Option<ClusterKv> {
        Some(*self)
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        let kept = match layer.number < usize::from(self.whole) {
            true => layer.tokens,
            false => self.sinks(layer.tokens),
        };
        Ok(Choice::alike(layer.kv_heads, (0..kept as u32).collect()))
    }
}
