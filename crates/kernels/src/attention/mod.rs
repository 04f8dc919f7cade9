//! HOT PATH (no allocation after warm-up, locks or logging). Attention of some query rows to one block of
//! keys and values, with an online softmax.
//!
//! **Order of sums.** A score is one chain of multiply-adds over the channels in order, a mixed value one
//! chain over the tokens in order; a row's sum of weights is 16 lanes (token mod 16) added in a fixed tree.
//! All ways below keep this order, so a row gets the same bits whichever way its block is read and
//! whatever rows are beside it. Tokens that a row does not see have weight 0 and add nothing.
//!
//! Few rows (decode) read f16 keys straight from where they are stored, transposed in registers, so that
//! scores come as vectors of tokens. For more rows (prefill), and for other storage, keys are
//! transposed once into a tile `[dim, tokens]` in L1.
//!
//! **Products.** Where they are of bf16, queries, keys, weights and values are rounded to it, two channels of a score
//! or two tokens of a mixed value are taken at a time, and tiles hold such pairs; sums stay in f32, in the same order,
//! so that all of this holds for them too. Processors without such products use those of f32. Where rows are bytes, products are of
//! integers (`integers.rs`): exact within a block, and one multiply-add into f32 for each block.
//!
//! Every stage is one function, generic over the set and over what products are of (`kind.rs`).

// Register blocks are indexed by (row, column); iterators would hide that.
#![allow(clippy::needless_range_loop)]

use half::f16;

use crate::elementwise::{scale_in_place, soft_cap};
use crate::isa::Isa;
use crate::lines::Lines;
use crate::simd::LANES;
use crate::softmax::OnlineSoftmax;

mod columns;
mod fetch;
mod integers;
mod kind;
mod many;
mod merge;
mod mix;
mod numbers;
mod score;
mod tile;
mod weigh;

pub use columns::add_columns;
use fetch::fetch;
pub use many::{ManyRows, QueryLanes};
pub use merge::merge_rows;
use numbers::Numbers;
pub(crate) use score::turned;
use tile::{Plan, WorthLines};

/// Query rows that pass through rotation, scores, softmax and values together: 12 × 2 vectors of scores
/// fill the registers, and what they leave between the stages stays in L1.
const ROWS: usize = 12;

/// Rows `[tokens, dim]` of keys or of values, as stored.
#[derive(Debug, Clone, Copy)]
pub enum StoredRows<'a> {
    /// Half precision.
    F16(&'a [f16]),
    /// Single precision.
    F32(&'a [f32]),
    /// Bytes with a sign, for products of integers only.
    Bytes {
        /// `[tokens, dim]`.
        codes: &'a [u8],
        /// What a one is worth, `[tokens, ⌈dim / BYTE_GROUP⌉]` little-endian f16.
        scales: &'a [u8],
    },
}

impl StoredRows<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F16(rows) => rows.len(),
            Self::F32(rows) => rows.len(),
            Self::Bytes { codes, .. } => codes.len(),
        }
    }
}

/// What products are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Products {
    /// f32, exact up to the order of sums.
    F32,
    /// bf16 where the processor has them (twice as many a cycle), else f32.
    Bf16,
    /// Integers of 16 bits, for rows of bytes ([`has_integers`]): what they are of anyway.
    Integers,
}

/// Whether products of integers are there for rows of `dim` channels. Where not, [`Products::Integers`] is refused.
#[inline]
pub fn has_integers(dim: usize) -> bool {
    numbers::has_integers(Isa::best())
        && dim.is_multiple_of(LANES)
        && dim <= integers::MOST_CHANNELS
}

/// Channels of a row of bytes that share a scale.
pub const BYTE_GROUP: usize = 64;

/// Keys and values of one KV head in one block.
#[derive(Debug, Clone, Copy)]
pub struct KvBlock<'a> {
    /// `[capacity, dim]`.
    pub keys: StoredRows<'a>,
    /// `[capacity, value_dim]`.
    pub values: StoredRows<'a>,
    /// Channels of a value: those of a key, or latents.
    pub value_dim: usize,
    /// Where in a row of sums they are added.
    pub at: usize,
    /// Leading rows that hold tokens; the others may hold anything. Room for 32 or 64 tokens is read fastest.
    pub filled: usize,
    /// Bytes that will be read after this block, to be fetched meanwhile; may be empty.
    pub next: [&'a [u8]; 2],
}

/// Query rows of one KV head: `group` rows for each of some consecutive tokens.
#[derive(Debug, Clone, Copy)]
pub struct QueryRows<'a> {
    /// `[tokens · group, dim]`, scaled, before rotation.
    pub rows: &'a [f32],
    /// Channels of a row.
    pub dim: usize,
    /// Rows of a token.
    pub group: usize,
    /// Cosines and sines of every token's rotation, `[tokens, dim / 2]` each; `None` for rows that are to
    /// be taken as they are.
    pub turn: Option<(&'a [f32], &'a [f32])>,
    /// Position of the first token less that of the block's first.
    pub offset: usize,
    /// A token sees this many tokens, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// Soft cap of scores.
    pub cap: Option<f32>,
    /// What products are of: of one sequence always the same.
    pub products: Products,
}

impl QueryRows<'_> {
    /// Number of rows.
    fn num(&self) -> usize {
        self.rows.len() / self.dim
    }

    /// Tokens of the block that rows `first .. first + n` see.
    #[inline(always)]
    fn visible(&self, first: usize, n: usize, filled: usize) -> [(usize, usize); ROWS] {
        let (mut end, mut member) = (self.offset + first / self.group + 1, first % self.group);
        let mut all = [(0, 0); ROWS];
        for seen in &mut all[..n] {
            let from = self.window.map_or(0, |w| end.saturating_sub(w));
            *seen = (from.min(filled), end.min(filled));
            member += 1;
            if member == self.group {
                (end, member) = (end + 1, 0);
            }
        }
        all
    }
}

/// One thread's buffers for [`attend_block`].
#[derive(Debug, Default)]
pub struct BlockScratch {
    values: Lines, // [tokens, dim]
    worth: WorthLines,
    passes: PassScratch,
}

/// The same for [`passes`].
#[derive(Debug, Default)]
struct PassScratch {
    keys: Lines, // [dim, tokens]
    worth: WorthLines,
    queries: Lines, // [ROWS, dim]
    scores: Lines,  // [ROWS, tokens]
}

impl BlockScratch {
    /// Makes room for blocks of `tokens` rows of `dim` channels, so that [`attend_block`] need not.
    pub fn reserve(&mut self, tokens: usize, dim: usize) {
        let tokens = tokens.next_multiple_of(LANES);
        let PassScratch { keys, worth, queries, scores } = &mut self.passes;
        self.values.resize(tokens * dim.next_multiple_of(LANES));
        self.worth.resize(tokens);
        worth.resize(tokens);
        keys.resize(tokens * dim);
        queries.resize(ROWS * dim);
        scores.resize(ROWS * tokens);
    }
}

/// Takes one block into the online softmax of every query row: `states` (one a row) and
/// `sums` (`[rows, stride]`) become those over all blocks so far, not normalised. Values are added to the `value_dim`
/// elements of a row from `at` on; the others are brought to the new maximum with them.
///
/// # Panics
/// If a slice is shorter than its shape says, or products are of integers and [`has_integers`] says no, or are not and rows are bytes.
#[inline]
pub fn attend_block(
    queries: &QueryRows<'_>,
    block: &KvBlock<'_>,
    states: &mut [OnlineSoftmax],
    sums: &mut [f32],
    stride: usize,
    scratch: &mut BlockScratch,
) {
    attend_block_on(Isa::best(), queries, block, states, sums, stride, scratch);
}

fn attend_block_on(
    isa: Isa,
    queries: &QueryRows<'_>,
    block: &KvBlock<'_>,
    states: &mut [OnlineSoftmax],
    sums: &mut [f32],
    stride: usize,
    scratch: &mut BlockScratch,
) {
    let (rows, filled) = (queries.num(), block.filled);
    if rows == 0 || filled == 0 {
        return;
    }
    let (at, value_dim) = (block.at, block.value_dim);
    assert!(filled <= block.values.len() / value_dim, "{filled} tokens of values");
    assert!(stride >= at + value_dim, "{value_dim} channels at {at} of {stride}");
    assert!(sums.len() >= rows * stride, "sums are {}", sums.len());
    assert!(states.len() >= rows);
    let BlockScratch { values, worth, passes: scratch } = scratch;
    let plan = Plan::new(isa, queries, block);
    let values = tile::values(isa, &plan, block, values, worth);
    let worth = worth.worth();
    passes(isa, &plan, queries, block, scratch, |Pass { first, part, visible, scores }| {
        let n = part.n;
        let (mut factors, mut shares) = ([1.0; ROWS], [0.0; ROWS]);
        let states = &mut states[first..first + n];
        let to = (&mut factors, &mut shares);
        if first == 0 {
            fetch(plan.ahead.weigh);
        }
        weigh::weigh(isa, plan.numbers, &part, visible, worth, scores, states, to);
        let sums = &mut sums[first * stride..(first + n) * stride];
        if stride > value_dim {
            for (row, factor) in sums.chunks_exact_mut(stride).zip(factors) {
                scale_in_place(&mut row[..at], factor);
                scale_in_place(&mut row[at + value_dim..], factor);
            }
        }
        let part = Part { dim: value_dim, ..part };
        let by = (&factors, &shares);
        mix::mix(isa, plan.numbers, &part, scores, by, values, &mut sums[at..], stride);
    });
    fetch(plan.ahead.end);
}

/// Some rows' scores of a block, on their way.
struct Pass<'a> {
    first: usize,
    part: Part,
    visible: &'a [(usize, usize); ROWS],
    /// `[n, tokens]`.
    scores: &'a mut [f32],
}

/// Computes scores of all rows that see anything of a block, some rows at a time.
fn passes(
    isa: Isa,
    plan: &Plan<'_>,
    queries: &QueryRows<'_>,
    block: &KvBlock<'_>,
    scratch: &mut PassScratch,
    mut pass: impl FnMut(Pass<'_>),
) {
    let (dim, rows, filled) = (queries.dim, queries.num(), block.filled);
    check(queries, block);
    let tokens = filled.next_multiple_of(LANES);
    let PassScratch { keys, worth, queries: turned, scores } = scratch;
    turned.resize(ROWS * dim);
    scores.resize(ROWS * tokens);
    let keys = tile::keys(isa, plan, block, dim, keys, worth);
    let worth = worth.worth();
    if !plan.fetches() {
        block.next.into_iter().for_each(fetch);
    }
    fetch(plan.ahead.turn);
    for first in (0..rows).step_by(ROWS) {
        let n = ROWS.min(rows - first);
        let visible = queries.visible(first, n, filled);
        let (from, to) = (visible[0].0, visible[n - 1].1);
        if from >= to {
            continue;
        }
        // Whole vectors that anybody sees.
        let vectors = (from / LANES, to.div_ceil(LANES));
        let by = score::Turn { first, group: queries.group, angles: queries.turn };
        let rows = &queries.rows[first * dim..(first + n) * dim];
        let (mut factors, mut worths) = ([1.0; ROWS], [1.0; ROWS]);
        if plan.numbers == Numbers::Integers {
            integers::query_worths(isa, rows, dim, &mut factors, &mut worths);
        }
        score::turn(isa, plan.numbers, rows, dim, by, &factors, turned.as_mut_slice());
        let part = Part { dim, n, tokens, vectors, from, to };
        let scores = &mut scores.as_mut_slice()[..n * tokens];
        let by = (worth, &worths);
        score::score(isa, plan.numbers, &part, keys, by, turned.as_slice(), scores);
        if let Some(cap) = queries.cap {
            for row in scores.chunks_exact_mut(tokens) {
                soft_cap(&mut row[vectors.0 * LANES..vectors.1 * LANES], cap);
            }
        }
        pass(Pass { first, part, visible: &visible, scores });
    }
}

fn check(queries: &QueryRows<'_>, block: &KvBlock<'_>) {
    let (dim, rows, filled) = (queries.dim, queries.num(), block.filled);
    let capacity = block.keys.len() / dim;
    assert!(filled <= capacity, "{filled} tokens in a block for {capacity}");
    assert!(queries.group > 0);
    if let Some((cos, sin)) = queries.turn {
        let needed = rows.div_ceil(queries.group) * (dim / 2);
        assert!(dim.is_multiple_of(2) && cos.len() >= needed && sin.len() >= needed, "rotations");
    }
}

/// Some rows against some of a block's tokens.
struct Part {
    dim: usize,
    /// Rows, at most [`ROWS`].
    n: usize,
    /// Stride of scores and of transposed keys: the filled rows, in whole vectors.
    tokens: usize,
    /// Vectors of tokens that some row sees.
    vectors: (usize, usize),
    /// Tokens that some row sees.
    from: usize,
    to: usize,
}

#[cfg(test)]
mod tests;
