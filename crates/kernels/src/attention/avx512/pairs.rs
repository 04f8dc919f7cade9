//! Products of pairs of bf16 (`vdpbf16ps`): two channels of a score, or two tokens of a mixed value, at a time.
//!
//! As with f32, a score is one chain over the channels in order and a mixed value one chain over the tokens in
//! order, so that rows that read blocks as they are stored and rows that read tiles get the same bits.

use std::arch::x86_64::*;

use half::f16;

use super::super::{LANES, Part, ROWS};
use super::pair_rows::{Paired, narrowed, transposed};
use super::{Fetch, by_rows};

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: both are 64 bytes of any bits.
    let [a, b] = [a, b].map(|v| unsafe { std::mem::transmute::<__m512i, __m512bh>(v) });
    _mm512_dpbf16_ps(sum, a, b)
}

/// As [`super::scores_of_stored`], with `queries` in pairs of channels: `[n, dim / 2]`.
pub(in crate::attention) fn scores_of_stored_pairs(
    part: &Part,
    keys: &[f16],
    queries: &[u32],
    scores: &mut [f32],
    next: &[u8],
) {
    let &Part { dim, n, tokens, vectors, .. } = part;
    assert!(dim.is_multiple_of(8) && vectors.1 * LANES <= tokens);
    assert!(keys.len() >= vectors.1.next_multiple_of(2) * LANES * dim);
    assert!(queries.len() >= n * dim / 2 && scores.len() >= n * tokens);
    let mut next = Fetch::new(next, vectors.1.div_ceil(2) * dim / 8);
    for pair in vectors.0 / 2..vectors.1.div_ceil(2) {
        let t = pair * 2 * LANES;
        by_rows!(n, [8, 7, 6, 5, 4, 3, 2, 1], |R, first| {
            // SAFETY: the processor has AVX-512 with BF16; the asserts cover 2 · LANES keys from `t` on, rows
            // `first .. first + R` of queries, and of scores one vector, or two if `tokens` has room for them.
            unsafe {
                let keys = keys.as_ptr().add(t * dim).cast();
                let queries = queries.as_ptr().add(first * dim / 2);
                let scores = scores.as_mut_ptr().add(first * tokens + t);
                let both = t + LANES < tokens;
                stored_tile::<R>(dim / 2, keys, queries, scores, tokens, both, &mut next);
            }
        });
    }
}

/// R rows against 32 keys of `pairs` pairs of channels.
///
/// # Safety
/// The processor must have AVX-512 with BF16; `keys` points to 32 · `pairs` pairs of f16, `queries` to R · `pairs`
/// pairs of bf16, `scores` to R rows of 16 floats, or 32, every `stride`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn stored_tile<const R: usize>(
    pairs: usize,
    keys: *const u32,
    queries: *const u32,
    scores: *mut f32,
    stride: usize,
    both: bool,
    next: &mut Fetch,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for c in (0..pairs).step_by(4) {
            next.step();
            let lows = transposed(keys.add(c), pairs, LANES);
            let highs = transposed(keys.add(c + LANES * pairs), pairs, LANES);
            for i in 0..4 {
                let (low, high) = (narrowed(lows[i]), narrowed(highs[i]));
                for r in 0..R {
                    let q = _mm512_set1_epi32(*queries.add(r * pairs + c + i) as i32);
                    sums[r][0] = dot(sums[r][0], low, q);
                    sums[r][1] = dot(sums[r][1], high, q);
                }
            }
        }
        for r in 0..R {
            _mm512_storeu_ps(scores.add(r * stride), sums[r][0]);
            if both {
                _mm512_storeu_ps(scores.add(r * stride + LANES), sums[r][1]);
            }
        }
    }
}

/// Scores against keys in pairs of channels.
pub(in crate::attention) fn scores_of_pairs(
    part: &Part,
    keys: &[u32],
    queries: &[u32],
    scores: &mut [f32],
) {
    let &Part { dim, n, tokens, vectors, .. } = part;
    let pairs = dim / 2;
    assert!(vectors.1 * LANES <= tokens && keys.len() >= tokens * pairs);
    assert!(queries.len() >= n * pairs && scores.len() >= n * tokens);
    let mut v = vectors.0;
    while v < vectors.1 {
        let two = v + 2 <= vectors.1;
        by_rows!(n, [12, 8, 4, 2, 1], |R, first| {
            // SAFETY: the processor has AVX-512 with BF16; the asserts cover `pairs` rows of `tokens` keys, of which
            // one or two vectors from `v` on are read, and rows `first .. first + R` of queries and scores.
            unsafe {
                let keys = keys.as_ptr().add(v * LANES);
                let queries = queries.as_ptr().add(first * pairs);
                let scores = scores.as_mut_ptr().add(first * tokens + v * LANES);
                if two {
                    scores_tile::<R, 2>(pairs, keys, queries, scores, tokens);
                } else {
                    scores_tile::<R, 1>(pairs, keys, queries, scores, tokens);
                }
            }
        });
        v += 2;
    }
}

/// R rows against NV vectors of keys.
///
/// # Safety
/// The processor must have AVX-512 with BF16; `keys` points to `pairs` rows, `scores` to R rows, of NV vectors every
/// `stride`, `queries` to R · `pairs` pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn scores_tile<const R: usize, const NV: usize>(
    pairs: usize,
    keys: *const u32,
    queries: *const u32,
    scores: *mut f32,
    stride: usize,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); NV]; R];
        for c in 0..pairs {
            let mut ks = [_mm512_setzero_si512(); NV];
            for v in 0..NV {
                ks[v] = _mm512_loadu_si512(keys.add(c * stride + v * LANES).cast());
            }
            for r in 0..R {
                let q = _mm512_set1_epi32(*queries.add(r * pairs + c) as i32);
                for v in 0..NV {
                    sums[r][v] = dot(sums[r][v], ks[v], q);
                }
            }
        }
        for r in 0..R {
            for v in 0..NV {
                _mm512_storeu_ps(scores.add(r * stride + v * LANES), sums[r][v]);
            }
        }
    }
}

/// Where values come from in pairs of tokens.
pub(in crate::attention) trait PairedValues: Copy {
    /// As [`Paired::load`]: pair `pair` of the tokens, from channel `d` on; the second token is there if `both`.
    ///
    /// # Safety
    /// The processor must have AVX-512 with BF16; the pair and NV vectors exist.
    unsafe fn load<const NV: usize>(
        self,
        dim: usize,
        pair: usize,
        d: usize,
        both: bool,
    ) -> [__m512i; NV];
}

/// Values as they are stored: `[tokens, dim]`.
#[derive(Clone, Copy)]
struct Stored(*const f16);

impl PairedValues for Stored {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    #[inline]
    unsafe fn load<const NV: usize>(
        self,
        dim: usize,
        pair: usize,
        d: usize,
        both: bool,
    ) -> [__m512i; NV] {
        // SAFETY: forwarded from the caller.
        unsafe {
            let first = self.0.add(2 * pair * dim + d);
            <f16 as Paired>::load::<NV>(first, first.wrapping_add(dim), both)
        }
    }
}

/// Values as [`super::pair_values`] leaves them.
#[derive(Clone, Copy)]
struct Tiled(*const u32);

impl PairedValues for Tiled {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    #[inline]
    unsafe fn load<const NV: usize>(
        self,
        dim: usize,
        pair: usize,
        d: usize,
        _both: bool,
    ) -> [__m512i; NV] {
        let mut out = [_mm512_setzero_si512(); NV];
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: forwarded from the caller.
            *out = unsafe { _mm512_loadu_si512(self.0.add(pair * dim + d + LANES * i).cast()) };
        }
        out
    }
}

/// [`super::mix`] with weights as [`super::weights`] leaves them in bf16, and values as they are stored; `next` is
/// fetched meanwhile.
pub(in crate::attention) fn mix_stored_pairs(
    part: &Part,
    weights: &[u32],
    factors: &[f32; ROWS],
    values: &[f16],
    sums: &mut [f32],
    stride: usize,
    next: &[u8],
) {
    assert!(values.len() >= part.to * part.dim);
    // SAFETY: `to` tokens are there.
    unsafe { mix(part, weights, factors, Stored(values.as_ptr()), sums, stride, next) }
}

/// The same with values as [`super::pair_values`] leaves them.
pub(in crate::attention) fn mix_pairs(
    part: &Part,
    weights: &[u32],
    factors: &[f32; ROWS],
    values: &[u32],
    sums: &mut [f32],
    stride: usize,
) {
    assert!(values.len() >= part.to.div_ceil(2) * part.dim);
    // SAFETY: all pairs of `to` tokens are there.
    unsafe { mix(part, weights, factors, Tiled(values.as_ptr()), sums, stride, &[]) }
}

/// # Safety
/// The processor has AVX-512 with BF16; `values` has `part.to` tokens of `part.dim` channels.
unsafe fn mix<V: PairedValues>(
    part: &Part,
    weights: &[u32],
    factors: &[f32; ROWS],
    values: V,
    sums: &mut [f32],
    stride: usize,
    next: &[u8],
) {
    let &Part { dim, n, tokens, vectors, from, to } = part;
    assert!(dim.is_multiple_of(LANES) && n > 0 && stride >= dim && to <= tokens);
    assert!(vectors.0 * LANES <= from && weights.len() >= n * tokens);
    assert!(sums.len() >= (n - 1) * stride + dim);
    let shape = Shape { dim, tokens, from, to, stride };
    let mut next = Fetch::new(next, (to.div_ceil(2) - from / 2) * dim.div_ceil(4 * LANES));
    let mut d = 0;
    while d < dim {
        let four = d + 4 * LANES <= dim;
        by_rows!(n, [6, 4, 3, 2, 1], |R, first| {
            // SAFETY: by contract; the asserts cover tokens `from .. to` of one or four vectors from channel `d` on,
            // and rows `first .. first + R` of weights (a row's first is that of vector `vectors.0`) and sums.
            unsafe {
                let weights = weights.as_ptr().add(first * tokens + vectors.0 * LANES);
                let weights = weights.sub(vectors.0 * LANES / 2);
                let factors = factors.as_ptr().add(first);
                let sums = sums.as_mut_ptr().add(first * stride + d);
                if four {
                    mix_tile::<V, R, 4>(&shape, weights, factors, (values, d), sums, &mut next);
                } else {
                    mix_tile::<V, R, 1>(&shape, weights, factors, (values, d), sums, &mut next);
                }
            }
        });
        d += if four { 4 * LANES } else { LANES };
    }
}

struct Shape {
    dim: usize,
    tokens: usize,
    from: usize,
    to: usize,
    stride: usize,
}

/// R rows against NV vectors of values from channel `d` on.
///
/// # Safety
/// The processor must have AVX-512 with BF16; pointers are good for the tokens, rows and vectors that shape, R and NV
/// say, `weights` for pairs of tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn mix_tile<V: PairedValues, const R: usize, const NV: usize>(
    shape: &Shape,
    weights: *const u32,
    factors: *const f32,
    (values, d): (V, usize),
    sums: *mut f32,
    next: &mut Fetch,
) {
    let &Shape { dim, tokens, from, to, stride } = shape;
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); NV]; R];
        for r in 0..R {
            let factor = _mm512_set1_ps(*factors.add(r));
            for v in 0..NV {
                let sum = _mm512_loadu_ps(sums.add(r * stride + v * LANES));
                acc[r][v] = _mm512_mul_ps(sum, factor);
            }
        }
        for pair in from / 2..to.div_ceil(2) {
            next.step();
            let vs = values.load::<NV>(dim, pair, d, 2 * pair + 1 < to);
            for r in 0..R {
                let weight = _mm512_set1_epi32(*weights.add(r * tokens + pair) as i32);
                for v in 0..NV {
                    acc[r][v] = dot(acc[r][v], vs[v], weight);
                }
            }
        }
        for r in 0..R {
            for v in 0..NV {
                _mm512_storeu_ps(sums.add(r * stride + v * LANES), acc[r][v]);
            }
        }
    }
}
