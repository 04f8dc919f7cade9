//! H2O (arXiv 2306.14048): the tokens that were paid most attention so far (heavy hitters), and the newest ones.
//!
//! Every token's score is the sum of the attention that all queries so far have paid it, of the prompt and of what was
//! generated, over the query heads of a KV head. Half of the budget are the newest tokens. When one of them
//! leaves their window it takes the place of the heavy hitter with the least score, if its own is higher: in that token's very
//! row, so a cache neither grows nor moves. Keys keep their positions.
//!
//! Differences from the released code: KV heads are not repeated for query heads; sums come from the attention
//! kernel, over the causal part only. Tokens come and go one by one, so blocks cannot be coded.

use std::collections::VecDeque;

use super::Budget;
use super::options::Options;
use super::policy::{Choice, LayerView, Observed, Policy, Recent};
use super::rank;
use super::state::Memory;
use crate::append::clamp;
use crate::error::{CacheError, Result};
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;
use crate::table::Stays;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct H2o {
    budget: Budget,
}

impl H2o {
    pub(crate) const NAME: &str = "h2o";
    pub(crate) const USAGE: &str = "h2o:SHARE";
    /// Half of a prompt.
    pub const HALF: Self = Self { budget: Budget::HALF };

    /// Of a budget.
    pub(super) const fn of(budget: Budget) -> Self {
        Self { budget }
    }

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let budget = Budget::parse(&mut options)?;
        options.done(Self::USAGE)?;
        Ok(Self { budget })
    }

    /// Heavy hitters, and newest tokens, of which there is at least one: the query's own.
    fn sizes(&self, prompt: usize) -> (usize, usize) {
        let all = self.budget.of(prompt);
        (all / 2, all - all / 2)
    }
}

impl std::fmt::Display for H2o {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", Self::NAME, self.budget)
    }
}

impl Policy for H2o {
    fn observed(&self) -> Observed {
        Observed::All
    }

    fn most_kept(&self, prompt: usize) -> usize {
        self.budget.of(prompt)
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        let (heavy, recent) = self.sizes(layer.tokens);
        let before = layer.tokens - recent;
        let heads = layer.columns.iter().map(|columns| {
            let mut positions = rank::top(&columns[..before], heavy);
            positions.extend((before..layer.tokens).map(|p| p as u32));
            positions
        });
        Ok(Choice { heads: heads.collect() })
    }

    fn recent(&self, prompt: usize) -> Option<Recent> {
        let (heavy, recent) = self.sizes(prompt);
        (!self.budget.is_whole()).then_some(Recent {
            first: heavy,
            stays: Stays::Always,
            window: recent,
            scored: true,
        })
    }
}

/// Scores of one group's tokens.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scores {
    /// Of the heavy hitters, by row.
    heavy: Vec<f32>,
    /// Of the newest tokens, oldest first.
    recent: VecDeque<f32>,
    /// Position of the first of those.
    oldest: usize,
}

impl Scores {
    /// Those of the tokens that were chosen of a prompt. `columns`: `[prompt]`.
    pub(super) fn new(columns: &[f32], positions: &[u32], heavy: usize) -> Self {
        let (first, recent) = positions.split_at(heavy.min(positions.len()));
        let score = |position: &u32| columns.get(*position as usize).copied().unwrap_or(0.0);
        Self {
            heavy: first.iter().map(score).collect(),
            recent: recent.iter().map(score).collect(),
            oldest: recent.first().map_or(columns.len(), |p| *p as usize),
        }
    }

    /// Bytes of all of them, with a window of `window` tokens and one that is about to leave.
    pub(super) fn num_bytes(&self, window: usize) -> usize {
        let recent = if self.recent.is_empty() { 0 } else { window + 1 };
        4 * (self.heavy.len() + recent)
    }

    /// Adds what heavy hitter `row` was paid.
    pub(super) fn add_heavy(&mut self, row: usize, paid: f32) {
        if let Some(score) = self.heavy.get_mut(row) {
            *score += paid;
        }
    }

    /// Adds what the token at `position` was paid.
    pub(super) fn add_recent(&mut self, position: usize, paid: f32) {
        let Some(at) = position.checked_sub(self.oldest) else { return };
        if self.recent.len() <= at {
            self.recent.resize(at + 1, 0.0);
        }
        self.recent[at] += paid;
    }

    /// The next token older than `oldest`, and the row it takes, if it takes one.
    fn leave(&mut self, oldest: usize) -> Option<(usize, Option<usize>)> {
        if self.oldest >= oldest {
            return None;
        }
        let (position, score) = (self.oldest, self.recent.pop_front()?);
        self.oldest += 1;
        let least = self.heavy.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
        let row = least.filter(|(_, least)| **least < score).map(|(row, _)| row);
        if let Some(row) = row {
            self.heavy[row] = score;
        }
        Some((position, row))
    }
}

impl KvCache {
    /// Lets the tokens that left the window take the rows of lesser heavy hitters.
    pub(super) fn replace_lesser(&mut self, sequence: &mut Sequence) -> Result<()> {
        let Some(recent) = sequence.kept.recent.filter(|recent| recent.scored) else {
            return Ok(());
        };
        let oldest = (sequence.num_tokens + 1).saturating_sub(recent.window);
        let mut all = std::mem::take(&mut sequence.kept.scores);
        let mut memory = sequence.kept.memory.take();
        let block_size = self.geometry.block_size();
        let mut row = std::mem::take(&mut self.residual_rows);
        for (group, scores) in all.iter_mut().enumerate() {
            while let Some((position, taken)) = scores.leave(oldest) {
                let (layer, _) = self.geometry.layer_of(group);
                if let Some(memory) = &mut memory {
                    match taken {
                        Some(row) => self.remember_heavy(sequence, memory, group, row)?,
                        None => self.remember(sequence, memory, group, position)?,
                    }
                }
                let Some(to) = taken else { continue };
                row.resize(self.geometry.layers()[layer].head_dim, 0.0);
                for part in 0..2 {
                    self.read_row(sequence, group, part, position, &mut row)?;
                    let tail = sequence.recipe.tail();
                    clamp(&mut row, tail.largest());
                    let block = &sequence.tables[group].kept[to / block_size];
                    let slot = self.pool.bytes_mut(block.entries[part].slot)?;
                    tail.write_row(to % block_size, &row, slot);
                }
            }
        }
        self.residual_rows = row;
        sequence.kept.scores = all;
        sequence.kept.memory = memory;
        Ok(())
    }

    /// Remembers the heavy hitter in a row that another token is about to take.
    fn remember_heavy(
        &self,
        sequence: &Sequence,
        memory: &mut Memory,
        group: usize,
        row: usize,
    ) -> Result<()> {
        let (layer, _) = self.geometry.layer_of(group);
        let dim = self.geometry.layers()[layer].head_dim;
        let block_size = self.geometry.block_size();
        let (tail, block) =
            (sequence.recipe.tail(), &sequence.tables[group].kept[row / block_size]);
        let len = tail.slot_bytes(1, dim);
        for (entry, out) in block.entries.iter().zip(&mut memory.rows) {
            out.resize(dim, 0.0);
            // Rows stand one after another in tails.
            let stored = &self.pool.bytes(entry.slot)[row % block_size * len..][..len];
            tail.decode(stored, 1, dim, out);
        }
        self.remember_rows(memory, group);
        Ok(())
    }

    /// A key, turned by its position, or a value of a token that is in the window.
    pub(super) fn read_row(
        &self,
        sequence: &Sequence,
        group: usize,
        part: usize,
        position: usize,
        row: &mut [f32],
    ) -> Result<()> {
        let (layer, _) = self.geometry.layer_of(group);
        let (l, block_size) = (&self.geometry.layers()[layer], self.geometry.block_size());
        let (entry, at, turn) = match position.checked_sub(sequence.origin) {
            Some(own) => {
                let block = own / block_size;
                (sequence.entry(group, part, block), own % block_size, position - own % block_size)
            }
            None => {
                let holds = |first: usize, rows: usize| (first..first + rows).contains(&position);
                let kept = sequence.tables[group].kept.iter();
                let found = kept
                    .filter(|b| b.stays == Stays::InWindow)
                    .find(|block| holds(block.first, block.rows));
                let block = found.ok_or_else(|| CacheError::Integrity {
                    what: format!("position {position} of group {group} left the cache too early"),
                })?;
                (block.entries[part], position - block.first, 0)
            }
        };
        let bytes = self.pool.bytes(entry.slot);
        // Rows stand one after another in tails.
        let row_bytes = sequence.recipe.tail().slot_bytes(1, l.head_dim);
        let stored = bytes.get(at * row_bytes..(at + 1) * row_bytes).unwrap_or_default();
        if stored.len() < row_bytes {
            let what = format!("position {position} of group {group} is beyond its slot");
            return Err(CacheError::Integrity { what });
        }
        if part == 1 || turn == 0 {
            sequence.recipe.tail().decode(stored, 1, l.head_dim, row);
            return Ok(());
        }
        let mut plain = vec![0.0; l.head_dim];
        sequence.recipe.tail().decode(stored, 1, l.head_dim, &mut plain);
        self.frame.rotate(l.rope, turn, &plain, row);
        Ok(())
    }
}
