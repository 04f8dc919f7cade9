//! HOT PATH. Attention over block tables: prefill and decode are the same code with more or fewer
//! query rows.
//!
//! A work item is (sequence, KV heads, up to [`QUERY_TOKENS`] query tokens). It walks the blocks in order
//! of position, decodes each tile once into L1-sized scratch and uses it for all its query rows, with an
//! online softmax. What one row computes over uncompressed blocks depends on its own position only, never
//! on the other rows of the step or on how the prompt was cut: masked keys contribute exact zeros.
//!
//! Two paths: [`plain`] turns a tile into plain rows first, which pays where many queries meet it
//! (prefill), and always where its codec knows no other way; [`coded`] reads jointly coded tiles in their
//! own basis, for few queries (decode).

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rayon::prelude::*;

use crate::error::Result;
use crate::frame::Frame;
use crate::geometry::LayerGeometry;
use crate::kv_cache::KvCache;
use crate::sequence::{Sequence, SequenceId};

mod coded;
mod plain;
mod tile;

use tile::Tile;

/// Query tokens of one work item: with three query heads to a KV head, 192 rows whose scores, queries
/// and sums stay in L2.
const QUERY_TOKENS: usize = 64;

/// The same where every tile costs a product to decode: as many queries as L2 holds share it.
const CODED_QUERY_TOKENS: usize = 256;

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
    /// KV heads; more than one on the coded path only.
    heads: usize,
    first: usize,
    len: usize,
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
        let clock = Instant::now();
        let l = &self.geometry.layers()[layer];
        let group = l.query_heads / l.kv_heads;
        scratch.items.clear();
        for (slice, s) in slices.iter().enumerate() {
            let sequence = self.sequence(s.sequence)?;
            let heads = self.coded_heads(layer, sequence, s.len * group);
            let most = self.query_tokens(layer, sequence);
            for first in (0..s.len).step_by(most) {
                let len = most.min(s.len - first);
                let step = heads.unwrap_or(1);
                for kv_head in (0..l.kv_heads).step_by(step) {
                    let heads = heads.map_or(0, |h| h.min(l.kv_heads - kv_head));
                    scratch.items.push(Item { slice, kv_head, heads, first, len });
                }
            }
        }
        let width = group * l.head_dim;
        let rows: usize = scratch.items.iter().map(|i| i.len * i.heads.max(1)).sum();
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
                let len = item.len * item.heads.max(1) * width;
                let (own, others) = std::mem::take(&mut rest).split_at_mut(len);
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
            let work = Work { layer, l, group, sequence, start: slice.start + item.first, item };
            match item.heads {
                0 => self.attend_plain(&work, queries, mixed, &mut tile),
                _ => self.attend_coded(&work, queries, mixed, &mut tile),
            }
            Ok::<(), crate::CacheError>(())
        })?;
        let mut mixed = scratch.mixed.chunks_exact(width);
        for item in &scratch.items {
            let row = slices[item.slice].row + item.first;
            for head in item.kv_head..item.kv_head + item.heads.max(1) {
                for (t, mixed) in mixed.by_ref().take(item.len).enumerate() {
                    let at = ((row + t) * l.query_heads + head * group) * l.head_dim;
                    out[at..at + width].copy_from_slice(mixed);
                }
            }
        }
        self.attention_nanos.fetch_add(clock.elapsed().as_nanos() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// What an item is about.
struct Work<'a> {
    layer: usize,
    l: &'a LayerGeometry,
    /// Query heads of a KV head.
    group: usize,
    sequence: &'a Sequence,
    /// Position of the item's first query token.
    start: usize,
    item: &'a Item,
}

/// A block and the query tokens that see any of it.
struct Visible {
    block: usize,
    /// Position of its first token.
    p: usize,
    /// Tokens of it that somebody sees.
    filled: usize,
    /// Query tokens of the item, `t0 .. t1`.
    t0: usize,
    t1: usize,
}

impl Work<'_> {
    /// Blocks in order of position.
    fn visible(&self, block_size: usize) -> impl Iterator<Item = Visible> {
        let (start, len, window) = (self.start, self.item.len, self.l.window);
        let oldest = window.map_or(0, |w| (start + 1).saturating_sub(w));
        let last = start + len - 1;
        (oldest / block_size..=last / block_size).filter_map(move |block| {
            let p = block * block_size;
            let filled = block_size.min(last + 1 - p);
            // Not before the block, and not past the window.
            let t0 = p.saturating_sub(start);
            let t1 = window
                .map_or(len, |w| len.min((p + filled).saturating_add(w - 1).saturating_sub(start)));
            (t0 < t1).then_some(Visible { block, p, filled, t0, t1 })
        })
    }
}

impl Work<'_> {
    /// The queries of one KV head and query tokens `tokens` (of the item), each turned by its token's
    /// position less `origin`. `queries`: from the item's first row; `out`: `[tokens · group, head_dim]`.
    #[inline]
    fn rotate_queries(
        &self,
        frame: &Frame,
        kv_head: usize,
        tokens: std::ops::Range<usize>,
        origin: usize,
        queries: &[f32],
        out: &mut [f32],
    ) {
        let dim = self.l.head_dim;
        let width = self.group * dim;
        for (t, rows) in tokens.zip(out.chunks_exact_mut(width)) {
            let at = t * self.l.query_heads * dim + kv_head * width;
            let heads = queries[at..at + width].chunks_exact(dim).zip(rows.chunks_exact_mut(dim));
            for (query, row) in heads {
                frame.rotate(self.l.rope, self.start + t - origin, query, row);
            }
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
