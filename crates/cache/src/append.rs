//! How tokens get into the cache: reserve → write (layer by layer) → commit → seal.

use crate::attention::BatchSlice;
use crate::codec::{Part, TailCodec};
use crate::config::KeyFrame;
use crate::error::{CacheError, Result};
use crate::kv_cache::{KvCache, find};
use crate::pool::SlotId;
use crate::sequence::{Sequence, SequenceId};
use crate::table::Entry;

impl KvCache {
    /// Makes room for the next `count` tokens of a sequence, evicting unused prefixes as needed. All or
    /// nothing.
    ///
    /// # Errors
    /// [`CacheError::Exhausted`] if there is no room: the caller preempts somebody.
    pub fn reserve(&mut self, id: SequenceId, count: usize) -> Result<()> {
        self.with_sequence(id, |cache, sequence| {
            let end = sequence.num_tokens + count;
            let blocks = cache.geometry.blocks_for(end).saturating_sub(sequence.num_blocks());
            let metadata = blocks * cache.geometry.table_bytes_per_block();
            // Slots for the blocks that these tokens will fill are taken now: sealing must not fail.
            let prepared = sequence.num_sealed + sequence.seal_slots.len();
            let seals = match cache.sealed_class.is_empty() {
                true => 0,
                false => (end / cache.geometry.block_size()).saturating_sub(prepared),
            };
            let tails = cache.block_slots.iter().map(|(c, n)| (*c, n * blocks));
            let sealed = cache.sealed_slots.iter().map(|(c, n)| (*c, n * seals));
            let slots: Vec<_> = tails.chain(sealed).collect();
            let needed: usize = slots.iter().map(|(c, n)| n * cache.pool.slot_bytes(*c)).sum();
            let pinned = cache.pool.physical_bytes().saturating_sub(cache.prefix.evictable_bytes());
            // Prefixes are not evicted for what would not fit without them either.
            let hopeless = pinned + needed + metadata > cache.pool.budget_bytes();
            while blocks + seals > 0 && !cache.pool.can_allocate(&slots, metadata) {
                if hopeless || !cache.prefix.evict_one(&mut cache.pool)? {
                    return Err(CacheError::Exhausted {
                        needed: slots.iter().map(|(_, n)| n).sum(),
                        slot_bytes: slots.first().map_or(0, |(c, _)| cache.pool.slot_bytes(*c)),
                        used_bytes: cache.pool.physical_bytes(),
                        budget_bytes: cache.pool.budget_bytes(),
                    });
                }
            }
            if blocks > 0 {
                cache.pool.charge_metadata(metadata)?;
            }
            for _ in 0..blocks {
                for (table, class) in sequence.tables.iter_mut().zip(&cache.group_class) {
                    table.keys.push(Entry::tail(cache.pool.allocate(*class)?));
                    table.values.push(Entry::tail(cache.pool.allocate(*class)?));
                }
            }
            for _ in 0..seals {
                let classes = cache.sealed_class.iter().flatten();
                let slots = classes.map(|c| cache.pool.allocate(*c)).collect::<Result<_>>()?;
                sequence.seal_slots.push_back(slots);
            }
            sequence.num_reserved = sequence.num_reserved.max(end);
            cache.frame.grow(end);
            Ok(())
        })
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
        let tail: &dyn TailCodec = self.recipe().codec().tail();
        let relative = self.recipe().frame() == KeyFrame::BlockRelative;
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
            for head in 0..heads {
                let table = &sequence.tables[first_group + head];
                for t in 0..slice.len {
                    let position = slice.start + t;
                    let (block, offset) = (position / block_size, position % block_size);
                    let at = ((slice.row + t) * heads + head) * dim;
                    let row = &mut self.row[..dim];
                    let distance = if relative { offset } else { position };
                    self.frame.rotate(rope, distance, &keys[at..at + dim], row);
                    self.num_clamped += clamp(row, tail.largest());
                    let slot = self.pool.bytes_mut(table.keys[block].slot)?;
                    tail.write_row(offset, row, slot);
                    row.copy_from_slice(&values[at..at + dim]);
                    self.num_clamped += clamp(row, tail.largest());
                    let slot = self.pool.bytes_mut(table.values[block].slot)?;
                    tail.write_row(offset, row, slot);
                }
            }
        }
        Ok(())
    }

    /// Counts written tokens, seals the blocks they fill, and publishes those to the prefix cache.
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
                cache.seal(sequence)?;
                sequence.tail_tokens.drain(..block_size);
            }
            Ok(())
        })
    }

    /// Seals the first unsealed block. With an uncompressed recipe the tail's slots become the block's.
    fn seal(&mut self, sequence: &mut Sequence) -> Result<()> {
        let block = sequence.num_sealed;
        sequence.num_sealed += 1;
        let slots = sequence.seal_slots.pop_front();
        // A block can only be known if all before it are: stop publishing after a gap.
        let publishable = sequence.nodes.len() == block;
        let hash = sequence.chain.map(|chain| {
            let hash = chain.child(&sequence.tail_tokens[..self.geometry.block_size()]);
            sequence.chain = Some(hash);
            hash
        });
        let Some(hash) = hash.filter(|_| publishable) else {
            return self.encode_block(sequence, block, slots);
        };
        if self.prefix.find(&hash).is_none() {
            self.encode_block(sequence, block, slots)?;
        } else {
            for slot in slots.into_iter().flatten() {
                self.pool.release(slot)?;
            }
        }
        if let Some(node) = self.prefix.find(&hash) {
            // Somebody sealed the same prefix meanwhile: read theirs, free ours.
            self.prefix.acquire(node, &mut self.pool)?;
            let entries = self.prefix.entries(node)?;
            let mut old: Vec<SlotId> = Vec::with_capacity(entries.len());
            for (table, pair) in sequence.tables.iter_mut().zip(entries.chunks_exact(2)) {
                old.push(std::mem::replace(&mut table.keys[block], pair[0]).slot);
                old.push(std::mem::replace(&mut table.values[block], pair[1]).slot);
            }
            for slot in old {
                self.pool.release(slot)?;
            }
            sequence.nodes.push(node);
        } else {
            let entries: Box<[Entry]> =
                sequence.tables.iter().flat_map(|t| [t.keys[block], t.values[block]]).collect();
            if let Some(node) = self.prefix.publish(hash, block, entries, &mut self.pool)? {
                sequence.nodes.push(node);
            }
        }
        Ok(())
    }

    /// Encodes a full tail block into `slots` (`[groups, 2]`) and frees the tail's; nothing to do without
    /// slots.
    fn encode_block(
        &mut self,
        sequence: &mut Sequence,
        block: usize,
        slots: Option<Vec<SlotId>>,
    ) -> Result<()> {
        let Some(slots) = slots else { return Ok(()) };
        let codec = self.recipe().codec();
        let tokens = self.geometry.block_size();
        let groups = self.geometry.groups().map(|(_, l)| l.head_dim);
        let tables = sequence.tables.iter_mut().zip(slots.chunks_exact(2)).zip(groups);
        for ((table, slots), dim) in tables {
            let parts =
                [(Part::Keys, &mut table.keys[block]), (Part::Values, &mut table.values[block])];
            for ((part, entry), slot) in parts.into_iter().zip(slots) {
                let Some(sealed) = codec.sealed(part) else { continue };
                let rows = &mut self.block_rows[..tokens * dim];
                codec.tail().decode(self.pool.bytes(entry.slot), tokens, dim, rows);
                let bytes = sealed.slot_bytes(tokens, dim);
                sealed.encode(rows, dim, &mut self.pool.bytes_mut(*slot)?[..bytes]);
                let old = std::mem::replace(entry, Entry::sealed(*slot));
                self.pool.release(old.slot)?;
            }
        }
        Ok(())
    }
}

/// Brings values that cannot be stored to the nearest that can, NaN to 0: one infinite value would turn
/// the scores of other tokens into NaN. Returns how many there were.
#[inline]
fn clamp(row: &mut [f32], largest: f32) -> u64 {
    // A count of comparisons vectorises; rows that need mending are rare. NaN is not below anything.
    let good = row.iter().filter(|x| x.abs() <= largest).count();
    let bad = (row.len() - good) as u64;
    if bad > 0 {
        for x in row {
            *x = if x.is_nan() { 0.0 } else { x.clamp(-largest, largest) };
        }
    }
    bad
}
