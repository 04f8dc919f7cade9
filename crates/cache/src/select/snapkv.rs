//! SnapKV (arXiv 2404.14469): a token stays if the prompt's last queries attend to it or to its neighbours.
//!
//! `score(t) = pool(mean over the last W queries, and over the query heads of a KV head, of their attention to t)`; the
//! last W tokens always stay. Differences from the released code: it repeats keys for every query head and chooses
//! for each; here a KV head chooses once for its query heads, by their mean, as kvpress does. A
//! budget smaller than the window keeps the newest tokens of it.

use super::options::Options;
use super::policy::{Choice, LayerView, Observed, Policy};
use super::{Budget, rank};
use crate::error::Result;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnapKv {
    budget: Budget,
    window: u16,
    kernel: u16,
}

impl SnapKv {
    pub(crate) const NAME: &str = "snapkv";
    pub(crate) const USAGE: &str = "snapkv:SHARE[:window=64][:kernel=5]";
    /// Half of a prompt, with kvpress' window and pool.
    pub const HALF: Self = Self { budget: Budget::HALF, window: 64, kernel: 5 };

    /// Of a budget, with the usual parameters.
    pub(super) const fn of(budget: Budget) -> Self {
        Self { budget, ..Self::HALF }
    }

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let budget = Budget::parse(&mut options)?;
        let window = options.whole("window", Self::HALF.window, 1..=4096)?;
        let kernel = options.whole("kernel", Self::HALF.kernel, 1..=255)? | 1;
        options.done(Self::USAGE)?;
        Ok(Self { budget, window, kernel })
    }
}

impl std::fmt::Display for SnapKv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", Self::NAME, self.budget)?;
        if self.window != Self::HALF.window {
            write!(f, ":window={}", self.window)?;
        }
        if self.kernel != Self::HALF.kernel {
            write!(f, ":kernel={}", self.kernel)?;
        }
        Ok(())
    }
}

/// Scores of one layer's heads by a window of queries; tokens of the window itself come before all others, the newest
/// first.
pub(super) fn window_scores(layer: &LayerView<'_>, window: usize, kernel: usize) -> Vec<Vec<f32>> {
    let window = window.min(layer.tokens);
    let before = layer.tokens - window;
    let scale = 1.0 / (window * layer.group) as f32;
    let mut scores: Vec<Vec<f32>> = layer
        .columns
        .iter()
        .map(|columns| {
            let means: Vec<f32> = columns[..before].iter().map(|sum| sum * scale).collect();
            rank::pool(&means, kernel)
        })
        .collect();
    layer.join(&mut scores);
    for scores in &mut scores {
        scores.resize(layer.tokens, f32::INFINITY);
    }
    scores
}

impl Policy for SnapKv {
    fn observed(&self) -> Observed {
        Observed::Last(usize::from(self.window))
    }

    fn most_kept(&self, prompt: usize) -> usize {
        self.budget.of(prompt)
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        let scores = window_scores(layer, usize::from(self.window), usize::from(self.kernel));
        let count = self.most_kept(layer.tokens);
        Ok(Choice { heads: scores.iter().map(|scores| rank::top(scores, count)).collect() })
    }
}
