//! How a full block becomes immutable: found in the prefix cache, shared with a block like it, or
//! encoded.

use std::time::Instant;

use crate::codec::JointCodec;
use crate::error::Result;
use crate::format::{FormatId, GroupPart};
use crate::geometry::LayerGeometry;
use crate::kv_cache::KvCache;
use crate::pool::SlotId;
use crate::prefix::BlockHash;
use crate::sequence::{Sequence, SequenceId};
use crate::sharing::SharingMode;
use crate::sharing::online::Fit;
use crate::table::{BlockTable, Entry};

/// Buffers of one block of one head group.
#[derive(Debug, Default)]
pub(crate) struct SealScratch {
    /// Rows of all heads: `[tokens, width]`.
    rows: Vec<f32>,
    /// Rows of one head: `[tokens, head_dim]`.
    head: Vec<f32>,
    /// What is compared and stored, if it is not the rows: `[tokens, width]`.
    coefficients: Vec<f32>,
    /// A candidate: `[tokens, width]`.
    candidate: Vec<f32>,
}

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
        let hash = hash.filter(|_| publishable);
        let known = hash.as_ref().and_then(|hash| self.prefix.find(hash));
        self.keep_residual(sequence, block)?;
        let clamped = self.clamped_blocks.contains(&(id, block));
        if clamped {
            // Values that were no numbers say that the rest of the block may be odd, too: it is kept as it is.
            self.clamped_blocks.retain(|clamped| *clamped != (id, block));
        }
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

    /// Lets every part of a full tail block share a slot that is like it, or encodes it into its own of
    /// `slots` (in the order of the format's parts; none if the tail's stay).
    fn store_block(
        &mut self,
        sequence: &mut Sequence,
        block: usize,
        slots: &[SlotId],
    ) -> Result<()> {
        // The first block is like no other; the tree looks at whole batches, later.
        let sharing =
            block > 0 && matches!(self.sharing.mode, SharingMode::Tokens | SharingMode::Sketch);
        if slots.is_empty() && !sharing {
            return Ok(());
        }
        let id = match slots.is_empty() {
            true => sequence.tail_format,
            false => sequence.sealed_format(block),
        };
        let tokens = self.geometry.block_size();
        let content = sharing.then(|| sequence.tenant.child(&sequence.tail_tokens[..tokens]));
        let mut scratch = std::mem::take(&mut self.seal_scratch);
        let mut parts = Vec::new();
        let mut all_shared = true;
        for layer in 0..self.geometry.layers().len() {
            let l = self.geometry.layers()[layer].clone();
            let (heads, groups) = {
                let format = &self.formats.get(id).layers[layer];
                (format.heads, format.groups.len())
            };
            for group in 0..groups {
                let first = self.geometry.group(layer, group * heads);
                for part in 0..2 {
                    let own = slots.get(parts.len()).copied();
                    let tables = &mut sequence.tables[first..first + heads];
                    let tail = sequence.recipe.tail();
                    scratch.gather(tables, part, block, (tokens, &l), |slot, rows| {
                        tail.decode(self.pool.bytes(slot), tokens, l.head_dim, rows);
                    });
                    let unit = Unit { id, layer, group, part, index: parts.len() };
                    let entry = self.store_part(
                        unit,
                        &sequence.tenant.clone(),
                        content,
                        own,
                        tables[0].part(part)[block],
                        &mut scratch,
                    )?;
                    all_shared &= entry.1;
                    let entry = entry.0;
                    for (head, table) in tables.iter_mut().enumerate() {
                        let place = &mut table.part_mut(part)[block];
                        let old = std::mem::replace(place, entry);
                        if head > 0 {
                            self.pool.retain(entry.slot)?;
                        }
                        if old.slot != entry.slot {
                            self.pool.release(old.slot)?;
                        }
                    }
                    parts.push((entry.slot, self.pool.stamp(entry.slot)));
                }
            }
        }
        self.seal_scratch = scratch;
        if let Some(content) = content.filter(|_| !all_shared) {
            self.sharing_index.publish(content, id, parts.into(), &mut self.pool);
        }
        Ok(())
    }

    /// Where one part of a block is to be read, with one reference taken for the first head (unless it is
    /// the tail's own slot), and whether that slot was there before.
    fn store_part(
        &mut self,
        unit: Unit,
        tenant: &BlockHash,
        content: Option<BlockHash>,
        own: Option<SlotId>,
        tail: Entry,
        scratch: &mut SealScratch,
    ) -> Result<(Entry, bool)> {
        let codec = &self.formats.get(unit.id).layers[unit.layer].groups[unit.group][unit.part];
        let SealScratch { rows, coefficients, candidate, .. } = scratch;
        let joint = codec.joint();
        if let Some(joint) = joint {
            coefficients.resize(rows.len(), 0.0);
            joint.coefficients(rows, coefficients);
        }
        let original: &[f32] = if joint.is_some() { coefficients } else { rows };
        let mut sketch = None;
        if let Some(content) = content {
            self.sharing_counts.sealed += 1;
            let own_error = match joint {
                Some(joint) => joint.codec_error(),
                None if own.is_none() => 0.0,
                None => codec.codec().expected_error(),
            };
            let most = self.sharing.most_error(own_error, joint.is_some());
            let mut best: Option<(SlotId, Fit)> = None;
            candidate.resize(original.len(), 0.0);
            let (tokens, pool) = (self.geometry.block_size(), &self.pool);
            let mut consider = |slot: SlotId| {
                decode(codec, joint, pool.bytes(slot), tokens, candidate);
                let fit = Fit::new(original, candidate);
                if best.is_none_or(|(_, b)| fit.error < b.error) {
                    best = Some((slot, fit));
                }
            };
            let index = &self.sharing_index;
            index.candidates(&content, unit.id, unit.index, pool).for_each(&mut consider);
            if self.sharing.mode == SharingMode::Sketch {
                let signs = self.sketch_index.sketch(original);
                let index = &self.sketch_index;
                index.candidates(tenant, unit.id, unit.index, signs, pool).for_each(consider);
                sketch = Some(signs);
            }
            self.sharing_counts.with_candidates += u64::from(best.is_some());
            if let Some((slot, fit)) = best.filter(|(_, fit)| fit.error <= most) {
                self.sharing_counts.shared += 1;
                self.pool.retain(slot)?;
                if let Some(own) = own {
                    self.pool.release(own)?;
                }
                let gain = half::f16::from_f32(fit.gain);
                return Ok((Entry { gain, ..Entry::new(slot, unit.id) }, true));
            }
        }
        if let Some(own) = own {
            let tokens = self.geometry.block_size();
            let bytes = codec.codec().slot_bytes(tokens, rows.len() / tokens);
            let slot = &mut self.pool.bytes_mut(own)?[..bytes];
            match joint {
                Some(joint) => joint.encode_coefficients(coefficients, slot),
                None => codec.codec().encode(rows, rows.len() / tokens, slot),
            }
        }
        let entry = own.map_or(tail, |own| Entry::new(own, unit.id));
        if let Some(sketch) = sketch {
            let (index, pool) = (&mut self.sketch_index, &mut self.pool);
            index.publish(tenant, unit.id, unit.index, sketch, entry.slot, pool);
        }
        Ok((entry, false))
    }
}

/// Which part of which head group.
#[derive(Clone, Copy)]
struct Unit {
    id: FormatId,
    layer: usize,
    group: usize,
    part: usize,
    /// Its place in the order of the format's parts.
    index: usize,
}

/// A candidate in the terms that the original is compared in.
fn decode(
    codec: &GroupPart,
    joint: Option<&JointCodec>,
    bytes: &[u8],
    tokens: usize,
    out: &mut [f32],
) {
    match joint {
        Some(joint) => joint.decode_coefficients(bytes, out),
        None => codec.codec().decode(bytes, tokens, out.len() / tokens, out),
    }
}

impl SealScratch {
    /// Reads the rows of all heads of a group, side by side. `read` decodes one head's slot.
    fn gather(
        &mut self,
        tables: &[BlockTable],
        part: usize,
        block: usize,
        (tokens, l): (usize, &LayerGeometry),
        read: impl Fn(SlotId, &mut [f32]),
    ) {
        let width = tables.len() * l.head_dim;
        self.rows.resize(tokens * width, 0.0);
        self.head.resize(tokens * l.head_dim, 0.0);
        for (head, table) in tables.iter().enumerate() {
            read(table.part(part)[block].slot, &mut self.head);
            for (t, row) in self.head.chunks_exact(l.head_dim).enumerate() {
                let at = t * width + head * l.head_dim;
                self.rows[at..at + l.head_dim].copy_from_slice(row);
            }
        }
    }
}
