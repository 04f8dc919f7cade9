//! HOT PATH (prompts). Attention of many query rows to one block after the other: the same arithmetic as
//! [`super::attend_block`], bit for bit, with rows in lanes instead of tokens.
//!
//! A vector has one query head's rows of 16 consecutive tokens; up to [`STRIP`] vectors make a strip, whose sums fill the
//! registers. Keys and values are broadcast, so keys need not be transposed, and maxima and sums of a softmax need
//! nothing from other lanes. Queries, weights and sums stay in this form from block to block: [`QueryLanes::load`] and
//! [`ManyRows::finish`] turn them once.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::kind::Kind;
use super::score::turned;
use super::weigh::{NUMBERS, exp2};
use super::{Fetch, KvBlock, LANES, Meanwhile, Products, QueryRows, tile};
use crate::elementwise::soft_cap;
use crate::isa::Isa;
use crate::lines::Lines;
use crate::simd::tile::{self as registers, Matrix, accumulate, by_kind, by_rows, has_bf16};
use crate::simd::{Lanes, compiled};
use crate::softmax::OnlineSoftmax;

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
}

impl QueryLanes {
    /// Whether rows of `dim` channels for `tokens` tokens are read faster this way: enough lanes have a row.
    #[inline]
    pub const fn pay(dim: usize, tokens: usize) -> bool {
        dim.is_multiple_of(LANES) && 4 * tokens >= 3 * tokens.next_multiple_of(LANES)
    }

    /// Takes rows `[tokens · group, dim]`, scaled, before rotation. `dim` is a multiple of 16.
    pub fn load(&mut self, rows: &[f32], dim: usize, group: usize) {
        self.load_on(Isa::best(), rows, dim, group);
    }

    fn load_on(&mut self, isa: Isa, rows: &[f32], dim: usize, group: usize) {
        assert!(dim.is_multiple_of(LANES) && rows.len().is_multiple_of(dim * group), "rows");
        self.shape = Shape { dim, group, tokens: rows.len() / dim / group };
        self.rows.resize(self.shape.floats());
        to_lanes(isa, rows, self.shape, self.rows.as_mut_slice());
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
        let pairs = queries.products == Products::Bf16 && has_bf16(isa);
        block.next.into_iter().for_each(|bytes| Fetch::new(bytes, 1).step());
        self.angles.resize(tokens.div_ceil(LANES) * LANES * dim);
        self.queries.resize(dim * WIDTH);
        self.scores.resize(filled * WIDTH);
        // Tokens go in pairs.
        self.weights.resize(filled.next_multiple_of(2) * WIDTH);
        let keys = tile::key_words(isa, pairs, block.keys, (filled, dim), &mut self.keys);
        let values = tile::value_words(isa, pairs, block.values, (filled, dim), &mut self.values);
        let mut call = Call {
            shape,
            seeing,
            filled,
            end: queries.offset as i64 - first as i64 + 1,
            window: queries.window.map(|w| w as i64),
            cap: queries.cap,
            turn: queries.turn,
            keys,
            values,
            rows: lanes.rows.as_slice(),
            sums: self.sums.as_mut_slice(),
            maxima: self.maxima.as_mut_slice(),
            totals: self.totals.as_mut_slice(),
            angles: self.angles.as_mut_slice(),
            queries: self.queries.as_mut_slice(),
            scores: self.scores.as_mut_slice(),
            weights: self.weights.as_mut_slice(),
        };
        attend(isa, pairs, &mut call);
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

/// A block, and who sees it.
struct Call<'a> {
    shape: Shape,
    /// Query tokens that see any of it.
    seeing: (usize, usize),
    filled: usize,
    /// Query token `i` sees the block's tokens before `end + i`, ...
    end: i64,
    /// ... and no more than so many.
    window: Option<i64>,
    cap: Option<f32>,
    turn: Option<(&'a [f32], &'a [f32])>,
    /// In words, `[filled, dim / depth]` and `[filled / depth, dim]`.
    keys: &'a [f32],
    values: &'a [f32],
    rows: &'a [f32],
    sums: &'a mut [f32],
    maxima: &'a mut [f32],
    totals: &'a mut [f32],
    angles: &'a mut [f32],
    queries: &'a mut [f32],
    scores: &'a mut [f32],
    weights: &'a mut [f32],
}

by_kind! {
    fn attend(call: &mut Call<'_>) = attend_body;
}

#[inline(always)]
fn attend_body<S: Lanes>(s: S, kind: impl Kind<S>, call: &mut Call<'_>) {
    let Shape { dim, group, .. } = call.shape;
    let (lanes, depth) = (call.shape.vectors() * LANES, kind.depth());
    assert!(call.rows.len() >= call.shape.floats() && call.sums.len() >= call.shape.floats());
    assert!(call.maxima.len() >= lanes && call.totals.len() >= lanes);
    assert!(call.keys.len() >= call.filled * (dim / depth));
    assert!(call.values.len() >= call.filled.div_ceil(depth) * dim);
    assert!(call.angles.len() >= call.seeing.1.div_ceil(LANES) * LANES * dim);
    assert!(call.queries.len() >= dim * WIDTH);
    assert!(call.scores.len() >= call.filled * WIDTH);
    assert!(call.weights.len() >= call.filled.next_multiple_of(2) * WIDTH);
    if let Some(turn) = call.turn {
        turn_angles(s, turn, call.seeing, dim / 2, call.angles);
    }
    let seeing = (call.seeing.0 / LANES * group, call.seeing.1.div_ceil(LANES) * group);
    let mut u = seeing.0;
    while u < seeing.1 {
        let n = if S::WIDE { (STRIP - u % STRIP).min(seeing.1 - u) } else { 1 };
        // SAFETY: the asserts cover vectors `u .. u + n`, which are in one strip.
        unsafe {
            match n {
                1 => strip::<S, 1>(s, kind, call, u),
                2 => strip::<S, 2>(s, kind, call, u),
                _ => strip::<S, STRIP>(s, kind, call, u),
            }
        }
        u += n;
    }
}

/// Cosines and sines `[tokens, half]` of the tokens that see a block, with tokens side by side; of others in the same vectors 0.
#[inline(always)]
fn turn_angles<S: Lanes>(
    s: S,
    (cos, sin): (&[f32], &[f32]),
    (begin, end): (usize, usize),
    half: usize,
    out: &mut [f32],
) {
    assert!(cos.len().min(sin.len()) >= (end - begin) * half);
    for tokens in begin / LANES..end.div_ceil(LANES) {
        let (from, to) = ((tokens * LANES).max(begin), ((tokens + 1) * LANES).min(end));
        for (part, angles) in [cos, sin].into_iter().enumerate() {
            let out = &mut out[(2 * tokens + part) * half * LANES..][..half * LANES];
            if to - from == LANES && half.is_multiple_of(4) {
                for c in (0..half).step_by(4) {
                    // SAFETY: 4 angles of 16 tokens, and a vector of each.
                    unsafe {
                        let at = angles.as_ptr().add((from - begin) * half + c);
                        let columns = s.words4(at.cast(), half, LANES);
                        for i in 0..4 {
                            s.istore(out.as_mut_ptr().add((c + i) * LANES).cast(), columns[i]);
                        }
                    }
                }
            } else {
                out.fill(0.0);
                for t in from..to {
                    for c in 0..half {
                        out[c * LANES + t % LANES] = angles[(t - begin) * half + c];
                    }
                }
            }
        }
    }
}

/// Vectors `u .. u + NV` against the block.
///
/// # Safety
/// The call's slices are as long as [`attend_body`] asserts, and the vectors are in one strip.
#[inline(always)]
unsafe fn strip<S: Lanes, const NV: usize>(
    s: S,
    kind: impl Kind<S>,
    call: &mut Call<'_>,
    u: usize,
) {
    let Shape { dim, group, .. } = call.shape;
    let words = dim / kind.depth();
    let end = |u: usize| call.end + (u / group * LANES) as i64;
    // Those of the first row of the first vector, and of the last of the last.
    let to = (end(u + NV - 1) + LANES as i64 - 1).clamp(0, call.filled as i64) as usize;
    let from = call.window.map_or(0, |w| (end(u) - w).max(0)) as usize & !1;
    if from >= to {
        return;
    }
    let to = to.next_multiple_of(2).min(call.filled);
    // SAFETY: by contract.
    unsafe {
        let rows = call.rows.as_ptr().add(call.shape.at(u));
        let (queries, scores) = (call.queries.as_mut_ptr(), call.scores.as_mut_ptr());
        let mut angles = [call.angles.as_ptr(); NV];
        for v in 0..NV {
            angles[v] = angles[v].add((u + v) / group * LANES * dim);
        }
        turn::<S, NV>(s, kind, rows, dim, call.turn.map(|_| angles), queries);
        let keys = call.keys.as_ptr().add(from * words);
        by_rows!(S, NV, to - from, [8, 6, 4, 2, 1], |R, first| {
            let queries = Matrix { from: queries, step: WIDTH, pitch: LANES };
            let keys = (keys.add(first * words), words, 1);
            let sums = [[s.zero(); NV]; R];
            let sums = accumulate((s, kind), queries, (0, words), keys, &mut (), sums);
            registers::store(s, sums, scores.add((from + first) * WIDTH), WIDTH);
        });
        if let Some(cap) = call.cap {
            for t in from..to {
                soft_cap(&mut call.scores[t * WIDTH..t * WIDTH + NV * LANES], cap);
            }
        }
        let mut factors = [s.zero(); NV];
        for v in 0..NV {
            let end = end(u + v);
            let all = end >= to as i64 && call.window.is_none_or(|w| end + LANES as i64 - 1 <= w);
            let hides = (!all).then_some((end, call.window));
            let state = (call.maxima.as_mut_ptr(), call.totals.as_mut_ptr());
            let state = (state.0.add((u + v) * LANES), state.1.add((u + v) * LANES));
            let weights = call.weights.as_mut_ptr().add(v * LANES);
            factors[v] = weigh(
                s,
                kind,
                call.scores.as_ptr().add(v * LANES),
                (from, to),
                hides,
                state,
                weights,
            );
        }
        let (sums, depth) = (call.sums.as_mut_ptr().add(call.shape.at(u)), kind.depth());
        let weights = Matrix { from: call.weights.as_ptr(), step: WIDTH, pitch: LANES };
        by_rows!(S, NV, dim, [8, 6, 4, 2, 1], |R, first| {
            let at = sums.add(first * WIDTH);
            let mut begin = registers::load::<S, R, NV>(s, at, WIDTH);
            for r in 0..R {
                for v in 0..NV {
                    begin[r][v] = s.mul(begin[r][v], factors[v]);
                }
            }
            let values = (call.values.as_ptr().add(first), 1, dim);
            let range = (from / depth, to.div_ceil(depth));
            let of = accumulate((s, kind), weights, range, values, &mut (), begin);
            registers::store(s, of, at, WIDTH);
        });
    }
}

/// Rotates a strip's queries `[dim, WIDTH]`, if there are angles, and makes words of them.
///
/// # Safety
/// All channels of NV vectors are there, `dim / 2` cosines and as many sines of each, and room for the words.
#[inline(always)]
unsafe fn turn<S: Lanes, const NV: usize>(
    s: S,
    kind: impl Kind<S>,
    rows: *const f32,
    dim: usize,
    angles: Option<[*const f32; NV]>,
    out: *mut f32,
) {
    let half = dim / 2;
    // SAFETY: by contract.
    unsafe {
        for c in (0..half).step_by(2) {
            for v in 0..NV {
                let (rows, out) = (rows.add(v * LANES), out.add(v * LANES));
                let mut two = [[s.zero(); 2]; 2];
                for i in 0..2 {
                    let pair = [
                        s.load(rows.add((c + i) * WIDTH)),
                        s.load(rows.add((half + c + i) * WIDTH)),
                    ];
                    let [x, y] = match angles {
                        Some(angles) => {
                            let at = angles[v].add((c + i) * LANES);
                            turned(s, pair, [s.load(at), s.load(at.add(half * LANES))])
                        }
                        None => pair,
                    };
                    (two[0][i], two[1][i]) = (x, y);
                }
                kind.put_two(s, out, c, WIDTH, two[0]);
                kind.put_two(s, out, half + c, WIDTH, two[1]);
            }
        }
    }
}

/// Turns the scores of a vector's tokens `from .. to` into weights relative to the new maxima, as words, and updates its state
/// (`LANES` maxima and sums); returns what its sums are to be multiplied with. `hides`: where not all rows see all of it, what
/// the first row sees is before that, and the window. `from` is even.
///
/// # Safety
/// Scores and room for weights are there, a token or a word every [`WIDTH`].
#[inline(always)]
unsafe fn weigh<S: Lanes>(
    s: S,
    kind: impl Kind<S>,
    scores: *const f32,
    (from, to): (usize, usize),
    hides: Option<(i64, Option<i64>)>,
    (max_at, sum_at): (*mut f32, *mut f32),
    weights: *mut f32,
) -> S::F {
    let hidden = s.splat(f32::NEG_INFINITY);
    // SAFETY: by contract; 16 numbers are there.
    unsafe {
        let numbers = s.load(NUMBERS.as_ptr());
        let bounds = hides.map(|(end, window)| {
            let begin = window.map_or(f32::MIN, |w| (end - w) as f32);
            (s.add(s.splat(begin), numbers), s.add(s.splat(end as f32), numbers))
        });
        let mut largest = hidden;
        for t in from..to {
            // A score that is no number is passed over, as by `f32::max`.
            largest = s.max(seen(s, scores, t, bounds), largest);
        }
        let (old_max, old_sum) = (s.load(max_at), s.load(sum_at));
        let max = s.max(largest, old_max);
        let base = s.select(s.lt(max, s.splat(f32::MIN)), s.zero(), max);
        let log2e = s.splat(std::f32::consts::LOG2_E);
        let factor = exp2(s, s.mul(s.sub(old_max, base), log2e));
        // 16 sums, of tokens `t mod 16`, would not fit registers: they are made two at a time, in the order in which
        // `Lanes::sum4` adds them up.
        let mut total = [s.zero(); 2];
        for half in [0, 2] {
            let mut quarter = [s.zero(); 2];
            for j in [half, half + 4] {
                let tokens = (from, to);
                let a = columns(s, kind, scores, (tokens, j), bounds, base, weights);
                let b = columns(s, kind, scores, (tokens, j + 8), bounds, base, weights);
                for i in 0..2 {
                    quarter[i] = s.add(quarter[i], s.add(a[i], b[i]));
                }
            }
            for i in 0..2 {
                total[i] = s.add(total[i], quarter[i]);
            }
        }
        let sum = s.fma(old_sum, factor, s.add(total[0], total[1]));
        s.store(max_at, max);
        s.store(sum_at, sum);
        factor
    }
}

/// Weights of tokens `j`, `j + 1` and every 16th after them, and the sums of both.
///
/// # Safety
/// As [`weigh`].
#[inline(always)]
unsafe fn columns<S: Lanes>(
    s: S,
    kind: impl Kind<S>,
    scores: *const f32,
    ((from, to), j): ((usize, usize), usize),
    bounds: Option<(S::F, S::F)>,
    base: S::F,
    weights: *mut f32,
) -> [S::F; 2] {
    let log2e = s.splat(std::f32::consts::LOG2_E);
    let mut sums = [s.zero(); 2];
    let mut t = from / LANES * LANES + j;
    if t < from {
        t += LANES;
    }
    while t < to {
        let mut two = [s.zero(); 2];
        // SAFETY: by contract.
        unsafe {
            for i in 0..2 {
                if t + i < to {
                    let x = seen(s, scores, t + i, bounds);
                    two[i] = exp2(s, s.mul(s.sub(x, base), log2e));
                    sums[i] = s.add(sums[i], two[i]);
                }
            }
            kind.put_two(s, weights, t, WIDTH, two);
        }
        t += LANES;
    }
    sums
}

/// The scores of token `t`, hidden from rows that do not see it.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn seen<S: Lanes>(s: S, scores: *const f32, t: usize, bounds: Option<(S::F, S::F)>) -> S::F {
    // SAFETY: by contract.
    let x = unsafe { s.load(scores.add(t * WIDTH)) };
    let Some((from, to)) = bounds else { return x };
    let (t, hidden) = (s.splat(t as i32 as f32), s.splat(f32::NEG_INFINITY));
    s.select(s.lt(t, from), hidden, s.select(s.lt(t, to), x, hidden))
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::super::{BlockScratch, StoredRows, attend_block_on};
    use super::*;
    use crate::convert::f32_to_f16;
    use crate::gemm::tests::values;

    struct Case {
        shape: Shape,
        filled: usize,
        /// Position of the first query less that of the first block's first token.
        start: usize,
        window: Option<usize>,
        cap: Option<f32>,
        turned: bool,
    }

    fn cases() -> Vec<Case> {
        let shape = Shape { dim: 64, group: 3, tokens: 64 };
        let base = || Case { shape, filled: 32, start: 64, window: None, cap: None, turned: true };
        vec![
            base(),
            Case { start: 0, ..base() },
            Case { start: 16, window: Some(9), ..base() },
            Case { start: 33, window: Some(40), cap: Some(2.0), ..base() },
            Case { shape: Shape { tokens: 41, ..shape }, start: 7, filled: 19, ..base() },
            Case { shape: Shape { group: 1, ..shape }, start: 3, turned: false, ..base() },
            Case { shape: Shape { dim: 48, group: 8, tokens: 9 }, start: 40, filled: 49, ..base() },
            Case {
                shape: Shape { dim: 128, group: 2, tokens: 33 },
                start: 1,
                filled: 64,
                ..base()
            },
        ]
    }

    /// Three blocks, of which the last ones are seen by some tokens only: every row gets the bits that it gets alone.
    fn check(isa: Isa, case: &Case, half: bool, products: Products) {
        let &Case { shape, filled, start, window, cap, turned } = case;
        let Shape { dim, group, tokens } = shape;
        let rows = values(tokens * group * dim, 1);
        let distances = tokens + start;
        let (cos, sin) = (values(distances * dim / 2, 2), values(distances * dim / 2, 3));
        let mut states = vec![OnlineSoftmax::default(); tokens * group];
        let mut sums = vec![0.0; rows.len()];
        let (mut lanes, mut many) = (QueryLanes::default(), ManyRows::default());
        lanes.load_on(isa, &rows, dim, group);
        // What an earlier job left.
        many.sums.resize(shape.floats());
        many.sums.as_mut_slice().fill(f32::NAN);
        many.reset(dim, group, tokens);
        let mut scratch = BlockScratch::default();
        for block in 0..3 {
            let stored: Vec<Vec<f16>> = (0..2)
                .map(|part| {
                    let mut halves = vec![f16::NAN; (filled + 3) * dim];
                    f32_to_f16(
                        &values(filled * dim, 4 + 2 * block + part),
                        &mut halves[..filled * dim],
                    );
                    halves
                })
                .collect();
            let wide: Vec<Vec<f32>> =
                stored.iter().map(|s| s.iter().map(|x| x.to_f32()).collect()).collect();
            let part = |i: usize| match half {
                true => StoredRows::F16(&stored[i]),
                false => StoredRows::F32(&wide[i]),
            };
            let p = block as usize * filled;
            let first = p.saturating_sub(start);
            let end =
                window.map_or(tokens, |w| tokens.min((p + filled + w - 1).saturating_sub(start)));
            if first >= end {
                continue;
            }
            let distance = start + first - p;
            let at = distance * dim / 2;
            let kv = KvBlock {
                keys: part(0),
                values: part(1),
                value_dim: dim,
                at: 0,
                filled,
                next: [&[0; 100], &[]],
            };
            let own = first * group..end * group;
            let queries = QueryRows {
                rows: &rows[own.start * dim..own.end * dim],
                dim,
                group,
                turn: turned.then_some((&cos[at..], &sin[at..])),
                offset: distance,
                window,
                cap,
                products,
            };
            many.attend_block_on(isa, &lanes, first, &queries, &kv);
            let (states, sums) = (&mut states[own.clone()], &mut sums[own.start * dim..]);
            attend_block_on(isa, &queries, &kv, states, sums, dim, &mut scratch);
        }
        let mut side = vec![OnlineSoftmax::default(); tokens * group];
        let mut beside = vec![0.0; rows.len()];
        many.finish_on(isa, &mut side, &mut beside);
        for (i, (a, b)) in states.iter().zip(&side).enumerate() {
            assert_eq!((a.max, a.sum), (b.max, b.sum), "{isa} {shape:?} {products:?} row {i}");
        }
        assert!(sums == beside, "{isa} {shape:?} {products:?} {half}");
    }

    #[test]
    fn rows_get_the_bits_that_they_get_alone() {
        for isa in Isa::available() {
            for case in cases() {
                for products in [Products::F32, Products::Bf16] {
                    check(isa, &case, true, products);
                    check(isa, &case, false, products);
                }
            }
        }
    }
}
