//! HOT PATH. One KV head at a time: rows as they are stored where attention can read them, and tiles decoded to f32
//! where not.

use std::time::Instant;

use half::f16;
use kvasir_kernels::coded::ByteIsa;
use kvasir_kernels::{
    KvBlock, OnlineSoftmax, Products, QueryRows, StoredRows, attend_block, scale_in_place,
};

use super::tile::{Sums, Tile};
use super::{Visible, Work};
use crate::config::{KeyFrame, Recipe};
use crate::format::GroupPart;
use crate::kv_cache::KvCache;
use crate::table::Entry;

impl KvCache {
    /// Makes ready for blocks of one plain job.
    pub(super) fn begin_plain(&self, work: &Work<'_>, tile: &mut Tile) {
        let dim = work.l.head_dim;
        tile.resize(work.rows(), dim, dim, self.geometry.block_size());
        self.load_queries(work, work.kv_head, tile);
    }

    /// Some blocks of the plain job that was begun; those up to `until` will follow. `sums`: `[len · group,
    /// head_dim]`, to which they are added.
    pub(super) fn attend_plain(
        &self,
        work: &Work<'_>,
        blocks: (usize, usize),
        until: usize,
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let (dim, block_size) = (work.l.head_dim, self.geometry.block_size());
        let mut found = (blocks.0 < blocks.1).then(|| self.find(work, work.kv_head, blocks.0));
        for block in blocks.0..blocks.1 {
            let next = (block + 1 < until).then(|| self.find(work, work.kv_head, block + 1));
            if let (Some(v), Some(found)) = (work.visible(block, block_size), &found) {
                let fetch = next.as_ref().map_or([&[][..]; 2], |next| next.bytes);
                let Sums { states, values } = &mut *sums;
                self.attend_found(work, &v, found, fetch, states, values, dim, tile);
            }
            found = next;
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
    /// every `stride`.
    pub(super) fn attend_visible(
        &self,
        work: &Work<'_>,
        v: &Visible,
        kv_head: usize,
        states: &mut [OnlineSoftmax],
        sums: &mut [f32],
        stride: usize,
        tile: &mut Tile,
    ) {
        let found = self.find(work, kv_head, v.block);
        self.attend_found(work, v, &found, [&[]; 2], states, sums, stride, tile);
    }

    /// The same with a block that was looked up; `next` will be read after it.
    #[allow(clippy::too_many_arguments)]
    fn attend_found(
        &self,
        work: &Work<'_>,
        v: &Visible,
        found: &Found<'_>,
        next: [&[u8]; 2],
        states: &mut [OnlineSoftmax],
        sums: &mut [f32],
        stride: usize,
        tile: &mut Tile,
    ) {
        let (l, dim, group) = (work.l, work.l.head_dim, work.group);
        let (first, n) = (v.t0 * group, (v.t1 - v.t0) * group);
        let [own_keys, own_values] = [0, 1].map(|part| found.stored(part, dim));
        for (part, stored) in [&own_keys, &own_values].into_iter().enumerate() {
            if stored.is_none() {
                self.decode(found, part, v.filled, dim, tile);
            }
        }
        let relative = work.sequence.recipe.frame() == KeyFrame::BlockRelative;
        let turned = relative && n > v.filled && found.parts[0].joint().is_some();
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
            products: if work.sequence.recipe == Recipe::F32 {
                Products::F32
            } else {
                self.products
            },
        };
        let kv = KvBlock {
            keys: own_keys.unwrap_or(StoredRows::F32(keys)),
            values: own_values.unwrap_or(StoredRows::F32(values)),
            filled: v.filled,
            next,
        };
        let (states, sums) = (&mut states[first..], &mut sums[first * stride..]);
        attend_block(&queries, &kv, states, sums, stride, block);
    }

    /// Looks a block of one KV head up.
    #[inline]
    fn find(&self, work: &Work<'_>, kv_head: usize, block: usize) -> Found<'_> {
        let group = self.geometry.group(work.layer, kv_head);
        let entries = [0, 1].map(|part| work.sequence.entry(group, part, block));
        let bytes = entries.map(|entry| self.pool.bytes(entry.slot));
        let formats = entries.map(|entry| &self.formats.get(entry.format).layers[work.layer]);
        let parts = [0, 1].map(|part| &formats[part].groups[kv_head / formats[part].heads][part]);
        Found { entries, bytes, parts, head: kv_head % formats[0].heads }
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
    fn decode(&self, found: &Found<'_>, part: usize, filled: usize, dim: usize, tile: &mut Tile) {
        let clock = Instant::now();
        let bytes = found.bytes[part];
        let gain = found.entries[part].gain.to_f32();
        let Tile { keys, values, coded, bases, rows, levels, .. } = tile;
        let out = if part == 0 { keys } else { values };
        let out = &mut out[..filled * dim];
        if let Some(codec) = found.parts[part].joint() {
            let tokens = self.geometry.block_size();
            if ByteIsa::best() == ByteIsa::Vnni && filled == tokens {
                rows[part].load(codec.basis(), dim);
                let place = (found.head, dim, tokens);
                codec.decode_bytes(bytes, gain, place, &rows[part].rows, levels, out);
            } else {
                bases[part].load(codec.basis());
                let columns = &bases[part].columns;
                codec.decode_head(bytes, tokens, gain, found.head, dim, columns, coded, out);
            }
        } else {
            found.parts[part].codec().decode(bytes, self.geometry.block_size(), dim, out);
            if gain != 1.0 {
                scale_in_place(out, gain);
            }
        }
        tile.decode_nanos += clock.elapsed().as_nanos() as u64;
    }
}

/// Keys and values of one KV head in one block.
struct Found<'a> {
    entries: [Entry; 2],
    bytes: [&'a [u8]; 2],
    parts: [&'a GroupPart; 2],
    /// Number of the head among those of the slot.
    head: usize,
}

impl<'a> Found<'a> {
    /// Rows as they are stored, where they can be read so.
    #[inline]
    fn stored(&self, part: usize, dim: usize) -> Option<StoredRows<'a>> {
        let plain = self.entries[part].gain == f16::ONE && self.parts[part].joint().is_none();
        plain.then(|| self.parts[part].codec().stored_rows(self.bytes[part], dim)).flatten()
    }
}
