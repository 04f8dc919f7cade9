//! HOT PATH. Tiles as plain rows, one KV head at a time.

use std::time::Instant;

use kvasir_kernels::{gemm_nn_acc, gemm_nt, scale_in_place, soft_cap};

use super::tile::Tile;
use super::{Visible, Work, mask};
use crate::config::KeyFrame;
use crate::kv_cache::KvCache;
use crate::table::Entry;

impl KvCache {
    /// One work item. `mixed`: `[len, group, head_dim]`.
    pub(super) fn attend_plain(&self, work: &Work<'_>, mixed: &mut [f32], tile: &mut Tile) {
        let (dim, block_size) = (work.l.head_dim, self.geometry.block_size());
        tile.resize(work.rows(), dim, dim, block_size);
        mixed.fill(0.0);
        let blocks = work.blocks(block_size);
        for v in blocks.filter_map(|block| work.visible(block, block_size)) {
            let n = (v.t1 - v.t0) * work.group;
            self.plain_scores(work, &v, work.kv_head, tile);
            let scores = &mut tile.scores[..n * v.filled];
            for (i, scores) in scores.chunks_exact_mut(v.filled).enumerate() {
                let row = v.t0 * work.group + i;
                mask(scores, work.l, work.start + row / work.group, v.p);
                let mixed = &mut mixed[row * dim..(row + 1) * dim];
                tile.states[row].push(scores, mixed);
            }
            let mixed = &mut mixed[v.t0 * work.group * dim..v.t1 * work.group * dim];
            let values = &tile.values[..v.filled * dim];
            gemm_nn_acc((n, dim, v.filled), scores, v.filled, values, dim, mixed, dim);
        }
        for (state, mixed) in tile.states.iter().zip(mixed.chunks_exact_mut(dim)) {
            scale_in_place(mixed, state.normaliser());
        }
    }

    /// Decodes a block of one KV head into `tile.keys` and `tile.values` (`[filled, head_dim]`), and
    /// scores its keys into `tile.scores` (`[(t1 - t0) · group, filled]`), scaled and capped, not masked.
    pub(super) fn plain_scores(
        &self,
        work: &Work<'_>,
        v: &Visible,
        kv_head: usize,
        tile: &mut Tile,
    ) {
        let l = work.l;
        let dim = l.head_dim;
        let index = self.geometry.group(work.layer, kv_head);
        let clock = Instant::now();
        for part in 0..2 {
            let entry = work.sequence.entry(index, part, v.block);
            self.decode(work, part, kv_head, entry, v.filled, tile);
        }
        tile.decode_nanos += clock.elapsed().as_nanos() as u64;
        let n = (v.t1 - v.t0) * work.group;
        let relative = work.sequence.recipe.frame() == KeyFrame::BlockRelative;
        let format = work.sequence.entry(index, 0, v.block).format;
        let coded = self.formats.get(format).layers[work.layer].groups[0][0].joint().is_some();
        if coded && relative && n > v.filled {
            self.turn_tile(work, v, kv_head, tile);
            let (queries, keys) = (&tile.absolute[v.t0 * work.group * dim..], &tile.keys);
            gemm_nt((n, v.filled, dim), queries, dim, keys, dim, &mut tile.scores, v.filled);
            self.scale_scores(work, &mut tile.scores[..n * v.filled]);
            return;
        }
        let origin = if relative { v.p } else { 0 };
        let rotated = &mut tile.queries;
        work.rotate_queries(&self.frame, kv_head, v.t0..v.t1, origin, rotated);
        let keys = &tile.keys[..v.filled * dim];
        gemm_nt((n, v.filled, dim), &tile.queries, dim, keys, dim, &mut tile.scores, v.filled);
        self.scale_scores(work, &mut tile.scores[..n * v.filled]);
    }

    /// Brings scores to the layer's scale, and under its cap.
    pub(super) fn scale_scores(&self, work: &Work<'_>, scores: &mut [f32]) {
        scale_in_place(scores, work.l.score_scale * self.frame.score_factor(work.l.rope));
        if let Some(cap) = work.l.score_cap {
            soft_cap(scores, cap);
        }
    }

    /// Where more queries meet a tile than it has tokens: turns its keys to their own positions, and the
    /// item's queries, once, to theirs. (Only coded tiles: for uncompressed ones a row must not depend on
    /// how many others there are.)
    fn turn_tile(&self, work: &Work<'_>, v: &Visible, kv_head: usize, tile: &mut Tile) {
        let (l, dim) = (work.l, work.l.head_dim);
        let Tile { keys, absolute, queries: row, .. } = tile;
        if absolute.is_empty() {
            absolute.resize(work.rows() * dim, 0.0);
            work.rotate_queries(&self.frame, kv_head, 0..work.len, 0, absolute);
        }
        for key in keys[..v.filled * dim].chunks_exact_mut(dim) {
            row[..dim].copy_from_slice(key);
            self.frame.rotate(l.rope, v.p, &row[..dim], key);
        }
    }

    /// Plain rows of one head of a block: `tile.keys` or `tile.values`, `[filled, head_dim]`.
    #[inline]
    fn decode(
        &self,
        work: &Work<'_>,
        part: usize,
        kv_head: usize,
        entry: Entry,
        filled: usize,
        tile: &mut Tile,
    ) {
        let format = &self.formats.get(entry.format).layers[work.layer];
        let codec = &format.groups[kv_head / format.heads][part];
        let bytes = self.pool.bytes(entry.slot);
        let dim = work.l.head_dim;
        let Tile { keys, values, coded, bases, .. } = tile;
        let out = if part == 0 { keys } else { values };
        let out = &mut out[..filled * dim];
        let gain = entry.gain.to_f32();
        if let Some(codec) = codec.joint() {
            bases[part].load(codec.basis());
            let head = kv_head % format.heads;
            codec.decode_head(bytes, gain, head, dim, &bases[part].columns, coded, out);
            return;
        }
        codec.codec().decode(bytes, self.geometry.block_size(), dim, out);
        if gain != 1.0 {
            scale_in_place(out, gain);
        }
    }
}
