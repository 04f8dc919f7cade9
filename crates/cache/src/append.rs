//! How tokens get into the cache: reserve → write (layer by layer) → commit → seal.

use std::ops::Range;

use kvasir_kernels::num_beyond;

use crate::attention::BatchSlice;
use crate::codec::TailCodec;
use crate::config::KeyFrame;
use crate::error::{CacheError, Result};
use crate::format::{Format, FormatId, Formats, add_class};
use crate::kv_cache::{KvCache, find, own_groups};
use crate::pool::ClassId;
use crate::sequence::{Sequence, SequenceId};
use crate::table::Entry;

/// What a sequence lacks to hold more tokens.
struct Growth {
    /// What the last block must have room for, if it is a tail that is too small.
    last: Option<usize>,
    /// Blocks to come.
    tails: Range<usize>,
    /// Blocks that will be full, and have no slots to be encoded into yet.
    filled: Range<usize>,
    /// Tokens of the tables then.
    end: usize,
}

impl KvCache {
    /// Makes room for the next `count` tokens of a sequence, evicting unused prefixes as needed. All or
    /// nothing.
    ///
    /// # Errors
    /// [`CacheError::Exhausted`] if there is no room: the caller preempts somebody.
    pub fn reserve(&mut self, id: SequenceId, count: usize) -> Result<()> {
        self.with_sequence(id, |cache, sequence| {
            let end = sequence.num_tokens + count;
            let growth = cache.growth(sequence, end - sequence.origin);
            let mut metadata = growth.tails.len() * cache.geometry.table_bytes_per_block();
            let mut slots = cache.slots_of(sequence, &growth);
            let choice = cache.room_to_choose(sequence, end)?;
            for class in &choice.classes {
                add_class(&mut slots, *class, 1);
            }
            metadata += choice.metadata;
            if !cache.make_room(sequence, &slots, metadata)? {
                return Err(CacheError::Exhausted {
                    needed: slots.iter().map(|(_, n)| n).sum(),
                    slot_bytes: slots.first().map_or(0, |(c, _)| cache.pool.slot_bytes(*c)),
                    used_bytes: cache.pool.physical_bytes(),
                    budget_bytes: cache.pool.budget_bytes(),
                });
            }
            if metadata > 0 {
                cache.pool.charge_metadata(metadata)?;
            }
            cache.take_room_to_choose(sequence, choice)?;
            if let Some(capacity) = growth.last {
                cache.grow_tail(sequence, capacity)?;
            }
            for block in growth.tails.clone() {
                let capacity = cache.tail_capacity(block, growth.end);
                let own: Vec<usize> = own_groups(&cache.geometry, sequence).collect();
                for group in own {
                    let class = cache.tail_class(sequence.tail_format, group, capacity);
                    let [key, value] = [cache.pool.allocate(class)?, cache.pool.allocate(class)?];
                    let table = &mut sequence.tables[group];
                    table.keys.push(Entry::new(key, sequence.tail_format));
                    table.values.push(Entry::new(value, sequence.tail_format));
                }
                sequence.tail_capacity = capacity;
            }
            // Slots for the blocks that these tokens will fill are taken now: sealing must not fail.
            for block in growth.filled {
                let Self { formats, pool, .. } = &mut *cache;
                let layers =
                    new_format(formats, sequence, block).into_iter().flat_map(|f| &f.layers);
                let own = layers.enumerate().filter(|(layer, _)| sequence.owns(*layer));
                let parts = own.flat_map(|(_, l)| l.groups.iter().flatten());
                let slots = parts.map(|part| pool.allocate(part.class));
                sequence.seal_slots.push_back(slots.collect::<Result<_>>()?);
            }
            sequence.num_reserved = sequence.num_reserved.max(end);
            cache.frame.grow(end);
            Ok(())
        })
    }

    /// Gives up what nobody needs until slots and metadata fit; false if they cannot, nothing given up for what would not fit
    /// without it either. `sequence` is out of its place.
    pub(crate) fn make_room(
        &mut self,
        sequence: &mut Sequence,
        slots: &[(ClassId, usize)],
        metadata: usize,
    ) -> Result<bool> {
        let fits = |cache: &Self| slots.is_empty() || cache.pool.can_allocate(slots, metadata);
        if !fits(self) && self.is_hopeless(slots, metadata) {
            return Ok(false);
        }
        while !fits(self) {
            let relieved = self.prefix.evict_one(&mut self.pool)?
                || self.drop_sharing_index()
                || self.lower_oldest(sequence)?;
            if !relieved {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether slots and metadata would not fit even if all were given up that can be.
    fn is_hopeless(&self, slots: &[(ClassId, usize)], metadata: usize) -> bool {
        let needed: usize = slots.iter().map(|(c, n)| n * self.pool.slot_bytes(*c)).sum();
        let room = self.prefix.evictable_bytes(&self.pool)
            + self.sharing_index_bytes()
            + self.lowerable_bytes();
        let pinned = self.pool.physical_bytes().saturating_sub(room);
        pinned + needed + metadata > self.pool.budget_bytes()
    }

    /// What a sequence's tables lack to hold `end` tokens.
    fn growth(&self, sequence: &Sequence, end: usize) -> Growth {
        let (block_size, blocks) = (self.geometry.block_size(), sequence.num_blocks());
        let open = blocks.checked_sub(1).filter(|last| *last >= sequence.num_sealed);
        let capacity = open.map(|last| self.tail_capacity(last, end));
        let prepared = sequence.num_sealed + sequence.seal_slots.len();
        Growth {
            last: capacity.filter(|capacity| *capacity > sequence.tail_capacity),
            tails: blocks..self.geometry.blocks_for(end).max(blocks),
            filled: prepared..(end / block_size).max(prepared),
            end,
        }
    }

    /// The slots of that, by class. A tail that moves needs its new ones while it has the old.
    fn slots_of(&self, sequence: &Sequence, growth: &Growth) -> Vec<(ClassId, usize)> {
        let mut slots = Vec::new();
        let tails = growth.tails.clone().map(|block| self.tail_capacity(block, growth.end));
        for capacity in growth.last.into_iter().chain(tails) {
            for group in own_groups(&self.geometry, sequence) {
                let class = self.tail_class(sequence.tail_format, group, capacity);
                add_class(&mut slots, class, 2);
            }
        }
        for block in growth.filled.clone() {
            let format = new_format(&self.formats, sequence, block);
            for (class, n) in format.into_iter().flat_map(|f| f.slots_of(sequence.owners.as_ref()))
            {
                add_class(&mut slots, class, n);
            }
        }
        slots
    }

    /// Tokens that the slots of a block have room for while the tables have `end` tokens.
    fn tail_capacity(&self, block: usize, end: usize) -> usize {
        let block_size = self.geometry.block_size();
        tail_capacity(end.saturating_sub(block * block_size).min(block_size), block_size)
    }

    /// The class of a group's tails with room for `capacity` tokens. Sizes of tails are whole fractions
    /// of a block's.
    fn tail_class(&self, format: FormatId, group: usize, capacity: usize) -> ClassId {
        self.tail_classes(format)[group][capacity.trailing_zeros() as usize]
    }

    /// Moves the last block into larger slots, so that short tails are cheap. All slots were found to be
    /// there.
    fn grow_tail(&mut self, sequence: &mut Sequence, capacity: usize) -> Result<()> {
        let last = sequence.num_held() - 1;
        let own: Vec<usize> = own_groups(&self.geometry, sequence).collect();
        for group in own {
            let class = self.tail_class(sequence.tail_format, group, capacity);
            let table = &mut sequence.tables[group];
            for entry in [&mut table.keys[last], &mut table.values[last]] {
                let slot = self.pool.allocate(class)?;
                self.pool.copy(entry.slot, slot, &mut self.slot_bytes)?;
                self.pool.release(entry.slot)?;
                entry.slot = slot;
            }
        }
        sequence.tail_capacity = capacity;
        Ok(())
    }

    /// Writes one layer's keys and values of the step's tokens into their blocks.
    ///
    /// `keys` (not rotated) and `values`: `[rows, kv_heads, head_dim]`, rows as the slices number them.
    ///
    /// # Errors
    /// [`CacheError::NotReserved`] for tokens without a slot.
    pub fn write(
        &mut self,
        layer: usize,
        slices: &[BatchSlice],
        keys: &[f32],
        values: &[f32],
    ) -> Result<()> {
        let l = &self.geometry.layers()[layer];
        let (heads, dim, rope) = (l.kv_heads, l.head_dim, l.rope);
        let block_size = self.geometry.block_size();
        let first_group = self.geometry.group(layer, 0);
        for slice in slices {
            let sequence = find(&self.sequences, &self.generations, slice.sequence)?;
            if slice.start + slice.len > sequence.num_reserved || slice.start < sequence.num_tokens
            {
                return Err(CacheError::NotReserved {
                    id: slice.sequence.to_string(),
                    reserved: sequence.num_reserved,
                    used: slice.start + slice.len,
                });
            }
            let tail: &dyn TailCodec = sequence.recipe.tail();
            let relative = sequence.frame() == KeyFrame::BlockRelative;
            let begin = sequence.origin + sequence.released * block_size;
            if !sequence.owns(layer) {
                continue;
            }
            for head in 0..heads {
                let table = &sequence.tables[first_group + head];
                let mut t = 0;
                while t < slice.len {
                    let since = slice.start + t - begin;
                    let (block, offset) = (since / block_size, since % block_size);
                    // Rows of one block, keys before values.
                    let rows = (block_size - offset).min(slice.len - t);
                    let at = |i: usize| ((slice.row + t + i) * heads + head) * dim;
                    let row = &mut self.row[..dim];
                    let mut clamped = 0;
                    let slot = self.pool.bytes_mut(table.keys[block].slot)?;
                    for i in 0..rows {
                        let distance = if relative { offset + i } else { slice.start + t + i };
                        self.frame.rotate(rope, distance, &keys[at(i)..at(i) + dim], row);
                        clamped += clamp(row, tail.largest());
                        tail.write_row(offset + i, row, slot);
                    }
                    let slot = self.pool.bytes_mut(table.values[block].slot)?;
                    for i in 0..rows {
                        row.copy_from_slice(&values[at(i)..at(i) + dim]);
                        clamped += clamp(row, tail.largest());
                        tail.write_row(offset + i, row, slot);
                    }
                    if clamped > 0 {
                        self.num_clamped += clamped;
                        let clamped = (slice.sequence, sequence.released + block);
                        if !self.clamped_blocks.contains(&clamped) {
                            self.clamped_blocks.push(clamped);
                        }
                    }
                    t += rows;
                }
            }
        }
        Ok(())
    }

    /// Counts written tokens, seals the blocks they fill, and publishes those to the prefix cache. Lets the recipe's
    /// policy choose when they complete the prompt ([`Self::expect_prompt`]).
    /// `tokens` are the ids of exactly the tokens written.
    ///
    /// # Errors
    /// [`CacheError::NotReserved`] for more tokens than were reserved.
    pub fn commit(&mut self, id: SequenceId, tokens: &[u32]) -> Result<()> {
        let block_size = self.geometry.block_size();
        self.with_sequence(id, |cache, sequence| {
            let end = sequence.num_tokens + tokens.len();
            if end > sequence.num_reserved {
                let id = id.to_string();
                return Err(CacheError::NotReserved {
                    id,
                    reserved: sequence.num_reserved,
                    used: end,
                });
            }
            sequence.num_tokens = end;
            sequence.tail_tokens.extend_from_slice(tokens);
            while sequence.tail_tokens.len() >= block_size {
                cache.seal(id, sequence)?;
                sequence.tail_tokens.drain(..block_size);
            }
            cache.fade_residual(sequence)?;
            cache.after_commit(id, sequence)
        })
    }
}

/// The format that a block is encoded in when it is full; `None` if it stays as it is.
fn new_format<'a>(formats: &'a Formats, sequence: &Sequence, block: usize) -> Option<&'a Format> {
    let format = sequence.sealed_format(block);
    (format != sequence.tail_format).then(|| formats.get(format))
}

/// Tokens that a tail of `tokens` has room for: growing in steps of two from an eighth of the largest
/// block, so that a short tail is small and moves a few times at most.
pub(crate) fn tail_capacity(tokens: usize, block_size: usize) -> usize {
    tokens.next_power_of_two().clamp(8, block_size)
}

/// Brings values that cannot be stored to the nearest that can, NaN to 0: one infinite value would turn
/// the scores of other tokens into NaN. Returns how many there were.
#[inline]
pub(crate) fn clamp(row: &mut [f32], largest: f32) -> u64 {
    // Rows that need mending are rare.
    let bad = num_beyond(row, largest) as u64;
    if bad > 0 {
        for x in row {
            *x = if x.is_nan() { 0.0 } else { x.clamp(-largest, largest) };
        }
    }
    bad
}
