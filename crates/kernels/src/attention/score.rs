//! Query rows in the form that products read, and their products with keys.

use half::f16;

use super::fetch::Fetch;
use super::kind::{Kind, whole};
use super::numbers::by_numbers;
use super::{LANES, Part, ROWS};
use crate::simd::Lanes;
use crate::simd::tile::{self, Matrix, accumulate, by_rows, tiles};

/// Rotations of rows.
#[derive(Clone, Copy)]
pub(super) struct Turn<'a> {
    /// Number of the first row.
    pub(super) first: usize,
    /// Rows that share a token.
    pub(super) group: usize,
    /// Cosines and sines, `[tokens, dim / 2]` each, from row 0's token on; if none, rows stay as they are.
    pub(super) angles: Option<(&'a [f32], &'a [f32])>,
}

by_numbers! {
    /// Rotates rows `[n, dim]` of a head's queries, times their factors where numbers are whole, into words: `[n, dim / depth]`.
    pub(super) fn turn(rows: &[f32], dim: usize, by: Turn<'_>, factors: &[f32; ROWS], out: &mut [f32]) = turn_body;
}

#[inline(always)]
fn turn_body<S: Lanes>(
    s: S,
    kind: impl Kind<S>,
    rows: &[f32],
    dim: usize,
    by: Turn<'_>,
    factors: &[f32; ROWS],
    out: &mut [f32],
) {
    let (words, half, n) = (dim / kind.depth(), dim / 2, rows.len() / dim);
    assert!(dim.is_multiple_of(kind.depth()) && out.len() >= n * words);
    assert!(n <= ROWS);
    let (rows, out) = (rows.as_ptr(), out.as_mut_ptr());
    let Some((cos, sin)) = by.angles else {
        for (r, i) in (0..n).flat_map(|r| (0..dim).step_by(LANES).map(move |i| (r, i))) {
            let left = LANES.min(dim - i);
            // SAFETY: elements below `dim` of row `r`.
            unsafe {
                let x = s.load_first(rows.add(r * dim + i), left);
                let [x] = sized(s, kind, [x], s.splat(factors[r]));
                kind.put(s, out.add(r * words), i, x, left);
            }
        }
        return;
    };
    let (mut token, mut first) = (by.first / by.group, 0);
    let mut end = by.group - by.first % by.group;
    while first < n {
        let angles = token * half..(token + 1) * half;
        let (cos, sin) = (cos[angles.clone()].as_ptr(), sin[angles].as_ptr());
        // SAFETY: elements below `half` of angles, and below `dim` of rows that share the token.
        unsafe {
            let same = first..end.min(n);
            let whole = half - half % LANES;
            for i in (0..whole).step_by(LANES) {
                let angle = [s.load(cos.add(i)), s.load(sin.add(i))];
                for r in same.clone() {
                    let (row, out) = (rows.add(r * dim + i), out.add(r * words));
                    let pair = turned(s, [s.load(row), s.load(row.add(half))], angle);
                    let [x, y] = sized(s, kind, pair, s.splat(factors[r]));
                    kind.put(s, out, i, x, LANES);
                    kind.put(s, out, half + i, y, LANES);
                }
            }
            let left = half - whole;
            for r in same.take(if left > 0 { n } else { 0 }) {
                let angle =
                    [s.load_first(cos.add(whole), left), s.load_first(sin.add(whole), left)];
                let (row, out) = (rows.add(r * dim + whole), out.add(r * words));
                let pair = [s.load_first(row, left), s.load_first(row.add(half), left)];
                let [x, y] = sized(s, kind, turned(s, pair, angle), s.splat(factors[r]));
                kind.put(s, out, whole, x, left);
                kind.put(s, out, half + whole, y, left);
            }
        }
        (token, first, end) = (token + 1, end, end + by.group);
    }
}

/// Pairs of channels by an angle's cosine and sine.
#[inline(always)]
pub(crate) fn turned<S: Lanes>(s: S, [a, b]: [S::F; 2], [cos, sin]: [S::F; 2]) -> [S::F; 2] {
    [s.fms(a, cos, s.mul(b, sin)), s.fma(b, cos, s.mul(a, sin))]
}

/// Vectors times what makes them whole numbers, where they are to be.
#[inline(always)]
pub(super) fn sized<S: Lanes, K: Kind<S>, const N: usize>(
    s: S,
    _kind: K,
    mut v: [S::F; N],
    factor: S::F,
) -> [S::F; N] {
    if K::WHOLE {
        for i in 0..N {
            v[i] = s.mul(v[i], factor);
        }
    }
    v
}

/// Scores from sums of products: integers times what keys and queries are worth.
#[inline(always)]
pub(super) fn worth<S: Lanes, K: Kind<S>>(
    s: S,
    _kind: K,
    sum: S::F,
    keys: S::F,
    queries: S::F,
) -> S::F {
    if K::WHOLE { s.mul(s.mul(s.from_int(s.bits(sum)), keys), queries) } else { sum }
}

/// [`worth`] of a tile: NV vectors of tokens, whose keys are worth what is at `keys`, for R rows.
///
/// # Safety
/// NV vectors of keys' worth are readable, and R queries' are, where numbers are whole.
#[inline(always)]
unsafe fn worths<S: Lanes, K: Kind<S>, const R: usize, const NV: usize>(
    s: S,
    kind: K,
    mut sums: [[S::F; NV]; R],
    keys: *const f32,
    queries: *const f32,
) -> [[S::F; NV]; R] {
    if K::WHOLE {
        for r in 0..R {
            for v in 0..NV {
                // SAFETY: by contract.
                let [key, query] =
                    unsafe { [s.load(keys.add(v * LANES)), s.splat(*queries.add(r))] };
                sums[r][v] = worth(s, kind, sums[r][v], key, query);
            }
        }
    }
    sums
}

/// Keys that scores are computed from.
#[derive(Clone, Copy)]
pub(super) enum Keys<'a> {
    /// As they are stored, or as integers, `[tokens, dim]`: whole vectors of tokens are there. Bytes to fetch meanwhile.
    Stored(&'a [f16], &'a [u8]),
    /// Transposed, in words: `[dim / depth, tokens]`.
    Tile(&'a [f32]),
}

by_numbers! {
    /// Scores of a part's rows in its vectors: `scores[i, t] = Σ_c queries[i, c] · keys[c, t]`. `queries`: what
    /// [`turn`] gives. `by`: what whole keys and queries are worth.
    pub(super) fn score(part: &Part, keys: Keys<'_>, by: (&[f32], &[f32; ROWS]), queries: &[f32], scores: &mut [f32]) = score_body;
}

#[inline(always)]
fn score_body<S: Lanes>(
    s: S,
    kind: impl Kind<S>,
    part: &Part,
    keys: Keys<'_>,
    (key_worth, worth): (&[f32], &[f32; ROWS]),
    queries: &[f32],
    scores: &mut [f32],
) {
    let &Part { dim, n, tokens, vectors, .. } = part;
    let words = dim / kind.depth();
    assert!(vectors.1 * LANES <= tokens && queries.len() >= n * words);
    assert!(scores.len() >= n * tokens && n <= ROWS);
    assert!(!whole(s, kind) || key_worth.len() >= tokens);
    let (queries, scores) = (queries.as_ptr(), scores.as_mut_ptr());
    let key_worth = |v: usize| key_worth.as_ptr().wrapping_add(v * LANES);
    let worth = |first: usize| worth.as_ptr().wrapping_add(first);
    match keys {
        Keys::Stored(keys, next) => {
            assert!(dim.is_multiple_of(8) && keys.len() >= vectors.1 * LANES * dim);
            let most = if S::WIDE { 2 } else { 1 };
            let mut next = Fetch::new(next, (vectors.1 - vectors.0).div_ceil(most) * dim / 8);
            let mut v = vectors.0;
            while v < vectors.1 {
                // SAFETY: the asserts cover one or two vectors of keys from `v` on, and rows `first .. first + R` of
                // queries and of scores.
                let keys = unsafe { (keys.as_ptr().add(v * LANES * dim), dim) };
                if most == 2 && v + 2 <= vectors.1 {
                    // SAFETY: as said above.
                    by_rows!(S, 2, n, [8, 7, 6, 5, 4, 3, 2, 1], |R, first| unsafe {
                        let queries = queries.add(first * words);
                        let sums = kind.stored_keys::<R, 2>(s, keys, queries, &mut next);
                        let sums = worths(s, kind, sums, key_worth(v), worth(first));
                        tile::store(s, sums, scores.add(first * tokens + v * LANES), tokens);
                    });
                    v += 2;
                } else {
                    // SAFETY: as said above.
                    by_rows!(S, 1, n, [8, 7, 6, 5, 4, 3, 2, 1], |R, first| unsafe {
                        let queries = queries.add(first * words);
                        let sums = kind.stored_keys::<R, 1>(s, keys, queries, &mut next);
                        let sums = worths(s, kind, sums, key_worth(v), worth(first));
                        tile::store(s, sums, scores.add(first * tokens + v * LANES), tokens);
                    });
                    v += 1;
                }
            }
        }
        Keys::Tile(keys) => {
            assert!(keys.len() >= tokens * words);
            // SAFETY: the assert covers `words` rows of `tokens` keys, of which NV vectors from `at` on are read, and
            // the others rows `first .. first + R` of queries and scores.
            tiles!(S, n, vectors.1 - vectors.0, |R, first, NV, v| unsafe {
                let at = (vectors.0 + v) * LANES;
                let keys = Matrix { from: keys.as_ptr().add(at), step: tokens, pitch: LANES };
                let queries = (queries.add(first * words), words, 1);
                let sums = [[s.zero(); NV]; R];
                let sums = accumulate((s, kind), keys, (0, words), queries, &mut (), sums);
                let sums = worths(s, kind, sums, key_worth(vectors.0 + v), worth(first));
                tile::store(s, sums, scores.add(first * tokens + at), tokens);
            });
        }
    }
}
