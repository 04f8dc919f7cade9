//! Queries, keys, values and weights as integers of 16 bits: what products of two of them, summed in 32 bits, need.
//!
//! A row is divided by what makes its largest channel 32,767, its *worth*: rows of keys and of values have one each. Queries
//! are divided so that their magnitudes add up to no more than twice that, and the weights of a block by their sum, so that no sum of
//! products leaves 32 bits: of 64 channels a query's have ten bits on average, where bf16 has eight. Sums are exact, so that
//! they do not depend on their order; what is left in f32 is what rows are worth and the sum over blocks.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use half::f16;

use super::fetch::Fetch;
use super::kind::{Element, whole_pairs};
use super::{BYTE_GROUP, LANES, StoredRows};
use crate::simd::tile::Meanwhile;
use crate::simd::{Lanes, bytes::Bytes, compiled};

/// A set that has what this needs.
trait Whole: Lanes + Bytes {}
impl<S: Lanes + Bytes> Whole for S {}

/// The largest integer.
const MOST: f32 = 32_767.0;

/// What magnitudes of a query add up to, however it is rotated, which may make them √2 times as much: times [`MOST`], and with
/// what rounding adds, that is less than 2³¹.
const MOST_OF_QUERY: f32 = 45_900.0;

/// Where a sum of weights is smaller, its block adds nothing: dividing by it could be infinite.
const LEAST: f32 = 1e-30;

/// What numbers are multiplied with so that `size` becomes [`MOST`], and what a one is worth then. 0 and 0 where `size` is next
/// to nothing; NaN stays.
#[inline(always)]
pub(super) fn worths<S: Lanes>(s: S, size: S::F) -> [S::F; 2] {
    let little = s.lt(size, s.splat(LEAST));
    let factor = s.select(little, s.zero(), s.div(s.splat(MOST), size));
    [factor, s.select(little, s.zero(), s.mul(size, s.splat(1.0 / MOST)))]
}

compiled! {
    /// What the rows `[n, dim]` of queries are to be multiplied with before they become integers, however they are rotated, and
    /// what a one is worth then.
    pub(super) fn query_worths(rows: &[f32], dim: usize, factors: &mut [f32], worth: &mut [f32]) = query_worths_body
        for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn query_worths_body<S: Lanes>(
    s: S,
    rows: &[f32],
    dim: usize,
    factors: &mut [f32],
    worth: &mut [f32],
) {
    let n = rows.len() / dim;
    assert!(dim.is_multiple_of(LANES) && factors.len() >= n && worth.len() >= n);
    for first in (0..n).step_by(4) {
        let (mut sums, mut largest) = ([s.zero(); 4], [s.zero(); 4]);
        for r in 0..4.min(n - first) {
            for c in (0..dim).step_by(LANES) {
                // SAFETY: a vector of row `first + r`.
                let x = unsafe { s.load(rows.as_ptr().add((first + r) * dim + c)) };
                let x = s.from_bits(s.and(s.bits(x), s.isplat(0x7fff_ffff)));
                sums[r] = s.add(sums[r], x);
                largest[r] = s.max(largest[r], x);
            }
        }
        // A NaN is in the sum, which stands last.
        let sums = s.mul(s.sum4(sums), s.splat(MOST / MOST_OF_QUERY));
        let turned = s.mul(s.largest4(largest), s.splat(std::f32::consts::SQRT_2));
        let of = worths(s, s.max(turned, sums));
        for (to, from) in [&mut *factors, &mut *worth].into_iter().zip(of) {
            let to = &mut to[first..n.min(first + 4)];
            // SAFETY: as many numbers.
            unsafe { s.store_first(to.as_mut_ptr(), from, to.len()) };
        }
    }
}

/// What a block's rows become: a query's products are along the channels of a key, a weight's along the tokens of values.
pub(super) const KEYS: bool = false;
pub(super) const VALUES: bool = true;

compiled! {
    /// Rows `[filled, dim]` as integers: keys in rows, values two tokens to a word, `[filled / 2, dim]`; and what they are worth. The worth
    /// of tokens behind them, up to a whole vector, is 0.
    pub(super) fn integers[const PART: bool][PART](rows: StoredRows<'_>, shape: (usize, usize), out: &mut [f32], by: &mut Worths<'_>, next: &[u8]) = integers_body
        for [Avx512, Avx2];
}

/// Tokens of a block, in whole vectors: what they are multiplied with, and what a one is worth then.
pub(super) struct Worths<'a> {
    pub(super) factors: &'a mut [f32],
    pub(super) worth: &'a mut [f32],
}

#[inline(always)]
fn integers_body<S: Whole, const PART: bool>(
    s: S,
    rows: StoredRows<'_>,
    shape: (usize, usize),
    out: &mut [f32],
    by: &mut Worths<'_>,
    next: &[u8],
) {
    match rows {
        StoredRows::F16(rows) => of_rows::<S, f16, PART>(s, rows, shape, out, by, next),
        StoredRows::F32(rows) => of_rows::<S, f32, PART>(s, rows, shape, out, by, next),
        StoredRows::Bytes { codes, scales } => {
            let groups = byte_worths(s, scales, shape, by);
            assert!(codes.len() >= shape.0 * shape.1);
            match PART {
                KEYS => key_bytes(s, (codes, scales, groups), shape, out, by, next),
                VALUES => value_bytes(s, (codes, scales, groups), shape, out, by, next),
            }
        }
    }
}

#[inline(always)]
fn of_rows<S: Whole, T: Element, const PART: bool>(
    s: S,
    rows: &[T],
    shape: (usize, usize),
    out: &mut [f32],
    by: &mut Worths<'_>,
    next: &[u8],
) {
    row_worths(s, rows, shape, by);
    match PART {
        KEYS => key_rows(s, rows, shape, out, by, next),
        VALUES => value_rows(s, rows, shape, out, by, next),
    }
}

#[inline(always)]
fn key_rows<S: Whole, T: Element>(
    s: S,
    rows: &[T],
    (filled, dim): (usize, usize),
    out: &mut [f32],
    by: &mut Worths<'_>,
    next: &[u8],
) {
    assert!(out.len() >= filled * dim / 2);
    let mut next = Fetch::new(next, filled);
    for t in 0..filled {
        next.step();
        let factor = s.splat(by.factors[t]);
        for c in (0..dim).step_by(2 * LANES) {
            // SAFETY: one or two vectors of a row that is there, as [`row_worths`] asserts, and their places.
            unsafe {
                let from = rows.as_ptr().add(t * dim + c);
                let to = out.as_mut_ptr().cast::<u16>().add(t * dim + c);
                let low = s.to_int(s.mul(T::load(s, from), factor));
                if c + LANES < dim {
                    let high = s.to_int(s.mul(T::load(s, from.add(LANES)), factor));
                    s.istore(to.cast(), s.halves_of(low, high));
                } else {
                    s.store_low_halves(to, low);
                }
            }
        }
    }
}

/// [`Worths`] of rows `[filled, dim]` by their largest magnitudes.
#[inline(always)]
fn row_worths<S: Whole, T: Element>(
    s: S,
    rows: &[T],
    (filled, dim): (usize, usize),
    by: &mut Worths<'_>,
) {
    let tokens = filled.next_multiple_of(LANES);
    assert!(dim.is_multiple_of(LANES) && filled > 0 && rows.len() >= filled * dim);
    assert!(by.factors.len() >= tokens && by.worth.len() >= tokens);
    for t in (0..filled).step_by(4) {
        let row = |r: usize| rows.as_ptr().wrapping_add((t + r).min(filled - 1) * dim);
        // SAFETY: the rows are there, as asserted.
        let sizes = unsafe { T::largest4(s, [row(0), row(1), row(2), row(3)], dim) };
        by.worth[t..t + 4].copy_from_slice(&sizes);
    }
    by.worth[filled..tokens].fill(0.0);
    for t in (0..tokens).step_by(LANES) {
        // SAFETY: a whole vector of either.
        unsafe {
            let [factor, worth] = worths(s, s.load(by.worth.as_ptr().add(t)));
            s.store(by.factors.as_mut_ptr().add(t), factor);
            s.store(by.worth.as_mut_ptr().add(t), worth);
        }
    }
}

#[inline(always)]
fn value_rows<S: Whole, T: Element>(
    s: S,
    rows: &[T],
    (filled, dim): (usize, usize),
    out: &mut [f32],
    by: &mut Worths<'_>,
    next: &[u8],
) {
    assert!(out.len() >= filled.div_ceil(2) * dim);
    let mut next = Fetch::new(next, filled.div_ceil(2));
    for t in (0..filled).step_by(2) {
        next.step();
        let factor = [s.splat(by.factors[t]), s.splat(by.factors[t + 1])];
        for c in (0..dim).step_by(LANES) {
            // SAFETY: a vector of one or two rows that are there, as [`row_worths`] asserts, and its place.
            unsafe {
                let from = rows.as_ptr().add(t * dim + c);
                let low = s.mul(T::load(s, from), factor[0]);
                let high = match t + 1 < filled {
                    true => s.mul(T::load(s, from.add(dim)), factor[1]),
                    false => s.zero(),
                };
                let to = out.as_mut_ptr().add(t / 2 * dim + c);
                s.istore(to.cast(), whole_pairs(s, [low, high]));
            }
        }
    }
}

/// What the scales of a row of bytes are of its largest, of which [`MOST`] is all, where it has several: its bytes, 256 times as large, are
/// multiplied with that and rounded, so that a row with one large channel keeps what its others are.
type Parts = [i16; MOST_GROUPS];

/// Most scales of a row, and channels.
const MOST_GROUPS: usize = 8;
pub(super) const MOST_CHANNELS: usize = MOST_GROUPS * BYTE_GROUP;

/// Those of a row with one scale, which nobody multiplies with.
const ONE: Parts = [0; MOST_GROUPS];

/// Finds what rows of bytes `[filled, dim]` are worth; returns how many scales they have.
#[inline(always)]
fn byte_worths<S: Whole>(
    s: S,
    scales: &[u8],
    (filled, dim): (usize, usize),
    by: &mut Worths<'_>,
) -> usize {
    let (tokens, groups) = (filled.next_multiple_of(LANES), dim.div_ceil(BYTE_GROUP));
    assert!(dim.is_multiple_of(LANES) && filled > 0 && groups <= MOST_GROUPS, "{dim} bytes");
    assert!(scales.len() >= 2 * filled * groups && by.worth.len() >= tokens);
    let halves = scales.as_chunks::<2>().0;
    if groups == 1 {
        for t in (0..filled).step_by(LANES) {
            let mut own = [0u16; LANES];
            for (own, half) in own.iter_mut().zip(&halves[t..filled.min(t + LANES)]) {
                *own = u16::from_le_bytes(*half);
            }
            // SAFETY: a whole vector of either.
            unsafe { s.store(by.worth.as_mut_ptr().add(t), s.load_f16(own.as_ptr())) };
        }
        return groups;
    }
    for (worth, row) in by.worth.iter_mut().zip(halves.chunks_exact(groups)).take(filled) {
        let scales = row.iter().map(|half| f16::from_le_bytes(*half).to_f32());
        *worth = scales.fold(0.0, f32::max) / WIDER;
    }
    by.worth[filled..tokens].fill(0.0);
    groups
}

/// What bytes are multiplied with before their parts are taken: 8 bits.
const WIDER: f32 = 256.0;

/// [`Parts`] of row `t`, which is worth `worth`.
#[inline(always)]
fn parts(scales: &[u8], t: usize, groups: usize, worth: f32) -> Parts {
    let mut parts = [0; MOST_GROUPS];
    let inverse = if worth > 0.0 { MOST / (WIDER * worth) } else { 0.0 };
    let row = &scales.as_chunks::<2>().0[t * groups..(t + 1) * groups];
    for (part, half) in parts.iter_mut().zip(row) {
        *part = (f16::from_le_bytes(*half).to_f32() * inverse + 0.5) as i16;
    }
    parts
}

#[inline(always)]
fn key_bytes<S: Whole>(
    s: S,
    (codes, scales, groups): (&[u8], &[u8], usize),
    (filled, dim): (usize, usize),
    out: &mut [f32],
    by: &mut Worths<'_>,
    next: &[u8],
) {
    assert!(out.len() >= filled * dim / 2);
    // With one scale a row is like the next.
    let (rows, dim) = if groups == 1 { (1, filled * dim) } else { (filled, dim) };
    let mut next = Fetch::new(next, rows * dim.div_ceil(2 * LANES));
    for t in 0..rows {
        let parts = if groups > 1 { parts(scales, t, groups, by.worth[t]) } else { ONE };
        let whole = dim - dim % (2 * LANES);
        // SAFETY: one or two vectors of rows that are there, as asserted, and their places.
        unsafe {
            let (from, to) = (codes.as_ptr().add(t * dim), out.as_mut_ptr().cast::<u16>());
            let to = to.add(t * dim);
            for c in (0..whole).step_by(2 * LANES) {
                next.step();
                let x = times(s, s.load_signed16(from.add(c)), groups, [parts; 2], c);
                s.istore(to.add(c).cast(), x);
            }
            if whole < dim {
                let x = times(s, s.load_signed(from.add(whole)), groups, [parts; 2], whole);
                s.store_low_halves(to.add(whole), x);
            }
        }
    }
}

/// Integers from channel `c` on, the even and the odd ones times the parts of their rows, where there are several scales.
#[inline(always)]
fn times<S: Whole>(s: S, x: S::I, groups: usize, parts: [Parts; 2], c: usize) -> S::I {
    if groups == 1 {
        return x;
    }
    let [even, odd] = parts.map(|parts| i32::from(parts[c / BYTE_GROUP]));
    s.mulhrs16(s.shl16(x, 8), s.isplat(even | odd << 16))
}

#[inline(always)]
fn value_bytes<S: Whole>(
    s: S,
    (codes, scales, groups): (&[u8], &[u8], usize),
    (filled, dim): (usize, usize),
    out: &mut [f32],
    by: &mut Worths<'_>,
    next: &[u8],
) {
    assert!(out.len() >= filled.div_ceil(2) * dim);
    let mut next = Fetch::new(next, filled.div_ceil(2));
    let of = |t: usize| if groups > 1 { parts(scales, t, groups, by.worth[t]) } else { ONE };
    for t in (0..filled).step_by(2) {
        next.step();
        let both = t + 1 < filled;
        // The last row, if it is alone, stands for the next, and counts as nothing.
        let (second, mask) = if both { (dim, -1) } else { (0, 0xffff) };
        let parts = [of(t), of(t + usize::from(both))];
        for c in (0..dim).step_by(LANES) {
            // SAFETY: a vector of one or two rows that are there, as asserted, and its place.
            unsafe {
                let from = codes.as_ptr().add(t * dim + c);
                let (low, high) = (s.load_signed(from), s.load_signed(from.add(second)));
                let pairs = s.or(s.and(low, s.isplat(0xffff)), s.shl(high, 16));
                let pairs = times(s, s.and(pairs, s.isplat(mask)), groups, parts, c);
                s.istore(out.as_mut_ptr().add(t / 2 * dim + c).cast(), pairs);
            }
        }
    }
}
