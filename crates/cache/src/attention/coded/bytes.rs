//! HOT PATH (decode). Jointly coded blocks as sums of byte products ([`kvasir_kernels::coded`]), some
//! blocks of a sequence at a time: queries of all of them are folded in one product, and weights are
//! rounded once.
//!
//! Levels are looked up inside the products, which leaves no more to share between neighbours on the same
//! slots (a common prefix) than the factors of their rows. Which blocks are taken together follows from
//! their position alone, so what a sequence gets does not depend on its company.

use kvasir_kernels::coded::{
    ByteBasis, ByteQueries, FINE, FoldScratch, LONGEST, Rows, Scores, ValueBlock, Weights,
    add_scores, add_values, largest_pair, prefetch, rotate_to_bytes, soft_weights,
};
use kvasir_kernels::trellis::Boosts;
use kvasir_kernels::{gemm_nt, scale_in_place, soft_cap};

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
pub(crate) const GROUP_TOKENS: usize = 128;

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
    queries: Vec<u8>, // [heads, blocks, rows of a head, head_dim]
    fine: Vec<i16>,   // the same
    /// Those of one head, turned for the middle of the blocks.
    slow: Vec<u8>, // [rows of a head, head_dim]
    slow_fine: Vec<i16>, // the same, not used
    scratch: Box<FoldScratch>,
    folded: Vec<i8>,         // [blocks, rows, stride]
    offsets: Vec<i32>,       // [blocks, rows, stride / 4]
    scales: Vec<f32>,        // [blocks, rows]
    scores: Vec<f32>,        // [rows, GROUP_TOKENS]
    weights: Vec<u8>,        // [rows, GROUP_TOKENS]
    weight_scales: Vec<f32>, // [rows]
    /// Factors of a group's values with their gains.
    factors: Vec<f32>, // [GROUP_TOKENS]
    held: [[HeldBlock; MAX_BLOCKS]; 2],
}

/// Factors of a block of keys or values that was read last.
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
        Self {
            weighted: Vec::new(),
            worth: Vec::new(),
            queries: Vec::new(),
            fine: Vec::new(),
            slow: Vec::new(),
            slow_fine: Vec::new(),
            scratch: Box::default(),
            folded: Vec::new(),
            offsets: Vec::new(),
            scales: Vec::new(),
            scores: Vec::new(),
            weights: Vec::new(),
            weight_scales: Vec::new(),
            factors: vec![0.0; GROUP_TOKENS],
            held: Default::default(),
        }
    }
}

impl ByteTile {
    /// Room for `all` rows of `dim` channels against `blocks` blocks; `stride` bytes a folded row.
    fn resize(&mut self, dim: usize, all: usize, blocks: usize, stride: usize) {
        let rows = blocks * all;
        self.queries.resize(rows * dim, 0);
        self.fine.resize(rows * dim, 0);
        self.slow.resize(all * dim, 0);
        self.slow_fine.resize(all * dim, 0);
        self.folded.resize(rows * stride, 0);
        self.offsets.resize(rows * stride / 4, 0);
        self.scales.resize(rows, 0.0);
        self.scores.resize(all * GROUP_TOKENS, 0.0);
        self.weights.resize(all * GROUP_TOKENS, 0);
        self.weight_scales.resize(all, 0.0);
    }
}

impl HeldBlock {
    /// Reads the factors of keys' (0) or values' (1) first `segments` segments, unless they are there.
    #[inline]
    fn load(
        &mut self,
        pool: &BlockPool,
        block: &Block<'_>,
        part: usize,
        tokens: usize,
        segments: usize,
    ) {
        let entry = &block.entries[part];
        let of = (entry.slot, entry.format, segments);
        if self.of == Some(of) {
            return;
        }
        let layout = block.codecs[part].layout();
        self.factors.resize(tokens, 0.0);
        layout.row_factors(pool.bytes(entry.slot), &mut self.factors, &mut self.boosts);
        if part == 0 {
            self.by_segment.resize(segments * tokens, 0.0);
            layout.segment_factors(&self.factors, &self.boosts, segments, &mut self.by_segment);
        }
        self.of = Some(of);
    }
}

/// A coded block of one sequence.
#[derive(Clone, Copy)]
struct Block<'a> {
    number: usize,
    /// Position of its first token.
    p: usize,
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
        let tokens = self.geometry.block_size();
        // Slots may have been written since the last step.
        tile.bytes.held.iter_mut().flatten().for_each(|held| held.of = None);
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
    }

    /// A group of blocks of one sequence.
    fn group(&self, work: &Work<'_>, (from, to): (usize, usize)) -> Group<'_> {
        let mut group = Group { from, to, count: 0, coded: [None; MAX_BLOCKS] };
        for number in from..to {
            // Weights are rounded to bytes without a sign.
            let coded = self.coded_entries(work, number);
            let p = work.visible(number, self.geometry.block_size()).map_or(0, |v| v.p);
            if let Some((entries, codecs)) = coded.filter(|(e, _)| !e[1].gain.is_sign_negative()) {
                group.coded[group.count] = Some(Block { number, p, entries, codecs });
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
        let Some(Some(first)) = blocks.first() else { return };
        let Some(basis) = first.codecs[0].basis().byte_queries() else { return };
        let tokens = self.geometry.block_size();
        self.byte_scores(work, rows, blocks, basis, fetch, tile);
        let (all, count) = (blocks.len() * tokens, rows.all);
        if let Some(cap) = work.l.score_cap {
            let rows = tile.scores.chunks_exact_mut(GROUP_TOKENS).take(count);
            rows.for_each(|row| soft_cap(&mut row[..all], cap));
        }
        let (dim, stride) = (work.l.head_dim, Stride::of(work));
        let segments = used(blocks, 1);
        let held = &mut tile.held[1];
        for (block, held) in blocks.iter().flatten().zip(held.iter_mut()) {
            held.load(&self.pool, block, 1, tokens, segments);
        }
        let gains = blocks.iter().flatten().map(|b| b.entries[1].gain.to_f32());
        for ((factors, gain), held) in tile.factors.chunks_exact_mut(tokens).zip(gains).zip(&*held)
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
        let weights = Weights {
            weights: scores,
            bytes,
            scales: &tile.weight_scales[..count],
            stride: GROUP_TOKENS,
        };
        // Places without a block are not passed on.
        let values: [ValueBlock<'_>; MAX_BLOCKS] = std::array::from_fn(|i| {
            let block = blocks.get(i).copied().flatten().unwrap_or(*first);
            let layout = block.codecs[1].layout();
            let slot = &self.pool.bytes(block.entries[1].slot)[..layout.slot_bytes(tokens)];
            ValueBlock { layout, slot, boosts: &held[i].boosts }
        });
        let values = &values[..blocks.len()];
        add_values(&weights, values, tokens, segments, &mut sums[dim..], stride.row);
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
        let middle = blocks.iter().flatten().map(|b| b.p).sum::<usize>() / count;
        for head in 0..work.heads {
            let own = rows.first + head * n;
            fetch.some();
            for (i, block) in blocks.iter().flatten().enumerate() {
                fetch.some();
                for t in 0..work.len {
                    let distance = work.start + t - block.p;
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
            for t in 0..work.len {
                let at = t * work.group * dim;
                rotate_to_bytes(
                    &tile.weighted[own * dim + at..][..width],
                    dim,
                    self.frame.span(work.l.rope, work.start + t - middle, 1),
                    &mut tile.slow[at..at + width],
                    &mut tile.slow_fine[..width],
                );
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
                scratch: &mut tile.scratch,
                runs: (n, all),
            };
            fetch.some();
            let queries = &tile.queries[head * count * n * dim..][..count * n * dim];
            basis.fold(head, segments, queries, &tile.slow[..n * dim], scaled, &mut folded);
        }
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
        let ByteTile { held, offsets, scales, scores, .. } = tile;
        held[0][i].load(&self.pool, block, 0, tokens, segments);
        let scales = &mut scales[i * all..][..all];
        let gain = block.entries[0].gain.to_f32();
        scales.iter_mut().for_each(|s| *s *= gain);
        let layout = block.codecs[0].layout();
        let s = Scores {
            layout,
            slot: &self.pool.bytes(block.entries[0].slot)[..layout.slot_bytes(tokens)],
            factors: &held[0][i].by_segment,
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
