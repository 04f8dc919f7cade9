//! Products of pairs of bf16 (`vdpbf16ps`): two channels of a score, or two tokens of a mixed value, at a time.
//!
//! As with f32, a score is one chain over the channels in order and a mixed value one chain over the tokens in
//! order, so that rows that read blocks as they are stored and rows that read tiles get the same bits.

use std::arch::x86_64::*;

use half::f16;

use super::super::{LANES, Part, ROWS};
use super::{Fetch, by_rows};

/// A register of 32 f16 in bf16.
///
/// # Safety
/// The processor must have AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
#[inline]
fn narrowed(halves: __m512i) -> __m512i {
    let low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves));
    integers(_mm512_cvtne2ps_pbh(high, low))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn integers(v: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes of any bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(v) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: both are 64 bytes of any bits.
    let [a, b] = [a, b].map(|v| unsafe { std::mem::transmute::<__m512i, __m512bh>(v) });
    _mm512_dpbf16_ps(sum, a, b)
}

/// Four pairs of channels of 16 tokens: register p is pair p of all of them. Tokens from `filled` on are the last
/// filled one again.
///
/// # Safety
/// The processor must have AVX-512; `rows` points to `filled.min(16)` rows of 4 pairs every `stride`; `filled` > 0.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
#[inline]
unsafe fn transposed(rows: *const u32, stride: usize, filled: usize) -> [__m512i; 4] {
    // Quarter q of the i-th register is token 4 q + i.
    let mut a = [_mm512_setzero_si512(); 4];
    for i in 0..4 {
        let mut quarters = [_mm_setzero_si128(); 4];
        for q in 0..4 {
            let row = (4 * q + i).min(filled - 1);
            // SAFETY: a row below `filled`, by contract.
            quarters[q] = unsafe { _mm_loadu_si128(rows.add(row * stride).cast()) };
        }
        let v = _mm512_broadcast_i32x4(quarters[0]);
        let v = _mm512_mask_broadcast_i32x4(v, 0x00f0, quarters[1]);
        let v = _mm512_mask_broadcast_i32x4(v, 0x0f00, quarters[2]);
        a[i] = _mm512_mask_broadcast_i32x4(v, 0xf000, quarters[3]);
    }
    let (x, y) = (_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpacklo_epi32(a[2], a[3]));
    let (z, w) = (_mm512_unpackhi_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[2], a[3]));
    [
        _mm512_unpacklo_epi64(x, y),
        _mm512_unpackhi_epi64(x, y),
        _mm512_unpacklo_epi64(z, w),
        _mm512_unpackhi_epi64(z, w),
    ]
}

/// Keys in pairs of channels: `out`: `[dim / 2, tokens]`. `rows`: `[filled, dim]` of f16 if `HALVES`, else of bf16;
/// `dim` is a multiple of 8.
pub(in crate::attention) fn pair_keys<const HALVES: bool>(
    rows: &[u16],
    (filled, dim): (usize, usize),
    tokens: usize,
    out: &mut [u32],
) {
    assert!(dim.is_multiple_of(8) && filled > 0 && filled <= tokens);
    assert!(tokens.is_multiple_of(LANES) && rows.len() >= filled * dim);
    assert!(out.len() >= dim / 2 * tokens);
    for t in (0..filled).step_by(LANES) {
        for c in (0..dim).step_by(8) {
            // SAFETY: the processor has AVX-512 with BF16; rows are not read past the last filled one, and four
            // rows of a vector from (c / 2, t) on are inside `out`.
            unsafe {
                let from = rows.as_ptr().add(t * dim + c).cast();
                let to = out.as_mut_ptr().add(c / 2 * tokens + t);
                pair_8_channels::<HALVES>(from, dim / 2, filled - t, to, tokens);
            }
        }
    }
}

/// # Safety
/// As for [`transposed`]; `out` points to four rows of 16 words every `tokens`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn pair_8_channels<const HALVES: bool>(
    rows: *const u32,
    stride: usize,
    filled: usize,
    out: *mut u32,
    tokens: usize,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        for (p, pairs) in transposed(rows, stride, filled).into_iter().enumerate() {
            let pairs = if HALVES { narrowed(pairs) } else { pairs };
            _mm512_storeu_si512(out.add(p * tokens).cast(), pairs);
        }
    }
}

/// Two tokens' vectors as they are stored, paired.
pub(in crate::attention) trait Paired: Copy {
    /// NV vectors (1, or 4) of pairs: `first`'s elements in the low halves, `second`'s, if it is there, in the
    /// others.
    ///
    /// # Safety
    /// The processor must have AVX-512 with BF16; both point to NV vectors, `second` only if it is there.
    unsafe fn load<const NV: usize>(
        first: *const Self,
        second: *const Self,
        both: bool,
    ) -> [__m512i; NV];
}

/// Words of two registers in turn, from the first half or from the second.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn in_turn(second_half: bool) -> __m512i {
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let first = _mm512_add_epi32(lanes, _mm512_set1_epi32(if second_half { 16 } else { 0 }));
    _mm512_or_si512(first, _mm512_slli_epi32::<16>(_mm512_add_epi32(first, _mm512_set1_epi32(32))))
}

impl Paired for f16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    #[inline]
    unsafe fn load<const NV: usize>(
        first: *const Self,
        second: *const Self,
        both: bool,
    ) -> [__m512i; NV] {
        let mask = if both { !0 } else { 0 };
        let mut out = [_mm512_setzero_si512(); NV];
        // SAFETY: forwarded from the caller; what is masked is not read.
        unsafe {
            if NV == 1 {
                let a = _mm512_castsi256_si512(_mm256_loadu_si256(first.cast()));
                let b = _mm256_maskz_loadu_epi16(mask as __mmask16, second.cast());
                let both = _mm512_permutex2var_epi16(a, in_turn(false), _mm512_castsi256_si512(b));
                out[0] = narrowed(both);
            } else {
                for i in 0..NV / 2 {
                    let a = _mm512_loadu_si512(first.add(32 * i).cast());
                    let b = _mm512_maskz_loadu_epi16(mask, second.add(32 * i).cast());
                    out[2 * i] = narrowed(_mm512_permutex2var_epi16(a, in_turn(false), b));
                    out[2 * i + 1] = narrowed(_mm512_permutex2var_epi16(a, in_turn(true), b));
                }
            }
        }
        out
    }
}

impl Paired for f32 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    #[inline]
    unsafe fn load<const NV: usize>(
        first: *const Self,
        second: *const Self,
        both: bool,
    ) -> [__m512i; NV] {
        let mask = if both { !0 } else { 0 };
        let mut out = [_mm512_setzero_si512(); NV];
        // The words of a register's halves in turn.
        let turn = _mm512_and_si512(in_turn(false), _mm512_set1_epi32(0x000f_001f));
        let turn = _mm512_or_si512(turn, _mm512_set1_epi32(0x0010_0000));
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: forwarded from the caller; what is masked is not read.
            unsafe {
                let a = _mm512_loadu_ps(first.add(LANES * i));
                let b = _mm512_maskz_loadu_ps(mask, second.add(LANES * i));
                *out = _mm512_permutexvar_epi16(turn, integers(_mm512_cvtne2ps_pbh(b, a)));
            }
        }
        out
    }
}

/// Values in pairs of tokens: `out`: `[⌈filled / 2⌉, dim]`. `rows`: `[filled, dim]`; `dim` in whole vectors.
pub(in crate::attention) fn pair_values<T: Paired>(
    rows: &[T],
    (filled, dim): (usize, usize),
    out: &mut [u32],
) {
    assert!(dim.is_multiple_of(LANES) && rows.len() >= filled * dim);
    assert!(out.len() >= filled.div_ceil(2) * dim);
    for t in (0..filled).step_by(2) {
        let both = t + 1 < filled;
        let mut d = 0;
        while d < dim {
            let four = d + 4 * LANES <= dim;
            // SAFETY: the processor has AVX-512 with BF16; one or four vectors from channel d on are inside row t, and
            // inside the next if `both`, and their places inside `out`.
            unsafe {
                let first = rows.as_ptr().add(t * dim + d);
                let (second, to) = (first.wrapping_add(dim), out.as_mut_ptr().add(t / 2 * dim + d));
                if four {
                    put_pairs::<T, 4>(first, second, both, to);
                } else {
                    put_pairs::<T, 1>(first, second, both, to);
                }
            }
            d += if four { 4 * LANES } else { LANES };
        }
    }
}

/// # Safety
/// As for [`Paired::load`]; `to` takes NV vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn put_pairs<T: Paired, const NV: usize>(
    first: *const T,
    second: *const T,
    both: bool,
    to: *mut u32,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        for (i, pairs) in T::load::<NV>(first, second, both).into_iter().enumerate() {
            _mm512_storeu_si512(to.add(LANES * i).cast(), pairs);
        }
    }
}

/// Rounds whole vectors to bf16.
pub(in crate::attention) fn round(from: &[f32], to: &mut [u16]) {
    assert!(from.len() <= to.len() && from.len().is_multiple_of(LANES));
    // SAFETY: the processor has AVX-512 with BF16, and `to` is as long.
    unsafe { round_vectors(from.as_ptr(), from.len() / LANES, to.as_mut_ptr()) }
}

/// # Safety
/// The processor must have AVX-512 with BF16; `from` and `to` point to so many vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
unsafe fn round_vectors(from: *const f32, vectors: usize, to: *mut u16) {
    for i in 0..vectors {
        // SAFETY: forwarded from the caller.
        unsafe { put_rounded(to.add(i * LANES), _mm512_loadu_ps(from.add(i * LANES))) };
    }
}

/// Rounds a vector to bf16.
///
/// # Safety
/// The processor must have AVX-512 with BF16; `to` takes 16 elements.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub(super) unsafe fn put_rounded(to: *mut u16, v: __m512) {
    // SAFETY: by contract; both are 32 bytes of any bits.
    unsafe {
        let bits = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
        _mm256_storeu_si256(to.cast(), bits);
    }
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

/// Values as [`pair_values`] leaves them.
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

/// The same with values as [`pair_values`] leaves them.
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
