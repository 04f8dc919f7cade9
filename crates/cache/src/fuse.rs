//! The paper's tree over the sequences of a batch: which sealed blocks it looks at, and how its
//! redirects become table entries and free slots.
//!
//! The unit is a block of tokens of a whole layer: the keys of all KV heads decide, the values follow.
//! Sequences that the tree looks at keep their keys in the absolute frame, as the paper's do, so that
//! any two blocks are compared, and read, as they are stored.

use half::f16;
use rustc_hash::FxHashSet;

use crate::error::{CacheError, Result};
use crate::kv_cache::KvCache;
use crate::prefix::BlockHash;
use crate::sequence::{Sequence, SequenceId};
use crate::sharing::batch::{NewBlocks, Predictions};
use crate::sharing::tree::{self, Block, BlockId, Followed, FusionOptions, Representative};
use crate::sharing::{FusionReport, LayerFusion, SharingMode};
use crate::table::Entry;

/// Layers at either end that take no part.
const PROTECTED_LAYERS: usize = 2;

/// Blocks of a chunk where a single sequence is fused with itself; blocks of one chunk are not compared.
const CHUNK_BLOCKS: usize = 16;

/// A block of tokens of one sequence.
#[derive(Debug, Clone, Copy)]
struct Place {
    sequence: SequenceId,
    block: usize,
}

/// One layer of a batch, ready for the tree.
#[derive(Debug, Default)]
struct Batch {
    /// What a [`BlockId`] names.
    places: Vec<Place>,
    groups: Vec<BatchGroup>,
    /// Blocks of all tables; more than `places` where some are read from one slot.
    num_readers: usize,
}

/// A request, or a chunk of one.
#[derive(Debug, Default)]
struct BatchGroup {
    /// Blocks fused earlier first.
    blocks: Vec<Block>,
    keys: Vec<f32>,   // [blocks, kv_heads, block_size, head_dim]
    values: Vec<f32>, // the same
}

impl BatchGroup {
    fn new_blocks(&self, dim: usize) -> NewBlocks<'_> {
        let fused = self.blocks.iter().filter(|b| b.fused).count();
        NewBlocks { keys: &self.keys[fused * dim..], values: &self.values[fused * dim..] }
    }
}

impl KvCache {
    /// Fuses the sealed blocks of these sequences, where [`SharingMode::Tree`] is on; otherwise nothing
    /// happens. Each block is fused once: later calls compare new blocks with each other, and let them
    /// join the old ones as they are stored. Blocks of different tenants are never compared. With
    /// `pairs` the report says what the theory predicts from so many random pairs a layer.
    ///
    /// Groups of the tree are the sequences of a tenant; if there is only one, its chunks of 16 blocks.
    /// Blocks that share point to one set of slots, and the others' are free when this returns.
    /// All sealed blocks of the tenant's sequences are brought to f32, a layer at a time.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn fuse(&mut self, ids: &[SequenceId], pairs: usize) -> Result<FusionReport> {
        let bytes_before = self.pool.physical_bytes();
        let mut report = FusionReport { bytes_before, ..FusionReport::default() };
        let mut predictions = Predictions::default();
        if self.sharing.mode == SharingMode::Tree {
            for ids in self.by_tenant(ids)? {
                let mut new = 0;
                for id in &ids {
                    let sequence = self.sequence(*id)?;
                    new += sequence.num_sealed - sequence.num_fused;
                }
                if new == 0 {
                    continue;
                }
                report.blocks += new;
                let layers = self.geometry.layers().len();
                for layer in PROTECTED_LAYERS..layers.saturating_sub(PROTECTED_LAYERS) {
                    report.add(self.fuse_layer(layer, &ids, pairs, &mut predictions)?);
                }
                for id in ids {
                    let sequence = self.sequence_mut(id)?;
                    sequence.num_fused = sequence.num_sealed;
                }
            }
        }
        report.bytes_after = self.pool.physical_bytes();
        report.predicted = predictions.total(self.sharing.threshold());
        Ok(report)
    }

    /// The sequences of each tenant, each once. Equal tenants have equal recipes.
    fn by_tenant(&self, ids: &[SequenceId]) -> Result<Vec<Vec<SequenceId>>> {
        let mut tenants: Vec<(BlockHash, Vec<SequenceId>)> = Vec::new();
        for id in ids {
            let tenant = self.sequence(*id)?.tenant;
            match tenants.iter_mut().find(|(known, _)| *known == tenant) {
                Some((_, ids)) if ids.contains(id) => {}
                Some((_, ids)) => ids.push(*id),
                None => tenants.push((tenant, vec![*id])),
            }
        }
        Ok(tenants.into_iter().map(|(_, ids)| ids).collect())
    }

    fn sequence_mut(&mut self, id: SequenceId) -> Result<&mut Sequence> {
        self.sequence(id)?;
        let sequence = self.sequences[id.index as usize].as_mut();
        sequence.ok_or_else(|| CacheError::UnknownSequence { id: id.to_string() })
    }

    fn fuse_layer(
        &mut self,
        layer: usize,
        ids: &[SequenceId],
        pairs: usize,
        predictions: &mut Predictions,
    ) -> Result<LayerFusion> {
        let threshold = self.sharing.threshold();
        let dim = self.unit_len(layer);
        let batch = self.gather_layer(layer, ids)?;
        let groups: Vec<tree::Group<'_>> = batch
            .groups
            .iter()
            .map(|g| tree::Group { blocks: &g.blocks, keys: &g.keys, values: &[] })
            .collect();
        if pairs > 0 {
            let new: Vec<NewBlocks<'_>> = batch.groups.iter().map(|g| g.new_blocks(dim)).collect();
            predictions.add(&new, dim, pairs, threshold)?;
        }
        let fusion = tree::fuse(&groups, dim, &FusionOptions::paper(threshold))?;
        let rows = |of: fn(&BatchGroup) -> &[f32]| batch.groups.iter().map(of).collect::<Vec<_>>();
        let followed =
            [fusion.follow(&rows(|g| &g.keys), dim)?, fusion.follow(&rows(|g| &g.values), dim)?];
        let mut moved = 0;
        for (index, representative) in fusion.representatives().iter().enumerate() {
            moved += representative.members.len() - 1;
            for (part, followed) in followed.iter().enumerate() {
                let place = |member: usize| batch.places[fusion.blocks()[member].0 as usize];
                self.apply(Shared { layer, part, index, representative, followed }, place)?;
            }
        }
        let new = batch.groups.iter().flat_map(|g| &g.blocks).filter(|b| !b.fused).count();
        let parts = 2 * self.geometry.layers()[layer].kv_heads as u64;
        self.sharing_counts.sealed += parts * new as u64;
        self.sharing_counts.with_candidates += parts * new as u64;
        self.sharing_counts.shared += parts * moved as u64;
        Ok(LayerFusion {
            layer,
            blocks: batch.num_readers,
            representatives: fusion.representatives().len(),
            new,
            moved,
            rejected: fusion.num_rejected(),
        })
    }

    /// Numbers of a unit's key vector, and of its value vector.
    fn unit_len(&self, layer: usize) -> usize {
        let l = &self.geometry.layers()[layer];
        l.kv_heads * self.geometry.block_size() * l.head_dim
    }

    /// Reads the sealed blocks of one layer, as they are stored. What several tables read from one slot
    /// is listed once.
    fn gather_layer(&self, layer: usize, ids: &[SequenceId]) -> Result<Batch> {
        let mut batch = Batch::default();
        let mut seen = FxHashSet::default();
        for id in ids {
            let sequence = self.sequence(*id)?;
            let chunk = if ids.len() == 1 { CHUNK_BLOCKS } else { usize::MAX };
            for first in (0..sequence.num_sealed).step_by(chunk) {
                let end = first.saturating_add(chunk).min(sequence.num_sealed);
                // What others read too (a block that is shared by its prefix) keeps its bytes as well.
                let fixed = |block: &usize| {
                    *block < sequence.num_fused || !self.is_alone(sequence, layer, *block)
                };
                let (fused, new): (Vec<usize>, Vec<usize>) = (first..end).partition(fixed);
                let mut group = BatchGroup::default();
                let first_head = &sequence.tables[self.geometry.group(layer, 0)].keys;
                let listed = fused.into_iter().map(|b| (b, true));
                for (block, fused) in listed.chain(new.into_iter().map(|b| (b, false))) {
                    batch.num_readers += 1;
                    // Heads, keys and values of a unit move together: one slot stands for all.
                    if !seen.insert(first_head[block].slot) {
                        continue;
                    }
                    let id_of_block = BlockId(batch.places.len() as u32);
                    batch.places.push(Place { sequence: *id, block });
                    group.blocks.push(Block { id: id_of_block, fused });
                    self.read_unit(sequence, layer, (block, 0), &mut group.keys);
                    self.read_unit(sequence, layer, (block, 1), &mut group.values);
                }
                batch.groups.push(group);
            }
        }
        Ok(batch)
    }

    /// Whether nobody else reads any slot of a unit.
    fn is_alone(&self, sequence: &Sequence, layer: usize, block: usize) -> bool {
        let heads = self.geometry.layers()[layer].kv_heads;
        let first = self.geometry.group(layer, 0);
        let tables = &sequence.tables[first..first + heads];
        let slots = tables.iter().flat_map(|t| [t.keys[block].slot, t.values[block].slot]);
        slots.into_iter().all(|slot| self.pool.ref_count(slot) == 1)
    }

    /// Appends the stored rows of a unit's keys (0) or values (1), without gains.
    fn read_unit(
        &self,
        sequence: &Sequence,
        layer: usize,
        (block, part): (usize, usize),
        out: &mut Vec<f32>,
    ) {
        let l = &self.geometry.layers()[layer];
        let tokens = self.geometry.block_size();
        for head in 0..l.kv_heads {
            let entry = sequence.tables[self.geometry.group(layer, head)].part(part)[block];
            let at = out.len();
            out.resize(at + tokens * l.head_dim, 0.0);
            let bytes = self.pool.bytes(entry.slot);
            sequence.recipe.tail().decode(bytes, tokens, l.head_dim, &mut out[at..]);
        }
    }

    /// Writes a representative, and lets its members read it. `place` says which block a member is.
    fn apply(&mut self, shared: Shared<'_>, place: impl Fn(usize) -> Place) -> Result<()> {
        let Shared { layer, part, index, representative, followed } = shared;
        let [first, others @ ..] = representative.members.as_slice() else { return Ok(()) };
        if others.is_empty() {
            return Ok(());
        }
        let owner = place(*first);
        let l = &self.geometry.layers()[layer];
        let (heads, head_len) = (l.kv_heads, self.geometry.block_size() * l.head_dim);
        let dim = l.head_dim;
        let mut rows = vec![0.0; head_len];
        for head in 0..heads {
            let group = self.geometry.group(layer, head);
            let sequence = self.sequence(owner.sequence)?;
            let tail = sequence.recipe.tail();
            let entry = sequence.tables[group].part(part)[owner.block];
            if let Some(mean) = &followed.means[index] {
                let largest = tail.largest();
                let stored = &mean[head * head_len..(head + 1) * head_len];
                for (row, x) in rows.iter_mut().zip(stored) {
                    *row = (x * followed.stored_norms[index]).clamp(-largest, largest);
                }
                tail.encode(&rows, dim, self.pool.bytes_mut(entry.slot)?);
                let sequence = self.sequence_mut(owner.sequence)?;
                sequence.tables[group].part_mut(part)[owner.block].gain =
                    gain(followed.gains[*first]);
            }
            for member in others {
                let Place { sequence, block } = place(*member);
                self.pool.retain(entry.slot)?;
                let sequence = self.sequence_mut(sequence)?;
                let place = &mut sequence.tables[group].part_mut(part)[block];
                let old = place.slot;
                *place = Entry { gain: gain(followed.gains[*member]), ..entry };
                self.pool.release(old)?;
            }
        }
        Ok(())
    }
}

/// One part of a representative.
#[derive(Clone, Copy)]
struct Shared<'a> {
    layer: usize,
    part: usize,
    /// Its index in the fusion.
    index: usize,
    representative: &'a Representative,
    followed: &'a Followed,
}

/// Gains are near 1 but where a block of some length joins one of nearly none.
fn gain(gain: f32) -> f16 {
    f16::from_f32(gain.clamp(0.0, f16::MAX.to_f32()))
}
