//! From a complete prompt to what was chosen of it: rows are gathered into blocks of their own, coded as the recipe says,
//! and everything else is freed.
//!
//! Kept keys are stored turned by their own position, so that reading them needs no positions; jointly coded ones by
//! their row in the block, as their statistics expect, with the positions beside them. Whole blocks are coded, what is left
//! over stays as tails are, in the smallest slots that hold it. Slots were taken when the last tokens of the prompt were
//! reserved, so nothing here can run out of room.

use std::sync::Arc;

use kvasir_kernels::AlignedBytes;
use rayon::prelude::*;

use super::cold::{ColdBuilder, ColdRows, group_bytes};
use super::h2o::Scores;
use super::kept::Kept;
use super::observe::Selection;
use super::policy::{Choice, Policy, Recent};
use super::state::{Memory, State};
use crate::append::tail_capacity;
use crate::error::{CacheError, Result};
use crate::format::{FormatId, RecipeFormats};
use crate::geometry::LayerGeometry;
use crate::kv_cache::KvCache;
use crate::pool::{ClassId, SlotId};
use crate::project::{Channels, Owners, RECENT};
use crate::sequence::{Sequence, SequenceId};
use crate::table::{Entry, KeptBlock, Stays};

/// Bytes of the positions of a block.
pub(super) fn position_bytes(rows: usize) -> usize {
    16 + 4 * rows
}

/// One block of one layer that is to be kept.
#[derive(Debug, Clone, Copy)]
struct Planned {
    /// Its rows among those that a head keeps.
    begin: usize,
    rows: usize,
    stays: Stays,
    format: FormatId,
}

/// What must be there before the last tokens of a prompt may come.
#[derive(Debug, Default)]
pub(crate) struct RoomToChoose {
    pub(crate) classes: Vec<ClassId>,
    pub(crate) metadata: usize,
}

/// A coded part of a planned block.
struct Part {
    planned: usize,
    /// First KV head, and how many.
    heads: (usize, usize),
    part: usize,
    class: ClassId,
    bytes: AlignedBytes,
}

/// One layer in its new form.
struct Compacted {
    layer: usize,
    planned: Vec<Planned>,
    /// By KV head.
    positions: Vec<Vec<u32>>,
    parts: Vec<Part>,
    /// By KV head, if keys of some blocks have fewer.
    channels: Vec<Channels>,
    /// By KV head, if rows go outside the pool.
    cold: Vec<ColdRows>,
    /// By KV head, if what goes is remembered.
    states: Vec<State>,
}

impl KvCache {
    /// Tokens that a head of a layer keeps at most.
    fn most_rows(l: &LayerGeometry, policy: &dyn Policy, prompt: usize) -> usize {
        l.window.map_or_else(|| policy.most_kept(prompt), |window| window.min(prompt))
    }

    /// The blocks that `rows` kept rows of a layer's heads go to.
    fn planned(
        &self,
        l: &LayerGeometry,
        recent: Option<Recent>,
        rows: usize,
        formats: RecipeFormats,
    ) -> Vec<Planned> {
        let segments = match (l.window, recent) {
            (Some(_), _) => [(0, Stays::Always), (rows, Stays::InWindow)],
            (None, None) => [(rows, Stays::Always), (0, Stays::InWindow)],
            (None, Some(Recent { first, stays, .. })) => {
                let first = first.min(rows);
                [(first, stays), (rows - first, Stays::InWindow)]
            }
        };
        let block_size = self.geometry.block_size();
        let (all, mut begin) = (rows, 0);
        let mut planned = Vec::new();
        for (rows, stays) in segments {
            let end = begin + rows;
            while begin < end {
                let rows = block_size.min(end - begin);
                // The newest keep all channels: of all blocks of the sequence, not of a segment.
                let format = match (rows == block_size, formats.narrow) {
                    (true, Some(narrow)) if begin + rows + RECENT <= all => narrow,
                    (true, _) => formats.sealed[begin.min(1)],
                    (false, _) => formats.tail,
                };
                planned.push(Planned { begin, rows, stays, format });
                begin += rows;
            }
        }
        planned
    }

    /// The slot classes of a planned block: for each of its format's head groups, keys and values.
    fn classes(&self, layer: usize, planned: &Planned, tail: FormatId) -> Vec<[ClassId; 2]> {
        let l = &self.geometry.layers()[layer];
        if planned.format == tail {
            let log = self.room_of(planned.rows).trailing_zeros() as usize;
            let class = |head| self.tail_classes(tail)[self.geometry.group(layer, head)][log];
            return (0..l.kv_heads).map(|head| [class(head); 2]).collect();
        }
        let format = &self.formats.get(planned.format).layers[layer];
        format.groups.iter().map(|parts| [parts[0].class, parts[1].class]).collect()
    }

    fn room_of(&self, rows: usize) -> usize {
        tail_capacity(rows, self.geometry.block_size())
    }

    /// Whether blocks of a format know the positions of their tokens.
    fn has_positions(&self, format: FormatId, layer: usize) -> bool {
        let layer = &self.formats.get(format).layers[layer];
        layer.groups.first().is_some_and(|parts| parts[0].is_relative())
    }

    /// Slots for what a policy may keep of a prompt, by class, and the metadata of them.
    pub(crate) fn room_for_choice(
        &self,
        policy: &dyn Policy,
        prompt: usize,
        formats: RecipeFormats,
        owners: Option<&Owners>,
    ) -> RoomToChoose {
        let tail = formats.tail;
        let mut room = RoomToChoose::default();
        let block_size = self.geometry.block_size();
        for (layer, l) in self.geometry.layers().iter().enumerate() {
            if owners.is_some_and(|owners| owners[layer] != layer) {
                continue;
            }
            let rows = Self::most_rows(l, policy, prompt);
            let recent = policy.recent(prompt);
            if recent.is_some_and(|recent| recent.scored) && l.window.is_none() {
                room.metadata += l.kv_heads * 4 * (rows + 1);
            }
            if let Some(clusters) = policy.clusters().filter(|_| l.window.is_none()) {
                room.metadata += l.kv_heads * group_bytes(clusters, rows, l.head_dim);
            }
            if policy.remembers() && l.window.is_none() {
                room.metadata += l.kv_heads * State::num_bytes(l.head_dim);
            }
            let mut planned = self.planned(l, recent, rows, formats);
            if formats.narrow.is_some() {
                room.metadata += l.kv_heads * 4 * l.head_dim.div_ceil(32);
            }
            if policy.varies() && l.window.is_none() {
                // Wherever the cut falls, what is left over fits a whole tail.
                planned.push(Planned {
                    begin: 0,
                    rows: block_size,
                    stays: Stays::Always,
                    format: tail,
                });
            }
            for planned in &planned {
                let classes = self.classes(layer, planned, tail);
                let heads = l.kv_heads / classes.len();
                room.metadata += l.kv_heads * size_of::<KeptBlock>();
                if self.has_positions(planned.format, layer) {
                    room.metadata += l.kv_heads / heads * position_bytes(planned.rows);
                }
                room.classes.extend(classes.into_iter().flatten());
            }
        }
        room
    }

    /// Lets the policy choose and moves what it kept. Everything that only the prompt needed is free when this
    /// returns.
    pub(crate) fn choose(&mut self, id: SequenceId, sequence: &mut Sequence) -> Result<()> {
        let Some(mut selection) = sequence.selection.take() else { return Ok(()) };
        // A copy, which the policy is borrowed from.
        let recipe = sequence.recipe;
        let Some(policy) = recipe.policy() else { return Ok(()) };
        let (prompt, formats) = (sequence.num_tokens, selection.formats);
        // A prompt that is too short for anything to be seen of it.
        selection.columns.resize(self.geometry.num_groups(), Vec::new());
        selection.energies.resize(self.geometry.num_groups(), Vec::new());
        for (columns, (_, l)) in selection.columns.iter_mut().zip(self.geometry.groups()) {
            let rows = policy.observed().rows(l.query_heads / l.kv_heads);
            columns.resize(rows * prompt, 0.0);
        }
        for (energies, (_, l)) in selection.energies.iter_mut().zip(self.geometry.groups()) {
            energies.resize(l.head_dim, 0.0);
        }
        let choices = self.choices(policy, sequence, &selection)?;
        self.count_kept(&choices, prompt);
        let recent = policy.recent(prompt);
        let scores = recent.filter(|recent| recent.scored).map_or_else(Vec::new, |recent| {
            let groups = self.geometry.groups().enumerate();
            groups
                .map(|(group, (_, l))| match l.window {
                    Some(_) => Scores::default(),
                    None => {
                        let (layer, head) = self.geometry.layer_of(group);
                        Scores::new(
                            &selection.columns[group],
                            &choices[layer].heads[head],
                            recent.first,
                        )
                    }
                })
                .collect()
        });
        selection.columns = Vec::new();
        let mut slots = std::mem::take(&mut selection.slots);
        let layers = 0..self.geometry.layers().len();
        let layers: Vec<usize> = layers.filter(|layer| sequence.owns(*layer)).collect();
        let mut cold = ColdBuilder::new(self.geometry.num_groups());
        let mut states = vec![State::default(); self.geometry.num_groups()];
        // A few layers at a time, so that little is held twice.
        for layers in layers.chunks(rayon::current_num_threads()) {
            let compacted: Vec<Compacted> = layers
                .par_iter()
                .map(|layer| self.compact(sequence, *layer, &choices[*layer], recent, &selection))
                .collect::<Result<_>>()?;
            for mut layer in compacted {
                let first = self.geometry.group(layer.layer, 0);
                for (head, rows) in std::mem::take(&mut layer.cold).into_iter().enumerate() {
                    cold.add(first + head, rows);
                }
                for (head, state) in std::mem::take(&mut layer.states).into_iter().enumerate() {
                    states[first + head] = state;
                }
                self.move_layer(sequence, layer, &mut slots)?;
            }
        }
        for slot in slots {
            self.pool.release(slot)?;
        }
        let held = sequence.num_held() * self.geometry.table_bytes_per_block();
        self.pool.discharge_metadata(held + selection.charged);
        for table in &mut sequence.tables {
            table.keys.clear();
            table.values.clear();
        }
        for node in sequence.nodes.drain(..).rev() {
            self.prefix.leave(node, &mut self.pool)?;
        }
        self.clamped_blocks.retain(|(owner, _)| *owner != id);
        let cold = policy.clusters().map(|clusters| cold.finish(clusters, prompt));
        let memory = match policy.remembers() {
            true => {
                let window = recent.map_or(0, |recent| recent.window);
                let next = prompt.saturating_sub(window);
                Some(Memory::new(Arc::clone(self.tables.less()?), states, next))
            }
            false => None,
        };
        sequence.kept = Kept { recent, scores, cold, memory, metadata_bytes: 0 };
        sequence.kept.metadata_bytes = sequence.kept.count(&sequence.tables);
        self.pool.charge_metadata(sequence.kept.metadata_bytes)?;
        sequence.origin = prompt;
        sequence.num_sealed = 0;
        sequence.chain = None;
        sequence.tail_tokens.clear();
        sequence.tail_capacity = 0;
        // The first block of what follows is not the first of the sequence.
        sequence.sealed_formats = [formats.sealed[1]; 2];
        Ok(())
    }

    /// One layer's kept rows, coded.
    fn compact(
        &self,
        sequence: &Sequence,
        layer: usize,
        choice: &Choice,
        recent: Option<Recent>,
        selection: &Selection,
    ) -> Result<Compacted> {
        let (formats, tail) = (selection.formats, selection.formats.tail);
        let l = &self.geometry.layers()[layer];
        let rows = choice.heads.first().map_or(0, Vec::len);
        let planned = self.planned(l, recent, rows, formats);
        let gathered: Vec<[Vec<f32>; 2]> = (0..l.kv_heads)
            .map(|head| self.gather_chosen(sequence, layer, head, &choice.heads[head]))
            .collect();
        let channels = sequence.recipe.think().map_or_else(Vec::new, |think| {
            let first = self.geometry.group(layer, 0);
            let heads = selection.energies.iter().skip(first).zip(&gathered);
            heads.map(|(energies, [keys, _])| think.choose(energies, keys)).collect()
        });
        let mut parts = Vec::new();
        for (number, block) in planned.iter().enumerate() {
            let classes = self.classes(layer, block, tail);
            let heads = l.kv_heads / classes.len();
            for (group, classes) in classes.into_iter().enumerate() {
                for (part, class) in classes.into_iter().enumerate() {
                    let place = (group * heads, heads);
                    let mut bytes = AlignedBytes::zeroed(self.pool.slot_bytes(class));
                    let mut rows =
                        self.beside(layer, block, place, part, &gathered, &choice.heads[place.0]);
                    if part == 0 && Some(block.format) == formats.narrow {
                        rows = channels[place.0].narrow(&rows, l.head_dim);
                    }
                    self.encode(sequence, layer, block, (group, part), &rows, bytes.as_mut_slice());
                    parts.push(Part { planned: number, heads: place, part, class, bytes });
                }
            }
        }
        let cold = self.cold_rows(sequence, layer, choice);
        let states = self.states_of(sequence, layer, choice)?;
        let positions = choice.heads.clone();
        Ok(Compacted { layer, planned, positions, parts, channels, cold, states })
    }

    /// Rows of a layer that go outside the pool, by KV head: those after the kept ones.
    fn cold_rows(&self, sequence: &Sequence, layer: usize, choice: &Choice) -> Vec<ColdRows> {
        let l = &self.geometry.layers()[layer];
        let clusters = sequence.recipe.policy().and_then(Policy::clusters);
        let kept = choice.heads.first().map_or(0, Vec::len);
        let Some(clusters) = clusters.filter(|_| l.window.is_none() && kept < sequence.num_tokens)
        else {
            return Vec::new();
        };
        let positions: Vec<u32> = (kept as u32..sequence.num_tokens as u32).collect();
        let head = |head| {
            let [keys, values] = self.gather_chosen(sequence, layer, head, &positions);
            ColdRows::new(clusters, &keys, &values, l.head_dim)
        };
        (0..l.kv_heads).map(head).collect()
    }

    /// Rows of some heads side by side, `[rows, heads · head_dim]`; keys in the frame they are stored in.
    fn beside(
        &self,
        layer: usize,
        block: &Planned,
        (first, heads): (usize, usize),
        part: usize,
        gathered: &[[Vec<f32>; 2]],
        positions: &[u32],
    ) -> Vec<f32> {
        let l = &self.geometry.layers()[layer];
        let (dim, width) = (l.head_dim, heads * l.head_dim);
        let turned = part == 0 && self.has_positions(block.format, layer);
        let mut rows = vec![0.0; block.rows * width];
        for head in 0..heads {
            let from = &gathered[first + head][part][block.begin * dim..];
            for (row, (to, from)) in
                rows.chunks_exact_mut(width).zip(from.chunks_exact(dim)).enumerate()
            {
                let to = &mut to[head * dim..(head + 1) * dim];
                match turned {
                    // From its position back to its row.
                    true => {
                        let back = positions[block.begin + row] as usize - row;
                        self.frame.rotate_back(l.rope, back, from, to);
                    }
                    false => to.copy_from_slice(from),
                }
            }
        }
        rows
    }

    fn encode(
        &self,
        sequence: &Sequence,
        layer: usize,
        block: &Planned,
        (group, part): (usize, usize),
        rows: &[f32],
        bytes: &mut [u8],
    ) {
        let width = rows.len() / block.rows;
        if block.format == sequence.tail_format {
            return sequence.recipe.tail().encode(rows, width, bytes);
        }
        let codec = self.formats.get(block.format).layers[layer].groups[group][part].codec();
        let len = codec.slot_bytes(block.rows, width);
        codec.encode(rows, width, &mut bytes[..len]);
    }

    /// Keys, turned by their positions, and values of some positions of one head: `[positions, head_dim]` each.
    pub(super) fn gather_chosen(
        &self,
        sequence: &Sequence,
        layer: usize,
        head: usize,
        positions: &[u32],
    ) -> [Vec<f32>; 2] {
        let l = &self.geometry.layers()[layer];
        let (dim, block_size) = (l.head_dim, self.geometry.block_size());
        let group = self.geometry.group(layer, head);
        let tail = sequence.recipe.tail();
        let mut block_rows = vec![0.0; block_size * dim];
        [0, 1].map(|part| {
            let mut out = vec![0.0; positions.len() * dim];
            let mut held = usize::MAX;
            for (position, out) in positions.iter().zip(out.chunks_exact_mut(dim)) {
                let position = *position as usize;
                let (block, row) = (position / block_size, position % block_size);
                if held != block {
                    let slot = self.pool.bytes(sequence.entry(group, part, block).slot);
                    // A tail has room for fewer; rows that are not written yet are not asked for.
                    let rows = block_size.min(slot.len() / tail.slot_bytes(1, dim));
                    tail.decode(slot, block_size, dim, &mut block_rows[..rows * dim]);
                    held = block;
                }
                let from = &block_rows[row * dim..(row + 1) * dim];
                match part {
                    0 => self.frame.rotate(l.rope, block * block_size, from, out),
                    _ => out.copy_from_slice(from),
                }
            }
            out
        })
    }

    /// Puts a layer's blocks into slots, and frees what it was made from.
    fn move_layer(
        &mut self,
        sequence: &mut Sequence,
        compacted: Compacted,
        slots: &mut Vec<SlotId>,
    ) -> Result<()> {
        let Compacted { layer, planned, positions, parts, channels, .. } = compacted;
        let first = self.geometry.group(layer, 0);
        let tables = &mut sequence.tables[first..first + positions.len()];
        for entry in tables.iter().flat_map(|t| t.keys.iter().chain(&t.values)) {
            self.pool.release(entry.slot)?;
        }
        for (table, channels) in tables.iter_mut().zip(channels) {
            table.channels = Some(channels);
        }
        let heads_of = positions.len();
        let mut entries = vec![[None; 2]; planned.len() * heads_of];
        for part in parts {
            let slot = self.take_slot(part.class, slots, planned[part.planned].rows)?;
            let to = self.pool.bytes_mut(slot)?;
            let len = part.bytes.len().min(to.len());
            to[..len].copy_from_slice(&part.bytes.as_slice()[..len]);
            let entry = Entry::new(slot, planned[part.planned].format);
            for head in part.heads.0..part.heads.0 + part.heads.1 {
                if head > part.heads.0 {
                    self.pool.retain(slot)?;
                }
                entries[part.planned * heads_of + head][part.part] = Some(entry);
            }
        }
        for (number, block) in planned.iter().enumerate() {
            let joint = self.has_positions(block.format, layer);
            let heads = if joint { self.formats.get(block.format).layers[layer].heads } else { 1 };
            let mut shared = None;
            for (head, table) in tables.iter_mut().enumerate() {
                let own = &positions[head][block.begin..block.begin + block.rows];
                if joint && head.is_multiple_of(heads) {
                    shared = Some(Arc::from(own));
                }
                let [Some(key), Some(value)] = entries[number * heads_of + head] else {
                    let what = format!("layer {layer}: a kept block without slots");
                    return Err(CacheError::Integrity { what });
                };
                table.kept.push(KeptBlock {
                    entries: [key, value],
                    rows: block.rows,
                    first: own.first().map_or(0, |p| *p as usize),
                    stays: block.stays,
                    positions: shared.clone().filter(|_| joint),
                });
            }
        }
        Ok(())
    }

    /// One of the slots that were taken beforehand. Where a policy kept fewer than it might, what is left over in a
    /// layer may fit a smaller slot than was taken for it.
    fn take_slot(
        &mut self,
        class: ClassId,
        slots: &mut Vec<SlotId>,
        rows: usize,
    ) -> Result<SlotId> {
        if let Some(at) = slots.iter().rposition(|slot| self.pool.class_of(*slot) == Some(class)) {
            return Ok(slots.swap_remove(at));
        }
        if let Ok(slot) = self.pool.allocate(class) {
            return Ok(slot);
        }
        let needed = self.pool.slot_bytes(class);
        let larger = slots.iter().rposition(|slot| self.pool.size_of(*slot) >= needed);
        larger.map(|at| slots.swap_remove(at)).ok_or_else(|| CacheError::Integrity {
            what: format!("no slot was taken for {rows} rows of {needed} bytes"),
        })
    }
}
