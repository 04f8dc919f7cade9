//! HOT PATH. One KV head at a time: rows as they are stored where attention can read them, and tiles decoded to f32
//! where not.

use std::time::Instant;

use half::f16;
use kvasir_kernels::{
    BlockScratch, KvBlock, ManyRows, OnlineSoftmax, Products, QueryLanes, QueryRows, StoredRows,
    add_columns, attend_block, expand_channels, has_integers, scale_in_place,
};

use super::tile::{Sums, Tile};
use super::{Visible, Work};
use crate::codec::{CodecKind, LowRankCodec};
use crate::config::KeyFrame;
use crate::format::GroupPart;
use crate::kv_cache::KvCache;
use crate::project::Channels;
use crate::table::{Entry, KeptBlock, Stays};

impl KvCache {
    /// Makes ready for blocks of one plain job.
    pub(super) fn begin_plain(&self, work: &Work<'_>, tile: &mut Tile) {
        let dim = work.l.head_dim;
        tile.resize(work.rows(), dim, dim, self.geometry.block_size());
        self.load_queries(work, work.kv_head, tile);
    }

    /// Lets the rows of the plain job that was begun go through blocks side by side, where that is faster.
    pub(super) fn begin_many(&self, work: &Work<'_>, tile: &mut Tile) {
        // Every row of a sink has a place of its own.
        let sinks = || work.kept.iter().any(|kept| matches!(kept.stays, Stays::AsSink(_)));
        tile.many = work.latents == 0 && QueryLanes::pay(work.l.head_dim, work.len) && !sinks();
        tile.loaded = [false; 2];
    }

    /// Some blocks of the plain job that was begun; those up to `until` will follow. `sums`: `[len · group,
    /// [`Work::stride`]]`, which have seen nothing.
    pub(super) fn attend_plain(
        &self,
        work: &Work<'_>,
        blocks: (usize, usize),
        until: usize,
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let (stride, block_size) = (work.stride(), self.geometry.block_size());
        if tile.many {
            tile.many_rows.reset(work.l.head_dim, work.group, work.len);
        }
        let mut found = (blocks.0 < blocks.1).then(|| self.find(work, work.kv_head, blocks.0));
        for block in blocks.0..blocks.1 {
            let next = (block + 1 < until).then(|| self.find(work, work.kv_head, block + 1));
            if let (Some(v), Some(found)) = (work.visible(block, block_size), &found) {
                let fetch = next.as_ref().map_or([&[][..]; 2], |next| next.bytes);
                let Sums { states, values } = &mut *sums;
                self.attend_found(work, &v, found, fetch, states, values, stride, tile);
            }
            found = next;
        }
        if tile.many {
            tile.many_rows.finish(&mut sums.states, &mut sums.values);
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
        // Every query has its own place among the cached tokens that a sink is read from.
        if matches!(found.kept, Some(KeptBlock { stays: Stays::AsSink(_), .. })) && v.t1 - v.t0 > 1
        {
            for t in v.t0..v.t1 {
                let one = Visible { t0: t, t1: t + 1, ..*v };
                self.attend_found(work, &one, found, next, states, sums, stride, tile);
            }
            return;
        }
        let first = v.t0 * work.group;
        let Read { queries, mut kv, block, many } = self.read(work, v, found, tile);
        kv.next = next;
        if let Some((many, lanes)) = many {
            return many.attend_block(lanes, v.t0, &queries, &kv);
        }
        let (states, sums) = (&mut states[first..], &mut sums[first * stride..]);
        attend_block(&queries, &kv, states, sums, stride, block);
    }

    /// Adds what the tokens of a block were paid by rows whose softmax is finished. `sums`: `rows` rows of columns,
    /// of `width` each, the block's from `at` on; several rows for as many query heads, and then
    /// one query token.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn observe_visible(
        &self,
        work: &Work<'_>,
        v: &Visible,
        states: &[OnlineSoftmax],
        rows: usize,
        (width, at): (usize, usize),
        sums: &mut [f32],
        tile: &mut Tile,
    ) {
        let found = self.find(work, work.kv_head, v.block);
        let Read { queries, kv, block, .. } = self.read(work, v, &found, tile);
        let states = &states[v.t0 * work.group..];
        let per_row = queries.rows.len() / queries.dim / rows;
        for (row, sums) in sums.chunks_exact_mut(width).take(rows).enumerate() {
            let own = row * per_row..(row + 1) * per_row;
            let some = QueryRows {
                rows: &queries.rows[own.start * queries.dim..own.end * queries.dim],
                group: if rows > 1 { 1 } else { queries.group },
                ..queries
            };
            let to = (at + v.filled).min(width);
            add_columns(&some, &kv, &states[own], &mut sums[at..to], block);
        }
    }

    /// The queries that see a block, and the block, as products read them.
    fn read<'t>(
        &'t self,
        work: &Work<'_>,
        v: &Visible,
        found: &Found<'t>,
        tile: &'t mut Tile,
    ) -> Read<'t> {
        let (l, dim, group) = (work.l, work.l.head_dim, work.group);
        let (first, n) = (v.t0 * group, (v.t1 - v.t0) * group);
        let products = self.products_of(work);
        let tokens = self.geometry.block_size();
        let stored = |part| found.stored(part, dim, tokens, products);
        let (mut own_keys, mut own_values) = (stored(0), stored(1));
        let mut halves = [false; 2];
        let latents = found.parts[1].low_rank().filter(|_| work.latents > 0);
        for (part, stored) in [&own_keys, &own_values].into_iter().enumerate() {
            if stored.is_none() && (part == 0 || latents.is_none()) {
                halves[part] = self.decode(found, part, v.filled, dim, tile);
            }
        }
        let relative = found.kept.is_none() && work.sequence.frame() == KeyFrame::BlockRelative;
        let turned = relative && n > v.filled && found.parts[0].joint().is_some();
        if turned {
            self.turn_tile(work, v, tile);
        }
        if let Some(positions) = found.kept.and_then(|kept| kept.positions.as_deref()) {
            self.turn_kept(l.rope, positions, dim, tile);
        }
        let Tile { keys, values, halves: held, queries, absolute, block, .. } = tile;
        let many = tile.many.then(|| {
            let (rows, which) = (if turned { &*absolute } else { &*queries }, usize::from(turned));
            if !std::mem::replace(&mut tile.loaded[which], true) {
                tile.lanes[which].load(&rows[..work.rows() * dim], dim, group, products);
            }
            (&mut tile.many_rows, &tile.lanes[which])
        });
        let [held_keys, held_values] = held;
        if halves[0] {
            own_keys = Some(StoredRows::F16(held_keys));
        }
        if let Some(codec) = latents {
            let how = (v.filled, found.entries[1].gain.to_f32());
            own_values = Some(self.read_latents(codec, found.bytes[1], how, held_values));
        } else if halves[1] {
            own_values = Some(StoredRows::F16(held_values));
        }
        let from = work.start + v.t0;
        let from = match found.kept {
            None if relative => from - v.p,
            Some(KeptBlock { stays: Stays::AsSink(last), .. }) => from.min(*last),
            _ => from,
        };
        let queries = QueryRows {
            rows: &if turned { &*absolute } else { &*queries }[first * dim..(first + n) * dim],
            dim,
            group,
            turn: if turned { None } else { self.frame.span(l.rope, from, v.t1 - v.t0) },
            offset: work.start + v.t0 - v.p,
            window: v.window,
            cap: l.score_cap,
            products,
        };
        let kv = KvBlock {
            keys: own_keys.unwrap_or(StoredRows::F32(keys)),
            values: own_values.unwrap_or(StoredRows::F32(values)),
            value_dim: latents.map_or(dim, LowRankCodec::rank),
            at: latents.map_or(0, |_| dim),
            filled: v.filled,
            next: [&[]; 2],
        };
        Read { queries, kv, block, many }
    }

    /// What products of a sequence are of: always the same, so that its rows are.
    fn products_of(&self, work: &Work<'_>) -> Products {
        let recipe = &work.sequence.recipe;
        match (recipe.codec(), self.products) {
            (CodecKind::F32, _) | (_, Products::F32) => Products::F32,
            (CodecKind::Int8, _) if work.latents == 0 && has_integers(work.l.head_dim) => {
                Products::Integers
            }
            (_, products) => products,
        }
    }

    /// Turns decoded keys from their rows in the block to their own positions.
    fn turn_kept(&self, rope: Option<usize>, positions: &[u32], dim: usize, tile: &mut Tile) {
        let Tile { keys, scores: row, .. } = tile;
        row.resize(row.len().max(dim), 0.0);
        for (i, (key, position)) in keys.chunks_exact_mut(dim).zip(positions).enumerate() {
            row[..dim].copy_from_slice(key);
            self.frame.rotate(rope, *position as usize - i, &row[..dim], key);
        }
    }

    /// Looks a block of one KV head up.
    #[inline]
    fn find<'a>(&'a self, work: &Work<'a>, kv_head: usize, block: usize) -> Found<'a> {
        let group = self.geometry.group(work.layer, kv_head);
        let table = &work.sequence.tables[group];
        let (kept, entries) = match work.own_block(block) {
            Some(own) => {
                let entry = |part| work.sequence.entry(group, part, own);
                (None, [entry(0), entry(1)])
            }
            None => (Some(&table.kept[block]), table.kept[block].entries),
        };
        // Without `map` of arrays, which compilers call: this is done for every block.
        let bytes = [self.pool.bytes(entries[0].slot), self.pool.bytes(entries[1].slot)];
        let format = |part: usize| &self.formats.get(entries[part].format).layers[work.layer];
        let formats = [format(0), format(1)];
        let part = |i: usize| &formats[i].groups[kv_head / formats[i].heads][i];
        let parts = [part(0), part(1)];
        let channels = table.channels.as_ref();
        Found { entries, bytes, parts, head: kv_head % formats[0].heads, kept, channels }
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

    /// Keys of fewer channels with zeros in the places of the others, as [`Self::decode`].
    fn decode_narrow(
        &self,
        found: &Found<'_>,
        channels: &Channels,
        filled: usize,
        dim: usize,
        tile: &mut Tile,
    ) -> bool {
        let (codec, bytes, kept) = (found.parts[0].codec(), found.bytes[0], found.parts[0].width);
        let tokens = self.geometry.block_size();
        let Tile { keys, halves, narrow, coded, .. } = tile;
        let [out, ..] = halves;
        out.resize(tokens * dim, f16::ZERO);
        let out = &mut out[..filled * dim];
        match codec.stored_rows(bytes, kept) {
            Some(StoredRows::F16(rows)) => {
                expand_channels(&rows[..filled * kept], channels.mask(), dim, out);
                return true;
            }
            Some(StoredRows::F32(rows)) => {
                channels.widen(&rows[..filled * kept], dim, &mut keys[..filled * dim]);
                return false;
            }
            Some(StoredRows::Bytes { .. }) | None => narrow.resize(filled * kept, f16::ZERO),
        }
        if codec.decode_halves(bytes, tokens, kept, narrow) {
            expand_channels(narrow, channels.mask(), dim, out);
            return true;
        }
        coded.resize(filled * kept, 0.0);
        codec.decode(bytes, tokens, kept, coded);
        channels.widen(coded, dim, &mut keys[..filled * dim]);
        false
    }

    /// Plain rows of one head of a block: `tile.keys` or `tile.values`, `[filled, head_dim]`; or, if it returns true,
    /// `tile.halves`.
    fn decode(
        &self,
        found: &Found<'_>,
        part: usize,
        filled: usize,
        dim: usize,
        tile: &mut Tile,
    ) -> bool {
        let clock = Instant::now();
        let bytes = found.bytes[part];
        let gain = found.entries[part].gain.to_f32();
        let tokens = self.geometry.block_size();
        if let Some(channels) = found.channels(part) {
            let done = self.decode_narrow(found, channels, filled, dim, tile);
            tile.decode_nanos += clock.elapsed().as_nanos() as u64;
            return done;
        }
        let Tile { keys, values, halves, coded, bases, rows, levels, .. } = tile;
        if gain == 1.0 {
            let halves = &mut halves[part];
            // Whole blocks: attention reads 32 rows at a time.
            halves.resize(tokens * dim, f16::ZERO);
            let rows = &mut halves[..filled * dim];
            if let Some(codec) = found.parts[part].low_rank().filter(|codec| !codec.is_f32()) {
                codec.decode_head(bytes, tokens, found.head, rows);
                tile.decode_nanos += clock.elapsed().as_nanos() as u64;
                return true;
            }
            if found.parts[part].codec().decode_halves(bytes, tokens, dim, rows) {
                tile.decode_nanos += clock.elapsed().as_nanos() as u64;
                return true;
            }
        }
        let out = if part == 0 { keys } else { values };
        let out = &mut out[..filled * dim];
        if let Some(codec) = found.parts[part].low_rank() {
            codec.decode_head(bytes, tokens, found.head, out);
            if gain != 1.0 {
                scale_in_place(out, gain);
            }
        } else if let Some(codec) = found.parts[part].joint() {
            if filled == tokens {
                rows[part].load(codec.basis(), dim);
                let place = (found.head, dim, tokens);
                codec.decode_bytes(bytes, gain, place, &rows[part].rows, levels, out);
            } else {
                bases[part].load(codec.basis());
                let columns = &bases[part].columns;
                codec.decode_head(bytes, tokens, gain, found.head, dim, columns, coded, out);
            }
        } else {
            found.parts[part].codec().decode(bytes, tokens, dim, out);
            if gain != 1.0 {
                scale_in_place(out, gain);
            }
        }
        tile.decode_nanos += clock.elapsed().as_nanos() as u64;
        false
    }
}

/// A block and the queries that see it.
struct Read<'t> {
    queries: QueryRows<'t>,
    kv: KvBlock<'t>,
    block: &'t mut BlockScratch,
    /// Where the job's rows are side by side, and the queries as they are now.
    many: Option<(&'t mut ManyRows, &'t QueryLanes)>,
}

/// Keys and values of one KV head in one block.
struct Found<'a> {
    entries: [Entry; 2],
    bytes: [&'a [u8]; 2],
    parts: [&'a GroupPart; 2],
    /// Number of the head among those of the slot.
    head: usize,
    /// If a policy kept it.
    kept: Option<&'a KeptBlock>,
    /// Channels of blocks whose keys have fewer.
    channels: Option<&'a Channels>,
}

impl<'a> Found<'a> {
    /// The channels that its keys have, if not all.
    fn channels(&self, part: usize) -> Option<&'a Channels> {
        self.channels.filter(|channels| part == 0 && channels.kept() == self.parts[0].width)
    }

    /// Rows as they are stored, where they can be read so.
    #[inline]
    fn stored(
        &self,
        part: usize,
        dim: usize,
        tokens: usize,
        products: Products,
    ) -> Option<StoredRows<'a>> {
        let plain = self.entries[part].gain == f16::ONE
            && self.parts[part].joint().is_none()
            && self.parts[part].width == dim;
        if !plain {
            return None;
        }
        let (codec, bytes) = (self.parts[part].codec(), self.bytes[part]);
        match products {
            Products::Integers => codec.stored_bytes(bytes, tokens, dim),
            _ => None,
        }
        .or_else(|| codec.stored_rows(bytes, dim))
    }
}
