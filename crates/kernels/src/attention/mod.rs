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
//! so that all of this holds for them too. Processors without such products use those of f32.

// Register blocks are indexed by (row, column); iterators would hide that.
#![allow(clippy::needless_range_loop)]

use half::f16;

use crate::elementwise::{scale_in_place, soft_cap};
use crate::isa::{Isa, Set};
use crate::softmax::OnlineSoftmax;

#[cfg(target_arch = "x86_64")]
mod avx512;
mod columns;
mod exp2;
mod merge;
mod portable;
mod tile;

pub use columns::add_columns;
pub use merge::merge_rows;
use tile::Lines;

/// Tokens of a vector of scores.
const LANES: usize = 16;

/// Query rows that pass through rotation, scores, softmax and values together: 12 × 2 vectors of scores
/// fill the registers, and what they leave between the stages stays in L1.
const ROWS: usize = 12;

/// Most rows for which f16 keys are transposed in registers.
const FEW_ROWS: usize = 8;

/// Rows `[tokens, dim]` of keys or of values, as stored.
#[derive(Debug, Clone, Copy)]
pub enum StoredRows<'a> {
    /// Half precision.
    F16(&'a [f16]),
    /// Single precision.
    F32(&'a [f32]),
}

impl StoredRows<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F16(rows) => rows.len(),
            Self::F32(rows) => rows.len(),
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
}

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
    keys: Lines,    // [dim, tokens]
    values: Lines,  // [tokens, dim]
    rows: Lines,    // [tokens, dim], keys as f32 before they are transposed
    queries: Lines, // [ROWS, dim]
    pairs: Lines,   // [ROWS, dim / 2], queries as pairs of bf16
    scores: Lines,  // [ROWS, tokens]
}

impl BlockScratch {
    /// Room for what every block needs.
    fn begin(&mut self, dim: usize, tokens: usize) {
        self.queries.resize(ROWS * dim);
        self.scores.resize(ROWS * tokens);
        self.pairs.resize(ROWS * dim / 2);
    }

    /// Makes room for blocks of `tokens` rows of `dim` channels, so that [`attend_block`] need not.
    pub fn reserve(&mut self, tokens: usize, dim: usize) {
        let tokens = tokens.next_multiple_of(LANES);
        for tile in [&mut self.keys, &mut self.values, &mut self.rows] {
            tile.resize(tokens * dim);
        }
        self.queries.resize(ROWS * dim);
        self.pairs.resize(ROWS * dim / 2);
        self.scores.resize(ROWS * tokens);
    }
}

/// Takes one block into the online softmax of every query row: `states` (one a row) and
/// `sums` (`[rows, stride]`) become those over all blocks so far, not normalised. Values are added to the `value_dim`
/// elements of a row from `at` on; the others are brought to the new maximum with them.
///
/// # Panics
/// If a slice is shorter than its shape says.
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
    let (dim, rows, filled) = (queries.dim, queries.num(), block.filled);
    if rows == 0 || filled == 0 {
        return;
    }
    let (at, value_dim) = (block.at, block.value_dim);
    assert!(filled <= block.values.len() / value_dim, "{filled} tokens of values");
    assert!(stride >= at + value_dim, "{value_dim} channels at {at} of {stride}");
    assert!(sums.len() >= rows * stride, "sums are {}", sums.len());
    assert!(states.len() >= rows);
    let isa = check(isa, queries, block);
    let tokens = filled.next_multiple_of(LANES);
    scratch.begin(dim, tokens);
    let plan = tile::Plan::new(isa, queries, block);
    tile::prepare(isa, &plan, block, dim, scratch);
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) && !plan.keys_in_registers {
        block.next.into_iter().for_each(avx512::fetch);
    }
    for first in (0..rows).step_by(ROWS) {
        let n = ROWS.min(rows - first);
        let visible = queries.visible(first, n, filled);
        let (from, to) = (visible[0].0, visible[n - 1].1);
        if from >= to {
            continue;
        }
        // Whole vectors that anybody sees.
        let vectors = (from / LANES, to.div_ceil(LANES));
        turn_rows(isa, &plan, queries, (first, n), scratch);
        let part = Part { dim, n, tokens, vectors, from, to };
        score(isa, &plan, &part, block, scratch);
        let scores = &mut scratch.scores.as_mut_slice()[..n * tokens];
        if let Some(cap) = queries.cap {
            for row in scores.chunks_exact_mut(tokens) {
                soft_cap(&mut row[vectors.0 * LANES..vectors.1 * LANES], cap);
            }
        }
        let mut factors = [1.0; ROWS];
        weigh(isa, &plan, &part, &visible, scores, &mut states[first..first + n], &mut factors);
        let sums = &mut sums[first * stride..(first + n) * stride];
        if stride > value_dim {
            for (row, factor) in sums.chunks_exact_mut(stride).zip(factors) {
                scale_in_place(&mut row[..at], factor);
                scale_in_place(&mut row[at + value_dim..], factor);
            }
        }
        let part = Part { dim: value_dim, ..part };
        mix(isa, &plan, &part, block, &factors, scratch, &mut sums[at..], stride);
    }
}

/// Checks shapes, and returns the instruction set that can do them.
fn check(isa: Isa, queries: &QueryRows<'_>, block: &KvBlock<'_>) -> Isa {
    let (dim, rows, filled) = (queries.dim, queries.num(), block.filled);
    let capacity = block.keys.len() / dim;
    assert!(filled <= capacity, "{filled} tokens in a block for {capacity}");
    assert!(queries.group > 0);
    if let Some((cos, sin)) = queries.turn {
        let needed = rows.div_ceil(queries.group) * (dim / 2);
        assert!(dim.is_multiple_of(2) && cos.len() >= needed && sin.len() >= needed, "rotations");
    }
    // The AVX-512 way is for whole vectors of channels, and for masks of 64 tokens.
    let whole = dim.is_multiple_of(LANES) && block.value_dim.is_multiple_of(LANES) && filled <= 64;
    if whole { isa } else { isa.without_avx512() }
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

/// Rotated rows `first .. first + n`, in the form that products of scores read.
fn turn_rows(
    isa: Isa,
    plan: &tile::Plan,
    queries: &QueryRows<'_>,
    (first, n): (usize, usize),
    scratch: &mut BlockScratch,
) {
    let dim = queries.dim;
    let rows = &queries.rows[first * dim..(first + n) * dim];
    let place = (first, queries.group);
    #[cfg(target_arch = "x86_64")]
    if plan.pairs {
        let out = &mut scratch.pairs.halves_mut()[..n * dim];
        match queries.turn {
            Some((cos, sin)) if dim.is_multiple_of(2 * LANES) => {
                avx512::turn(rows, place, dim, cos, sin, &mut avx512::Turned::Bf16(out));
            }
            Some((cos, sin)) => {
                let turned = &mut scratch.queries.as_mut_slice()[..n * dim];
                portable::turn_on(isa, rows, place, dim, cos, sin, turned);
                avx512::round(turned, out);
            }
            None => avx512::round(rows, out),
        }
        return;
    }
    let _ = plan;
    let out = &mut scratch.queries.as_mut_slice()[..n * dim];
    let Some((cos, sin)) = queries.turn else {
        out.copy_from_slice(rows);
        return;
    };
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) && dim.is_multiple_of(2 * LANES) {
        avx512::turn(rows, place, dim, cos, sin, &mut avx512::Turned::F32(out));
        return;
    }
    portable::turn_on(isa, rows, place, dim, cos, sin, out);
}

/// Scores of a part's rows, in its vectors.
fn score(
    isa: Isa,
    plan: &tile::Plan,
    part: &Part,
    block: &KvBlock<'_>,
    scratch: &mut BlockScratch,
) {
    let BlockScratch { keys, queries, pairs, scores, .. } = scratch;
    let (queries, scores) = (queries.as_slice(), scores.as_mut_slice());
    #[cfg(target_arch = "x86_64")]
    if plan.pairs {
        let queries = pairs.words();
        match (plan.keys_in_registers, block.keys) {
            (true, StoredRows::F16(stored)) => {
                avx512::scores_of_stored_pairs(part, stored, queries, scores, block.next[0]);
            }
            _ => avx512::scores_of_pairs(part, keys.words(), queries, scores),
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) {
        match (plan.keys_in_registers, block.keys) {
            (true, StoredRows::F16(stored)) => {
                avx512::scores_of_stored(part, stored, queries, scores, block.next[0]);
            }
            _ => avx512::scores_of_tile(part, keys.as_slice(), queries, scores),
        }
        return;
    }
    portable::scores_on(isa, part, keys.as_slice(), queries, scores);
}

/// Turns scores into weights (in place; as bf16 they take the first half of a row's vectors); `factors` become what the rows' sums are to be multiplied with.
fn weigh(
    isa: Isa,
    plan: &tile::Plan,
    part: &Part,
    visible: &[(usize, usize); ROWS],
    scores: &mut [f32],
    states: &mut [OnlineSoftmax],
    factors: &mut [f32; ROWS],
) {
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) {
        avx512::weights(plan.pairs, part, visible, scores, states, factors);
        return;
    }
    let _ = plan;
    portable::weights_on(isa, part, visible, scores, states, factors);
}

/// Adds the weighted values to the rows' sums.
#[allow(clippy::too_many_arguments)]
fn mix(
    isa: Isa,
    plan: &tile::Plan,
    part: &Part,
    block: &KvBlock<'_>,
    factors: &[f32; ROWS],
    scratch: &BlockScratch,
    sums: &mut [f32],
    stride: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if plan.pairs {
        let weights = scratch.scores.words();
        match (plan.values_in_registers, block.values) {
            (true, StoredRows::F16(stored)) => {
                let next = if plan.keys_in_registers { block.next[1] } else { &[] };
                avx512::mix_stored_pairs(part, weights, factors, stored, sums, stride, next);
            }
            _ => {
                let values = scratch.values.words();
                avx512::mix_pairs(part, weights, factors, values, sums, stride);
            }
        }
        return;
    }
    let scores = scratch.scores.as_slice();
    let values = match block.values {
        StoredRows::F32(rows) => rows,
        StoredRows::F16(_) => scratch.values.as_slice(),
    };
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) {
        match (plan.values_in_registers, block.values) {
            (true, StoredRows::F16(stored)) => {
                let next = if plan.keys_in_registers { block.next[1] } else { &[] };
                avx512::mix(part, scores, factors, stored, sums, stride, next);
            }
            _ => avx512::mix(part, scores, factors, values, sums, stride, &[]),
        }
        return;
    }
    portable::mix_on(isa, part, scores, factors, values, sums, stride);
}

#[cfg(test)]
mod tests;
