//! How the parts of a full block are stored: each shares a slot that is like it, or is encoded into one of
//! its own. All parts are decided side by side on the current rayon pool; then the books follow, one by one.

use std::cell::RefCell;

use kvasir_kernels::AlignedBytes;
use rayon::prelude::*;

use crate::codec::JointCodec;
use crate::error::{CacheError, Result};
use crate::format::{FormatId, GroupPart};
use crate::kv_cache::KvCache;
use crate::pool::SlotId;
use crate::prefix::BlockHash;
use crate::sequence::Sequence;
use crate::sharing::SharingMode;
use crate::sharing::online::{Fit, square};
use crate::sharing::sketch::Sketch;
use crate::table::Entry;

/// Keys or values of one head group of the block that is sealed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit {
    layer: usize,
    group: usize,
    part: usize,
    /// Its first table, and how many name its slot.
    table: usize,
    heads: usize,
    /// The slot it may encode into; `None` if the tail's stays.
    own: Option<SlotId>,
    /// Its place in the order of the format's parts.
    index: usize,
}

/// What all units of a block have in common.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    pub(crate) sequence: &'a Sequence,
    pub(crate) block: usize,
    pub(crate) format: FormatId,
    /// What candidates for sharing are found by, if they are looked for.
    pub(crate) content: Option<BlockHash>,
}

/// What is to happen to a unit.
#[derive(Debug, Default)]
struct Decision {
    share: Option<(SlotId, Fit)>,
    had_candidates: bool,
    sketch: Option<Sketch>,
}

/// One thread's buffers.
#[derive(Debug, Default)]
struct Scratch {
    /// Rows of all heads: `[tokens, width]`.
    rows: Vec<f32>,
    /// Rows of one head: `[tokens, head_dim]`.
    head: Vec<f32>,
    /// What is compared and stored, if it is not the rows: `[tokens, width]`.
    coefficients: Vec<f32>,
    /// A candidate: `[tokens, width]`.
    candidate: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl KvCache {
    /// Stores all parts of a full tail block. `slots`: one for every part, in the order of the format's
    /// parts; none if the tail's stay.
    pub(crate) fn store_block(
        &mut self,
        sequence: &mut Sequence,
        block: usize,
        slots: &[SlotId],
    ) -> Result<()> {
        // The first block is like no other; the tree looks at whole batches, later.
        let sharing = (block > 0 || sequence.origin > 0)
            && sequence.selection.is_none()
            && sequence.watched.is_none()
            && matches!(self.sharing.mode, SharingMode::Tokens | SharingMode::Sketch);
        if slots.is_empty() && !sharing {
            return Ok(());
        }
        let format = match slots.is_empty() {
            true => sequence.tail_format,
            false => sequence.sealed_format(block),
        };
        let tokens = self.geometry.block_size();
        let content = sharing.then(|| sequence.tenant.child(&sequence.tail_tokens[..tokens]));
        let units = self.units(sequence, format, slots);
        if sharing && self.sharing.mode == SharingMode::Sketch {
            let layers = self.geometry.layers().iter();
            let widest = layers.map(|l| l.kv_heads * l.head_dim).max().unwrap_or(0);
            self.sketch_index.prepare(tokens * widest);
        }
        let sizes = units.iter().map(|u| u.own.map_or(0, |own| self.pool.size_of(own)));
        let mut bytes = std::mem::replace(&mut self.sealed_bytes, AlignedBytes::zeroed(0));
        let needed = sizes.clone().sum();
        if bytes.len() < needed {
            bytes = AlignedBytes::zeroed(needed);
        }
        // Aligned as slots are: their sizes are whole cache lines.
        let mut rest = bytes.as_mut_slice();
        let outputs: Vec<&mut [u8]> = sizes
            .map(|size| {
                let (own, others) = std::mem::take(&mut rest).split_at_mut(size);
                rest = others;
                own
            })
            .collect();
        let job = Block { sequence, block, format, content };
        let decisions: Vec<(Decision, &[u8])> = units
            .par_iter()
            .with_max_len(1)
            .zip(outputs)
            .map(|(unit, out)| (self.decide(&job, unit, out), &*out))
            .collect();
        let mut all_shared = true;
        let mut parts = Vec::with_capacity(units.len());
        for (unit, (decision, bytes)) in units.iter().zip(decisions) {
            all_shared &= decision.share.is_some();
            let entry =
                self.carry_out(sequence, (block, format), unit, &decision, bytes, sharing)?;
            parts.push((entry.slot, self.pool.stamp(entry.slot)));
        }
        self.sealed_bytes = bytes;
        if let Some(content) = content.filter(|_| !all_shared) {
            self.sharing_index.publish(content, format, parts.into(), &mut self.pool);
        }
        Ok(())
    }

    pub(crate) fn units(
        &self,
        sequence: &Sequence,
        format: FormatId,
        slots: &[SlotId],
    ) -> Vec<Unit> {
        let mut units = Vec::new();
        for (layer, l) in self.formats.get(format).layers.iter().enumerate() {
            if !sequence.owns(layer) {
                continue;
            }
            for group in 0..l.groups.len() {
                let table = self.geometry.group(layer, group * l.heads);
                for part in 0..2 {
                    let index = units.len();
                    let own = slots.get(index).copied();
                    units.push(Unit { layer, group, part, table, heads: l.heads, own, index });
                }
            }
        }
        units
    }

    /// What coding does to a unit: its squared error by its square, in the terms that its codec compares rows in.
    pub(crate) fn unit_error(&self, job: &Block<'_>, unit: &Unit) -> f64 {
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { rows, head, coefficients, candidate } = scratch;
            let codec =
                &self.formats.get(job.format).layers[unit.layer].groups[unit.group][unit.part];
            self.gather(job, unit, rows, head);
            let tokens = self.geometry.block_size();
            let width = rows.len() / tokens;
            let mut bytes = AlignedBytes::zeroed(codec.codec().slot_bytes(tokens, width));
            let joint = codec.joint();
            let original: &[f32] = match joint {
                Some(joint) => {
                    coefficients.resize(rows.len(), 0.0);
                    joint.coefficients(rows, coefficients);
                    joint.encode_coefficients(coefficients, bytes.as_mut_slice());
                    coefficients
                }
                None => {
                    codec.codec().encode(rows, width, bytes.as_mut_slice());
                    rows
                }
            };
            candidate.resize(original.len(), 0.0);
            decode(codec, joint, bytes.as_slice(), (tokens, width), candidate);
            let squares = |values: &mut dyn Iterator<Item = f32>| -> f64 {
                values.map(|x| f64::from(x) * f64::from(x)).sum()
            };
            let error = squares(&mut original.iter().zip(&*candidate).map(|(a, b)| a - b));
            let whole = squares(&mut original.iter().copied());
            if whole > 0.0 && error.is_finite() { error / whole } else { 0.0 }
        })
    }

    /// Looks for a slot that is like a unit, or encodes it into `out`.
    fn decide(&self, job: &Block<'_>, unit: &Unit, out: &mut [u8]) -> Decision {
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { rows, head, coefficients, candidate } = scratch;
            let codec =
                &self.formats.get(job.format).layers[unit.layer].groups[unit.group][unit.part];
            let joint = codec.joint();
            self.gather(job, unit, rows, head);
            if let Some(joint) = joint {
                coefficients.resize(rows.len(), 0.0);
                joint.coefficients(rows, coefficients);
            }
            let original: &[f32] = if joint.is_some() { coefficients } else { rows };
            let mut decision = Decision::default();
            if let Some(content) = &job.content {
                candidate.resize(original.len(), 0.0);
                decision = self.look_for_like(job, content, unit, codec, original, candidate);
            }
            if decision.share.is_none() && unit.own.is_some() {
                let width = rows.len() / self.geometry.block_size();
                let bytes = codec.codec().slot_bytes(self.geometry.block_size(), width);
                match joint {
                    Some(joint) => joint.encode_coefficients(coefficients, &mut out[..bytes]),
                    None => codec.codec().encode(rows, width, &mut out[..bytes]),
                }
            }
            decision
        })
    }

    /// The slot that a unit may share, if there is one within the limit.
    fn look_for_like(
        &self,
        job: &Block<'_>,
        content: &BlockHash,
        unit: &Unit,
        codec: &GroupPart,
        original: &[f32],
        candidate: &mut [f32],
    ) -> Decision {
        let joint = codec.joint();
        let own_error = match joint {
            Some(joint) => joint.codec_error(),
            None if unit.own.is_none() => 0.0,
            None => codec.codec().expected_error(),
        };
        let most = self.sharing.most_error(own_error, joint.is_some());
        let mut best: Option<(SlotId, Fit)> = None;
        let mut had_candidates = false;
        let (tokens, pool) = (self.geometry.block_size(), &self.pool);
        // Most blocks that a sketch brings up are unlike already in their first rows.
        let rows = (tokens, original.len() / tokens);
        let (begin, _) = original.split_at(tokens / 4 * rows.1);
        let most_of_begin = most * square(original) / square(begin);
        let mut consider = |slot: SlotId| {
            had_candidates = true;
            let bytes = pool.bytes(slot);
            decode(codec, joint, bytes, rows, &mut candidate[..begin.len()]);
            // No gain for all rows does better by these than their own, which leaves 1 at most.
            let fit = Fit::new(begin, &candidate[..begin.len()]);
            if fit.error.min(1.0) > most_of_begin {
                return;
            }
            decode(codec, joint, bytes, rows, candidate);
            let fit = Fit::new(original, candidate);
            if best.is_none_or(|(_, b)| fit.error < b.error) {
                best = Some((slot, fit));
            }
        };
        let index = &self.sharing_index;
        index.candidates(content, job.format, unit.index, pool).for_each(&mut consider);
        let mut sketch = None;
        if self.sharing.mode == SharingMode::Sketch {
            let (index, tenant) = (&self.sketch_index, &job.sequence.tenant);
            let signs = index.sketch(original);
            index.candidates(tenant, job.format, unit.index, signs, pool).for_each(consider);
            sketch = Some(signs);
        }
        let share = best.filter(|(_, fit)| fit.error <= most);
        Decision { share, had_candidates, sketch }
    }

    /// Brings a decision into pool, tables and indices; returns the unit's entry.
    fn carry_out(
        &mut self,
        sequence: &mut Sequence,
        (block, format): (usize, FormatId),
        unit: &Unit,
        decision: &Decision,
        bytes: &[u8],
        sharing: bool,
    ) -> Result<Entry> {
        let counts = &mut self.sharing_counts;
        counts.sealed += u64::from(sharing);
        counts.with_candidates += u64::from(decision.had_candidates);
        counts.shared += u64::from(decision.share.is_some());
        let tables = &mut sequence.tables[unit.table..unit.table + unit.heads];
        let at = block - sequence.released;
        let tail =
            tables.first().map(|t| t.part(unit.part)[at]).ok_or_else(|| CacheError::Integrity {
                what: format!("a head group without heads in layer {}", unit.layer),
            })?;
        let entry = match (decision.share, unit.own) {
            (Some((slot, fit)), own) => {
                self.pool.retain(slot)?;
                if let Some(own) = own {
                    self.pool.release(own)?;
                }
                Entry { gain: half::f16::from_f32(fit.gain), ..Entry::new(slot, format) }
            }
            (None, Some(own)) => {
                self.pool.bytes_mut(own)?.copy_from_slice(bytes);
                Entry::new(own, format)
            }
            (None, None) => tail,
        };
        for (head, table) in tables.iter_mut().enumerate() {
            let old = std::mem::replace(&mut table.part_mut(unit.part)[at], entry);
            if head > 0 {
                self.pool.retain(entry.slot)?;
            }
            if old.slot != entry.slot {
                self.pool.release(old.slot)?;
            }
        }
        if let Some(sketch) = decision.sketch.filter(|_| decision.share.is_none()) {
            let (index, pool) = (&mut self.sketch_index, &mut self.pool);
            index.publish(&sequence.tenant, format, unit.index, sketch, entry.slot, pool);
        }
        Ok(entry)
    }

    /// Reads the rows of all heads of a unit as the tail has them, side by side.
    fn gather(&self, job: &Block<'_>, unit: &Unit, rows: &mut Vec<f32>, head: &mut Vec<f32>) {
        let (tokens, dim) =
            (self.geometry.block_size(), self.geometry.layers()[unit.layer].head_dim);
        let width = unit.heads * dim;
        rows.resize(tokens * width, 0.0);
        head.resize(tokens * dim, 0.0);
        let tables = &job.sequence.tables[unit.table..unit.table + unit.heads];
        for (i, table) in tables.iter().enumerate() {
            let entry = table.part(unit.part)[job.block - job.sequence.released];
            job.sequence.recipe.tail().decode(self.pool.bytes(entry.slot), tokens, dim, head);
            // A prefix that was found may have blocks that stand for others.
            let gain = entry.gain.to_f32();
            if gain != 1.0 {
                head.iter_mut().for_each(|x| *x *= gain);
            }
            for (row, from) in rows.chunks_exact_mut(width).zip(head.chunks_exact(dim)) {
                row[i * dim..(i + 1) * dim].copy_from_slice(from);
            }
        }
    }
}

/// The first rows of a candidate in the terms that the original is compared in. `tokens`, `width`: shape of
/// a block.
fn decode(
    codec: &GroupPart,
    joint: Option<&JointCodec>,
    bytes: &[u8],
    (tokens, width): (usize, usize),
    out: &mut [f32],
) {
    match joint {
        Some(joint) => joint.decode_coefficients(bytes, tokens, out),
        None => codec.codec().decode(bytes, tokens, width, out),
    }
}
