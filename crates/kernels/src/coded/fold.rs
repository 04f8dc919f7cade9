//! HOT PATH. Queries into the basis of coded keys, as bytes.

use crate::coded::basis::{ByteBasis, Head, MAX_STRIDE, MOST, TILE, shift};
use crate::coded::tile::{Prepared, QuadRows, Quads, add_products, by_rows, part, widened};
use crate::simd::bytes::{BYTES, Bytes};
use crate::simd::{LANES, compiled};
use crate::trellis::SEGMENT;

/// Queries folded into a basis: what [`ByteBasis::fold`] writes.
#[derive(Debug)]
pub struct ByteQueries<'a> {
    /// `[rows, stride]`.
    pub bytes: &'a mut [i8],
    /// What bytes make of levels that are 128 too large, see [`crate::coded::Scores::offsets`]: `[rows,
    /// stride / 4]`.
    pub offsets: &'a mut [i32],
    /// What a byte is worth: `[rows]`.
    pub scales: &'a mut [f32],
    /// Anything.
    pub scratch: &'a mut FoldScratch,
    /// Rows written one after the other, and the distance from one such run to the next.
    pub runs: (usize, usize),
}

/// Most rows of a run.
const MAX_RUN: usize = 16;

/// Rows that are folded together where there are 32 vectors: their sums for one tile fill 24 of them.
const FOLDED: usize = 6;

/// One thread's buffers for [`ByteBasis::fold`].
#[derive(Debug)]
#[repr(C, align(64))]
pub struct FoldScratch {
    /// Folded rows before they are bytes.
    words: [i16; FOLDED * MAX_STRIDE],
    /// Sums over slow pairs.
    slow: [i32; MAX_RUN * MAX_STRIDE],
    /// Queries, widened.
    wide: [u8; 2 * MAX_RUN * MAX_STRIDE],
}

impl Default for FoldScratch {
    fn default() -> Self {
        Self {
            words: [0; FOLDED * MAX_STRIDE],
            slow: [0; MAX_RUN * MAX_STRIDE],
            wide: [0; 2 * MAX_RUN * MAX_STRIDE],
        }
    }
}

impl ByteQueries<'_> {
    /// Where query `i` goes.
    fn row(&self, i: usize) -> usize {
        i / self.runs.0 * self.runs.1 + i % self.runs.0
    }
}

impl ByteBasis {
    /// Folds runs of one head's queries into the first `segments` segments of the basis; zeros fill up
    /// the last tile of 64 bytes, and what comes after it is left alone. `queries`:
    /// `[rows, dim]` bytes as [`crate::coded::rotate_to_bytes`] writes them; `slow`: one run of them, turned by about as
    /// much, whose slow pairs stand for those of all runs; `worth`: what the bytes of each row of a run are
    /// worth, the same in all runs.
    ///
    /// # Panics
    /// If queries are not whole runs of at most 16 rows, a slice is shorter than its shape says, or there
    /// is no such head or segment.
    pub fn fold(
        &self,
        head: usize,
        segments: usize,
        queries: &[u8],
        slow: &[u8],
        worth: &[f32],
        out: &mut ByteQueries<'_>,
    ) {
        let (run, rows) = (out.runs.0, queries.len() / self.dim);
        assert!(segments <= self.segments, "{segments} of {} segments", self.segments);
        assert!(queries.len() == rows * self.dim, "{} of {} channels", queries.len(), self.dim);
        assert!(worth.len() == run && run <= out.runs.1.min(MAX_RUN), "runs of {:?}", out.runs);
        assert!(slow.len() == run * self.dim, "slow queries: {}", slow.len());
        if rows == 0 {
            return;
        }
        assert!(rows.is_multiple_of(run), "{rows} rows in runs of {run}");
        let rows = out.row(rows - 1) + 1;
        assert!(out.scales.len() >= rows, "scales: {}", out.scales.len());
        assert!(out.bytes.len() >= rows * self.stride, "bytes: {}", out.bytes.len());
        assert!(out.offsets.len() >= rows * self.stride / 4, "offsets: {}", out.offsets.len());
        fold(self.isa, self, head, segments, queries, slow, worth, out);
    }

    /// What a folded byte is worth in units of the query's bytes.
    pub(super) fn worth(&self, head: &Head, factor: i16) -> f32 {
        head.unit * (1 << shift(self.dim)) as f32 * 32768.0 / f32::from(factor)
    }
}

/// In 2^15ths: what brings a magnitude of `most` to that of a byte.
#[inline(always)]
pub(super) fn byte_factor(most: u16) -> i16 {
    (MOST * 32768.0 / f32::from(most.max(128))) as i16
}

compiled! {
    #[allow(clippy::too_many_arguments)]
    fn fold(
        basis: &ByteBasis,
        head: usize,
        segments: usize,
        queries: &[u8],
        slow: &[u8],
        worth: &[f32],
        out: &mut ByteQueries<'_>,
    ) = body for [Avx512Vnni, Avx512, AvxVnni, Avx2];
}

/// Groups of four channels; the two halves of a head are paired.
struct Ranges {
    /// Fast ones of a half; then come slow ones.
    fast: usize,
    /// Of a half.
    pairs: usize,
}

impl Ranges {
    /// Those that are fast, or those that are slow, in each half: first and last.
    #[inline(always)]
    fn of(&self, fast: bool) -> [(usize, usize); 2] {
        let Self { fast: middle, pairs } = *self;
        match fast {
            true => [(0, middle), (pairs, pairs + middle)],
            false => [(middle, pairs), (pairs + middle, 2 * pairs)],
        }
    }
}

/// What all rows of a fold have in common.
struct Fold<'a> {
    head: &'a Head,
    dim: usize,
    segments: usize,
    ranges: Ranges,
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn body<S: Bytes>(
    set: S,
    basis: &ByteBasis,
    head: usize,
    segments: usize,
    queries: &[u8],
    slow: &[u8],
    worth: &[f32],
    out: &mut ByteQueries<'_>,
) {
    let (dim, stride, run) = (basis.dim, basis.stride, out.runs.0);
    let (rows, head) = (queries.len() / dim, &basis.heads[head]);
    let tiles = (segments * SEGMENT).div_ceil(TILE);
    assert!(tiles * TILE <= stride.min(MAX_STRIDE) && run <= MAX_RUN && dim <= MAX_STRIDE);
    let ranges = Ranges { fast: basis.fast_pairs / 4, pairs: dim / 8 };
    let shared = ranges.fast < ranges.pairs;
    let fold = Fold { head, dim, segments, ranges };
    let wide = out.scratch.wide.as_mut_ptr();
    if shared {
        // SAFETY: slow queries are `run` rows.
        unsafe {
            let at = QuadRows { at: slow.as_ptr(), stride: dim };
            let slow = widened::<S, false>(set, at, run, dim, wide);
            let mut row = 0;
            while row < run {
                let n = part(run - row, S::ROWS.min(FOLDED));
                let to = out.scratch.slow.as_mut_ptr().add(row * MAX_STRIDE);
                by_rows!(n, S, slow_rows(set, &fold, tiles, slow.from::<S>(row, 0), to));
                row += n;
            }
        }
    }
    let mut row = 0;
    while row < rows {
        let n = part(rows - row, S::ROWS.min(FOLDED));
        // SAFETY: rows `row .. row + n` of the queries are there; `words` has room for `FOLDED` rows of
        // at most `MAX_STRIDE`; the outputs have room for the row of every query.
        unsafe {
            let query = QuadRows { at: queries.as_ptr().add(row * dim), stride: dim };
            let query = widened::<S, false>(set, query, n, dim, wide);
            let to = out.scratch.words.as_mut_ptr();
            let slow = out.scratch.slow.as_ptr();
            let mut begin: [*const i32; FOLDED] = [head.begin.as_slice().as_ptr().cast(); FOLDED];
            for (r, begin) in begin.iter_mut().enumerate().filter(|_| shared) {
                *begin = slow.add((row + r) % run * MAX_STRIDE);
            }
            by_rows!(n, S, fold_rows(set, &fold, query, &begin, to));
            // One step of all rows after the other: each is a long chain.
            let most = largest(set, to, n, tiles);
            let mut factors = [0; FOLDED];
            for (factor, most) in factors.iter_mut().zip(most) {
                *factor = byte_factor(most);
            }
            for (i, factor) in factors[..n].iter().enumerate() {
                let r = out.row(row + i);
                let bytes = out.bytes.as_mut_ptr().add(r * stride);
                let offsets = out.offsets.as_mut_ptr().add(r * stride / 4);
                to_bytes(set, to.add(i * MAX_STRIDE), tiles, *factor, bytes, offsets);
                out.scales[r] = worth[(row + i) % worth.len()] * basis.worth(head, *factor);
            }
        }
        row += n;
    }
}

/// Adds products of `R` rows with one tile's columns.
///
/// # Safety
/// `columns`: the tile's; `query`: `R` rows of `dim` bytes.
#[inline(always)]
unsafe fn add_columns<S: Bytes, const R: usize>(
    set: S,
    ranges: [(usize, usize); 2],
    columns: *const u8,
    query: QuadRows,
    mut sums: [[S::I; 4]; R],
) -> [[S::I; 4]; R] {
    // SAFETY: by contract.
    unsafe {
        if S::ROWS > FOLDED {
            let product =
                Quads::<_, false> { rows: query, vectors: Prepared { at: columns, step: 4 } };
            for (from, to) in ranges {
                for k in from..to {
                    sums = add_products::<S, _, R, 4, 1>(set, product, k, sums);
                }
            }
            return sums;
        }
        // One vector at a time fits the registers.
        for n in 0..4 {
            let vectors = Prepared { at: columns.add(n * S::PREPARED), step: 4 };
            let product = Quads::<_, false> { rows: query, vectors };
            let mut own = [[set.izero()]; R];
            for (own, sums) in own.iter_mut().zip(&sums) {
                *own = [sums[n]];
            }
            for (from, to) in ranges {
                for k in from..to {
                    own = add_products::<S, _, R, 1, 1>(set, product, k, own);
                }
            }
            for (own, sums) in own.into_iter().zip(&mut sums) {
                [sums[n]] = own;
            }
        }
    }
    sums
}

/// Sums of `R` rows over slow pairs, through all tiles, `MAX_STRIDE` apart.
///
/// # Safety
/// `query`: `R` rows of `dim` bytes; `to`: room for `R` rows of `MAX_STRIDE` sums.
#[inline(always)]
unsafe fn slow_rows<S: Bytes, const R: usize>(
    set: S,
    fold: &Fold<'_>,
    tiles: usize,
    query: QuadRows,
    to: *mut i32,
) {
    for tile in 0..tiles {
        // SAFETY: a tile's columns are `dim` vectors; the rest by contract.
        unsafe {
            let begin = fold.head.begin.as_slice().as_ptr().add(4 * TILE * tile);
            let mut sums = [[set.izero(); 4]; R];
            for sums in &mut sums {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = set.iload(begin.add(BYTES * i));
                }
            }
            let columns = fold.head.columns.as_slice().as_ptr().add(tile * fold.dim * S::PREPARED);
            let sums = add_columns(set, fold.ranges.of(false), columns, query, sums);
            for (r, sums) in sums.into_iter().enumerate() {
                for (i, sum) in sums.into_iter().enumerate() {
                    set.istore(to.add(r * MAX_STRIDE + tile * TILE + LANES * i).cast(), sum);
                }
            }
        }
    }
}

/// As many ones as there are zeros.
static ASKED: [u8; 2 * BYTES] = {
    let mut asked = [0; 2 * BYTES];
    let mut i = 0;
    while i < BYTES {
        asked[i] = 255;
        i += 1;
    }
    asked
};

/// `R` rows through all tiles, to 16 bits, `MAX_STRIDE` apart. `begin`: where each row's sums begin.
///
/// # Safety
/// `query`: `R` rows of `dim` bytes; `begin`: a sum for every column; `to`: room for `R` rows of
/// `MAX_STRIDE` words.
#[inline(always)]
unsafe fn fold_rows<S: Bytes, const R: usize>(
    set: S,
    fold: &Fold<'_>,
    query: QuadRows,
    begin: &[*const i32; FOLDED],
    to: *mut i16,
) {
    let (shift, segments) = (shift(fold.dim), fold.segments);
    let columns = fold.head.columns.as_slice().as_ptr();
    let factors = fold.head.factors.as_slice().as_ptr();
    // SAFETY: a tile's columns are `dim` vectors, its factors TILE words; the rest by contract.
    unsafe {
        for tile in 0..(segments * SEGMENT).div_ceil(TILE) {
            let columns = columns.add(tile * fold.dim * S::PREPARED);
            let mut sums = [[set.izero(); 4]; R];
            for (sums, begin) in sums.iter_mut().zip(begin) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = set.iload(begin.add(tile * TILE + LANES * i).cast());
                }
            }
            let sums = add_columns(set, fold.ranges.of(true), columns, query, sums);
            let factors = factors.add(2 * TILE * tile);
            // A quarter of factors is half of a segment's: those that are not asked for are zero.
            let quarters = (segments - tile * TILE / SEGMENT).min(4);
            let asked = set.iload(ASKED.as_ptr().add(BYTES - 16 * quarters));
            let low = set.and(asked, set.iload(factors));
            let high = set.and(asked, set.iload(factors.add(BYTES)));
            for (r, [a, b, c, d]) in sums.into_iter().enumerate() {
                let to = to.add(r * MAX_STRIDE + tile * TILE);
                let first = set.pack32(set.sar(a, shift), set.sar(b, shift));
                let second = set.pack32(set.sar(c, shift), set.sar(d, shift));
                set.istore(to.cast(), set.mulhrs16(first, low));
                set.istore(to.add(32).cast(), set.mulhrs16(second, high));
            }
        }
    }
}

/// The largest magnitude of each of `rows` rows of words, `MAX_STRIDE` apart.
///
/// # Safety
/// `words`: `tiles` · TILE of each row.
#[inline(always)]
unsafe fn largest<S: Bytes>(set: S, words: *const i16, rows: usize, tiles: usize) -> [u16; FOLDED] {
    let mut lanes = [set.izero(); 8];
    for (r, lanes) in lanes.iter_mut().enumerate().take(rows) {
        let mut most = set.izero();
        for i in 0..2 * tiles {
            // SAFETY: by contract.
            let words = unsafe { set.iload(words.add(r * MAX_STRIDE + 32 * i).cast()) };
            most = set.max16_u(most, set.abs16(words));
        }
        *lanes = set.imax_u(set.shr(most, 16), set.and(most, set.isplat(0xffff)));
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    let (first, second) = (set.fold4_max_u([a, b, c, d]), set.fold4_max_u([e, f, g, h]));
    let mut out = [0; FOLDED];
    for (out, most) in out.iter_mut().zip(first.into_iter().chain(second)) {
        *out = most as u16;
    }
    out
}

/// One row of words to bytes and their offsets.
///
/// # Safety
/// `words`, `bytes`: `tiles` · TILE elements; `offsets`: a quarter of that.
#[inline(always)]
unsafe fn to_bytes<S: Bytes>(
    set: S,
    words: *const i16,
    tiles: usize,
    factor: i16,
    bytes: *mut i8,
    offsets: *mut i32,
) {
    let by = set.splat16(factor);
    let minus = set.quad_u(set.isplat(0x8080_8080_u32 as i32));
    for tile in 0..tiles {
        // SAFETY: by contract.
        unsafe {
            let words = words.add(tile * TILE);
            let first = set.mulhrs16(set.iload(words.cast()), by);
            let second = set.mulhrs16(set.iload(words.add(32).cast()), by);
            let packed = set.pack16(first, second);
            set.istore(bytes.add(tile * TILE).cast(), packed);
            // A quarter is a segment.
            let fours = set.dot(set.izero(), minus, set.quad_i(packed));
            let pairs = set.iadd(fours, set.swap64(fours));
            let all = set.iadd(pairs, set.swap32(pairs));
            set.istore(offsets.add(tile * TILE / 4).cast(), set.isub(set.izero(), all));
        }
    }
}
