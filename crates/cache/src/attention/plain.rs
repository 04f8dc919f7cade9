//! HOT PATH. One KV head at a time: rows as they are stored where attention can read them, and tiles decoded to f32
//! where not.

use std::time::Instant;

use kvasir_kernels::{KvBlock, OnlineSoftmax, QueryRows, StoredRows, attend_block, scale_in_place};

use super::tile::{Sums, Tile};
use super::{Visible, Work};
use crate::config::KeyFrame;
use crate::format::GroupPart;
use crate::kv_cache::KvCache;
use crate::table::Entry;

impl KvCache {
    /// Some blocks of one plain job. `sums`: `[len · group, head_dim]`, to which they are added.
    pub(super) fn attend_plain(
        &self,
        work: &Work<'_>,
        blocks: (usize, usize),
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let (dim, block_size) = (work.l.head_dim, self.geometry.block_size());
        tile.resize(work.rows(), dim, dim, block_size);
        self.load_queries(work, work.kv_head, tile);
        for v in (blocks.0..blocks.1).filter_map(|block| work.visible(block, block_size)) {
            let next = (v.block + 1 < blocks.1).then_some(v.block + 1);
            self.attend_visible(
                work,
                &v,
                next,
                work.kv_head,
                &mut sums.states,
                &mut sums.values,
                dim,
                tile,
            );
        }
    }

    /// The queries of one KV head, scaled, into `tile.queries`: `[len · group, head_dim]`.
    pub(super) fn load_queries(&self, work: &Work<'_>, kv_head: usize, tile: &mut Tile) {
        let width = work.group * work.l.head_dim;
        let scale = work.l.score_scale * self.frame.score_factor(work.l.rope);
        let tokens = work.queries.chunks(work.l.query_heads * work.l.head_dim).take(work.len);
        for (token, rows) in tokens.zip(tile.queries.chunks_exact_mut(width)) {
            let heads = &token[kv_head * width..(kv_head + 1) * width];
            for (row, query) in rows.iter_mut().zip(heads) {
                *row = query * scale;
            }
        }
    }

    /// One KV head's block against the queries in `tile.queries`. `states`, `sums`: of the item's rows, a row
    /// every `stride`. `next`: the block that comes after it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attend_visible(
        &self,
        work: &Work<'_>,
        v: &Visible,
        next: Option<usize>,
        kv_head: usize,
        states: &mut [OnlineSoftmax],
        sums: &mut [f32],
        stride: usize,
        tile: &mut Tile,
    ) {
        let (l, dim, group) = (work.l, work.l.head_dim, work.group);
        let (first, n) = (v.t0 * group, (v.t1 - v.t0) * group);
        let [own_keys, own_values] = [0, 1].map(|part| self.stored(work, part, kv_head, v.block));
        for (part, stored) in [&own_keys, &own_values].into_iter().enumerate() {
            if stored.is_none() {
                self.decode(work, part, kv_head, v, tile);
            }
        }
        let relative = work.sequence.recipe.frame() == KeyFrame::BlockRelative;
        let coded = self.part(work, 0, kv_head, v.block).1.joint().is_some();
        let turned = coded && relative && n > v.filled;
        if turned {
            self.turn_tile(work, v, tile);
        }
        let Tile { keys, values, queries, absolute, block, .. } = tile;
        let queries = QueryRows {
            rows: &if turned { absolute } else { queries }[first * dim..(first + n) * dim],
            dim,
            group,
            turn: if turned {
                None
            } else {
                let origin = if relative { v.p } else { 0 };
                self.frame.span(l.rope, work.start + v.t0 - origin, v.t1 - v.t0)
            },
            offset: work.start + v.t0 - v.p,
            window: l.window,
            cap: l.score_cap,
        };
        let bytes = |part: usize| {
            next.map_or(&[][..], |next| {
                self.pool.bytes(self.part(work, part, kv_head, next).0.slot)
            })
        };
        let kv = KvBlock {
            keys: own_keys.unwrap_or(StoredRows::F32(keys)),
            values: own_values.unwrap_or(StoredRows::F32(values)),
            filled: v.filled,
            next: [bytes(0), bytes(1)],
        };
        attend_block(
            &queries,
            &kv,
            &mut states[first..],
            &mut sums[first * stride..],
            stride,
            block,
        );
    }

    /// A block's entry, what it is stored by, and how many heads together.
    #[inline]
    fn part(
        &self,
        work: &Work<'_>,
        part: usize,
        kv_head: usize,
        block: usize,
    ) -> (Entry, &GroupPart, usize) {
        let entry = work.sequence.entry(self.geometry.group(work.layer, kv_head), part, block);
        let format = &self.formats.get(entry.format).layers[work.layer];
        (entry, &format.groups[kv_head / format.heads][part], format.heads)
    }

    /// Rows as they are stored, where they can be read so.
    #[inline]
    fn stored(
        &self,
        work: &Work<'_>,
        part: usize,
        kv_head: usize,
        block: usize,
    ) -> Option<StoredRows<'_>> {
        let (entry, stored, _) = self.part(work, part, kv_head, block);
        let plain = entry.gain == half::f16::ONE && stored.joint().is_none();
        let bytes = self.pool.bytes(entry.slot);
        plain.then(|| stored.codec().stored_rows(bytes, work.l.head_dim)).flatten()
    }

    /// Where more queries meet a tile than it has tokens: turns its keys to their own positions, and the
    /// item's queries, once, to theirs. (Only coded tiles: for uncompressed ones a row must not depend on
    /// how many others there are.)
    fn turn_tile(&self, work: &Work<'_>, v: &Visible, tile: &mut Tile) {
        let (l, dim) = (work.l, work.l.head_dim);
        let Tile { keys, absolute, queries, scores: row, .. } = tile;
        if absolute.is_empty() {
            absolute.resize(work.rows() * dim, 0.0);
            let rows = queries.chunks_exact(dim).zip(absolute.chunks_exact_mut(dim));
            for (i, (query, row)) in rows.enumerate() {
                self.frame.rotate(l.rope, work.start + i / work.group, query, row);
            }
        }
        row.resize(row.len().max(dim), 0.0);
        for key in keys[..v.filled * dim].chunks_exact_mut(dim) {
            row[..dim].copy_from_slice(key);
            self.frame.rotate(l.rope, v.p, &row[..dim], key);
        }
    }

    /// Plain rows of one head of a block: `tile.keys` or `tile.values`, `[filled, head_dim]`.
    fn decode(&self, work: &Work<'_>, part: usize, kv_head: usize, v: &Visible, tile: &mut Tile) {
        let clock = Instant::now();
        let (entry, stored, heads) = self.part(work, part, kv_head, v.block);
        let bytes = self.pool.bytes(entry.slot);
        let dim = work.l.head_dim;
        let Tile { keys, values, coded, bases, .. } = tile;
        let out = if part == 0 { keys } else { values };
        let out = &mut out[..v.filled * dim];
        let gain = entry.gain.to_f32();
        if let Some(codec) = stored.joint() {
            bases[part].load(codec.basis());
            let head = kv_head % heads;
            let (tokens, columns) = (self.geometry.block_size(), &bases[part].columns);
            codec.decode_head(bytes, tokens, gain, head, dim, columns, coded, out);
        } else {
            stored.codec().decode(bytes, self.geometry.block_size(), dim, out);
            if gain != 1.0 {
                scale_in_place(out, gain);
            }
        }
        tile.decode_nanos += clock.elapsed().as_nanos() as u64;
    }
}
