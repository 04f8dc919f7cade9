//! HOT PATH (decode). Jointly coded blocks as sums of byte products ([`kvasir_kernels::coded`]), some
//! blocks of a sequence at a time: queries of all of them are folded in one product, and weights are
//! rounded once.
//!
//! Levels of the blocks that were read last are kept: neighbours on the same slots (a common prefix)
//! find them there. Whose blocks are taken together follows from their position alone, so what a
//! sequence gets does not depend on its company.

use std::time::Instant;

use kvasir_kernels::coded::{
    BoostedValues, ByteBasis, ByteQueries, FINE, LONGEST, Rows, Scores, Weights,
    add_boosted_values, add_scores, add_values, largest_pair, prefetch, rotate_to_bytes,
    soft_weights,
};
use kvasir_kernels::trellis::{Boosts, Order, SEGMENT};
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

/// Cache lines asked for at a time.
const LINES: usize = 10;

/// One thread's buffers. `rows` are those of one sequence over all its heads, `[heads, rows of a head]`.
#[derive(Debug)]
pub(in super::super) struct ByteTile {
    /// Queries of the item's sequences in weighted channels and in steps of fine queries, one sequence after another: `[rows,
    /// head_dim]` each.
    weighted: Vec<f32>,
    /// What a byte of each is worth.
    worth: Vec<f32>,
    queries: Vec<i8>,        // [heads, blocks, rows of a head, head_dim]
    fine: Vec<i16>,          // the same
    folded: Vec<i8>,         // [blocks, rows, stride]
    offsets: Vec<i32>,       // [blocks, rows, stride / 4]
    scales: Vec<f32>,        // [blocks, rows]
    scores: Vec<f32>,        // [rows, GROUP_TOKENS]
    weights: Vec<u8>,        // [rows, GROUP_TOKENS]
    weight_scales: Vec<f32>, // [rows]
    /// Factors of a group's values with their gains.
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
    factors: Vec<f32>, // [block_size]
    /// What levels of keys are worth.
    by_segment: Vec<f32>, // [segments, block_size]
    boosts: Boosts,
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
            offsets: Vec::new(),
            scales: Vec::new(),
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
        self.offsets.resize(rows * stride / 4, 0);
        self.scales.resize(rows, 0.0);
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
                codec.levels(order, slot, tokens, segments, levels);
                held.factors.resize(tokens, 0.0);
                codec.row_factors(slot, &mut held.factors, &mut held.boosts);
                if part == 0 {
                    held.by_segment.resize(segments * tokens, 0.0);
                    let by_segment = &mut held.by_segment;
                    codec.segment_factors(&held.factors, &held.boosts, segments, by_segment);
                }
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

/// Blocks `from .. to` of one sequence.
struct Group<'a> {
    from: usize,
    to: usize,
    /// Those that are coded.
    coded: [Option<Block<'a>>; MAX_BLOCKS],
    count: usize,
}

impl<'a> Group<'a> {
    fn blocks(&self) -> &[Option<Block<'a>>] {
        &self.coded[..self.count]
    }

    fn has(&self, number: usize) -> bool {
        self.blocks().iter().flatten().any(|block| block.number == number)
    }
}

/// Slots that will be read soon, asked for a little at a time between other work.
struct Fetch<'a> {
    slots: [&'a [u8]; 2 * MAX_BLOCKS],
    at: usize,
}

impl<'a> Fetch<'a> {
    /// Values of a group, and keys of the one after it.
    fn new(cache: &'a KvCache, group: &Group<'_>, next: Option<&Group<'_>>) -> Self {
        let mut slots = [&[][..]; 2 * MAX_BLOCKS];
        let values = group.blocks().iter().flatten().map(|block| (block, 1));
        let keys = next.map_or(&[][..], |next| next.blocks());
        let keys = keys.iter().flatten().map(|block| (block, 0));
        for (slot, (block, part)) in slots.iter_mut().zip(values.chain(keys)) {
            let bytes = cache.pool.bytes(block.entries[part].slot);
            *slot = block.codecs[part].stored(bytes, cache.geometry.block_size());
        }
        Self { slots, at: 0 }
    }

    #[inline]
    fn some(&mut self) {
        if let Some(slot) = self.slots.get_mut(self.at) {
            *slot = prefetch(slot, LINES);
            self.at += usize::from(slot.is_empty());
        }
    }
}

/// Where a sequence's rows lie.
#[derive(Clone, Copy)]
struct Place {
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
        let all: usize = works.iter().map(|work| work.heads * work.rows()).sum();
        let per_group = GROUP_TOKENS / tokens;
        let groups = (from / per_group..to.div_ceil(per_group))
            .map(|g| ((g * per_group).max(from), ((g + 1) * per_group).min(to)));
        let mut turns = groups.flat_map(|blocks| works.iter().map(move |work| (blocks, work)));
        let mut next = turns.next().map(|(blocks, work)| (self.group(work, blocks), work));
        let mut first = 0;
        while let Some((group, work)) = next {
            next = turns.next().map(|(blocks, work)| (self.group(work, blocks), work));
            let rows = Place { first, head: work.rows(), all: work.heads * work.rows() };
            first = (first + rows.all) % all;
            for block in (group.from..group.to).filter(|block| !group.has(*block)) {
                if let Some(v) = work.visible(block, tokens) {
                    self.plain_block(work, &v, (rows.first, rows.head), sums, tile);
                }
            }
            let mut fetch = Fetch::new(self, &group, next.as_ref().map(|(group, _)| group));
            self.byte_group(work, rows, group.blocks(), sums, &mut fetch, &mut tile.bytes);
        }
        tile.decode_nanos += std::mem::take(&mut tile.bytes.nanos);
    }

    /// A group of blocks of one sequence.
    fn group(&self, work: &Work<'_>, (from, to): (usize, usize)) -> Group<'_> {
        let mut group = Group { from, to, count: 0, coded: [None; MAX_BLOCKS] };
        for number in from..to {
            // Weights are rounded to bytes without a sign.
            let coded = self.coded_entries(work, number);
            if let Some((entries, codecs)) = coded.filter(|(e, _)| !e[1].gain.is_sign_negative()) {
                group.coded[group.count] = Some(Block { number, entries, codecs });
                group.count += 1;
            }
        }
        group
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
                        let row = &mut tile.weighted[from..];
                        let longest = largest_pair(row);
                        let steps = if longest > 0.0 { LONGEST / longest } else { 0.0 };
                        scale_in_place(row, steps);
                        tile.worth.push(longest * FINE / LONGEST);
                    }
                }
            }
        }
    }

    /// Some coded blocks of one sequence, into the coded channels of its sums.
    fn byte_group(
        &self,
        work: &Work<'_>,
        rows: Place,
        blocks: &[Option<Block<'_>>],
        sums: &mut Sums,
        fetch: &mut Fetch<'_>,
        tile: &mut ByteTile,
    ) {
        let Some(Some(Block { codecs: [keys, _], .. })) = blocks.first() else { return };
        let Some(basis) = keys.basis().byte_queries() else { return };
        let tokens = self.geometry.block_size();
        self.byte_scores(work, rows, blocks, basis, fetch, tile);
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
        let (scores, bytes) = (&mut tile.scores[..], &mut tile.weights[..]);
        let mut soft = Rows {
            scores: &mut scores[..count * GROUP_TOKENS],
            bytes: &mut bytes[..count * GROUP_TOKENS],
            scales: &mut tile.weight_scales[..count],
            stride: GROUP_TOKENS,
            states: &mut states[rows.first..][..count],
            sums,
            sums_stride: stride.row,
            mass: stride.mass,
        };
        soft_weights(all, &tile.factors, &mut soft);
        let weights = Weights { bytes, stride: GROUP_TOKENS, scales: &tile.weight_scales[..count] };
        let levels = held.levels.as_slice();
        let coded = &mut sums[dim..];
        let shape = (blocks.len(), tokens, width * tokens);
        add_values(&weights, levels, shape, segments, coded, stride.row);
        let mut boosts = [&held.blocks[0].boosts; MAX_BLOCKS];
        boosts.iter_mut().zip(&held.blocks).for_each(|(b, held)| *b = &held.boosts);
        let boosted = BoostedValues {
            boosts: &boosts[..blocks.len()],
            levels,
            block_tokens: tokens,
            block_bytes: width * tokens,
            segments,
            weights: &scores[..count * GROUP_TOKENS],
            stride: GROUP_TOKENS,
        };
        add_boosted_values(&boosted, coded, stride.row);
    }

    /// Scores of some coded blocks of one sequence, scaled but not capped, into `tile.scores`.
    fn byte_scores(
        &self,
        work: &Work<'_>,
        rows: Place,
        blocks: &[Option<Block<'_>>],
        basis: &ByteBasis,
        fetch: &mut Fetch<'_>,
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
            fetch.some();
            for (i, block) in blocks.iter().flatten().enumerate() {
                fetch.some();
                for t in 0..work.len {
                    let distance = work.start + t - block.number * tokens;
                    let at = ((head * count + i) * n + t * work.group) * dim;
                    rotate_to_bytes(
                        &tile.weighted[(own + t * work.group) * dim..][..width],
                        dim,
                        self.frame.span(work.l.rope, distance, 1),
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
                fetch.some();
                basis.mean_scores(head, queries, scaled, scores, GROUP_TOKENS);
            }
            let mut folded = ByteQueries {
                bytes: &mut tile.folded[head * n * basis.stride()..],
                offsets: &mut tile.offsets[head * n * basis.stride() / 4..],
                scales: &mut tile.scales[head * n..],
                runs: (n, all),
            };
            fetch.some();
            let queries = &tile.queries[head * count * n * dim..][..count * n * dim];
            basis.fold(head, segments, queries, scaled, &mut folded);
        }
        let clock = Instant::now();
        let width = basis.segments() * SEGMENT;
        tile.held[0].load(&self.pool, blocks, 0, (tokens, width, segments));
        tile.nanos += clock.elapsed().as_nanos() as u64;
        for (i, block) in blocks.iter().flatten().enumerate() {
            fetch.some();
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
        let ByteTile { held, offsets, scales, scores, .. } = tile;
        let scales = &mut scales[i * all..][..all];
        let gain = block.entries[0].gain.to_f32();
        scales.iter_mut().for_each(|s| *s *= gain);
        let s = Scores {
            levels: &held[0].levels.as_slice()[i * width * tokens..],
            factors: &held[0].blocks[i].by_segment,
            tokens,
            segments,
            queries: &tile.folded[i * all * basis.stride()..],
            stride: basis.stride(),
            offsets: &offsets[i * all * basis.stride() / 4..],
            scales,
        };
        add_scores(&s, &mut scores[i * tokens..], GROUP_TOKENS);
    }
}

/// Segments of keys (0) or values (1) that any of the blocks has bits for.
fn used(blocks: &[Option<Block<'_>>], part: usize) -> usize {
    blocks.iter().flatten().map(|b| b.codecs[part].used_segments()).max().unwrap_or(0)
}
