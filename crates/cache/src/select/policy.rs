//! What a policy sees of a layer, and what it answers.

use std::ops::Range;

use super::{Budget, ClusterKv};
use crate::error::Result;
use crate::table::Stays;

/// Which of a prompt's queries a policy wants to see the attention of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Observed {
    /// None.
    Nothing,
    /// The last so many; columns are sums over the query heads of a KV head.
    Last(usize),
    /// The last one; columns are by query head, one row after another.
    LastByQueryHead,
    /// Every one that is not at an end, in chunks, each of which sees its own chunk whole.
    Chunks(Chunks),
    /// Every one: prefixes that are found in the cache have no queries, so none are looked for.
    All,
}

/// Chunks of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunks {
    /// Tokens of one; the last may have fewer.
    pub(crate) size: usize,
    /// Tokens at both ends that are in none.
    pub(crate) first: usize,
    pub(crate) last: usize,
}

impl Chunks {
    /// The tokens that are not at an end.
    pub(crate) fn middle(&self, tokens: usize) -> Range<usize> {
        let first = self.first.min(tokens);
        first..tokens - self.last.min(tokens - first)
    }

    /// All chunks of a prompt, as positions.
    pub(crate) fn of(&self, prompt: usize) -> impl Iterator<Item = Range<usize>> {
        let (middle, size) = (self.middle(prompt), self.size);
        middle.clone().step_by(size).map(move |begin| begin..(begin + size).min(middle.end))
    }
}

impl Observed {
    /// Queries of a prompt that are seen.
    pub(crate) fn count(self, prompt: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Last(n) => n.min(prompt),
            Self::LastByQueryHead => prompt.min(1),
            Self::All | Self::Chunks(_) => prompt,
        }
    }

    /// Rows of columns of a KV head with `group` query heads.
    pub(crate) fn rows(self, group: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Last(_) | Self::All | Self::Chunks(_) => 1,
            Self::LastByQueryHead => group,
        }
    }
}

/// The positions that every KV head of a layer keeps, ascending.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Choice {
    /// One list a head, all of one length.
    pub(crate) heads: Vec<Vec<u32>>,
}

impl Choice {
    /// The same positions for every head.
    pub(crate) fn alike(heads: usize, positions: Vec<u32>) -> Self {
        Self { heads: vec![positions; heads] }
    }
}

/// A layer whose prompt is complete.
pub(crate) struct LayerView<'a> {
    /// Its number among the layers that attend to everything.
    pub(crate) number: usize,
    /// Tokens of the prompt.
    pub(crate) tokens: usize,
    /// KV heads.
    pub(crate) kv_heads: usize,
    /// KV heads that are stored together, and so must keep the same tokens.
    pub(crate) together: usize,
    /// Query heads of a KV head.
    pub(crate) group: usize,
    /// By KV head: attention that each token was paid by the observed queries, `[rows, tokens]` with as many rows as
    /// [`Observed::rows`] says.
    pub(crate) columns: &'a [Vec<f32>],
    /// Choices for the layers before it that attend to everything; none if the policy [decides alone](Policy::alone).
    pub(crate) before: &'a [Choice],
    /// What stays, for those that leave it to the prompt ([`Policy::quality`]).
    pub(crate) budget: Budget,
    /// Keys and values.
    pub(crate) rows: &'a dyn PromptRows,
}

/// The keys and values of a layer's prompt.
pub(crate) trait PromptRows {
    /// Channels of a head.
    fn dim(&self) -> usize;

    /// Of some tokens of a KV head: keys before RoPE, `[tokens, dim]`, and values' lengths.
    fn plain_keys(&self, kv_head: usize, tokens: Range<usize>) -> (Vec<f32>, Vec<f32>);
}

impl LayerView<'_> {
    /// Adds up the scores of heads that are stored together, so that they agree. `scores`: by head, `[tokens]`.
    pub(crate) fn join(&self, scores: &mut [Vec<f32>]) {
        for heads in scores.chunks_mut(self.together.max(1)) {
            let Some((first, others)) = heads.split_first_mut() else { continue };
            for other in &*others {
                first.iter_mut().zip(other).for_each(|(sum, score)| *sum += score);
            }
            for other in others {
                other.copy_from_slice(first);
            }
        }
    }
}

/// Chooses the tokens that stay. Immutable; everything a choice depends on is in the [`LayerView`].
pub(crate) trait Policy: std::fmt::Display {
    /// What it must see.
    fn observed(&self) -> Observed;

    /// Tokens that a sequence has when it chooses, at least: of a shorter prompt, what was generated belongs to it.
    fn least_prompt(&self) -> usize {
        1
    }

    /// Most tokens that a head keeps of a prompt: room for so many is taken beforehand.
    fn most_kept(&self, prompt: usize) -> usize;

    /// Whether it chooses for each layer without looking at others.
    fn alone(&self) -> bool {
        true
    }

    /// Whether it may keep fewer, as the prompt asks for.
    fn varies(&self) -> bool {
        false
    }

    /// The share of a prompt's worth that must stay, if its budget follows from that and from how much the prompt
    /// surprises the model.
    fn quality(&self) -> Option<f64> {
        None
    }

    /// How what does not stay is kept outside the pool, if it is.
    fn clusters(&self) -> Option<ClusterKv> {
        None
    }

    /// Whether what goes is remembered as sums.
    fn remembers(&self) -> bool {
        false
    }

    /// Whether kept tokens may be coded in blocks.
    fn can_be_coded(&self) -> bool {
        !self.recent(usize::MAX / 2).is_some_and(|recent| recent.scored)
    }

    /// Chooses for one layer.
    ///
    /// # Errors
    /// Only bugs.
    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice>;

    /// What those keep that go on choosing while tokens are generated; `prompt` is the prompt's length.
    fn recent(&self, _prompt: usize) -> Option<Recent> {
        None
    }
}

/// Keeps everything: prompts whose rows are to be stored otherwise.
#[derive(Debug)]
pub(crate) struct Whole;

impl std::fmt::Display for Whole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no policy")
    }
}

impl Policy for Whole {
    fn observed(&self) -> Observed {
        Observed::Nothing
    }

    fn most_kept(&self, prompt: usize) -> usize {
        prompt
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        let all = (0..layer.tokens as u32).collect();
        Ok(Choice::alike(layer.kv_heads, all))
    }
}

/// What a policy that goes on choosing keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Recent {
    /// Leading tokens of the kept ones that no window takes away, and how they stay.
    pub(crate) first: usize,
    pub(crate) stays: Stays,
    /// Newest tokens, the query's own included.
    pub(crate) window: usize,
    /// Whether queries are observed on and on, and tokens that leave the window may take the rows of others.
    pub(crate) scored: bool,
}
