//! Queries, keys, values and weights as integers of 16 bits: what products of two of them, summed in 32 bits, need.
//!
//! A row is divided by what makes its largest channel 32,767, its *worth*: rows of keys and of values have one each. Queries
//! are divided by the sum of their magnitudes instead, and the weights of a block by their sum, so that no sum of
//! products leaves 32 bits: a query's part in a channel is 1/dim of 32,767 then, which is less exact than a key but more
//! than bf16. Sums are exact, so that they do not depend on their order; what is left in f32 is a row's worth and the sum
//! over blocks.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::fetch::Fetch;
use super::kind::{Element, whole_pairs};
use super::{LANES, StoredRows};
use crate::simd::tile::Meanwhile;
use crate::simd::{Lanes, compiled};

/// The largest integer.
const MOST: f32 = 32_767.0;

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
        let mut sums = [s.zero(); 4];
        for r in 0..4.min(n - first) {
            for c in (0..dim).step_by(LANES) {
                // SAFETY: a vector of row `first + r`.
                let x = unsafe { s.load(rows.as_ptr().add((first + r) * dim + c)) };
                sums[r] = s.add(sums[r], magnitude(s, x));
            }
        }
        put_worths(s, s.sum4(sums), first, n, (factors, worth));
    }
}

/// `worths` of up to four numbers to places `first ..` below `n`.
#[inline(always)]
fn put_worths<S: Lanes>(
    s: S,
    sizes: S::F,
    first: usize,
    n: usize,
    (factors, worth): (&mut [f32], &mut [f32]),
) {
    let end = n.min(first + 4);
    for (to, from) in [factors, worth].into_iter().zip(worths(s, sizes)) {
        let to = &mut to[first..end];
        // SAFETY: as many numbers.
        unsafe { s.store_first(to.as_mut_ptr(), from, to.len()) };
    }
}

#[inline(always)]
fn magnitude<S: Lanes>(s: S, x: S::F) -> S::F {
    s.from_bits(s.and(s.bits(x), s.isplat(0x7fff_ffff)))
}

compiled! {
    /// Keys `[filled, dim]` as integers, in rows, and what they are worth; the worth of tokens behind them, up to a whole vector, is 0.
    pub(super) fn keys(rows: StoredRows<'_>, shape: (usize, usize), out: &mut [f32], worth: &mut [f32], next: &[u8]) = keys_body
        for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn keys_body<S: Lanes>(
    s: S,
    rows: StoredRows<'_>,
    (filled, dim): (usize, usize),
    out: &mut [f32],
    worth: &mut [f32],
    next: &[u8],
) {
    let next = Fetch::new(next, filled.div_ceil(4));
    assert!(dim.is_multiple_of(LANES) && rows.len() >= filled * dim);
    assert!(out.len() >= filled * dim / 2);
    worth[filled..filled.next_multiple_of(LANES)].fill(0.0);
    match rows {
        StoredRows::F16(rows) => key_rows(s, rows, (filled, dim), out, worth, next),
        StoredRows::F32(rows) => key_rows(s, rows, (filled, dim), out, worth, next),
    }
}

#[inline(always)]
fn key_rows<S: Lanes, T: Element>(
    s: S,
    rows: &[T],
    (filled, dim): (usize, usize),
    out: &mut [f32],
    worth: &mut [f32],
    mut next: Fetch,
) {
    for first in (0..filled).step_by(4) {
        next.step();
        // SAFETY: as [`keys_body`] asserts.
        unsafe {
            let mut factors = [0.0; LANES];
            row_worths(s, rows, (first, filled), dim, &mut factors, worth);
            for t in first..filled.min(first + 4) {
                let factor = s.splat(factors[t - first]);
                for c in (0..dim).step_by(2 * LANES) {
                    let x = |c: usize| s.mul(T::load(s, rows.as_ptr().add(t * dim + c)), factor);
                    let to = out.as_mut_ptr().cast::<u16>().add(t * dim + c);
                    s.store_low_halves(to, s.to_int(x(c)));
                    if c + LANES < dim {
                        s.store_low_halves(to.add(LANES), s.to_int(x(c + LANES)));
                    }
                }
            }
        }
    }
}

/// What tokens `first ..`, up to four, are multiplied with and what they are worth.
///
/// # Safety
/// `filled` rows are there, of whole vectors.
#[inline(always)]
unsafe fn row_worths<S: Lanes, T: Element>(
    s: S,
    rows: &[T],
    (first, filled): (usize, usize),
    dim: usize,
    factors: &mut [f32; LANES],
    worth: &mut [f32],
) {
    let n = filled.min(first + 4) - first;
    let mut largest = [s.izero(); 4];
    for r in 0..4 {
        let row = (first + r.min(n - 1)) * dim;
        for c in (0..dim).step_by(LANES) {
            // SAFETY: by contract.
            let x = unsafe { T::load(s, rows.as_ptr().add(row + c)) };
            // As bits, so that a NaN is larger than anything.
            largest[r] = s.imax_u(largest[r], s.bits(magnitude(s, x)));
        }
    }
    let [a, b, c, d] = s.fold4_max_u(largest);
    let sizes = [f32::from_bits(a), f32::from_bits(b), f32::from_bits(c), f32::from_bits(d)];
    let [factor, one] = worths(s, s.four(sizes));
    let worth = &mut worth[first..first + n];
    // SAFETY: a whole vector, and as many numbers.
    unsafe {
        s.store(factors.as_mut_ptr(), factor);
        s.store_first(worth.as_mut_ptr(), one, n);
    }
}

compiled! {
    /// Values `[filled, dim]` as integers, two tokens to a word, `[filled / 2, dim]`, and what they are worth; the worth of tokens behind
    /// them, up to a whole vector, is 0.
    pub(super) fn values(rows: StoredRows<'_>, shape: (usize, usize), out: &mut [f32], worth: &mut [f32], next: &[u8]) = values_body
        for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn values_body<S: Lanes>(
    s: S,
    rows: StoredRows<'_>,
    (filled, dim): (usize, usize),
    out: &mut [f32],
    worth: &mut [f32],
    next: &[u8],
) {
    let next = Fetch::new(next, filled.div_ceil(4));
    assert!(dim.is_multiple_of(LANES) && rows.len() >= filled * dim);
    assert!(out.len() >= filled.div_ceil(2) * dim);
    worth[filled..filled.next_multiple_of(LANES)].fill(0.0);
    match rows {
        StoredRows::F16(rows) => value_rows(s, rows, (filled, dim), out, worth, next),
        StoredRows::F32(rows) => value_rows(s, rows, (filled, dim), out, worth, next),
    }
}

#[inline(always)]
fn value_rows<S: Lanes, T: Element>(
    s: S,
    rows: &[T],
    (filled, dim): (usize, usize),
    out: &mut [f32],
    worth: &mut [f32],
    mut next: Fetch,
) {
    for first in (0..filled).step_by(4) {
        next.step();
        // SAFETY: as [`values_body`] asserts.
        unsafe {
            let mut factors = [0.0; LANES];
            row_worths(s, rows, (first, filled), dim, &mut factors, worth);
            for t in (first..filled.min(first + 4)).step_by(2) {
                let factor = [s.splat(factors[t - first]), s.splat(factors[t + 1 - first])];
                for c in (0..dim).step_by(LANES) {
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
}
