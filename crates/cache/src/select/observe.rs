//! What a policy must see of a prompt: how much attention its queries paid to every token. The sums are a
//! vector per KV head, made a step at a time while the prompt is computed; their bytes are taken from the
//! budget.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use kvasir_kernels::{num_threads, parallel_for};

use super::compact::RoomToChoose;
use super::policy::{Observed, Policy};
use crate::attention::{AttentionScratch, BatchSlice, Observer, lock};
use crate::config::Recipe;
use crate::error::{CacheError, Result};
use crate::format::RecipeFormats;
use crate::kv_cache::KvCache;
use crate::pool::SlotId;
use crate::sequence::{Sequence, SequenceId};
use crate::table::Stays;

/// Blocks whose sums a thread makes at a time.
const BLOCKS: usize = 8;

/// A choice to come.
#[derive(Debug)]
pub(crate) struct Selection {
    /// Tokens of the prompt, once somebody said it. A sequence without a prompt keeps everything, as it is.
    pub(crate) prompt: Option<usize>,
    /// Sums by group, `[rows, prompt]`; empty until the first query is observed.
    pub(super) columns: Vec<Vec<f32>>,
    /// By layer: queries of a chunk that is not complete, `[tokens, query_heads, head_dim]`.
    pub(super) pending: Vec<Vec<f16>>,
    /// Taken for what will be kept.
    pub(crate) slots: Vec<SlotId>,
    /// Metadata bytes taken for both.
    pub(crate) charged: usize,
    /// By group: sums of the squares of the last queries' channels; empty until one is observed.
    pub(crate) energies: Vec<Vec<f32>>, // [head_dim] each
    /// How many of the prompt's tokens were predicted, and the sum of their negative log likelihoods.
    pub(super) nll: (usize, f64),
    /// What the sequence is coded in afterwards.
    pub(super) formats: RecipeFormats,
}

impl Selection {
    pub(crate) fn new(formats: RecipeFormats) -> Self {
        Self {
            prompt: None,
            columns: Vec::new(),
            pending: Vec::new(),
            slots: Vec::new(),
            charged: 0,
            energies: Vec::new(),
            nll: (0, 0.0),
            formats,
        }
    }
}

/// Sums of one group that threads add to.
struct Columns {
    slice: usize,
    kv_head: usize,
    sums: Mutex<Vec<f32>>,
}

impl KvCache {
    /// Says that the first `tokens` tokens of an empty sequence are its prompt: when they are committed, the recipe's
    /// policy chooses among them. No step may hold tokens from both sides of a prompt's end
    /// ([`Self::most_next`]). Without a policy nothing happens.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn expect_prompt(&mut self, id: SequenceId, tokens: usize) -> Result<()> {
        self.with_sequence(id, |_, sequence| {
            let least = sequence.recipe.policy().map_or(1, |policy| policy.least_prompt());
            if let Some(selection) =
                sequence.selection.as_mut().filter(|_| tokens > sequence.num_tokens)
            {
                selection.prompt = Some(tokens.max(least));
            }
            Ok(())
        })
    }

    /// Notes the negative log likelihoods, in nats, of further tokens of a prompt that is not complete: `sum` of `tokens`.
    /// Recipes that ask for it ([`Recipe::needs_prompt_nll`]) want to know of every token but the first; for others nothing
    /// happens.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn note_prompt_nll(&mut self, id: SequenceId, tokens: usize, sum: f64) -> Result<()> {
        self.with_sequence(id, |_, sequence| {
            if let Some(selection) = &mut sequence.selection {
                selection.nll.0 += tokens;
                selection.nll.1 += sum;
            }
            Ok(())
        })
    }

    /// Most tokens of a sequence that one step may hold.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn most_next(&self, id: SequenceId) -> Result<usize> {
        let sequence = self.sequence(id)?;
        // Tokens that leave a window leave between steps.
        let kept = &sequence.kept;
        if kept.recent.is_some_and(|recent| recent.scored || kept.memory.is_some()) {
            return Ok(1);
        }
        let prompt = sequence.selection.as_ref().and_then(|selection| selection.prompt);
        Ok(prompt.map_or(usize::MAX, |prompt| prompt - sequence.num_tokens))
    }

    /// Leading tokens of a prompt that may be found in the prefix cache: the policy must see the queries of the
    /// others.
    pub(crate) fn matchable(&self, sequence: &Sequence, tokens: usize) -> usize {
        let prompt = sequence.selection.as_ref().and_then(|s| s.prompt).unwrap_or(tokens);
        let seen = sequence.recipe.observed_queries(prompt).max(1);
        prompt.min(tokens).saturating_sub(seen)
    }

    /// What must be there besides for a sequence to have `end` tokens.
    pub(crate) fn room_to_choose(&self, sequence: &Sequence, end: usize) -> Result<RoomToChoose> {
        let mut room = RoomToChoose::default();
        let (Some(selection), Some(policy)) = (&sequence.selection, sequence.recipe.policy())
        else {
            return Ok(room);
        };
        let Some(prompt) = selection.prompt else { return Ok(room) };
        if end > prompt {
            let what = format!("a step to token {end} crosses the end of a prompt of {prompt}");
            return Err(CacheError::Integrity { what });
        }
        if end == prompt && selection.slots.is_empty() {
            room =
                self.room_for_choice(policy, prompt, selection.formats, sequence.owners.as_ref());
        }
        if selection.charged == 0 {
            room.metadata += self.column_bytes(sequence.recipe, prompt);
        }
        Ok(room)
    }

    /// Bytes of the sums over a prompt.
    pub(crate) fn column_bytes(&self, recipe: Recipe, prompt: usize) -> usize {
        let energies: usize = self.geometry.layers().iter().map(|l| l.kv_heads * l.head_dim).sum();
        let energies = recipe.think().map_or(0, |_| 4 * energies);
        let observed = recipe.policy().map_or(Observed::Nothing, Policy::observed);
        let layers = self.geometry.layers().iter().filter(|l| l.window.is_none());
        let rows = layers.map(|l| l.kv_heads * observed.rows(l.query_heads / l.kv_heads));
        let pending = match observed {
            Observed::Chunks(chunks) => self.chunk_bytes(chunks.size, prompt),
            _ => 0,
        };
        4 * prompt * rows.sum::<usize>() + pending + energies
    }

    /// Takes it; the metadata was charged.
    pub(crate) fn take_room_to_choose(
        &mut self,
        sequence: &mut Sequence,
        room: RoomToChoose,
    ) -> Result<()> {
        if let Some(selection) = &mut sequence.selection {
            selection.charged += room.metadata;
            for class in room.classes {
                selection.slots.push(self.pool.allocate(class)?);
            }
        }
        Ok(())
    }

    /// What follows from tokens that were committed.
    pub(crate) fn after_commit(&mut self, id: SequenceId, sequence: &mut Sequence) -> Result<()> {
        let prompt = sequence.selection.as_ref().and_then(|selection| selection.prompt);
        if prompt == Some(sequence.num_tokens) {
            self.choose(id, sequence)?;
        }
        if sequence.origin > 0 {
            self.replace_lesser(sequence)?;
            self.remember_leaving(sequence)?;
            self.release_unseen(sequence)?;
        }
        Ok(())
    }

    /// The queries of a slice that a policy wants to see in a layer, as tokens of the slice.
    pub(crate) fn observed(
        &self,
        layer: usize,
        slice: &BatchSlice,
    ) -> Result<Option<std::ops::Range<usize>>> {
        let sequence = self.sequence(slice.sequence)?;
        if self.geometry.layers()[layer].window.is_some() || !sequence.owns(layer) {
            return Ok(None);
        }
        if sequence.kept.recent.is_some_and(|recent| recent.scored) {
            return Ok(Some(0..slice.len));
        }
        let prompt = sequence.selection.as_ref().and_then(|selection| selection.prompt);
        let (Some(prompt), Some(policy)) = (prompt, sequence.recipe.policy()) else {
            return Ok(None);
        };
        let observed = policy.observed();
        if matches!(observed, Observed::Chunks(_)) {
            return Ok(None);
        }
        let from = prompt - observed.count(prompt);
        let first = from.saturating_sub(slice.start).min(slice.len);
        let end = prompt.saturating_sub(slice.start).min(slice.len);
        Ok((first < end).then_some(first..end))
    }

    /// Whether anything of these sequences depends on all queries of a layer: then none may be left out of
    /// [`KvCache::attend`].
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn observes(&self, layer: usize, slices: &[BatchSlice]) -> Result<bool> {
        for slice in slices {
            let sequence = self.sequence(slice.sequence)?;
            let chooses = sequence.selection.is_some() || sequence.watched.is_some();
            if chooses || self.observed(layer, slice)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Adds what this step's queries paid to every token, where a policy wants to know. After
    /// [`KvCache::attend`] with the same arguments, which left the softmax of every row in `scratch`.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn observe(
        &mut self,
        layer: usize,
        slices: &[BatchSlice],
        queries: &[f32],
        scratch: &mut AttentionScratch,
    ) -> Result<()> {
        self.watch_attention(layer, slices, queries)?;
        self.observe_channels(layer, slices, queries)?;
        self.observe_chunks(layer, slices, queries)?;
        let kv_heads = self.geometry.layers()[layer].kv_heads;
        let first = self.geometry.group(layer, 0);
        let mut all: Vec<Columns> = Vec::new();
        for (number, slice) in slices.iter().enumerate() {
            if self.observed(layer, slice)?.is_none() {
                continue;
            }
            for kv_head in 0..kv_heads {
                let sums = self.take_columns(slice.sequence, first + kv_head)?;
                all.push(Columns { slice: number, kv_head, sums: Mutex::new(sums) });
            }
        }
        if all.is_empty() {
            return Ok(());
        }
        let observer = Observer::new(self, layer, queries, scratch);
        // Ranges of blocks own their columns, so whatever thread does them, sums are the same.
        let mut units = Vec::new();
        for (i, columns) in all.iter().enumerate() {
            let sequence = self.sequence(slices[columns.slice].sequence)?;
            let kept = sequence.tables[first + columns.kv_head].kept.len();
            let blocks = kept + sequence.num_held();
            units.extend((0..blocks).step_by(BLOCKS).map(|b| (i, b..(b + BLOCKS).min(blocks))));
        }
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(None);
        let threads = num_threads();
        parallel_for(threads.min(units.len()), |task, _| {
            let mut own = Vec::new();
            while let Some((i, blocks)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                let columns = &all[*i];
                let slice = &slices[columns.slice];
                let done = self.observed(layer, slice).and_then(|tokens| {
                    let tokens = tokens.unwrap_or_default();
                    observer.run(slice, columns.kv_head, tokens, blocks.clone(), task, &mut own)
                });
                match done {
                    // By row of columns: `[rows, tokens of the blocks]`.
                    Ok(rows) => {
                        let mut sums = lock(&columns.sums);
                        let (width, from) =
                            (own.len() / rows, blocks.start * observer.block_size());
                        let stride = sums.len() / rows;
                        let sums = sums.chunks_exact_mut(stride);
                        for (own, sums) in own.chunks_exact(width).zip(sums) {
                            let sums = sums[from.min(stride)..].iter_mut();
                            sums.zip(own).for_each(|(sum, own)| *sum += own);
                        }
                    }
                    Err(error) => *lock(&failed) = Some(error),
                }
            }
        });
        for Columns { slice, kv_head, sums } in all {
            let sums = sums.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            self.with_sequence(slices[slice].sequence, |cache, sequence| {
                match &mut sequence.selection {
                    Some(selection) => selection.columns[first + kv_head] = sums,
                    None => cache.add_scores(sequence, first + kv_head, &sums),
                }
                Ok(())
            })?;
        }
        match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Adds what kept and newer tokens were paid. `sums`: `[blocks, block_size]`.
    fn add_scores(&self, sequence: &mut Sequence, group: usize, sums: &[f32]) {
        let block_size = self.geometry.block_size();
        let Sequence { kept, tables, origin, released, num_reserved, .. } = sequence;
        let Some(scores) = kept.scores.get_mut(group) else { return };
        for (block, sums) in sums.chunks_exact(block_size).enumerate() {
            let own = tables[group].kept.get(block);
            let (first, rows) = match own {
                Some(kept) => (kept.first, kept.rows),
                None => {
                    let own = block - tables[group].kept.len() + *released;
                    let first = *origin + own * block_size;
                    (first, block_size.min(num_reserved.saturating_sub(first)))
                }
            };
            let heavy = own.is_some_and(|kept| kept.stays == Stays::Always);
            for (row, paid) in sums.iter().enumerate().take(rows) {
                match heavy {
                    true => scores.add_heavy(block * block_size + row, *paid),
                    false => scores.add_recent(first + row, *paid),
                }
            }
        }
    }

    /// Sums of one group, taken out.
    pub(super) fn take_columns(&mut self, id: SequenceId, group: usize) -> Result<Vec<f32>> {
        let groups = self.geometry.num_groups();
        let l = &self.geometry.layers()[self.geometry.layer_of(group).0];
        let query_heads = l.query_heads / l.kv_heads;
        let block_size = self.geometry.block_size();
        self.with_sequence(id, |_, sequence| {
            let observed = sequence.recipe.policy().map(Policy::observed);
            let rows = observed.map_or(0, |observed| observed.rows(query_heads));
            let blocks = sequence.tables[group].kept.len() + sequence.num_held();
            let Some(selection) = &mut sequence.selection else {
                return Ok(vec![0.0; blocks * block_size]);
            };
            selection.columns.resize(groups, Vec::new());
            let mut columns = std::mem::take(&mut selection.columns[group]);
            columns.resize(rows * selection.prompt.unwrap_or(0), 0.0);
            Ok(columns)
        })
    }
}
