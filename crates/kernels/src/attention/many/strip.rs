//! The kernel of [`super::ManyRows`]: one block against all strips that see any of it.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::{STRIP, Shape, WIDTH};
use crate::attention::integers;
use crate::attention::kind::{Kind, whole};
use crate::attention::numbers::by_numbers;
use crate::attention::score::{sized, turned, worth};
use crate::attention::weigh::{NUMBERS, exp2};
use crate::elementwise::soft_cap;
use crate::simd::tile::{self as registers, Matrix, accumulate, by_rows};
use crate::simd::{LANES, Lanes};

/// A block, and who sees it.
pub(super) struct Call<'a> {
    pub(super) shape: Shape,
    /// Query tokens that see any of it.
    pub(super) seeing: (usize, usize),
    pub(super) filled: usize,
    /// Query token `i` sees the block's tokens before `end + i`, ...
    pub(super) end: i64,
    /// ... and no more than so many.
    pub(super) window: Option<i64>,
    pub(super) cap: Option<f32>,
    pub(super) turn: Option<(&'a [f32], &'a [f32])>,
    /// In words, `[filled, dim / depth]` and `[filled / depth, dim]`.
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) rows: &'a [f32],
    /// Where numbers are whole, what rows are multiplied with, and what a one of rows, keys and values is worth.
    pub(super) factors: &'a [f32],
    pub(super) worth: &'a [f32],
    pub(super) key_worth: &'a [f32],
    pub(super) value_worth: &'a [f32],
    pub(super) sums: &'a mut [f32],
    pub(super) maxima: &'a mut [f32],
    pub(super) totals: &'a mut [f32],
    pub(super) angles: &'a mut [f32],
    pub(super) queries: &'a mut [f32],
    pub(super) scores: &'a mut [f32],
    pub(super) weights: &'a mut [f32],
}

by_numbers! {
    /// Takes a block into the softmax of all rows that see any of it.
    pub(super) fn attend(call: &mut Call<'_>) = attend_body;
}

#[inline(always)]
fn attend_body<S: Lanes>(s: S, kind: impl Kind<S>, call: &mut Call<'_>) {
    let Shape { dim, group, .. } = call.shape;
    let (lanes, depth) = (call.shape.vectors() * LANES, kind.depth());
    assert!(call.rows.len() >= call.shape.floats() && call.sums.len() >= call.shape.floats());
    assert!(call.maxima.len() >= lanes && call.totals.len() >= lanes);
    if whole(s, kind) {
        assert!(call.factors.len() >= lanes && call.worth.len() >= lanes);
        assert!(call.key_worth.len().min(call.value_worth.len()) >= call.filled);
    }
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
                1 => strip::<S, _, 1>(s, kind, call, u),
                2 => strip::<S, _, 2>(s, kind, call, u),
                _ => strip::<S, _, STRIP>(s, kind, call, u),
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
unsafe fn strip<S: Lanes, K: Kind<S>, const NV: usize>(
    s: S,
    kind: K,
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
        let (mut factors, mut query_worth) = ([s.zero(); NV], [s.zero(); NV]);
        for v in 0..if K::WHOLE { NV } else { 0 } {
            factors[v] = s.load(call.factors.as_ptr().add((u + v) * LANES));
            query_worth[v] = s.load(call.worth.as_ptr().add((u + v) * LANES));
        }
        turn::<S, NV>(s, kind, rows, dim, call.turn.map(|_| angles), factors, queries);
        let keys = call.keys.as_ptr().add(from * words);
        by_rows!(S, NV, to - from, [8, 6, 4, 2, 1], |R, first| {
            let queries = Matrix { from: queries, step: WIDTH, pitch: LANES };
            let keys = (keys.add(first * words), words, 1);
            let sums = [[s.zero(); NV]; R];
            let mut sums = accumulate((s, kind), queries, (0, words), keys, &mut (), sums);
            if K::WHOLE {
                for r in 0..R {
                    let key = s.splat(*call.key_worth.as_ptr().add(from + first + r));
                    for v in 0..NV {
                        sums[r][v] = worth(s, kind, sums[r][v], key, query_worth[v]);
                    }
                }
            }
            registers::store(s, sums, scores.add((from + first) * WIDTH), WIDTH);
        });
        if let Some(cap) = call.cap {
            for t in from..to {
                soft_cap(&mut call.scores[t * WIDTH..t * WIDTH + NV * LANES], cap);
            }
        }
        let mut shares = [s.zero(); NV];
        for v in 0..NV {
            let end = end(u + v);
            let all = end >= to as i64 && call.window.is_none_or(|w| end + LANES as i64 - 1 <= w);
            let hides = (!all).then_some((end, call.window));
            let state = (call.maxima.as_mut_ptr(), call.totals.as_mut_ptr());
            let state = (state.0.add((u + v) * LANES), state.1.add((u + v) * LANES));
            let weights = call.weights.as_mut_ptr().add(v * LANES);
            [factors[v], shares[v]] = weigh(
                s,
                kind,
                call.scores.as_mut_ptr().add(v * LANES),
                (from, to),
                hides,
                state,
                call.value_worth.as_ptr(),
                weights,
            );
        }
        let (sums, depth) = (call.sums.as_mut_ptr().add(call.shape.at(u)), kind.depth());
        let weights = Matrix { from: call.weights.as_ptr(), step: WIDTH, pitch: LANES };
        by_rows!(S, NV, dim, [8, 6, 4, 2, 1], |R, first| {
            let at = sums.add(first * WIDTH);
            let values = (call.values.as_ptr().add(first), 1, dim);
            let range = (from / depth, to.div_ceil(depth));
            let begin = match K::WHOLE {
                true => [[s.zero(); NV]; R],
                false => scaled::<S, R, NV>(s, at, factors),
            };
            let mut of = accumulate((s, kind), weights, range, values, &mut (), begin);
            if K::WHOLE {
                let sums = scaled::<S, R, NV>(s, at, factors);
                for r in 0..R {
                    for v in 0..NV {
                        of[r][v] = s.fma(s.from_int(s.bits(of[r][v])), shares[v], sums[r][v]);
                    }
                }
            }
            registers::store(s, of, at, WIDTH);
        });
    }
}

/// R rows of NV vectors of sums so far, times their factors.
///
/// # Safety
/// They are readable, a row every [`WIDTH`].
#[inline(always)]
unsafe fn scaled<S: Lanes, const R: usize, const NV: usize>(
    s: S,
    from: *const f32,
    factors: [S::F; NV],
) -> [[S::F; NV]; R] {
    // SAFETY: by contract.
    let mut sums = unsafe { registers::load::<S, R, NV>(s, from, WIDTH) };
    for r in 0..R {
        for v in 0..NV {
            sums[r][v] = s.mul(sums[r][v], factors[v]);
        }
    }
    sums
}

/// Rotates a strip's queries `[dim, WIDTH]`, if there are angles, and makes words of them, times their factors where numbers are whole.
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
    factors: [S::F; NV],
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
                    let [x, y] = sized(s, kind, [x, y], factors[v]);
                    (two[0][i], two[1][i]) = (x, y);
                }
                kind.put_two(s, out, c, WIDTH, two[0]);
                kind.put_two(s, out, half + c, WIDTH, two[1]);
            }
        }
    }
}

/// Turns the scores of a vector's tokens `from .. to` into weights relative to the new maxima, as words, and updates its state
/// (`LANES` maxima and sums); returns what its sums are to be multiplied with, and, where numbers are whole, what products of weights
/// with values, which are worth `worth`, are. `hides`: where not all rows see all of it, what
/// the first row sees is before that, and the window. `from` is even.
///
/// # Safety
/// Scores and room for weights are there, a token or a word every [`WIDTH`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn weigh<S: Lanes, K: Kind<S>>(
    s: S,
    kind: K,
    scores: *mut f32,
    (from, to): (usize, usize),
    hides: Option<(i64, Option<i64>)>,
    (max_at, sum_at): (*mut f32, *mut f32),
    worth: *const f32,
    weights: *mut f32,
) -> [S::F; 2] {
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
        let mut total = [s.zero(); 4];
        for half in [0, 2] {
            let mut quarter = [s.zero(); 4];
            for j in [half, half + 4] {
                let tokens = (from, to);
                let a = columns(s, kind, scores, (tokens, j), bounds, base, worth, weights);
                let b = columns(s, kind, scores, (tokens, j + 8), bounds, base, worth, weights);
                for i in 0..if K::WHOLE { 4 } else { 2 } {
                    quarter[i] = s.add(quarter[i], s.add(a[i], b[i]));
                }
            }
            for i in 0..if K::WHOLE { 4 } else { 2 } {
                total[i] = s.add(total[i], quarter[i]);
            }
        }
        let sum = s.fma(old_sum, factor, s.add(total[0], total[1]));
        s.store(max_at, max);
        s.store(sum_at, sum);
        if !K::WHOLE {
            return [factor, factor];
        }
        let [by, share] = integers::worths(s, s.add(total[2], total[3]));
        for t in (from..to).step_by(2) {
            let mut two = [s.zero(); 2];
            for i in 0..2.min(to - t) {
                two[i] = s.mul(s.load(scores.add((t + i) * WIDTH)), by);
            }
            kind.put_two(s, weights, t, WIDTH, two);
        }
        [factor, share]
    }
}

/// Weights of tokens `j`, `j + 1` and every 16th after them, and the sums of both. Where numbers are whole weights take the places
/// of scores, times what values are worth, and the other two sums are those of that.
///
/// # Safety
/// As [`weigh`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn columns<S: Lanes, K: Kind<S>>(
    s: S,
    kind: K,
    scores: *mut f32,
    ((from, to), j): ((usize, usize), usize),
    bounds: Option<(S::F, S::F)>,
    base: S::F,
    worth: *const f32,
    weights: *mut f32,
) -> [S::F; 4] {
    let log2e = s.splat(std::f32::consts::LOG2_E);
    let mut sums = [s.zero(); 4];
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
                    if K::WHOLE {
                        two[i] = s.mul(two[i], s.splat(*worth.add(t + i)));
                        sums[2 + i] = s.add(sums[2 + i], two[i]);
                        s.store(scores.add((t + i) * WIDTH), two[i]);
                    }
                }
            }
            if !K::WHOLE {
                kind.put_two(s, weights, t, WIDTH, two);
            }
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
