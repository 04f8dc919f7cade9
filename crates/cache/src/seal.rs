//! How a full block becomes immutable: found in the prefix cache, shared with a block like it, or
//! encoded.

use std::time::Instant;

use crate::error::Result;
use crate::kv_cache::{KvCache, own_groups};
use crate::pool::SlotId;
use crate::sequence::{Sequence, SequenceId};
use crate::table::Entry;

/// What sharing did since the start, in parts (keys or values of a head group).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SharingCounts {
    /// Parts that were sealed while sharing was on.
    pub sealed: u64,
    /// Of those, parts that had candidates.
    pub with_candidates: u64,
    /// Of those, parts that share one.
    pub shared: u64,
}

impl KvCache {
    /// Seals the first unsealed block. Without a codec the tail's slots become the block's.
    pub(crate) fn seal(&mut self, id: SequenceId, sequence: &mut Sequence) -> Result<()> {
        let block = sequence.num_sealed;
        sequence.num_sealed += 1;
        let slots = sequence.seal_slots.pop_front().unwrap_or_default();
        // A block can only be known if all before it are: stop publishing after a gap.
        let publishable = sequence.nodes.len() == block;
        let tokens = self.geometry.block_size();
        let hash = sequence.chain.map(|chain| {
            let hash = chain.child(&sequence.tail_tokens[..tokens]);
            sequence.chain = Some(hash);
            hash
        });
        // Values that were no numbers say that the rest of the block may be odd, too: it is kept as it is,
        // and for this sequence only.
        let odd = self.clamped_blocks.contains(&(id, block));
        // A block that may be coded later must be known to be odd then.
        if odd && sequence.watched.is_none() {
            self.clamped_blocks.retain(|clamped| *clamped != (id, block));
        }
        let clamped = odd && !sequence.codes_odd_blocks;
        let hash = hash.filter(|_| publishable && !clamped);
        let known = hash.as_ref().and_then(|hash| self.prefix.find(hash));
        let at = block - sequence.released;
        self.keep_residual(sequence, block)?;
        if clamped || known.is_some() {
            for slot in slots {
                self.pool.release(slot)?;
            }
        } else {
            let start = Instant::now();
            self.store_block(sequence, block, &slots)?;
            self.seal_nanos += start.elapsed().as_nanos() as u64;
        }
        let Some(hash) = hash else { return Ok(()) };
        if let Some(node) = known {
            // Somebody sealed the same prefix meanwhile: read theirs, free ours.
            self.prefix.acquire(node, &mut self.pool)?;
            let entries = self.prefix.entries(node)?;
            let mut old: Vec<SlotId> = Vec::with_capacity(entries.len());
            let own: Vec<usize> = own_groups(&self.geometry, sequence).collect();
            for (group, pair) in own.into_iter().zip(entries.chunks_exact(2)) {
                let table = &mut sequence.tables[group];
                old.push(std::mem::replace(&mut table.keys[at], pair[0]).slot);
                old.push(std::mem::replace(&mut table.values[at], pair[1]).slot);
            }
            for slot in old {
                self.pool.release(slot)?;
            }
            sequence.nodes.push(node);
        } else {
            let own = own_groups(&self.geometry, sequence).map(|group| &sequence.tables[group]);
            let entries: Box<[Entry]> = own.flat_map(|t| [t.keys[at], t.values[at]]).collect();
            if let Some(node) = self.prefix.publish(hash, block, entries, &mut self.pool)? {
                sequence.nodes.push(node);
            }
        }
        Ok(())
    }
}
