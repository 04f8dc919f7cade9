//! HOT PATH (decode). Jointly coded tiles in their own basis: the basis is folded into the query once per
//! block, values are summed as coefficients, and the sum is turned back once per query head.

use kvasir_kernels::{gemm_nn_acc, gemm_nt, scale_in_place, soft_cap};

use super::tile::Tile;
use super::{CODED_QUERY_TOKENS, QUERY_TOKENS, Visible, Work, mask};
use crate::codec::JointCodec;
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;

/// Query rows of one KV head up to which tiles are read in their basis: beyond it turning the tile
/// back costs less than turning the queries.
const CODED_QUERY_ROWS: usize = 16;

impl KvCache {
    /// KV heads of a coded work item, if a sequence with this many query rows a head should have one.
    pub(super) fn coded_heads(
        &self,
        layer: usize,
        sequence: &Sequence,
        query_rows: usize,
    ) -> Option<usize> {
        let format = &self.formats.get(sequence.sealed_formats[1]).layers[layer];
        let joint = format.groups.first().is_some_and(|parts| parts[0].joint().is_some());
        (joint && query_rows <= CODED_QUERY_ROWS).then_some(format.heads)
    }

    /// Query tokens of a plain work item of a sequence.
    pub(super) fn query_tokens(&self, layer: usize, sequence: &Sequence) -> usize {
        let format = &self.formats.get(sequence.sealed_formats[1]).layers[layer];
        let joint = format.groups.first().is_some_and(|parts| parts[0].joint().is_some());
        if joint { CODED_QUERY_TOKENS } else { QUERY_TOKENS }
    }

    /// One work item over all heads of a head group. `queries`: from the item's first row; `mixed`:
    /// `[item.heads, item.len, group, head_dim]`.
    pub(super) fn attend_coded(
        &self,
        work: &Work<'_>,
        queries: &[f32],
        mixed: &mut [f32],
        tile: &mut Tile,
    ) {
        let (dim, block_size) = (work.l.head_dim, self.geometry.block_size());
        let (heads, width) = (work.item.heads, work.item.heads * dim);
        let n = work.item.len * work.group;
        let stride = dim + width;
        tile.resize(heads * n, dim, width, block_size);
        tile.folded.resize(heads * n * width, 0.0);
        tile.sums.clear();
        tile.sums.resize(heads * n * stride, 0.0);
        let mut values_basis = None;
        for v in work.visible(block_size) {
            let table = &work.sequence.tables[self.geometry.group(work.layer, work.item.kv_head)];
            let codecs = [0, 1].map(|part| {
                let format = &self.formats.get(table.part(part)[v.block].format).layers[work.layer];
                format.groups[work.item.kv_head / format.heads][part].joint()
            });
            match codecs {
                [Some(keys), Some(values)] => {
                    self.coded_block(work, &v, [keys, values], queries, tile);
                    values_basis = Some(values.basis());
                }
                _ => self.plain_block(work, &v, queries, tile),
            }
        }
        if let Some(basis) = values_basis {
            tile.bases[1].load(basis);
        }
        for head in 0..heads {
            let rows = head * n..(head + 1) * n;
            let sums = &tile.sums[rows.start * stride..rows.end * stride];
            let mixed = &mut mixed[rows.start * dim..rows.end * dim];
            mixed.fill(0.0);
            if values_basis.is_some() {
                let columns = &tile.bases[1].columns[head * dim * width..];
                gemm_nt((n, dim, width), &sums[dim..], stride, columns, width, mixed, dim);
            }
            for (sums, mixed) in sums.chunks_exact(stride).zip(mixed.chunks_exact_mut(dim)) {
                mixed.iter_mut().zip(sums).for_each(|(m, s)| *m += s);
            }
            for (state, mixed) in tile.states[rows].iter().zip(mixed.chunks_exact_mut(dim)) {
                scale_in_place(mixed, state.normaliser());
            }
        }
    }

    /// A block of another kind: head by head, into the plain channels of the sums.
    fn plain_block(&self, work: &Work<'_>, v: &Visible, queries: &[f32], tile: &mut Tile) {
        let (dim, width) = (work.l.head_dim, work.item.heads * work.l.head_dim);
        let n = (v.t1 - v.t0) * work.group;
        for head in 0..work.item.heads {
            self.plain_scores(work, v, work.item.kv_head + head, queries, tile);
            let first = head * work.item.len * work.group + v.t0 * work.group;
            push(work, v, first, 0, tile, dim + width);
            let sums = &mut tile.sums[first * (dim + width)..];
            let values = &tile.values[..v.filled * dim];
            let shape = (n, dim, v.filled);
            gemm_nn_acc(shape, &tile.scores, v.filled, values, dim, sums, dim + width);
        }
    }

    /// A jointly coded block: all heads at once, into the coded channels of the sums.
    fn coded_block(
        &self,
        work: &Work<'_>,
        v: &Visible,
        [keys, values]: [&JointCodec; 2],
        queries: &[f32],
        tile: &mut Tile,
    ) {
        let l = work.l;
        let (dim, heads) = (l.head_dim, work.item.heads);
        let (width, stride) = (heads * dim, dim + heads * dim);
        let table = &work.sequence.tables[self.geometry.group(work.layer, work.item.kv_head)];
        let n = (v.t1 - v.t0) * work.group;
        tile.bases[0].load(keys.basis());
        for head in 0..heads {
            let weights = keys.basis().inverse_weights(head, dim);
            let rotated = &mut tile.queries[..n * dim];
            let kv_head = work.item.kv_head + head;
            work.rotate_queries(&self.frame, kv_head, v.t0..v.t1, v.p, queries, rotated);
            for row in rotated.chunks_exact_mut(dim) {
                row.iter_mut().zip(weights).for_each(|(q, w)| *q *= w);
            }
            let columns = &tile.bases[0].columns[head * dim * width..];
            let folded = &mut tile.folded[head * n * width..(head + 1) * n * width];
            folded.fill(0.0);
            gemm_nn_acc((n, width, dim), &tile.queries, dim, columns, width, folded, width);
        }
        let entry = table.keys[v.block];
        let tile_keys = &mut tile.keys[..v.filled * width];
        keys.decode_coded(self.pool.bytes(entry.slot), entry.gain.to_f32(), tile_keys);
        let scores = &mut tile.scores[..heads * n * v.filled];
        gemm_nt(
            (heads * n, v.filled, width),
            &tile.folded,
            width,
            tile_keys,
            width,
            scores,
            v.filled,
        );
        scale_in_place(scores, l.score_scale * self.frame.score_factor(l.rope));
        if let Some(cap) = l.score_cap {
            soft_cap(scores, cap);
        }
        for head in 0..heads {
            let first = head * work.item.len * work.group + v.t0 * work.group;
            push(work, v, first, head * n, tile, stride);
        }
        let entry = table.values[v.block];
        let tile_values = &mut tile.values[..v.filled * width];
        values.decode_coded(self.pool.bytes(entry.slot), entry.gain.to_f32(), tile_values);
        // Rows of all heads follow each other if all queries see the block.
        let rows = work.item.len * work.group;
        let (products, n) = if n == rows { (1, heads * n) } else { (heads, n) };
        for i in 0..products {
            let sums = &mut tile.sums[(i * rows + v.t0 * work.group) * stride + dim..];
            let scores = &tile.scores[i * n * v.filled..];
            gemm_nn_acc((n, width, v.filled), scores, v.filled, tile_values, width, sums, stride);
        }
    }
}

/// Masks `n` rows of scores from row `scores_at` and takes them into the softmax of rows `first ..`.
fn push(
    work: &Work<'_>,
    v: &Visible,
    first: usize,
    scores_at: usize,
    tile: &mut Tile,
    stride: usize,
) {
    let n = (v.t1 - v.t0) * work.group;
    let scores = &mut tile.scores[scores_at * v.filled..(scores_at + n) * v.filled];
    for (i, scores) in scores.chunks_exact_mut(v.filled).enumerate() {
        mask(scores, work.l, work.start + v.t0 + i / work.group, v.p);
        let row = first + i;
        tile.states[row].push(scores, &mut tile.sums[row * stride..(row + 1) * stride]);
    }
}
