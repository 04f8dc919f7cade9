//! HOT PATH (prompts). Attention of many query rows to one block after the other: the same arithmetic as
//! [`super::attend_block`], bit for bit, with rows in lanes instead of tokens.
//!
//! A vector has one query head's rows of 16 consecutive tokens; up to [`STRIP`] vectors make a strip, whose sums fill the
//! registers. Keys and values are broadcast, so keys need not be transposed, and maxima and sums of a softmax need
//! nothing from other lanes. Queries, weights and sums stay in this form from block to block: [`QueryLanes::load`] and
//! [`ManyRows::finish`] turn them once.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::fetch::fetch;
use super::numbers::Numbers;
use super::tile::WorthLines;
use super::{KvBlock, LANES, Products, QueryRows, integers, tile};
use crate::isa::Isa;
use crate::lines::Lines;
use crate::simd::{Lanes, compiled};
use crate::softmax::OnlineSoftmax;
use strip::{Call, attend};

mod strip;

/// Vectors of a strip: with 8 rows of keys or values they are 24 sums.
const STRIP: usize = 3;

/// From one channel or token of a strip to the next.
const WIDTH: usize = STRIP * LANES;

/// Rows of `group` query heads for each of `tokens` tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Shape {
    dim: usize,
    group: usize,
    tokens: usize,
}

impl Shape {
    /// Vectors, by 16 tokens and then by head, so that those of a strip see about the same tokens.
    fn vectors(self) -> usize {
        self.tokens.div_ceil(LANES) * self.group
    }

    /// Floats of all strips.
    fn floats(self) -> usize {
        self.vectors().div_ceil(STRIP) * self.dim * WIDTH
    }

    /// Of vector `u`: its first token, how many there are, and its head.
    fn place(self, u: usize) -> (usize, usize, usize) {
        let first = u / self.group * LANES;
        (first, LANES.min(self.tokens - first), u % self.group)
    }

    /// Where the first channel of vector `u` is.
    fn at(self, u: usize) -> usize {
        u / STRIP * self.dim * WIDTH + u % STRIP * LANES
    }
}

/// Query rows of one KV head with tokens side by side.
#[derive(Debug, Default)]
pub struct QueryLanes {
    shape: Shape,
    rows: Lines, // [strips, dim, WIDTH]
    /// What rows are multiplied with where numbers are whole, and what a one is worth then.
    factors: Lines, // [vectors, LANES]
    worth: Lines, // the same
    by_row: [Lines; 2], // [tokens · group]
}

impl QueryLanes {
    /// Whether rows of `dim` channels for `tokens` tokens are read faster this way: enough lanes have a row.
    #[inline]
    pub const fn pay(dim: usize, tokens: usize) -> bool {
        dim.is_multiple_of(LANES) && 4 * tokens >= 3 * tokens.next_multiple_of(LANES)
    }

    /// Takes rows `[tokens · group, dim]`, scaled, before rotation, for such products. `dim` is a multiple of 16.
    pub fn load(&mut self, rows: &[f32], dim: usize, group: usize, products: Products) {
        self.load_on(Isa::best(), rows, dim, group, products);
    }

    fn load_on(&mut self, isa: Isa, rows: &[f32], dim: usize, group: usize, products: Products) {
        assert!(dim.is_multiple_of(LANES) && rows.len().is_multiple_of(dim * group), "rows");
        self.shape = Shape { dim, group, tokens: rows.len() / dim / group };
        self.rows.resize(self.shape.floats());
        to_lanes(isa, rows, self.shape, self.rows.as_mut_slice());
        if products == Products::Integers {
            self.load_worths(isa, rows);
        }
    }

    fn load_worths(&mut self, isa: Isa, rows: &[f32]) {
        let Shape { dim, group, .. } = self.shape;
        let [factors, worth] = &mut self.by_row;
        for lines in [&mut *factors, &mut *worth] {
            lines.resize(rows.len() / dim);
        }
        integers::query_worths(isa, rows, dim, factors.as_mut_slice(), worth.as_mut_slice());
        for (to, from) in [(&mut self.factors, factors), (&mut self.worth, worth)] {
            to.resize(self.shape.vectors() * LANES);
            let (to, from) = (to.as_mut_slice(), from.as_slice());
            for (u, lanes) in to.chunks_exact_mut(LANES).take(self.shape.vectors()).enumerate() {
                let (first, n, head) = self.shape.place(u);
                for (i, lane) in lanes.iter_mut().enumerate() {
                    *lane = from[(first + i.min(n - 1)) * group + head];
                }
            }
        }
    }
}

/// The online softmax of many rows over the blocks so far, and buffers.
#[derive(Debug, Default)]
pub struct ManyRows {
    shape: Shape,
    sums: Lines,    // [strips, dim, WIDTH]
    maxima: Lines,  // [vectors, LANES]
    totals: Lines,  // the same
    keys: Lines,    // [tokens, words of dim]
    values: Lines,  // [words of tokens, dim]
    angles: Lines,  // [16 tokens, cosines and sines, dim / 2, LANES]
    queries: Lines, // [words of dim, WIDTH]
    scores: Lines,  // [tokens, WIDTH]
    weights: Lines, // [words of tokens, WIDTH]
    /// What whole keys and values are worth.
    key_worth: WorthLines,
    value_worth: WorthLines,
}

impl ManyRows {
    /// Rows of `group` query heads for each of `tokens` tokens that have seen nothing.
    pub fn reset(&mut self, dim: usize, group: usize, tokens: usize) {
        self.shape = Shape { dim, group, tokens };
        let (floats, lanes) = (self.shape.floats(), self.shape.vectors() * LANES);
        for (lines, len, with) in [
            (&mut self.sums, floats, 0.0),
            (&mut self.maxima, lanes, f32::NEG_INFINITY),
            (&mut self.totals, lanes, 0.0),
        ] {
            lines.resize(len);
            lines.as_mut_slice()[..len].fill(with);
        }
    }

    /// Takes a block into the softmax of tokens `first ..` of `lanes`, as [`super::attend_block`] does with the same `queries`:
    /// those tokens', whose `rows` are not read here but counted.
    ///
    /// # Panics
    /// If `lanes` have not the shape that [`Self::reset`] had, or a slice is shorter than its shape says, or values have another
    /// width than keys.
    pub fn attend_block(
        &mut self,
        lanes: &QueryLanes,
        first: usize,
        queries: &QueryRows<'_>,
        block: &KvBlock<'_>,
    ) {
        self.attend_block_on(Isa::best(), lanes, first, queries, block);
    }

    fn attend_block_on(
        &mut self,
        isa: Isa,
        lanes: &QueryLanes,
        first: usize,
        queries: &QueryRows<'_>,
        block: &KvBlock<'_>,
    ) {
        let (shape, filled) = (self.shape, block.filled);
        let Shape { dim, group, tokens } = shape;
        let seeing = (first, first + queries.num() / group);
        if seeing.0 == seeing.1 || filled == 0 {
            return;
        }
        super::check(queries, block);
        assert!(lanes.shape == shape && (queries.dim, queries.group) == (dim, group), "{shape:?}");
        assert!(seeing.1 <= tokens && (block.value_dim, block.at) == (dim, 0), "{shape:?}");
        assert!(filled <= block.values.len() / dim, "{filled} tokens of values");
        let numbers = Numbers::of(isa, queries.products, true);
        tile::check_rows(numbers, block);
        block.next.into_iter().for_each(fetch);
        self.angles.resize(tokens.div_ceil(LANES) * LANES * dim);
        self.queries.resize(dim * WIDTH);
        self.scores.resize(filled * WIDTH);
        // Tokens go in pairs.
        self.weights.resize(filled.next_multiple_of(2) * WIDTH);
        let (keys, values) = if numbers == Numbers::Integers {
            let Self { keys, values, key_worth, value_worth, .. } = &mut *self;
            tile::key_integers(isa, block, dim, keys, key_worth, &[]);
            tile::value_integers(isa, block, values, value_worth, &[]);
            (self.keys.as_slice(), self.values.as_slice())
        } else {
            let pairs = numbers == Numbers::Pairs;
            let keys = tile::key_words(isa, pairs, block.keys, (filled, dim), &mut self.keys);
            (keys, tile::value_words(isa, pairs, block, &mut self.values).0)
        };
        let mut call = Call {
            shape,
            seeing,
            filled,
            end: queries.offset as i64 - first as i64 + 1,
            // No block is so far away; more would not fit.
            window: queries.window.map(|w| w.min(1 << 48) as i64),
            cap: queries.cap,
            turn: queries.turn,
            keys,
            values,
            rows: lanes.rows.as_slice(),
            factors: lanes.factors.as_slice(),
            worth: lanes.worth.as_slice(),
            key_worth: self.key_worth.worth(),
            value_worth: self.value_worth.worth(),
            sums: self.sums.as_mut_slice(),
            maxima: self.maxima.as_mut_slice(),
            totals: self.totals.as_mut_slice(),
            angles: self.angles.as_mut_slice(),
            queries: self.queries.as_mut_slice(),
            scores: self.scores.as_mut_slice(),
            weights: self.weights.as_mut_slice(),
        };
        attend(isa, numbers, &mut call);
    }

    /// The softmax of all rows: `states` `[tokens · group]`, `sums` `[tokens · group, dim]`.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn finish(&self, states: &mut [OnlineSoftmax], sums: &mut [f32]) {
        self.finish_on(Isa::best(), states, sums);
    }

    fn finish_on(&self, isa: Isa, states: &mut [OnlineSoftmax], sums: &mut [f32]) {
        to_rows(isa, self.sums.as_slice(), self.shape, sums);
        let (maxima, totals) = (self.maxima.as_slice(), self.totals.as_slice());
        for u in 0..self.shape.vectors() {
            let (first, n, head) = self.shape.place(u);
            for i in 0..n {
                let (max, sum) = (maxima[u * LANES + i], totals[u * LANES + i]);
                states[(first + i) * self.shape.group + head] = OnlineSoftmax { max, sum };
            }
        }
    }
}

compiled! {
    /// Rows `[tokens · group, dim]` into lanes.
    fn to_lanes(rows: &[f32], shape: Shape, out: &mut [f32]) = to_lanes_body for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn to_lanes_body<S: Lanes>(s: S, rows: &[f32], shape: Shape, out: &mut [f32]) {
    let Shape { dim, group, tokens } = shape;
    assert!(rows.len() >= tokens * group * dim && out.len() >= shape.floats());
    for u in 0..shape.vectors() {
        let (first, n, head) = shape.place(u);
        for c in (0..dim).step_by(4) {
            // SAFETY: 4 channels of `n` rows, and a vector of each.
            unsafe {
                let from = rows.as_ptr().add((first * group + head) * dim + c);
                let columns = s.words4(from.cast(), group * dim, n);
                for i in 0..4 {
                    s.istore(
                        out.as_mut_ptr().add(shape.at(u) + (c + i) * WIDTH).cast(),
                        columns[i],
                    );
                }
            }
        }
    }
}

compiled! {
    /// The way back.
    fn to_rows(lanes: &[f32], shape: Shape, out: &mut [f32]) = to_rows_body for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn to_rows_body<S: Lanes>(s: S, lanes: &[f32], shape: Shape, out: &mut [f32]) {
    let Shape { dim, group, tokens } = shape;
    assert!(out.len() >= tokens * group * dim && lanes.len() >= shape.floats());
    for u in 0..shape.vectors() {
        let (first, n, head) = shape.place(u);
        for (c, t) in (0..dim).step_by(LANES).flat_map(|c| (0..n).step_by(4).map(move |t| (c, t))) {
            // SAFETY: 4 lanes of 16 channels, and a vector of each row that is there.
            unsafe {
                let from = lanes.as_ptr().add(shape.at(u) + c * WIDTH + t);
                let rows = s.words4(from.cast(), WIDTH, LANES);
                for i in 0..4.min(n - t) {
                    let row = (first + t + i) * group + head;
                    s.istore(out.as_mut_ptr().add(row * dim + c).cast(), rows[i]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
