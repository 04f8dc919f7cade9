//! HOT PATH. Attention over block tables: prefill and decode are the same code with more or fewer
//! query rows.
//!
//! A job is some query tokens of a sequence against a KV head, or of several sequences against the heads
//! of a coded block; an item is what a thread does of it at a time ([`plan`]). It walks blocks in order of position, with
//! an online softmax per range of them. What one row computes over uncompressed blocks depends on its own position only, never
//! on the other rows of the step or on how the prompt was cut: masked keys contribute exact zeros.
//!
//! Two paths: [`plain`] reads rows as they are stored, or turns a tile to rows first, which pays where many
//! queries meet it (prefill), and always where its codec knows no other way ([`latent`]: values that are summed as latents);
//! [`coded`] reads jointly coded tiles in
//! their own basis, for few queries (decode), of several sequences side by side.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvasir_kernels::{OnlineSoftmax, merge_rows, num_threads, parallel_for, scale_in_place};

use crate::codec::LowRankCodec;
use crate::error::Result;
use crate::geometry::LayerGeometry;
use crate::kv_cache::KvCache;
use crate::sequence::{Sequence, SequenceId};
use crate::table::{KeptBlock, Stays};

mod coded;
mod cold;
mod entropy;
mod latent;
mod observe;
mod plain;
mod plan;
mod state;
mod tile;

pub(crate) use coded::GROUP_TOKENS;
pub(crate) use observe::Observer;
use plan::{Item, Job, MAX_PARTS, Part, Plan, ranges};
use state::QueryFeatures;
use tile::{Sums, Tile};

/// Query tokens of a plain job: with three query heads to a KV head, 192 rows whose queries
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

/// Buffers that attention reuses from step to step. One per runner. Nothing is allocated once they have grown to what
/// steps need.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    plan: Plan,
    /// One a thread.
    tiles: Vec<Mutex<Tile>>,
    /// One an item, for jobs of several.
    partial: Vec<Mutex<Sums>>,
    /// Of every job, items that are not done.
    left: Vec<AtomicUsize>,
    /// The finished softmax of every row, if somebody observes any; else empty.
    states: Vec<OnlineSoftmax>, // [rows, query_heads]
    features: QueryFeatures,
}

/// What the threads of a step share.
struct Step<'a> {
    cache: &'a KvCache,
    layer: usize,
    l: &'a LayerGeometry,
    slices: &'a [BatchSlice],
    queries: &'a [f32],
    /// Threads copy finished rows in turn: their places are strided.
    out: Mutex<Finished<'a>>,
    plan: &'a Plan,
    partial: &'a [Mutex<Sums>],
    left: &'a [AtomicUsize],
    features: &'a QueryFeatures,
}

/// Where finished rows go.
struct Finished<'a> {
    rows: &'a mut [f32],             // [rows, query_heads, head_dim]
    states: &'a mut [OnlineSoftmax], // [rows, query_heads], or none
}

/// Scratch that a panic poisoned is as good as any: its contents are written before they are read, but for
/// bases, which are whole or not noted as held.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvCache {
    /// Attends with the step's queries to everything their sequences hold up to their own positions;
    /// [`KvCache::write`] has stored this step's keys and values before.
    ///
    /// `queries` (not rotated) and `out`: `[rows, query_heads, head_dim]`. Query heads `h · group ..
    /// (h + 1) · group` share KV head `h`. Uses the current threads.
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
        let threads = num_threads();
        let AttentionScratch { plan, tiles, partial, left, states, features } = scratch;
        plan.make(self, layer, slices, threads)?;
        if tiles.len() < threads {
            tiles.resize_with(threads, Mutex::default);
        }
        if partial.len() < plan.items.len() && plan.items.len() > plan.jobs.len() {
            partial.resize_with(plan.items.len(), Mutex::default);
        }
        left.clear();
        left.extend(plan.jobs.iter().map(|job| AtomicUsize::new(job.items.1 - job.items.0)));
        let l = &self.geometry.layers()[layer];
        let (rows, stride) = plan.most;
        for tile in tiles.iter().take(threads) {
            let mut tile = lock(tile);
            tile.reserve(rows, stride, l.head_dim, self.geometry.block_size());
            tile.job = None;
        }
        let mut observed = false;
        for slice in slices {
            observed |= self.observed(layer, slice)?.is_some();
        }
        let all = if observed { out.len() / l.head_dim } else { 0 };
        states.resize(all, OnlineSoftmax::default());
        self.query_features(layer, slices, queries, features)?;
        let out = Mutex::new(Finished { rows: out, states });
        let step =
            Step { cache: self, layer, l, slices, queries, out, plan, partial, left, features };
        let next = AtomicUsize::new(0);
        let run = |tile: &Mutex<Tile>| {
            let mut tile = lock(tile);
            while let Some(item) = plan.order.get(next.fetch_add(1, Ordering::Relaxed)) {
                step.run(*item, &mut tile)?;
            }
            let nanos = std::mem::take(&mut tile.decode_nanos);
            self.decode_nanos.fetch_add(nanos, Ordering::Relaxed);
            Ok::<(), crate::CacheError>(())
        };
        let failed = Mutex::new(None);
        parallel_for(threads.min(plan.items.len()), |task, _| {
            if let Err(error) = run(&tiles[task]) {
                *lock(&failed) = Some(error);
            }
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        self.attention_nanos.fetch_add(clock.elapsed().as_nanos() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Step<'_> {
    /// Does one item, and its job's last touches if it is the last of it.
    fn run(&self, number: usize, tile: &mut Tile) -> Result<()> {
        let item = &self.plan.items[number];
        let job = &self.plan.jobs[item.job];
        let parts = &self.plan.parts[job.parts.0..job.parts.1];
        let first = self.work(job, &parts[0])?;
        if let [_] = parts {
            return self.run_works(job, item, number, &[first], tile);
        }
        // On the stack: works borrow, so they cannot be kept in the scratch.
        let mut works = [first; MAX_PARTS];
        let works = &mut works[..parts.len()];
        for (work, part) in works.iter_mut().zip(parts) {
            *work = self.work(job, part)?;
        }
        self.run_works(job, item, number, works, tile)
    }

    fn run_works(
        &self,
        job: &Job,
        item: &Item,
        number: usize,
        works: &[Work<'_>],
        tile: &mut Tile,
    ) -> Result<()> {
        let rows = job.heads * works.iter().map(Work::rows).sum::<usize>();
        let stride = job.stride(self.l);
        match works {
            [work, ..] if !job.coded => {
                // Queries stay as they are from item to item of a job.
                if tile.job.replace(item.job) != Some(item.job) {
                    self.cache.begin_plain(work, tile);
                    self.cache.begin_many(work, tile);
                }
            }
            _ => (tile.job, tile.many) = (None, false),
        }
        let [mut all, mut range] = std::mem::take(&mut tile.sums);
        if job.items.1 - job.items.0 == 1 {
            let block_size = self.cache.geometry.block_size();
            for (i, blocks) in ranges(job.coded, block_size, item.blocks).enumerate() {
                let sums = if i == 0 { &mut all } else { &mut range };
                sums.reset(rows, stride, tile.many);
                self.attend(job, works, blocks, item.blocks.1, sums, tile);
                if i > 0 {
                    merge(&mut all, &range, stride);
                }
            }
            if let (false, [work, ..]) = (job.coded, works) {
                self.beside(job, work, &mut all, tile);
            }
            self.finish(job, works, &mut all, tile);
        } else {
            let mut sums = lock(&self.partial[number]);
            sums.reset(rows, stride, tile.many);
            self.attend(job, works, item.blocks, item.blocks.1, &mut sums, tile);
            if let (false, [work, ..], true) = (job.coded, works, number == job.items.0) {
                self.beside(job, work, &mut sums, tile);
            }
            drop(sums);
            // The last one sees what the others have done.
            if self.left[item.job].fetch_sub(1, Ordering::AcqRel) == 1 {
                let mut all = lock(&self.partial[job.items.0]);
                for range in &self.partial[job.items.0 + 1..job.items.1] {
                    merge(&mut all, &lock(range), stride);
                }
                self.finish(job, works, &mut all, tile);
            }
        }
        tile.sums = [all, range];
        Ok(())
    }

    /// What a job attends to beside blocks.
    fn beside(&self, job: &Job, work: &Work<'_>, sums: &mut Sums, tile: &mut Tile) {
        self.cache.attend_cold(work, sums, tile);
        let part = &self.plan.parts[job.parts.0];
        self.cache.attend_state(work, (part.slice, part.first), self.features, sums, tile);
    }

    /// Some blocks of a job; those up to `until` will follow.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        job: &Job,
        works: &[Work<'_>],
        blocks: (usize, usize),
        until: usize,
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        match (job.coded, works) {
            (true, works) => self.cache.attend_coded(works, blocks, sums, tile),
            (false, [work, ..]) => self.cache.attend_plain(work, blocks, until, sums, tile),
            (false, []) => {}
        }
    }

    /// Normalises a job's rows and puts them in their places.
    fn finish(&self, job: &Job, works: &[Work<'_>], sums: &mut Sums, tile: &mut Tile) {
        let dim = self.l.head_dim;
        let stride = job.stride(self.l);
        let mut mixed = if job.coded {
            self.cache.finish_coded(works, sums, tile);
            &tile.mixed[..]
        } else {
            for (state, row) in sums.states.iter().zip(sums.values.chunks_exact_mut(stride)) {
                scale_in_place(row, state.normaliser());
            }
            if stride > dim {
                self.cache.finish_latents(works, sums, tile);
                &tile.mixed[..]
            } else {
                &sums.values[..]
            }
        };
        let parts = &self.plan.parts[job.parts.0..job.parts.1];
        let mut out = lock(&self.out);
        let mut states = &sums.states[..];
        for head in job.kv_head..job.kv_head + job.heads {
            for (work, part) in works.iter().zip(parts) {
                let width = work.group * dim;
                let row = self.slices[part.slice].row + part.first;
                for t in 0..part.len {
                    let at = (row + t) * self.l.query_heads + head * work.group;
                    let (own, others) = mixed.split_at(width);
                    out.rows[at * dim..at * dim + width].copy_from_slice(own);
                    mixed = others;
                    // Jobs of coded blocks have their rows in another order, and nobody observes those.
                    if !job.coded && !out.states.is_empty() {
                        let (own, others) = states.split_at(work.group);
                        out.states[at..at + work.group].copy_from_slice(own);
                        states = others;
                    }
                }
            }
        }
    }

    fn work(&self, job: &Job, part: &Part) -> Result<Work<'_>> {
        let slice = &self.slices[part.slice];
        let sequence = self.cache.sequence(slice.sequence)?;
        let tokens = (part.first, part.len);
        Ok(Work::new(
            self.cache,
            self.layer,
            sequence,
            self.queries,
            slice,
            tokens,
            (job.kv_head, job.heads),
        ))
    }
}

/// Takes the tokens of a range into those before it.
fn merge(all: &mut Sums, range: &Sums, stride: usize) {
    merge_rows(&mut all.states, &mut all.values, &range.states, &range.values, stride);
}

/// What a part of a job is about.
#[derive(Clone, Copy)]
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
    /// A query at position m sees keys at m - window + 1 ..= m.
    window: Option<usize>,
    /// Latents of values; none if rows are read.
    latents: usize,
    /// What a policy kept of the prompt: blocks are counted from there. As many for all heads.
    kept: &'a [KeptBlock],
    /// From the first query token's row: `[.., query_heads, head_dim]`.
    queries: &'a [f32],
}

/// A block and the query tokens that see any of it.
#[derive(Clone, Copy)]
struct Visible {
    block: usize,
    /// Position of its first token.
    p: usize,
    /// Tokens of it that somebody sees.
    filled: usize,
    /// Query tokens, `t0 .. t1`.
    t0: usize,
    t1: usize,
    window: Option<usize>,
}

impl<'a> Work<'a> {
    /// Tokens `first .. first + len` of a slice against KV heads `kv_head .. kv_head + heads`.
    fn new(
        cache: &'a KvCache,
        layer: usize,
        sequence: &'a Sequence,
        queries: &'a [f32],
        slice: &BatchSlice,
        (first, len): (usize, usize),
        (kv_head, heads): (usize, usize),
    ) -> Self {
        let layer = sequence.owner(layer);
        let l = &cache.geometry.layers()[layer];
        let recent = sequence.kept.recent.map(|recent| recent.window);
        Self {
            layer,
            l,
            group: l.query_heads / l.kv_heads,
            sequence,
            start: slice.start + first,
            len,
            kv_head,
            heads,
            window: [l.window, recent].into_iter().flatten().min(),
            latents: cache.value_latents(layer, sequence).map_or(0, LowRankCodec::rank),
            kept: &sequence.tables[cache.geometry.group(layer, kv_head)].kept,
            queries: &queries[(slice.row + first) * l.query_heads * l.head_dim..],
        }
    }

    /// The number of a block in the sequence's own count, if it is not one that a policy kept.
    fn own_block(&self, block: usize) -> Option<usize> {
        Some(block.checked_sub(self.kept.len())? + self.sequence.released)
    }

    /// Query rows of a KV head.
    fn rows(&self) -> usize {
        self.len * self.group
    }

    /// From one row of sums to the next.
    fn stride(&self) -> usize {
        self.l.head_dim + self.latents
    }

    /// A block, if any query sees any of it.
    fn visible(&self, block: usize, block_size: usize) -> Option<Visible> {
        let (start, len) = (self.start, self.len);
        let (p, filled, window) = match self.own_block(block) {
            Some(own) => {
                let p = self.sequence.origin + own * block_size;
                (p, block_size.min((start + len).checked_sub(p)?), self.window)
            }
            None => {
                let kept = &self.kept[block];
                // What is kept for good is kept on layers without a window only.
                (kept.first, kept.rows, self.window.filter(|_| kept.stays == Stays::InWindow))
            }
        };
        // Not before the block, and not past the window.
        let t0 = p.saturating_sub(start);
        let t1 = window
            .map_or(len, |w| len.min((p + filled).saturating_add(w - 1).saturating_sub(start)));
        (t0 < t1).then_some(Visible { block, p, filled, t0, t1, window })
    }
}
