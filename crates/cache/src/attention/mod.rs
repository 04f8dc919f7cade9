//! HOT PATH. Attention over block tables: prefill and decode are the same code with more or fewer
//! query rows.
//!
//! A work item is some query tokens of a sequence against a KV head, or of several sequences against the heads
//! of a coded block. It walks the blocks in order of position, decodes each tile once into L1-sized scratch
//! and uses it for all its query rows, with an online softmax. What one row computes over uncompressed blocks depends on its own position only, never
//! on the other rows of the step or on how the prompt was cut: masked keys contribute exact zeros.
//!
//! Two paths: [`plain`] turns a tile into plain rows first, which pays where many queries meet it
//! (prefill), and always where its codec knows no other way; [`coded`] reads jointly coded tiles in their
//! own basis, for few queries (decode), of several sequences side by side.

use std::ops::Range;
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

/// Coded items a thread should have to choose from, so that none waits long for the last.
const ITEMS_PER_THREAD: usize = 2;

/// Most sequences of an item: their sums stay in L2.
const MAX_PARTS: usize = 32;

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

/// Query tokens of one sequence.
#[derive(Debug, Clone, Copy)]
struct Part {
    slice: usize,
    first: usize,
    len: usize,
}

/// What one thread does at a time: parts `parts.0 .. parts.1` against KV heads `kv_head .. kv_head + heads`.
#[derive(Debug, Clone, Copy)]
struct Item {
    /// One on the plain path.
    parts: (usize, usize),
    kv_head: usize,
    /// One on the plain path.
    heads: usize,
    coded: bool,
}

/// Buffers that attention reuses from step to step. One per runner.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    parts: Vec<Part>,
    items: Vec<Item>,
    /// Slices of the coded path, with what puts those together that may share tiles.
    coded: Vec<(coded::Affinity, usize)>,
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
        self.plan(layer, slices, scratch)?;
        let AttentionScratch { parts, items, mixed, tiles, .. } = scratch;
        let width = group * l.head_dim;
        let tokens = |i: &Item| parts[i.parts.0..i.parts.1].iter().map(|p| p.len).sum::<usize>();
        mixed.resize(items.iter().map(|i| tokens(i) * i.heads).sum::<usize>() * width, 0.0);
        let threads = rayon::current_num_threads();
        if tiles.len() < threads {
            tiles.resize_with(threads, Mutex::default);
        }
        let tiles = &*tiles;
        let mut rest = mixed.as_mut_slice();
        let outputs: Vec<&mut [f32]> = items
            .iter()
            .map(|item| {
                let len = tokens(item) * item.heads * width;
                let (own, others) = std::mem::take(&mut rest).split_at_mut(len);
                rest = others;
                own
            })
            .collect();
        items.par_iter().with_max_len(1).zip(outputs).try_for_each(|(item, mixed)| {
            let tile = &tiles[rayon::current_thread_index().unwrap_or(0) % tiles.len()];
            // A poisoned tile is only scratch: its contents are written before they are read, but for
            // bases, which are whole or not noted as held.
            let mut tile = tile.lock().unwrap_or_else(PoisonError::into_inner);
            let parts = &parts[item.parts.0..item.parts.1];
            let work = |part: &Part| {
                let slice = &slices[part.slice];
                Ok::<_, crate::CacheError>(Work {
                    layer,
                    l,
                    group,
                    sequence: self.sequence(slice.sequence)?,
                    start: slice.start + part.first,
                    len: part.len,
                    kv_head: item.kv_head,
                    heads: item.heads,
                    queries: &queries[(slice.row + part.first) * l.query_heads * l.head_dim..],
                })
            };
            if item.coded {
                let works = parts.iter().map(work).collect::<Result<Vec<_>>>()?;
                self.attend_coded(&works, mixed, &mut tile);
            } else {
                self.attend_plain(&work(&parts[0])?, mixed, &mut tile);
            }
            Ok::<(), crate::CacheError>(())
        })?;
        let mut mixed = mixed.chunks_exact(width);
        for item in items.iter() {
            for head in item.kv_head..item.kv_head + item.heads {
                for part in &parts[item.parts.0..item.parts.1] {
                    let row = slices[part.slice].row + part.first;
                    for (t, mixed) in mixed.by_ref().take(part.len).enumerate() {
                        let at = ((row + t) * l.query_heads + head * group) * l.head_dim;
                        out[at..at + width].copy_from_slice(mixed);
                    }
                }
            }
        }
        for tile in tiles {
            let mut tile = tile.lock().unwrap_or_else(PoisonError::into_inner);
            self.decode_nanos.fetch_add(std::mem::take(&mut tile.decode_nanos), Ordering::Relaxed);
        }
        self.attention_nanos.fetch_add(clock.elapsed().as_nanos() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Cuts a step's queries into work items.
    fn plan(
        &self,
        layer: usize,
        slices: &[BatchSlice],
        scratch: &mut AttentionScratch,
    ) -> Result<()> {
        let AttentionScratch { parts, items, coded, .. } = scratch;
        parts.clear();
        items.clear();
        coded.clear();
        let l = &self.geometry.layers()[layer];
        let group = l.query_heads / l.kv_heads;
        for (slice, s) in slices.iter().enumerate().filter(|(_, s)| s.len > 0) {
            let sequence = self.sequence(s.sequence)?;
            if let Some(affinity) = self.affinity(layer, sequence, s.len * group) {
                coded.push((affinity, slice));
                continue;
            }
            let most = self.query_tokens(layer, sequence);
            for first in (0..s.len).step_by(most) {
                let part = parts.len();
                parts.push(Part { slice, first, len: most.min(s.len - first) });
                items.extend((0..l.kv_heads).map(|kv_head| Item {
                    parts: (part, part + 1),
                    kv_head,
                    heads: 1,
                    coded: false,
                }));
            }
        }
        coded.sort_unstable();
        let most = coded.len().div_ceil(ITEMS_PER_THREAD * rayon::current_num_threads());
        for like in coded.chunk_by(|(a, _), (b, _)| a.basis == b.basis) {
            for members in like.chunks(most.clamp(1, MAX_PARTS)) {
                let first = parts.len();
                let part = |(_, slice): &(_, usize)| Part {
                    slice: *slice,
                    first: 0,
                    len: slices[*slice].len,
                };
                parts.extend(members.iter().map(part));
                let heads = members.first().map_or(1, |(affinity, _)| affinity.heads);
                items.extend((0..l.kv_heads).step_by(heads).map(|kv_head| Item {
                    parts: (first, parts.len()),
                    kv_head,
                    heads,
                    coded: true,
                }));
            }
        }
        Ok(())
    }
}

/// What a part of an item is about.
struct Work<'a> {
    layer: usize,
    l: &'a LayerGeometry,
    /// Query heads of a KV head.
    group: usize,
    sequence: &'a Sequence,
    /// Position of the first query token.
    start: usize,
    /// Query tokens.
    len: usize,
    /// KV heads `kv_head .. kv_head + heads`.
    kv_head: usize,
    heads: usize,
    /// From the first query token's row: `[.., query_heads, head_dim]`.
    queries: &'a [f32],
}

/// A block and the query tokens that see any of it.
struct Visible {
    block: usize,
    /// Position of its first token.
    p: usize,
    /// Tokens of it that somebody sees.
    filled: usize,
    /// Query tokens, `t0 .. t1`.
    t0: usize,
    t1: usize,
}

impl Work<'_> {
    /// Query rows of a KV head.
    fn rows(&self) -> usize {
        self.len * self.group
    }

    /// Blocks that may be visible.
    fn blocks(&self, block_size: usize) -> Range<usize> {
        let oldest = self.l.window.map_or(0, |w| (self.start + 1).saturating_sub(w));
        oldest / block_size..(self.start + self.len - 1) / block_size + 1
    }

    /// A block, if any query sees any of it.
    fn visible(&self, block: usize, block_size: usize) -> Option<Visible> {
        let (start, len, window) = (self.start, self.len, self.l.window);
        let p = block * block_size;
        let filled = block_size.min((start + len).checked_sub(p)?);
        // Not before the block, and not past the window.
        let t0 = p.saturating_sub(start);
        let t1 = window
            .map_or(len, |w| len.min((p + filled).saturating_add(w - 1).saturating_sub(start)));
        (t0 < t1).then_some(Visible { block, p, filled, t0, t1 })
    }

    /// The queries of one KV head and query tokens `tokens`, each turned by its token's position less
    /// `origin`. `out`: `[tokens · group, head_dim]`.
    #[inline]
    fn rotate_queries(
        &self,
        frame: &Frame,
        kv_head: usize,
        tokens: Range<usize>,
        origin: usize,
        out: &mut [f32],
    ) {
        let dim = self.l.head_dim;
        let width = self.group * dim;
        for (t, rows) in tokens.zip(out.chunks_exact_mut(width)) {
            let at = t * self.l.query_heads * dim + kv_head * width;
            let heads =
                self.queries[at..at + width].chunks_exact(dim).zip(rows.chunks_exact_mut(dim));
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
