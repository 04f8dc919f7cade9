//! HOT PATH (decode). Jointly coded blocks as sums of byte products ([`kvasir_kernels::coded`]), some
//! blocks of a sequence at a time: queries of all of them are folded in one product, and weights are
//! rounded once.
//!
//! Levels of the blocks that were read last are kept: neighbours on the same slots (a common prefix)
//! find them there. Whose blocks are taken together follows from their position alone, so what a
//! sequence gets does not depend on its company.

use std::time::Instant;

use kvasir_kernels::coded::{
    ByteBasis, ByteQueries, Scores, Weights, add_boosted_values, add_scores, add_values,
    largest_pair, rotate_to_bytes, soft_weights,
};
use kvasir_kernels::trellis::{Boost, Order, SEGMENT};
use kvasir_kernels::{AlignedBytes, gemm_nt, scale_in_place, soft_cap};

use super::super::Work;
use super::super::tile::{Sums, Tile};
use super::Stride;
use crate::codec::JointCodec;
use crate::format::FormatId;
use crate::kv_cache::KvCache;
use crate::pool::{BlockPool, SlotId};
use crate::table::Entry;

/// Tokens whose blocks are taken together: their levels and queries stay in L2, and one rounding of
/// their weights does not yet show beside the codes' error.
const GROUP_TOKENS: usize = 128;

/// Most blocks of a group: they have 16 tokens or more.
const MAX_BLOCKS: usize = GROUP_TOKENS / 16;

/// One thread's buffers. `rows` are those of one sequence over all its heads, `[heads, rows of a head]`.
#[derive(Debug)]
pub(in super::super) struct ByteTile {
    /// Queries of the item's sequences in weighted channels, one sequence after another: `[rows,
    /// head_dim]` each.
    weighted: Vec<f32>,
    /// What a byte of each is worth.
    worth: Vec<f32>,
    queries: Vec<i8>, // [heads, blocks, rows of a head, head_dim]
    fine: Vec<i16>,   // the same
    folded: Vec<i8>,  // [blocks, rows, stride]
    sums: Vec<i32>,   // [blocks, rows, stride / 4]
    totals: Vec<i32>, // [blocks, rows]
    scales: Vec<f32>, // [blocks, rows]
    /// Sums of a block's queries' bytes over a boosted segment, and over those that are not.
    partial_sums: [Vec<i32>; 2], // [rows]
    scores: Vec<f32>, // [rows, GROUP_TOKENS]
    weights: Vec<u8>, // [rows, GROUP_TOKENS]
    weight_scales: Vec<f32>, // [rows]
    /// Factors of a block's rows with a boost, or of a group's with their gains.
    factors: Vec<f32>, // [GROUP_TOKENS]
    held: [Held; 2],
    /// Time spent on reading levels since it was last asked for.
    pub(in super::super) nanos: u64,
}

/// Levels of the keys or values that were read last.
#[derive(Debug)]
struct Held {
    levels: AlignedBytes, // [blocks, width, block_size]
    blocks: [HeldBlock; MAX_BLOCKS],
}

#[derive(Debug, Default)]
struct HeldBlock {
    /// Which, and how many of its segments.
    of: Option<(SlotId, FormatId, usize)>,
    /// Factors of its rows, without a gain.
    factors: Vec<f32>,
    boosts: Vec<Boost>,
}

impl Default for ByteTile {
    fn default() -> Self {
        let held = || Held { levels: AlignedBytes::zeroed(0), blocks: Default::default() };
        Self {
            weighted: Vec::new(),
            worth: Vec::new(),
            queries: Vec::new(),
            fine: Vec::new(),
            folded: Vec::new(),
            sums: Vec::new(),
            totals: Vec::new(),
            scales: Vec::new(),
            partial_sums: Default::default(),
            scores: Vec::new(),
            weights: Vec::new(),
            weight_scales: Vec::new(),
            factors: vec![0.0; GROUP_TOKENS],
            held: [held(), held()],
            nanos: 0,
        }
    }
}

impl ByteTile {
    /// Room for `all` rows of `dim` channels against `blocks` blocks; `stride` bytes a folded row.
    fn resize(&mut self, dim: usize, all: usize, blocks: usize, stride: usize) {
        let rows = blocks * all;
        self.queries.resize(rows * dim, 0);
        self.fine.resize(rows * dim, 0);
        self.folded.resize(rows * stride, 0);
        self.sums.resize(rows * stride / 4, 0);
        self.totals.resize(rows, 0);
        self.scales.resize(rows, 0.0);
        self.partial_sums.iter_mut().for_each(|s| s.resize(all, 0));
        self.scores.resize(all * GROUP_TOKENS, 0.0);
        self.weights.resize(all * GROUP_TOKENS, 0);
        self.weight_scales.resize(all, 0.0);
    }
}

impl Held {
    /// Room for blocks of `bytes` bytes; what was held is forgotten.
    fn clear(&mut self, bytes: usize) {
        if self.levels.len() < MAX_BLOCKS * bytes {
            self.levels = AlignedBytes::zeroed(MAX_BLOCKS * bytes);
        }
        self.blocks.iter_mut().for_each(|b| b.of = None);
    }

    /// Reads the first `segments` segments of keys (0) or values (1) of some blocks, unless they are
    /// there.
    fn load(
        &mut self,
        pool: &BlockPool,
        blocks: &[Option<Block<'_>>],
        part: usize,
        (tokens, width, segments): (usize, usize, usize),
    ) {
        let order = if part == 0 { Order::Keys } else { Order::Values };
        let levels = self.levels.as_mut_slice().chunks_exact_mut(width * tokens);
        for ((block, held), levels) in blocks.iter().flatten().zip(&mut self.blocks).zip(levels) {
            let (entry, codec) = (&block.entries[part], block.codecs[part]);
            let of = (entry.slot, entry.format, segments);
            if held.of != Some(of) {
                let slot = pool.bytes(entry.slot);
                held.factors.resize(tokens, 0.0);
                codec.levels(order, slot, tokens, segments, levels);
                codec.row_factors(slot, &mut held.factors, &mut held.boosts);
                held.of = Some(of);
            }
        }
    }
}

/// A coded block of one sequence.
#[derive(Clone, Copy)]
struct Block<'a> {
    number: usize,
    /// Keys and values.
    entries: [Entry; 2],
    codecs: [&'a JointCodec; 2],
}

/// Where a sequence's rows lie.
#[derive(Clone, Copy)]
struct Rows {
    /// Before its first one, among those of the item.
    first: usize,
    /// Of a head.
    head: usize,
    /// Of all heads.
    all: usize,
}

impl KvCache {
    /// Some blocks of one job over all heads of a head group. `sums`: by work, `[heads, rows of a head]`
    /// each.
    pub(super) fn attend_bytes(
        &self,
        works: &[Work<'_>],
        (from, to): (usize, usize),
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let Some(first) = works.first() else { return };
        let tokens = self.geometry.block_size();
        let width = first.heads * first.l.head_dim;
        tile.bytes.held.iter_mut().for_each(|held| held.clear(width * tokens));
        self.load_byte_queries(works, &mut tile.bytes);
        let per_group = GROUP_TOKENS / tokens;
        let mut begin = from;
        while begin < to {
            let end = to.min((begin / per_group + 1) * per_group);
            let mut rows = Rows { first: 0, head: 0, all: 0 };
            for work in works {
                rows.first += rows.all;
                rows.head = work.rows();
                rows.all = work.heads * rows.head;
                let mut group = [None; MAX_BLOCKS];
                let mut count = 0;
                for block in begin..end {
                    // Weights are rounded to bytes without a sign.
                    let coded = self
                        .coded_entries(work, block)
                        .filter(|(e, _)| !e[1].gain.is_sign_negative());
                    if let Some((entries, codecs)) = coded {
                        group[count] = Some(Block { number: block, entries, codecs });
                        count += 1;
                    } else if let Some(v) = work.visible(block, tokens) {
                        self.plain_block(work, &v, (rows.first, rows.head), sums, tile);
                    }
                }
                self.byte_group(work, rows, &group[..count], sums, &mut tile.bytes);
            }
            begin = end;
        }
        tile.decode_nanos += std::mem::take(&mut tile.bytes.nanos);
    }

    /// Turns the sums of one job over all its blocks back. `tile.mixed` becomes `[heads, rows of all works,
    /// head_dim]`.
    pub(super) fn finish_bytes(&self, works: &[Work<'_>], sums: &Sums, tile: &mut Tile) {
        let Some(first) = works.first() else { return };
        let (dim, heads) = (first.l.head_dim, first.heads);
        let (width, stride) = (heads * dim, Stride::of(first));
        let rows: usize = works.iter().map(Work::rows).sum();
        let format = &self.formats.get(first.sequence.sealed_formats[1]).layers[first.layer];
        let codec = format.groups[first.kv_head / format.heads][1].joint();
        let Some(basis) = codec.map(JointCodec::basis) else { return };
        let Tile { mixed, bases, folded, .. } = tile;
        bases[1].load(basis);
        folded.resize(rows * width, 0.0);
        for (head, mixed) in mixed.chunks_exact_mut(rows * dim).enumerate() {
            // The head's rows of all works.
            let own = || {
                let mut first = 0;
                works.iter().flat_map(move |work| {
                    let begin = first + head * work.rows();
                    first += heads * work.rows();
                    begin..begin + work.rows()
                })
            };
            let row_sums = |row: usize| &sums.values[row * stride.row..(row + 1) * stride.row];
            for (row, turned) in own().zip(folded.chunks_exact_mut(width)) {
                let sums = row_sums(row);
                basis.sums_of_levels(&sums[dim..stride.mass], sums[stride.mass], turned);
            }
            let columns = &bases[1].columns[head * dim * width..];
            gemm_nt((rows, dim, width), folded, width, columns, width, mixed, dim);
            for (row, mixed) in own().zip(mixed.chunks_exact_mut(dim)) {
                mixed.iter_mut().zip(row_sums(row)).for_each(|(m, s)| *m += s);
                scale_in_place(mixed, sums.states[row].normaliser());
            }
        }
    }

    /// Queries of all works over their channels' weights, and what their bytes are worth.
    fn load_byte_queries(&self, works: &[Work<'_>], tile: &mut ByteTile) {
        tile.weighted.clear();
        tile.worth.clear();
        for work in works {
            let format = &self.formats.get(work.sequence.sealed_formats[1]).layers[work.layer];
            let Some(keys) = format.groups[work.kv_head / format.heads][0].joint() else {
                continue;
            };
            let (dim, width) = (work.l.head_dim, work.group * work.l.head_dim);
            for head in 0..work.heads {
                let weights = keys.basis().inverse_weights(head, dim);
                for t in 0..work.len {
                    let at = t * work.l.query_heads * dim + (work.kv_head + head) * width;
                    for query in work.queries[at..at + width].chunks_exact(dim) {
                        let from = tile.weighted.len();
                        tile.weighted.extend(query.iter().zip(weights).map(|(q, w)| q * w));
                        tile.worth.push(largest_pair(&tile.weighted[from..]) / 127.0);
                    }
                }
            }
        }
    }

    /// Some coded blocks of one sequence, into the coded channels of its sums.
    fn byte_group(
        &self,
        work: &Work<'_>,
        rows: Rows,
        blocks: &[Option<Block<'_>>],
        sums: &mut Sums,
        tile: &mut ByteTile,
    ) {
        let Some(Some(Block { codecs: [keys, _], .. })) = blocks.first() else { return };
        let Some(basis) = keys.basis().byte_queries() else { return };
        self.byte_scores(work, rows, blocks, basis, tile);
        let tokens = self.geometry.block_size();
        let (all, count) = (blocks.len() * tokens, rows.all);
        if let Some(cap) = work.l.score_cap {
            let rows = tile.scores.chunks_exact_mut(GROUP_TOKENS).take(count);
            rows.for_each(|row| soft_cap(&mut row[..all], cap));
        }
        let (dim, stride) = (work.l.head_dim, Stride::of(work));
        let segments = used(blocks, 1);
        let clock = Instant::now();
        let width = basis.segments() * SEGMENT;
        tile.held[1].load(&self.pool, blocks, 1, (tokens, width, segments));
        tile.nanos += clock.elapsed().as_nanos() as u64;
        let held = &tile.held[1];
        let gains = blocks.iter().flatten().map(|b| b.entries[1].gain.to_f32());
        for ((factors, gain), held) in
            tile.factors.chunks_exact_mut(tokens).zip(gains).zip(&held.blocks)
        {
            factors.iter_mut().zip(&held.factors).for_each(|(f, row)| *f = gain * row);
        }
        let Sums { states, values: sums } = sums;
        let sums = &mut sums[rows.first * stride.row..][..count * stride.row];
        let mut weights = Weights {
            bytes: &mut tile.weights[..count * GROUP_TOKENS],
            stride: GROUP_TOKENS,
            scales: &mut tile.weight_scales[..count],
        };
        soft_weights(
            all,
            &mut tile.scores[..count * GROUP_TOKENS],
            &tile.factors,
            &mut states[rows.first..][..count],
            &mut weights,
            sums,
            stride.row,
            stride.mass,
        );
        let levels = held.levels.as_slice();
        let coded = &mut sums[dim..];
        let shape = (blocks.len(), tokens, width * tokens);
        add_values(&weights, levels, shape, segments, coded, stride.row);
        for (i, held) in held.blocks[..blocks.len()].iter().enumerate() {
            let weights = &tile.scores[i * tokens..];
            let levels = &levels[i * width * tokens..];
            add_boosted_values(
                &held.boosts,
                levels,
                tokens,
                weights,
                GROUP_TOKENS,
                coded,
                stride.row,
            );
        }
    }

    /// Scores of some coded blocks of one sequence, scaled but not capped, into `tile.scores`.
    fn byte_scores(
        &self,
        work: &Work<'_>,
        rows: Rows,
        blocks: &[Option<Block<'_>>],
        basis: &ByteBasis,
        tile: &mut ByteTile,
    ) {
        let (dim, tokens) = (work.l.head_dim, self.geometry.block_size());
        let (n, all, count) = (rows.head, rows.all, blocks.len());
        let segments = used(blocks, 0);
        tile.resize(dim, all, count, basis.stride());
        let scale = work.l.score_scale * self.frame.score_factor(work.l.rope);
        let width = work.group * dim;
        for head in 0..work.heads {
            let own = rows.first + head * n;
            for (i, block) in blocks.iter().flatten().enumerate() {
                for t in 0..work.len {
                    let distance = work.start + t - block.number * tokens;
                    let at = ((head * count + i) * n + t * work.group) * dim;
                    rotate_to_bytes(
                        &tile.weighted[(own + t * work.group) * dim..],
                        dim,
                        self.frame.span(work.l.rope, distance, 1),
                        &tile.worth[own + t * work.group..][..work.group],
                        &mut tile.queries[at..at + width],
                        &mut tile.fine[at..at + width],
                    );
                }
            }
            let (worth, scaled) = (&tile.worth[own..own + n], &mut tile.factors[..n]);
            scaled.iter_mut().zip(worth).for_each(|(s, w)| *s = w * scale);
            for i in 0..count {
                let queries = &tile.fine[(head * count + i) * n * dim..];
                let scores = &mut tile.scores[head * n * GROUP_TOKENS + i * tokens..];
                basis.mean_scores(head, queries, scaled, scores, GROUP_TOKENS);
            }
            let mut folded = ByteQueries {
                bytes: &mut tile.folded[head * n * basis.stride()..],
                sums: &mut tile.sums[head * n * basis.stride() / 4..],
                totals: &mut tile.totals[head * n..],
                scales: &mut tile.scales[head * n..],
                runs: (n, all),
            };
            let queries = &tile.queries[head * count * n * dim..][..count * n * dim];
            basis.fold(head, segments, queries, scaled, &mut folded);
        }
        let clock = Instant::now();
        let width = basis.segments() * SEGMENT;
        tile.held[0].load(&self.pool, blocks, 0, (tokens, width, segments));
        tile.nanos += clock.elapsed().as_nanos() as u64;
        for (i, block) in blocks.iter().flatten().enumerate() {
            self.block_scores(block, (i, tokens, segments), all, basis, tile);
        }
    }

    /// The part of one block's scores that is not its mean's.
    fn block_scores(
        &self,
        block: &Block<'_>,
        (i, tokens, segments): (usize, usize, usize),
        all: usize,
        basis: &ByteBasis,
        tile: &mut ByteTile,
    ) {
        let width = basis.segments() * SEGMENT;
        let ByteTile { held, factors, partial_sums: [sums, rest], scales, scores, .. } = tile;
        let levels = &held[0].levels.as_slice()[i * width * tokens..];
        let held = &held[0].blocks[i];
        let scales = &mut scales[i * all..][..all];
        let gain = block.entries[0].gain.to_f32();
        scales.iter_mut().for_each(|s| *s *= gain);
        let mut boosted = 0u32;
        held.boosts.iter().for_each(|b| boosted |= 1 << b.segment);
        let folded_sums = &tile.sums[i * all * basis.stride() / 4..];
        let queries = &tile.folded[i * all * basis.stride()..];
        let (stride, scores) = (basis.stride(), &mut scores[i * tokens..]);
        let mut product = |segments: &[u8], sums: &[i32], factors: &[f32]| {
            let s = Scores { levels, tokens, segments, queries, stride, sums, scales, factors };
            add_scores(&s, scores, GROUP_TOKENS);
        };
        rest.copy_from_slice(&tile.totals[i * all..][..all]);
        for segment in (0..segments).filter(|s| boosted >> s & 1 == 1) {
            factors[..tokens].copy_from_slice(&held.factors);
            for boost in held.boosts.iter().filter(|b| b.segment == segment) {
                factors[boost.row] *= boost.factor;
            }
            for (row, (sum, rest)) in sums.iter_mut().zip(rest.iter_mut()).enumerate() {
                let at = (row * stride + segment * SEGMENT) / 4;
                *sum = folded_sums[at..at + SEGMENT / 4].iter().sum();
                *rest -= *sum;
            }
            product(&[segment as u8], sums, factors);
        }
        let mut plain = [0u8; 16];
        let mut listed = 0;
        for segment in (0..segments).filter(|s| boosted >> s & 1 == 0) {
            plain[listed] = segment as u8;
            listed += 1;
        }
        product(&plain[..listed], rest, &held.factors);
    }
}

/// Segments of keys (0) or values (1) that any of the blocks has bits for.
fn used(blocks: &[Option<Block<'_>>], part: usize) -> usize {
    blocks.iter().flatten().map(|b| b.codecs[part].used_segments()).max().unwrap_or(0)
}
