//! How a block is read: as it is stored, or from tiles of keys and values in f32, in pairs of bf16 or in integers.

use half::f16;

use super::fetch::Ahead;
use super::integers::{self, KEYS, VALUES, Worths};
use super::kind::{Element, Tiled};
use super::mix::Values;
use super::numbers::Numbers;
use super::score::Keys;
use super::{KvBlock, LANES, QueryRows, StoredRows};
use crate::isa::{Isa, Set};
use crate::lines::Lines;
use crate::simd::Lanes;
use crate::simd::tile::by_kind;

/// How a block is read.
pub(super) struct Plan<'a> {
    pub(super) numbers: Numbers,
    /// Keys are transposed on the way into registers.
    pub(super) keys_in_registers: bool,
    /// Values are widened on the way into registers.
    pub(super) values_in_registers: bool,
    /// What stages fetch; nothing if all is fetched at once.
    pub(super) ahead: Ahead<'a>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(isa: Isa, queries: &QueryRows<'_>, block: &KvBlock<'a>) -> Self {
        let capacity = (block.keys.len() / queries.dim).min(block.values.len() / block.value_dim);
        let few = queries.num() <= few_rows(isa);
        let halves = |rows| matches!(rows, StoredRows::F16(_));
        let keys = queries.dim.is_multiple_of(LANES);
        let values = block.value_dim.is_multiple_of(LANES);
        let numbers = Numbers::of(isa, queries.products, keys && values);
        let few = few && numbers != Numbers::Integers;
        check_rows(numbers, block);
        let keys_in_registers =
            few && halves(block.keys) && keys && block.filled.next_multiple_of(LANES) <= capacity;
        let integers = numbers == Numbers::Integers;
        let ahead = match keys_in_registers || integers {
            true => Ahead::new(block.next, integers),
            false => Ahead::default(),
        };
        let values_in_registers = few && halves(block.values) && values;
        Self { numbers, keys_in_registers, values_in_registers, ahead }
    }

    /// Whether what is read next is fetched by stages.
    pub(super) fn fetches(&self) -> bool {
        self.keys_in_registers || self.numbers == Numbers::Integers
    }
}

/// Refuses rows of bytes where products are not of integers.
pub(super) fn check_rows(numbers: Numbers, block: &KvBlock<'_>) {
    let bytes = |rows| matches!(rows, StoredRows::Bytes { .. });
    let any = bytes(block.keys) || bytes(block.values);
    assert!(!any || numbers == Numbers::Integers, "bytes for products of {numbers:?}");
}

/// Most rows for which f16 is widened in registers, again for every few of them.
fn few_rows(isa: Isa) -> usize {
    match isa {
        isa if isa.has(Set::Avx512) => 8,
        isa if isa.has(Set::Avx2) => 6,
        // Conversion is slow.
        _ => 0,
    }
}

/// Keys of a block for products with rows that pass.
pub(super) fn keys<'a>(
    isa: Isa,
    plan: &Plan<'a>,
    block: &KvBlock<'a>,
    dim: usize,
    scratch: &'a mut Lines,
    worth: &mut WorthLines,
) -> Keys<'a> {
    let tokens = block.filled.next_multiple_of(LANES);
    if plan.numbers == Numbers::Integers {
        key_integers(isa, block, dim, scratch, worth, plan.ahead.whole[0]);
        return Keys::Stored(&scratch.as_halves()[..tokens * dim], plan.ahead.keys);
    }
    match block.keys {
        StoredRows::F16(rows) if plan.keys_in_registers => {
            return Keys::Stored(&rows[..tokens * dim], plan.ahead.keys);
        }
        rows => {
            scratch.resize(tokens * dim);
            let pairs = plan.numbers == Numbers::Pairs;
            transpose(isa, pairs, rows, (block.filled, dim), tokens, scratch.as_mut_slice());
        }
    }
    Keys::Tile(scratch.as_slice())
}

/// Values of a block.
pub(super) fn values<'a>(
    isa: Isa,
    plan: &Plan<'a>,
    block: &KvBlock<'a>,
    scratch: &'a mut Lines,
    worth: &mut WorthLines,
) -> Values<'a> {
    if plan.numbers == Numbers::Integers {
        value_integers(isa, block, scratch, worth, plan.ahead.whole[1]);
        return Values::Tile(scratch.as_slice(), block.value_dim, plan.ahead.values);
    }
    match block.values {
        StoredRows::F16(rows) if plan.values_in_registers => {
            Values::Stored(rows, plan.ahead.values)
        }
        _ => {
            let pairs = plan.numbers == Numbers::Pairs;
            let (words, stride) = value_words(isa, pairs, block, scratch);
            Values::Tile(words, stride, plan.ahead.values)
        }
    }
}

/// Keys of a block as integers, in rows with room for whole vectors of tokens, and their worth.
pub(super) fn key_integers(
    isa: Isa,
    block: &KvBlock<'_>,
    dim: usize,
    keys: &mut Lines,
    worth: &mut WorthLines,
    next: &[u8],
) {
    let tokens = block.filled.next_multiple_of(LANES);
    keys.resize(tokens * dim / 2);
    let (shape, mut by) = ((block.filled, dim), worth.of(tokens));
    integers::integers::<KEYS>(isa, block.keys, shape, keys.as_mut_slice(), &mut by, next);
}

/// Values of a block as integers, `[filled / 2, value_dim]` words, and their worth.
pub(super) fn value_integers(
    isa: Isa,
    block: &KvBlock<'_>,
    values: &mut Lines,
    worth: &mut WorthLines,
    next: &[u8],
) {
    let shape = (block.filled, block.value_dim);
    values.resize(block.filled.div_ceil(2) * block.value_dim);
    let mut by = worth.of(block.filled.next_multiple_of(LANES));
    integers::integers::<VALUES>(isa, block.values, shape, values.as_mut_slice(), &mut by, next);
}

/// Buffers of [`Worths`].
#[derive(Debug, Default)]
pub(super) struct WorthLines {
    factors: Lines, // [tokens]
    worth: Lines,   // [tokens]
}

impl WorthLines {
    pub(super) fn resize(&mut self, tokens: usize) {
        self.factors.resize(tokens);
        self.worth.resize(tokens);
    }

    fn of(&mut self, tokens: usize) -> Worths<'_> {
        self.resize(tokens);
        Worths { factors: self.factors.as_mut_slice(), worth: self.worth.as_mut_slice() }
    }

    pub(super) fn worth(&self) -> &[f32] {
        self.worth.as_slice()
    }
}

/// Values of a block in words, `[filled / depth, stride]`, and the stride: the channels in whole vectors.
pub(super) fn value_words<'a>(
    isa: Isa,
    pairs: bool,
    block: &KvBlock<'a>,
    scratch: &'a mut Lines,
) -> (&'a [f32], usize) {
    let dim = block.value_dim;
    let stride = dim.next_multiple_of(LANES);
    match block.values {
        StoredRows::F32(rows) if !pairs && stride == dim => (rows, stride),
        rows => {
            scratch.resize(block.filled * stride);
            widen(isa, pairs, rows, (block.filled, dim), scratch.as_mut_slice());
            (scratch.as_slice(), stride)
        }
    }
}

/// Keys of a block in words, `[filled, dim / depth]`; `dim` is in whole vectors.
pub(super) fn key_words<'a>(
    isa: Isa,
    pairs: bool,
    rows: StoredRows<'a>,
    (filled, dim): (usize, usize),
    scratch: &'a mut Lines,
) -> &'a [f32] {
    match rows {
        StoredRows::F32(rows) if !pairs => rows,
        rows => {
            scratch.resize(filled * dim);
            in_words(isa, pairs, rows, filled * dim, scratch.as_mut_slice());
            scratch.as_slice()
        }
    }
}

by_kind! {
    /// `n` elements in words, in order.
    fn in_words(rows: StoredRows<'_>, n: usize, out: &mut [f32]) = in_words_body;
}

#[inline(always)]
fn in_words_body<S: Lanes>(
    s: S,
    kind: impl Tiled<S>,
    rows: StoredRows<'_>,
    n: usize,
    out: &mut [f32],
) {
    assert!(n.is_multiple_of(LANES) && rows.len() >= n && out.len() >= n / kind.depth());
    for i in (0..n).step_by(LANES) {
        // SAFETY: a vector from element `i` on.
        unsafe {
            let v = match rows {
                StoredRows::F16(rows) => f16::load(s, rows.as_ptr().add(i)),
                StoredRows::F32(rows) => f32::load(s, rows.as_ptr().add(i)),
                // `Plan::new` refuses them.
                StoredRows::Bytes { .. } => s.zero(),
            };
            kind.put(s, out.as_mut_ptr(), i, v, LANES);
        }
    }
}

by_kind! {
    /// Keys `[filled, dim]` as a tile of words, `[dim / depth, tokens]`. Columns beyond `filled` become anything.
    pub(super) fn transpose(rows: StoredRows<'_>, shape: (usize, usize), tokens: usize, out: &mut [f32]) = transpose_body;
}

#[inline(always)]
fn transpose_body<S: Lanes>(
    s: S,
    kind: impl Tiled<S>,
    rows: StoredRows<'_>,
    shape: (usize, usize),
    tokens: usize,
    out: &mut [f32],
) {
    match rows {
        StoredRows::F16(rows) => transpose_rows(s, kind, rows, shape, tokens, out),
        StoredRows::F32(rows) => transpose_rows(s, kind, rows, shape, tokens, out),
        StoredRows::Bytes { .. } => {}
    }
}

#[inline(always)]
fn transpose_rows<S: Lanes, T: Element>(
    s: S,
    kind: impl Tiled<S>,
    rows: &[T],
    (filled, dim): (usize, usize),
    tokens: usize,
    out: &mut [f32],
) {
    assert!(filled > 0 && filled <= tokens && tokens.is_multiple_of(LANES));
    assert!(rows.len() >= filled * dim && out.len() >= dim / kind.depth() * tokens);
    let whole = dim - dim % 8;
    for t in (0..filled).step_by(LANES) {
        for c in (0..whole).step_by(8) {
            // SAFETY: rows are not read past the last filled one, and a vector from `t` on of the words of 8 channels is
            // inside `out`.
            unsafe {
                let rows = rows.as_ptr().add(t * dim + c);
                let out = out.as_mut_ptr().add(c / kind.depth() * tokens + t);
                kind.put_keys(s, (rows, dim), filled - t, (out, tokens));
            }
        }
    }
    // Products of pairs are for whole vectors only.
    for c in whole..dim {
        for t in 0..filled {
            out[c * tokens + t] = rows[t * dim + c].widen();
        }
    }
}

by_kind! {
    /// Values `[filled, dim]` as words, `[filled / depth, dim in whole vectors]`.
    pub(super) fn widen(rows: StoredRows<'_>, shape: (usize, usize), out: &mut [f32]) = widen_body;
}

#[inline(always)]
fn widen_body<S: Lanes>(
    s: S,
    kind: impl Tiled<S>,
    rows: StoredRows<'_>,
    shape: (usize, usize),
    out: &mut [f32],
) {
    match rows {
        StoredRows::F16(rows) => widen_rows(s, kind, rows, shape, out),
        StoredRows::F32(rows) => widen_rows(s, kind, rows, shape, out),
        StoredRows::Bytes { .. } => {}
    }
}

#[inline(always)]
fn widen_rows<S: Lanes, T: Element>(
    s: S,
    kind: impl Tiled<S>,
    rows: &[T],
    (filled, dim): (usize, usize),
    out: &mut [f32],
) {
    let (depth, stride) = (kind.depth(), dim.next_multiple_of(LANES));
    assert!(rows.len() >= filled * dim && out.len() >= filled.div_ceil(depth) * stride);
    let whole = dim - dim % LANES;
    for t in (0..filled).step_by(depth) {
        for d in (0..whole).step_by(LANES) {
            // SAFETY: a vector from `d` on of token `t`, and of the next if it is there, and its place.
            unsafe {
                let rows = rows.as_ptr().add(t * dim + d);
                let out = out.as_mut_ptr().add(t / depth * stride + d);
                kind.put_values(s, rows, dim, t + 1 < filled, out);
            }
        }
        // Products of pairs are for whole vectors only.
        for d in whole..dim {
            out[t * stride + d] = rows[t * dim + d].widen();
        }
    }
}
