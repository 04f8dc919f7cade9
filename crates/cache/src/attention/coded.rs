//! HOT PATH (decode). Jointly coded tiles in their own basis: the basis is folded into the query once per
//! block, values are summed as coefficients, and the sum is turned back once per query head, after all ranges.
//!
//! An item's sequences walk their blocks side by side. Where neighbours read the same slots (a common
//! prefix), the tile is decoded once and meets the queries of all of them in one product.
//!
//! Where the processor has products of bytes, [`bytes`] does all that with them.

use std::time::Instant;

use kvasir_kernels::{OnlineSoftmax, gemm_nn_acc, gemm_nt, scale_in_place, soft_cap};

mod bytes;

pub(super) use bytes::ByteTile;
pub(crate) use bytes::GROUP_TOKENS;

use super::tile::{Sums, Tile};
use super::{Visible, Work, mask};
use crate::codec::JointCodec;
use crate::kv_cache::KvCache;
use crate::pool::SlotId;
use crate::sequence::Sequence;
use crate::table::Entry;

/// Query rows of one KV head up to which tiles are read in their basis: beyond it turning the tile
/// back costs less than turning the queries.
const CODED_QUERY_ROWS: usize = 16;

/// Sequences with equal affinity go well together, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Affinity {
    /// Which basis their blocks are in: all of an item have one.
    pub(super) basis: usize,
    /// KV heads of a block.
    pub(super) heads: usize,
    /// The first slot that a common prefix would share.
    first: Option<SlotId>,
}

/// What a row of sums holds: plain channels, coded ones, and the mass of the blocks in coded ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stride {
    /// From one row to the next.
    pub(super) row: usize,
    /// Where the mass is.
    mass: usize,
}

impl Stride {
    /// Of sums over blocks of `heads` heads of `dim` channels.
    pub(super) fn new(dim: usize, heads: usize) -> Self {
        let mass = dim * (1 + heads);
        Self { row: mass + 16, mass }
    }

    fn of(work: &Work<'_>) -> Self {
        Self::new(work.l.head_dim, work.heads)
    }
}

/// A block that is the same for some of an item's sequences.
struct Batch<'a> {
    /// Sequences that read it, all its queries each.
    works: &'a [Work<'a>],
    /// Rows of a KV head before theirs.
    first_row: usize,
    /// Keys and values.
    entries: [Entry; 2],
    codecs: [&'a JointCodec; 2],
    block: usize,
}

impl KvCache {
    fn joint_keys(&self, layer: usize, sequence: &Sequence) -> Option<(usize, &JointCodec)> {
        let layer = sequence.owner(layer);
        let format = &self.formats.get(sequence.sealed_formats[1]).layers[layer];
        Some((format.heads, format.groups.first()?[0].joint()?))
    }

    /// How a sequence with this many query rows a head takes part in a coded item, if it should.
    pub(super) fn affinity(
        &self,
        layer: usize,
        sequence: &Sequence,
        query_rows: usize,
    ) -> Option<Affinity> {
        // Rows outside the pool are read one KV head at a time.
        if sequence.kept.cold.is_some() || sequence.kept.memory.is_some() {
            return None;
        }
        let (heads, codec) = self.joint_keys(layer, sequence)?;
        let table = &sequence.tables[self.geometry.group(sequence.owner(layer), 0)];
        (query_rows <= CODED_QUERY_ROWS).then(|| Affinity {
            basis: std::sync::Arc::as_ptr(codec.basis()) as usize,
            heads,
            first: table.keys.get(1).map(|entry| entry.slot),
        })
    }

    /// Whether a sequence's blocks are jointly coded.
    pub(super) fn is_coded(&self, layer: usize, sequence: &Sequence) -> bool {
        self.joint_keys(layer, sequence).is_some()
    }

    /// Some blocks of one job over all heads of a head group. `sums`: of [`Stride`], `[heads, rows of all
    /// works]` (where they are read as bytes, by work, `[heads, rows]`), to which they are added.
    pub(super) fn attend_coded(
        &self,
        works: &[Work<'_>],
        (from, to): (usize, usize),
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let Some(first) = works.first() else { return };
        let (dim, heads, block_size) = (first.l.head_dim, first.heads, self.geometry.block_size());
        let width = heads * dim;
        let rows: usize = works.iter().map(Work::rows).sum();
        tile.resize(heads * rows, dim, width, block_size);
        if self.has_byte_queries(first) {
            self.attend_bytes(works, (from, to), sums, tile);
            return;
        }
        tile.folded.resize(heads * rows * width, 0.0);
        for block in from..to {
            let (mut at, mut first_row) = (0, 0);
            while let Some(work) = works.get(at) {
                let batch = self.batch(&works[at..], block, first_row);
                let taken = batch.as_ref().map_or(1, |batch| batch.works.len());
                if let Some(batch) = batch {
                    self.coded_block(&batch, rows, sums, tile);
                } else if let Some(v) = work.visible(block, block_size) {
                    self.plain_block(work, &v, (first_row, rows), sums, tile);
                }
                first_row += works[at..at + taken].iter().map(Work::rows).sum::<usize>();
                at += taken;
            }
        }
    }

    /// Turns the sums of one job over all its blocks back. `tile.mixed` becomes `[heads, rows of all works,
    /// head_dim]`.
    pub(super) fn finish_coded(&self, works: &[Work<'_>], sums: &Sums, tile: &mut Tile) {
        let Some(first) = works.first() else { return };
        let (dim, width) = (first.l.head_dim, first.heads * first.l.head_dim);
        let stride = Stride::of(first).row;
        let rows: usize = works.iter().map(Work::rows).sum();
        tile.mixed.resize(first.heads * rows * dim, 0.0);
        if self.has_byte_queries(first) {
            self.finish_bytes(works, sums, tile);
            return;
        }
        let Tile { mixed, bases, .. } = tile;
        let format = &self.formats.get(first.sequence.sealed_formats[1]).layers[first.layer];
        let values = format.groups[first.kv_head / format.heads][1].joint();
        // The first block never is.
        let any_coded = works
            .iter()
            .any(|work| work.sequence.num_sealed > usize::from(work.sequence.origin == 0));
        let basis = values.map(JointCodec::basis).filter(|_| any_coded);
        if let Some(basis) = basis {
            bases[1].load(basis);
        }
        let states = sums.states.chunks_exact(rows).zip(sums.values.chunks_exact(rows * stride));
        for (head, ((states, sums), mixed)) in
            states.zip(mixed.chunks_exact_mut(rows * dim)).enumerate()
        {
            match basis {
                Some(_) => {
                    let columns = &bases[1].columns[head * dim * width..];
                    gemm_nt((rows, dim, width), &sums[dim..], stride, columns, width, mixed, dim);
                }
                None => mixed.fill(0.0),
            }
            let mixed = mixed.chunks_exact_mut(dim);
            for ((state, sums), mixed) in states.iter().zip(sums.chunks_exact(stride)).zip(mixed) {
                mixed.iter_mut().zip(sums).for_each(|(m, s)| *m += s);
                scale_in_place(mixed, state.normaliser());
            }
        }
    }

    /// The first sequences that read one coded block at this place, if it is coded: whoever sees some of a
    /// sealed block sees it whole, but for windows.
    fn batch<'a>(
        &'a self,
        works: &'a [Work<'a>],
        block: usize,
        first_row: usize,
    ) -> Option<Batch<'a>> {
        let (own, codecs) = self.coded_entries(works.first()?, block)?;
        let alike = |work: &&Work<'_>| self.sealed_entries(work, block) == Some(own);
        let more = works[1..].iter().take_while(alike).count();
        Some(Batch { works: &works[..1 + more], first_row, entries: own, codecs, block })
    }

    /// Keys and values of a sealed block that all queries see.
    fn sealed_entries(&self, work: &Work<'_>, block: usize) -> Option<[Entry; 2]> {
        let v = work.visible(block, self.geometry.block_size())?;
        let group = self.geometry.group(work.layer, work.kv_head);
        let own = work.own_block(block)?;
        let entry = |part| work.sequence.entry(group, part, own);
        let whole = own < work.sequence.num_sealed && (v.t0, v.t1) == (0, work.len);
        whole.then(|| [entry(0), entry(1)])
    }

    /// The same, with their codecs, if they are jointly coded.
    fn coded_entries(
        &self,
        work: &Work<'_>,
        block: usize,
    ) -> Option<([Entry; 2], [&JointCodec; 2])> {
        let own = self.sealed_entries(work, block)?;
        let codec = |part: usize| {
            let format = &self.formats.get(own[part].format).layers[work.layer];
            format.groups[work.kv_head / format.heads][part].joint()
        };
        Some((own, [codec(0)?, codec(1)?]))
    }

    fn has_byte_queries(&self, work: &Work<'_>) -> bool {
        let keys = self.joint_keys(work.layer, work.sequence);
        keys.is_some_and(|(_, keys)| keys.basis().byte_queries().is_some())
    }

    /// A block of another kind, or one that not all queries see: head by head, into the plain channels of
    /// the sums. `place`: the first row of the first head, and rows from one head to the next.
    fn plain_block(
        &self,
        work: &Work<'_>,
        v: &Visible,
        (first_row, rows): (usize, usize),
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let stride = Stride::of(work).row;
        for head in 0..work.heads {
            let first = head * rows + first_row;
            let (states, values) = (&mut sums.states[first..], &mut sums.values[first * stride..]);
            self.load_queries(work, work.kv_head + head, tile);
            let kv_head = work.kv_head + head;
            self.attend_visible(work, v, kv_head, states, values, stride, tile);
        }
    }

    /// Brings scores to the layer's scale, and under its cap.
    fn scale_scores(&self, work: &Work<'_>, scores: &mut [f32]) {
        scale_in_place(scores, work.l.score_scale * self.frame.score_factor(work.l.rope));
        if let Some(cap) = work.l.score_cap {
            soft_cap(scores, cap);
        }
    }

    /// A jointly coded block: all heads and all its readers at once, into the coded channels of the sums.
    /// `rows`: of a KV head over the whole item.
    fn coded_block(&self, batch: &Batch<'_>, rows: usize, sums: &mut Sums, tile: &mut Tile) {
        let Batch { works, first_row, entries, codecs: [keys, values], block } = batch;
        let Some(work) = works.first() else { return };
        let (dim, heads, tokens) = (work.l.head_dim, work.heads, self.geometry.block_size());
        let (width, stride) = (heads * dim, Stride::of(work).row);
        let n: usize = works.iter().map(Work::rows).sum();
        let Some(v) = work.visible(*block, tokens) else { return };
        let p = v.p;
        let Tile {
            keys: tile_keys,
            values: tile_values,
            queries,
            folded,
            scores,
            bases,
            decode_nanos,
            ..
        } = tile;
        let Sums { states, values: sums } = sums;
        bases[0].load(keys.basis());
        for head in 0..heads {
            let mut at = 0;
            for work in *works {
                let rotated = &mut queries[at * dim..(at + work.rows()) * dim];
                work.rotate_queries(&self.frame, work.kv_head + head, 0..work.len, p, rotated);
                at += work.rows();
            }
            let weights = keys.basis().inverse_weights(head, dim);
            for row in queries[..n * dim].chunks_exact_mut(dim) {
                row.iter_mut().zip(weights).for_each(|(q, w)| *q *= w);
            }
            let columns = &bases[0].columns[head * dim * width..];
            let folded = &mut folded[head * n * width..(head + 1) * n * width];
            folded.fill(0.0);
            gemm_nn_acc((n, width, dim), queries, dim, columns, width, folded, width);
        }
        let [key, value] = entries;
        let tile_keys = &mut tile_keys[..tokens * width];
        let clock = Instant::now();
        keys.decode_coded(self.pool.bytes(key.slot), tokens, key.gain.to_f32(), tile_keys);
        *decode_nanos += clock.elapsed().as_nanos() as u64;
        let scores = &mut scores[..heads * n * tokens];
        gemm_nt((heads * n, tokens, width), folded, width, tile_keys, width, scores, tokens);
        self.scale_scores(work, scores);
        let mut own_scores = &mut scores[..];
        for head in 0..heads {
            let mut first = head * rows + first_row;
            for work in *works {
                let (own, others) = own_scores.split_at_mut(work.rows() * tokens);
                push(work, 0, p, (first, work.rows(), tokens), own, states, sums);
                own_scores = others;
                first += work.rows();
            }
        }
        let tile_values = &mut tile_values[..tokens * width];
        let clock = Instant::now();
        values.decode_coded(self.pool.bytes(value.slot), tokens, value.gain.to_f32(), tile_values);
        *decode_nanos += clock.elapsed().as_nanos() as u64;
        // Rows of all heads follow each other if they are all there.
        let (products, n) = if n == rows { (1, heads * n) } else { (heads, n) };
        for i in 0..products {
            let sums = &mut sums[(i * rows + first_row) * stride + dim..];
            let scores = &scores[i * n * tokens..];
            gemm_nn_acc((n, width, tokens), scores, tokens, tile_values, width, sums, stride);
        }
    }
}

/// Masks `n` rows of `filled` scores, whose first is query token `t0`'s and whose first key is at `p`, and
/// takes them into the softmax of rows `first ..`.
#[allow(clippy::too_many_arguments)]
fn push(
    work: &Work<'_>,
    t0: usize,
    p: usize,
    (first, n, filled): (usize, usize, usize),
    scores: &mut [f32],
    states: &mut [OnlineSoftmax],
    sums: &mut [f32],
) {
    let stride = Stride::of(work).row;
    let rows = scores.chunks_exact_mut(filled).take(n).zip(&mut states[first..]);
    let sums = sums[first * stride..].chunks_exact_mut(stride);
    for (i, ((scores, state), sums)) in rows.zip(sums).enumerate() {
        mask(scores, work.window, work.start + t0 + i / work.group, p);
        state.push(scores, sums);
    }
}
