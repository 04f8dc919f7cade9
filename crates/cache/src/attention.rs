//! HOT PATH. Attention over block tables: prefill and decode are the same code with more or fewer
//! query rows.
//!
//! A work item is (sequence, KV head, up to [`QUERY_TOKENS`] query tokens). It walks the blocks in order
//! of position, decodes each tile once into L1-sized scratch and uses it for all its query rows, with an
//! online softmax. What one row computes depends on its own position only, never on the other rows of
//! the step or on how the prompt was cut: masked keys contribute exact zeros.

use std::sync::{Mutex, PoisonError};

use kvasir_kernels::{OnlineSoftmax, gemm_nn_acc, gemm_nt, scale_in_place, soft_cap};
use rayon::prelude::*;

use crate::codec::Part;
use crate::config::KeyFrame;
use crate::error::Result;
use crate::geometry::LayerGeometry;
use crate::kv_cache::KvCache;
use crate::sequence::{Sequence, SequenceId};
use crate::table::{Entry, Format};

/// Query tokens of one work item: with three query heads to a KV head, 192 rows whose scores, queries
/// and sums stay in L2.
const QUERY_TOKENS: usize = 64;

/// The part of a step's flat batch that belongs to one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSlice {
    /// The sequence.
    pub sequence: SequenceId,
    /// Row of its first token in the flat batch.
    pub row: usize,
    /// Position of its first token in the sequence.
    pub start: usize,
    /// Its tokens.
    pub len: usize,
}

#[derive(Debug, Clone, Copy)]
struct Item {
    slice: usize,
    kv_head: usize,
    first: usize,
    len: usize,
}

/// One thread's tile and row buffers.
#[derive(Debug, Default)]
struct Tile {
    keys: Vec<f32>,    // [block_size, head_dim]
    values: Vec<f32>,  // [block_size, head_dim]
    queries: Vec<f32>, // [rows, head_dim]
    scores: Vec<f32>,  // [rows, block_size]
    states: Vec<OnlineSoftmax>,
}

/// Buffers that attention reuses from step to step. One per runner.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    items: Vec<Item>,
    mixed: Vec<f32>, // [rows of all items, head_dim], item by item
    tiles: Vec<Mutex<Tile>>,
}

impl KvCache {
    /// Attends with the step's queries to everything their sequences hold up to their own positions;
    /// [`KvCache::write`] has stored this step's keys and values before.
    ///
    /// `queries` (not rotated) and `out`: `[rows, query_heads, head_dim]`. Query heads `h · group ..
    /// (h + 1) · group` share KV head `h`. Uses the current rayon pool.
    ///
    /// # Errors
    /// [`crate::CacheError::UnknownSequence`].
    pub fn attend(
        &self,
        layer: usize,
        slices: &[BatchSlice],
        queries: &[f32],
        out: &mut [f32],
        scratch: &mut AttentionScratch,
    ) -> Result<()> {
        let l = &self.geometry.layers()[layer];
        let group = l.query_heads / l.kv_heads;
        for slice in slices {
            self.sequence(slice.sequence)?;
        }
        scratch.items.clear();
        for (slice, s) in slices.iter().enumerate() {
            for first in (0..s.len).step_by(QUERY_TOKENS) {
                let len = QUERY_TOKENS.min(s.len - first);
                let heads = 0..l.kv_heads;
                scratch.items.extend(heads.map(|kv_head| Item { slice, kv_head, first, len }));
            }
        }
        let width = group * l.head_dim;
        let rows: usize = scratch.items.iter().map(|i| i.len).sum();
        scratch.mixed.resize(rows * width, 0.0);
        let threads = rayon::current_num_threads();
        if scratch.tiles.len() < threads {
            scratch.tiles.resize_with(threads, Mutex::default);
        }
        let tiles = &scratch.tiles;
        let mut rest = scratch.mixed.as_mut_slice();
        let outputs: Vec<&mut [f32]> = scratch
            .items
            .iter()
            .map(|item| {
                let (own, others) = std::mem::take(&mut rest).split_at_mut(item.len * width);
                rest = others;
                own
            })
            .collect();
        let items = scratch.items.par_iter().with_max_len(1);
        items.zip(outputs).try_for_each(|(item, mixed)| {
            let slice = &slices[item.slice];
            let sequence = self.sequence(slice.sequence)?;
            let tile = &tiles[rayon::current_thread_index().unwrap_or(0) % tiles.len()];
            // A poisoned tile is only scratch: its contents are written before they are read.
            let mut tile = tile.lock().unwrap_or_else(PoisonError::into_inner);
            let queries = &queries[(slice.row + item.first) * l.query_heads * l.head_dim..];
            self.attend_item(layer, sequence, slice, item, queries, mixed, &mut tile);
            Ok::<(), crate::CacheError>(())
        })?;
        let mut mixed = scratch.mixed.chunks_exact(width);
        for item in &scratch.items {
            let row = slices[item.slice].row + item.first;
            for (t, mixed) in mixed.by_ref().take(item.len).enumerate() {
                let at = ((row + t) * l.query_heads + item.kv_head * group) * l.head_dim;
                out[at..at + width].copy_from_slice(mixed);
            }
        }
        Ok(())
    }

    /// One work item. `queries`: from the item's first row; `mixed`: `[item.len, group, head_dim]`.
    #[allow(clippy::too_many_arguments)]
    fn attend_item(
        &self,
        layer: usize,
        sequence: &Sequence,
        slice: &BatchSlice,
        item: &Item,
        queries: &[f32],
        mixed: &mut [f32],
        tile: &mut Tile,
    ) {
        let l = &self.geometry.layers()[layer];
        let (dim, block_size) = (l.head_dim, self.geometry.block_size());
        let group = l.query_heads / l.kv_heads;
        let scale = l.score_scale * self.frame.score_factor(l.rope);
        let table = &sequence.tables[self.geometry.group(layer, item.kv_head)];
        let relative = self.recipe().frame() == KeyFrame::BlockRelative;
        let start = slice.start + item.first;
        let rows = item.len * group;
        tile.resize(rows, dim, block_size);
        tile.states.fill(OnlineSoftmax::default());
        mixed.fill(0.0);

        let oldest = l.window.map_or(0, |w| (start + 1).saturating_sub(w));
        let last = start + item.len - 1;
        for block in oldest / block_size..=last / block_size {
            let p = block * block_size;
            let filled = block_size.min(last + 1 - p);
            // Query tokens that see any of this block: not before it, and not past the window.
            let t0 = p.saturating_sub(start);
            let t1 = l.window.map_or(item.len, |w| {
                item.len.min((p + filled).saturating_add(w - 1).saturating_sub(start))
            });
            if t0 >= t1 {
                continue;
            }
            let (keys, values) = (&mut tile.keys[..filled * dim], &mut tile.values[..filled * dim]);
            self.decode(Part::Keys, table.keys[block], dim, keys);
            self.decode(Part::Values, table.values[block], dim, values);

            for t in t0..t1 {
                for g in 0..group {
                    let at = (t * l.query_heads + item.kv_head * group + g) * dim;
                    let to = ((t - t0) * group + g) * dim;
                    let rotated = &mut tile.queries[to..to + dim];
                    let distance = if relative { start + t - p } else { start + t };
                    self.frame.rotate(l.rope, distance, &queries[at..at + dim], rotated);
                }
            }
            let n = (t1 - t0) * group;
            gemm_nt((n, filled, dim), &tile.queries, dim, keys, dim, &mut tile.scores, filled);
            let scores = &mut tile.scores[..n * filled];
            scale_in_place(scores, scale);
            if let Some(cap) = l.score_cap {
                soft_cap(scores, cap);
            }
            for (i, scores) in scores.chunks_exact_mut(filled).enumerate() {
                let row = t0 * group + i;
                mask(scores, l, start + row / group, p);
                let mixed = &mut mixed[row * dim..(row + 1) * dim];
                tile.states[row].push(scores, mixed);
            }
            let mixed = &mut mixed[t0 * group * dim..t1 * group * dim];
            gemm_nn_acc((n, dim, filled), scores, filled, values, dim, mixed, dim);
        }
        for (state, mixed) in tile.states.iter().zip(mixed.chunks_exact_mut(dim)) {
            scale_in_place(mixed, state.normaliser());
        }
    }

    #[inline]
    fn decode(&self, part: Part, entry: Entry, dim: usize, out: &mut [f32]) {
        let kind = self.recipe().codec();
        let bytes = self.pool.bytes(entry.slot);
        let tokens = self.geometry.block_size();
        match (entry.format, kind.sealed(part)) {
            (Format::Sealed, Some(codec)) => codec.decode(bytes, tokens, dim, out),
            _ => kind.tail().decode(bytes, tokens, dim, out),
        }
        if entry.gain != half::f16::ONE {
            scale_in_place(out, entry.gain.to_f32());
        }
    }
}

/// Hides keys after the query's position `m`, and those that left its window. `p`: position of the
/// first score.
#[inline]
fn mask(scores: &mut [f32], l: &LayerGeometry, m: usize, p: usize) {
    let visible = (m + 1).saturating_sub(p).min(scores.len());
    scores[visible..].fill(f32::NEG_INFINITY);
    if let Some(window) = l.window {
        let hidden = (m + 1).saturating_sub(window).saturating_sub(p).min(scores.len());
        scores[..hidden].fill(f32::NEG_INFINITY);
    }
}

impl Tile {
    fn resize(&mut self, rows: usize, dim: usize, block_size: usize) {
        self.keys.resize(block_size * dim, 0.0);
        self.values.resize(block_size * dim, 0.0);
        self.queries.resize(rows * dim, 0.0);
        self.scores.resize(rows * block_size, 0.0);
        self.states.resize(rows, OnlineSoftmax::default());
    }
}
