//! How a step's queries are cut into items, each done by one thread.
//!
//! Tokens are cut at fixed positions into *ranges*. Each range has its own online softmax, and ranges are merged in
//! order of position, always: so items may take one range of a long context each, or all of them, and
//! what comes out is the same bits.

use std::ops::Range;

use super::coded::{Affinity, Stride};
use super::{BatchSlice, CODED_QUERY_TOKENS, QUERY_TOKENS};
use crate::codec::LowRankCodec;
use crate::error::Result;
use crate::geometry::LayerGeometry;
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;

/// Tokens of a range. Long enough for merging to cost little, short enough for three KV heads to keep
/// two threads equally busy.
const RANGE_TOKENS: usize = 256;

/// The same on the coded path, whose sums are several times as wide.
const CODED_RANGE_TOKENS: usize = 512;

/// Items a thread should have to choose from, so that none waits long for the last.
const ITEMS_PER_THREAD: usize = 4;

/// Coded items of several sequences that a thread should have.
const CODED_ITEMS_PER_THREAD: usize = 2;

/// Most sequences of an item: their sums stay in L2.
pub(super) const MAX_PARTS: usize = 32;

/// Query tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) slice: usize,
    pub(super) first: usize,
    pub(super) len: usize,
}

/// Parts `parts.0 .. parts.1` against KV heads `kv_head .. kv_head + heads`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    /// One on the plain path.
    pub(super) parts: (usize, usize),
    pub(super) kv_head: usize,
    /// One on the plain path.
    pub(super) heads: usize,
    pub(super) coded: bool,
    /// Latents of values, which follow the channels in a row of sums.
    latents: usize,
    /// Blocks that any of its queries sees.
    pub(super) blocks: (usize, usize),
    /// Its items: one for all ranges, or one a range.
    pub(super) items: (usize, usize),
    /// About what it costs, in query rows meeting a block.
    cost: u64,
}

impl Job {
    /// Elements of a row's sum.
    pub(super) fn stride(&self, l: &LayerGeometry) -> usize {
        if self.coded { Stride::new(l.head_dim, self.heads).row } else { l.head_dim + self.latents }
    }
}

/// What one thread does at a time: some blocks of a job.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    pub(super) job: usize,
    pub(super) blocks: (usize, usize),
    cost: u64,
}

/// A step's items. Kept from step to step for its buffers.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
    pub(super) jobs: Vec<Job>,
    /// By job, ranges in order of position.
    pub(super) items: Vec<Item>,
    /// Numbers of items, costly ones first.
    pub(super) order: Vec<usize>,
    /// Most query rows of a job, over all its heads, and longest sum of a row.
    pub(super) most: (usize, usize),
    /// Slices of the coded path, with what puts those together that may share tiles.
    coded: Vec<(Affinity, usize)>,
}

/// The ranges that some blocks are in.
pub(super) fn ranges(
    coded: bool,
    block_size: usize,
    (from, to): (usize, usize),
) -> impl Iterator<Item = (usize, usize)> {
    let len = if coded { CODED_RANGE_TOKENS } else { RANGE_TOKENS } / block_size;
    let range = move |i: usize| ((i * len).max(from), ((i + 1) * len).min(to));
    (from / len..to.div_ceil(len)).map(range)
}

/// Blocks that may be visible to `len` query tokens of a KV head from position `start` on.
fn visible_blocks(
    cache: &KvCache,
    layer: usize,
    kv_head: usize,
    sequence: &Sequence,
    (start, len): (usize, usize),
) -> Range<usize> {
    let layer = sequence.owner(layer);
    let (l, block_size) = (&cache.geometry.layers()[layer], cache.geometry.block_size());
    // What a policy kept comes first. All of it is walked: there is little.
    let kept = sequence.tables[cache.geometry.group(layer, kv_head)].kept.len();
    let begin = sequence.origin + sequence.released * block_size;
    let oldest = match kept {
        0 => l.window.map_or(0, |w| (start + 1).saturating_sub(w).saturating_sub(begin)),
        _ => 0,
    };
    oldest / block_size..kept + (start + len - 1 - begin) / block_size + 1
}

impl Plan {
    /// Plans a step of `threads` threads.
    ///
    /// # Errors
    /// [`crate::CacheError::UnknownSequence`].
    pub(super) fn make(
        &mut self,
        cache: &KvCache,
        layer: usize,
        slices: &[BatchSlice],
        threads: usize,
    ) -> Result<()> {
        self.parts.clear();
        self.jobs.clear();
        self.items.clear();
        self.order.clear();
        self.most = (0, 0);
        self.coded.clear();
        let l = &cache.geometry.layers()[layer];
        let group = l.query_heads / l.kv_heads;
        for (slice, s) in slices.iter().enumerate().filter(|(_, s)| s.len > 0) {
            let sequence = cache.sequence(s.sequence)?;
            if let Some(affinity) = cache.affinity(layer, sequence, s.len * group) {
                self.coded.push((affinity, slice));
                continue;
            }
            let most = query_tokens(cache, layer, sequence);
            for first in (0..s.len).step_by(most) {
                let part = self.parts.len();
                self.parts.push(Part { slice, first, len: most.min(s.len - first) });
                for kv_head in 0..l.kv_heads {
                    let heads = kv_head..kv_head + 1;
                    self.add(cache, layer, slices, (part, part + 1), heads, false)?;
                }
            }
        }
        let mut coded = std::mem::take(&mut self.coded);
        coded.sort_unstable();
        let most = coded.len().div_ceil(CODED_ITEMS_PER_THREAD * threads).clamp(1, MAX_PARTS);
        for like in coded.chunk_by(|(a, _), (b, _)| a.basis == b.basis) {
            for members in like.chunks(most) {
                let first = self.parts.len();
                for (_, slice) in members {
                    self.parts.push(Part { slice: *slice, first: 0, len: slices[*slice].len });
                }
                let heads = members.first().map_or(1, |(affinity, _)| affinity.heads);
                for kv_head in (0..l.kv_heads).step_by(heads) {
                    let parts = (first, self.parts.len());
                    self.add(cache, layer, slices, parts, kv_head..kv_head + heads, true)?;
                }
            }
        }
        self.coded = coded;
        self.cut(cache.geometry.block_size(), threads);
        Ok(())
    }

    fn add(
        &mut self,
        cache: &KvCache,
        layer: usize,
        slices: &[BatchSlice],
        parts: (usize, usize),
        heads: Range<usize>,
        coded: bool,
    ) -> Result<()> {
        let l = &cache.geometry.layers()[layer];
        let group = l.query_heads / l.kv_heads;
        let (mut from, mut to, mut cost, mut rows, mut latents) = (usize::MAX, 0, 0, 0, 0);
        for part in &self.parts[parts.0..parts.1] {
            let slice = &slices[part.slice];
            let sequence = cache.sequence(slice.sequence)?;
            let tokens = (slice.start + part.first, part.len);
            let blocks = visible_blocks(cache, layer, heads.start, sequence, tokens);
            if !coded {
                latents = cache.value_latents(layer, sequence).map_or(0, LowRankCodec::rank);
            }
            // Reading a block costs about as much as three rows that meet it.
            rows += part.len * group * heads.len();
            cost += (blocks.len() * (part.len * group + 3) * heads.len()) as u64;
            (from, to) = (from.min(blocks.start), to.max(blocks.end));
        }
        let job = Job {
            parts,
            kv_head: heads.start,
            heads: heads.len(),
            coded,
            latents,
            blocks: (from, to),
            items: (0, 0),
            cost,
        };
        self.most = (self.most.0.max(rows), self.most.1.max(job.stride(l)));
        self.jobs.push(job);
        Ok(())
    }

    /// Cuts costly jobs into ranges, and puts items in order.
    fn cut(&mut self, block_size: usize, threads: usize) {
        let all: u64 = self.jobs.iter().map(|job| job.cost).sum();
        for (number, job) in self.jobs.iter_mut().enumerate() {
            let first = self.items.len();
            let costly = job.cost * (threads * ITEMS_PER_THREAD) as u64 > all;
            let per_block = job.cost / (job.blocks.1 - job.blocks.0).max(1) as u64;
            let item = |blocks: (usize, usize)| Item {
                job: number,
                blocks,
                cost: per_block * (blocks.1 - blocks.0) as u64,
            };
            if threads > 1 && costly {
                self.items.extend(ranges(job.coded, block_size, job.blocks).map(item));
            } else {
                self.items.push(item(job.blocks));
            }
            job.items = (first, self.items.len());
        }
        self.order.extend(0..self.items.len());
        let items = &self.items;
        self.order.sort_unstable_by_key(|i| (std::cmp::Reverse(items[*i].cost), *i));
    }
}

/// Query tokens of a plain job of a sequence.
fn query_tokens(cache: &KvCache, layer: usize, sequence: &Sequence) -> usize {
    let costly = cache.is_coded(layer, sequence) || cache.value_latents(layer, sequence).is_some();
    if costly { CODED_QUERY_TOKENS } else { QUERY_TOKENS }
}
