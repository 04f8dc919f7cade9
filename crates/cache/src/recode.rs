//! Deciding late: a prompt is computed over an uncompressed cache, and how it is stored is said when it is complete and more
//! is known of it.
//!
//! Until then the sequence is one of [`Recipe::F16`] in all respects, its prefixes are those of f16, but it shares no blocks by
//! likeness. [`KvCache::recode`] then seals its blocks again, from the first on, as the new recipe does: each takes its new slots,
//! is found in the prefix cache of that recipe or coded, and leaves its old ones, so that not more than a block is there twice.

use std::time::Instant;

use rayon::prelude::*;

use crate::codec::CodecKind;
use crate::config::{KeyFrame, Recipe};
use crate::error::{CacheError, Result};
use crate::format::FormatId;
use crate::kv_cache::KvCache;
use crate::pool::SlotId;
use crate::sequence::{Sequence, SequenceId};
use crate::store::Block;

/// Blocks whose error is measured: more say little else, and cost as much as sealing them.
const SAMPLED_BLOCKS: usize = 2;

/// A prompt whose recipe is to be decided.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watched {
    /// Its tokens.
    pub(crate) prompt: usize,
    /// Sum over heads of its last token's entropies of attention, by the largest possible.
    pub(crate) entropy: f64,
    /// Heads in that.
    pub(crate) heads: usize,
}

impl Recipe {
    /// Whether blocks that were written by [`Recipe::F16`] are what this recipe codes: then a sequence may change to it
    /// ([`KvCache::recode`]).
    pub fn follows_f16(self) -> bool {
        self.tail_kind() == CodecKind::F16
            && self.frame() == KeyFrame::BlockRelative
            && !self.waits_for_prompt()
            && self.kv_sharer().is_none()
            && self.think().is_none()
            && !self.keeps_residual()
    }
}

impl KvCache {
    /// Says that the recipe of an empty sequence of [`Recipe::F16`] is decided when its first `prompt` tokens are committed, by
    /// [`Self::recode`] or [`Self::stop_watching`].
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`]; [`CacheError::Integrity`] for another recipe.
    pub fn watch_prompt(&mut self, id: SequenceId, prompt: usize) -> Result<()> {
        self.with_sequence(id, |_, sequence| {
            if sequence.recipe != Recipe::F16 {
                let what = format!("a prompt is watched that {} stores", sequence.recipe);
                return Err(CacheError::Integrity { what });
            }
            sequence.watched = Some(Watched { prompt: prompt.max(1), entropy: 0.0, heads: 0 });
            Ok(())
        })
    }

    /// How widely the last token of a watched prompt looked around: the mean over heads of the entropy of its attention by the
    /// largest possible, 0 to 1. None before it was computed, and of a prompt of one token.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn attention_entropy(&self, id: SequenceId) -> Result<Option<f64>> {
        let watched = self.sequence(id)?.watched.filter(|watched| watched.heads > 0);
        Ok(watched.map(|watched| watched.entropy / watched.heads as f64))
    }

    /// The sequence stays as it is.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn stop_watching(&mut self, id: SequenceId) -> Result<()> {
        self.with_sequence(id, |cache, sequence| {
            sequence.watched = None;
            cache
                .clamped_blocks
                .retain(|(owner, block)| *owner != id || *block >= sequence.num_sealed);
            Ok(())
        })
    }

    /// What coding by `recipe` would do to the blocks of a sequence that is stored uncompressed: the squared error of keys and
    /// values by their squares, over the middle one and the last of the full blocks, each layer, keys and values counting alike. As
    /// the codec sees it: joint codecs weigh channels by what attention makes of them. None if no block is full.
    /// Costs about as much as sealing two blocks.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`]; as [`Self::prepare`]; [`CacheError::Integrity`] if `recipe` does not follow f16.
    pub fn coding_error(&mut self, id: SequenceId, recipe: Recipe) -> Result<Option<f64>> {
        self.check_follows(recipe)?;
        let clock = Instant::now();
        let formats = self.prepare_formats(recipe)?;
        let sequence = self.sequence(id)?;
        let Some(last) = sequence.num_sealed.checked_sub(1) else { return Ok(None) };
        let mut blocks = vec![last / 2, last];
        blocks.truncate(SAMPLED_BLOCKS.min(last + 1));
        let errors: Vec<f64> = blocks
            .into_iter()
            .flat_map(|block| {
                let format = formats.sealed[block.min(1)];
                let job = Block { sequence, block, format, content: None };
                let units = self.units(sequence, format, &[]);
                units.into_iter().map(move |unit| (job, unit))
            })
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|(job, unit)| self.unit_error(&job, &unit))
            .collect();
        self.recode_nanos += clock.elapsed().as_nanos() as u64;
        Ok(Some(errors.iter().sum::<f64>() / errors.len().max(1) as f64))
    }

    /// Stores a watched prompt by `recipe` from now on. `tokens`: those of the sequence; `salt` as it was added with. True if all of
    /// it is coded; false if there was no room for a block, which stays as it was, like all after it.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`]; as [`Self::prepare`]; [`CacheError::Integrity`] if `recipe` does not follow f16 or the sequence
    /// is not watched.
    pub fn recode(
        &mut self,
        id: SequenceId,
        recipe: Recipe,
        salt: Option<&str>,
        tokens: &[u32],
    ) -> Result<bool> {
        self.check_follows(recipe)?;
        let clock = Instant::now();
        let formats = self.prepare_formats(recipe)?;
        let root = self.root(recipe, salt);
        let block_size = self.geometry.block_size();
        self.with_sequence(id, |cache, sequence| {
            let full = sequence.num_sealed;
            let reserved = sequence.num_reserved != sequence.num_tokens;
            if sequence.watched.take().is_none() || reserved || tokens.len() != sequence.num_tokens {
                let (held, given) = (sequence.num_tokens, tokens.len());
                let what = format!("sequence {id} of {held} tokens cannot be stored anew by {recipe}, with {given} tokens");
                return Err(CacheError::Integrity { what });
            }
            // Whoever else uses them keeps them; otherwise they can be given up as soon as a block is coded.
            for node in sequence.nodes.drain(..).rev() {
                cache.prefix.leave(node, &mut cache.pool)?;
            }
            sequence.recipe = recipe;
            sequence.tenant = root;
            sequence.chain = sequence.chain.map(|_| root);
            sequence.sealed_formats = formats.sealed;
            let open = std::mem::take(&mut sequence.tail_tokens);
            sequence.num_sealed = 0;
            let mut all = true;
            for tokens in tokens.chunks_exact(block_size).take(full) {
                let block = sequence.num_sealed;
                let Some(slots) = cache.slots_to_code(sequence, formats.sealed[block.min(1)])? else {
                    all = false;
                    break;
                };
                sequence.seal_slots.push_back(slots);
                sequence.tail_tokens.extend_from_slice(tokens);
                cache.seal(id, sequence)?;
                sequence.tail_tokens.clear();
            }
            if !all {
                // Nothing can be known of what follows a block that is stored in another way.
                sequence.chain = None;
                let left = sequence.num_sealed;
                cache.clamped_blocks.retain(|(owner, block)| *owner != id || !(left..full).contains(block));
            }
            sequence.num_sealed = full;
            sequence.tail_tokens = open;
            cache.recode_nanos += clock.elapsed().as_nanos() as u64;
            Ok(all)
        })
    }

    fn check_follows(&self, recipe: Recipe) -> Result<()> {
        if recipe.follows_f16() {
            return Ok(());
        }
        let what = format!("blocks of f16 cannot be stored anew by {recipe}");
        Err(CacheError::Integrity { what })
    }

    /// Slots for one block in a format, in the order of its parts; none if there is no room.
    fn slots_to_code(
        &mut self,
        sequence: &mut Sequence,
        format: FormatId,
    ) -> Result<Option<Vec<SlotId>>> {
        if format == sequence.tail_format {
            return Ok(Some(Vec::new()));
        }
        let slots = self.formats.get(format).slots_of(sequence.owners.as_ref());
        if !self.make_room(sequence, &slots, 0)? {
            return Ok(None);
        }
        let parts = self.formats.get(format).layers.iter().flat_map(|l| l.groups.iter().flatten());
        let pool = &mut self.pool;
        parts.map(|part| pool.allocate(part.class)).collect::<Result<_>>().map(Some)
    }
}
