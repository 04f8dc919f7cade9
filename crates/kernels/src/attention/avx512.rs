//! The AVX-512 way: as [`super::portable`], bit for bit, in register blocks.

use std::arch::x86_64::*;

use half::f16;

use super::exp2::{LEAST, POLYNOMIAL};
use super::{LANES, Part, ROWS};
use crate::softmax::OnlineSoftmax;

/// Runs `$call` with the constant `$R` set to each of the sizes, largest first, while as many rows are
/// left; 1 is among them.
macro_rules! by_rows {
    ($rows:expr, [$($size:literal),*], |$R:ident, $first:ident| $call:expr) => {{
        let rows = $rows;
        let mut $first = 0;
        $(while rows - $first >= $size {
            const $R: usize = $size;
            $call;
            $first += $size;
        })*
    }};
}

/// Scores against keys as stored, transposed in registers 32 at a time; `next` is fetched meanwhile. For at most
/// 8 rows, and a dimension of whole vectors.
pub(super) fn scores_of_stored(
    part: &Part,
    keys: &[f16],
    queries: &[f32],
    scores: &mut [f32],
    next: &[u8],
) {
    let &Part { dim, n, tokens, vectors, .. } = part;
    assert!(dim.is_multiple_of(8) && vectors.1 * LANES <= tokens);
    assert!(keys.len() >= vectors.1.next_multiple_of(2) * LANES * dim);
    assert!(queries.len() >= n * dim && scores.len() >= n * tokens);
    let mut next = Fetch::new(next, vectors.1.div_ceil(2) * dim / 8);
    for pair in vectors.0 / 2..vectors.1.div_ceil(2) {
        let t = pair * 2 * LANES;
        by_rows!(n, [8, 7, 6, 5, 4, 3, 2, 1], |R, first| {
            // SAFETY: the processor has AVX-512; the asserts cover 2 · LANES keys from `t` on, rows
            // `first .. first + R` of queries, and of scores one vector, or two if `tokens` has room for them.
            unsafe {
                let keys = keys.as_ptr().add(t * dim).cast();
                let queries = queries.as_ptr().add(first * dim);
                let scores = scores.as_mut_ptr().add(first * tokens + t);
                let both = t + LANES < tokens;
                stored_tile::<R>(dim, keys, queries, scores, tokens, both, &mut next);
            }
        });
    }
}

/// Cache lines to fetch, some at every step: into L2, which takes twice as many at a time as L1 (12 and 22 GB/s
/// here), and leaves L1 to the block in hand.
pub(super) struct Fetch {
    at: *const i8,
    lines: usize,
    per_step: usize,
}

impl Fetch {
    pub(super) fn new(bytes: &[u8], steps: usize) -> Self {
        let lines = bytes.len().div_ceil(64);
        Self { at: bytes.as_ptr().cast(), lines, per_step: lines.div_ceil(steps.max(1)) }
    }

    #[inline(always)]
    pub(super) fn step(&mut self) {
        let now = self.per_step.min(self.lines);
        for _ in 0..now {
            // SAFETY: a hint, which reads nothing; the instruction is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at) };
            self.at = self.at.wrapping_add(64);
        }
        self.lines -= now;
    }
}

/// R rows against 32 keys of `dim` channels: 8 channels at a time are transposed. Scores of the first 16, or of
/// `both` halves, are stored.
///
/// # Safety
/// The processor must have AVX-512; `keys` points to 32 · `dim` f16, `queries` to R · `dim` floats, `scores` to R
/// rows of 16 floats, or 32, every `stride`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn stored_tile<const R: usize>(
    dim: usize,
    keys: *const u16,
    queries: *const f32,
    scores: *mut f32,
    stride: usize,
    both: bool,
    next: &mut Fetch,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let mut c = 0;
        while c < dim {
            next.step();
            let lows = transposed(keys.add(c), dim);
            let highs = transposed(keys.add(c + LANES * dim), dim);
            for i in 0..8 {
                let low = _mm512_cvtph_ps(lows[i]);
                let high = _mm512_cvtph_ps(highs[i]);
                for r in 0..R {
                    let q = _mm512_set1_ps(*queries.add(r * dim + c + i));
                    sums[r][0] = _mm512_fmadd_ps(q, low, sums[r][0]);
                    sums[r][1] = _mm512_fmadd_ps(q, high, sums[r][1]);
                }
            }
            c += 8;
        }
        for r in 0..R {
            _mm512_storeu_ps(scores.add(r * stride), sums[r][0]);
            if both {
                _mm512_storeu_ps(scores.add(r * stride + LANES), sums[r][1]);
            }
        }
    }
}

/// 8 channels of 16 tokens: element `t` of the `c`-th result is channel `c` of token `t`.
///
/// # Safety
/// The processor must have AVX-512; `keys` points to 8 f16 of the first of 16 rows, `dim` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
unsafe fn transposed(keys: *const u16, dim: usize) -> [__m256i; 8] {
    // The halves of the i-th register are tokens i and 8 + i.
    let mut a = [_mm256_setzero_si256(); 8];
    for i in 0..8 {
        // SAFETY: rows up to 15 of 8 elements each, by contract.
        unsafe {
            let row = keys.add(i * dim);
            let low = _mm256_castsi128_si256(_mm_loadu_si128(row.cast()));
            a[i] = _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(row.add(8 * dim).cast()));
        }
    }
    // 8 × 8 elements in each half: pairs of tokens × channels 0-3 and 4-7, ...
    let mut b = a;
    for i in 0..4 {
        b[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    // ... fours × channels 01, 23, 45, 67, ...
    for i in 0..2 {
        let (x, y) = ([b[4 * i], b[4 * i + 1]], [b[4 * i + 2], b[4 * i + 3]]);
        for half in 0..2 {
            a[4 * i + 2 * half] = _mm256_unpacklo_epi32(x[half], y[half]);
            a[4 * i + 2 * half + 1] = _mm256_unpackhi_epi32(x[half], y[half]);
        }
    }
    // ... and eights × one channel.
    for i in 0..4 {
        b[2 * i] = _mm256_unpacklo_epi64(a[i], a[4 + i]);
        b[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[4 + i]);
    }
    b
}

/// Scores against transposed keys.
pub(super) fn scores_of_tile(part: &Part, keys: &[f32], queries: &[f32], scores: &mut [f32]) {
    let &Part { dim, n, tokens, vectors, .. } = part;
    assert!(vectors.1 * LANES <= tokens && keys.len() >= tokens * dim);
    assert!(queries.len() >= n * dim && scores.len() >= n * tokens);
    let mut v = vectors.0;
    while v < vectors.1 {
        let two = v + 2 <= vectors.1;
        by_rows!(n, [12, 8, 4, 2, 1], |R, first| {
            // SAFETY: the processor has AVX-512; the asserts cover `dim` rows of `tokens` keys, of which one or
            // two vectors from `v` on are read, and rows `first .. first + R` of queries and scores.
            unsafe {
                let keys = keys.as_ptr().add(v * LANES);
                let queries = queries.as_ptr().add(first * dim);
                let scores = scores.as_mut_ptr().add(first * tokens + v * LANES);
                if two {
                    scores_tile::<R, 2>(dim, keys, queries, scores, tokens);
                } else {
                    scores_tile::<R, 1>(dim, keys, queries, scores, tokens);
                }
            }
        });
        v += 2;
    }
}

/// R rows against NV vectors of keys.
///
/// # Safety
/// The processor must have AVX-512; `keys` points to `dim` rows, `scores` to R rows, of NV vectors every
/// `stride`, `queries` to R · `dim` floats.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn scores_tile<const R: usize, const NV: usize>(
    dim: usize,
    keys: *const f32,
    queries: *const f32,
    scores: *mut f32,
    stride: usize,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); NV]; R];
        for c in 0..dim {
            let mut ks = [_mm512_setzero_ps(); NV];
            for v in 0..NV {
                ks[v] = _mm512_loadu_ps(keys.add(c * stride + v * LANES));
            }
            for r in 0..R {
                let q = _mm512_set1_ps(*queries.add(r * dim + c));
                for v in 0..NV {
                    sums[r][v] = _mm512_fmadd_ps(q, ks[v], sums[r][v]);
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

/// See [`super::portable::weights`].
pub(super) fn weights(
    part: &Part,
    visible: &[(usize, usize); ROWS],
    scores: &mut [f32],
    states: &mut [OnlineSoftmax],
    factors: &mut [f32; ROWS],
) {
    let &Part { n, tokens, vectors, .. } = part;
    assert!(vectors.1 * LANES <= tokens && tokens <= 64 && scores.len() >= n * tokens);
    let scores = &mut scores[vectors.0 * LANES..];
    // Bits of the tokens that a row sees, from the first vector on.
    let mut masks = [0u64; ROWS];
    for (mask, (from, to)) in masks[..n].iter_mut().zip(visible) {
        let below = |end: usize| 1u64.checked_shl(end as u32).unwrap_or(0).wrapping_sub(1);
        *mask = (below(*to) & !below(*from)) >> (vectors.0 * LANES);
    }
    for first in (0..n).step_by(4) {
        let rows = 4.min(n - first);
        let scores = &mut scores[first * tokens..];
        let (masks, states) = (&masks[first..first + rows], &mut states[first..first + rows]);
        let factors = &mut factors[first..first + rows];
        // SAFETY: the processor has AVX-512; `rows` rows of the vectors asked for lie in `scores`.
        unsafe {
            match vectors.1 - vectors.0 {
                1 => weights4::<1>(scores.as_mut_ptr(), tokens, masks, states, factors),
                2 => weights4::<2>(scores.as_mut_ptr(), tokens, masks, states, factors),
                3 => weights4::<3>(scores.as_mut_ptr(), tokens, masks, states, factors),
                _ => weights4::<4>(scores.as_mut_ptr(), tokens, masks, states, factors),
            }
        }
    }
}

/// One to four rows of NV vectors.
///
/// # Safety
/// The processor must have AVX-512; `scores` points to as many rows as there are masks, of NV vectors every
/// `stride`; states and factors are as many.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn weights4<const NV: usize>(
    scores: *mut f32,
    stride: usize,
    masks: &[u64],
    states: &mut [OnlineSoftmax],
    factors: &mut [f32],
) {
    let rows = masks.len();
    let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
    // Rows beyond the last are that one again.
    let row = |r: usize| r.min(rows - 1);
    let mut old = [OnlineSoftmax::default(); 4];
    let mut xs = [[hidden; NV]; 4];
    let mut largest = [hidden; 4];
    for r in 0..4 {
        old[r] = states[row(r)];
        for v in 0..NV {
            let mask = (masks[row(r)] >> (v * LANES)) as __mmask16;
            // SAFETY: row and vector exist by contract.
            let x = unsafe { _mm512_loadu_ps(scores.add(row(r) * stride + v * LANES)) };
            xs[r][v] = _mm512_mask_mov_ps(hidden, mask, x);
            // A score that is no number is passed over, as by `f32::max`.
            largest[r] = _mm512_max_ps(xs[r][v], largest[r]);
        }
    }
    let old_max = _mm_setr_ps(old[0].max, old[1].max, old[2].max, old[3].max);
    let old_sum = _mm_setr_ps(old[0].sum, old[1].sum, old[2].sum, old[3].sum);
    let max = _mm_max_ps(fold4::<true>(largest), old_max);
    let none = _mm_cmp_ps_mask::<_CMP_EQ_OQ>(max, _mm512_castps512_ps128(hidden));
    let base = _mm_mask_mov_ps(max, none, _mm_setzero_ps());
    let factor = exp2(_mm512_castps128_ps512(_mm_mul_ps(
        _mm_sub_ps(old_max, base),
        _mm_set1_ps(std::f32::consts::LOG2_E),
    )));
    let factor = _mm512_castps512_ps128(factor);
    let mut bases = [0.0f32; 4];
    // SAFETY: four floats.
    unsafe { _mm_storeu_ps(bases.as_mut_ptr(), base) };
    let mut lanes = [_mm512_setzero_ps(); 4];
    for r in 0..4 {
        for v in 0..NV {
            let x = _mm512_sub_ps(xs[r][v], _mm512_set1_ps(bases[r]));
            let weight = exp2(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
            // SAFETY: as for the load; a row beyond the last is written as that one again.
            unsafe { _mm512_storeu_ps(scores.add(row(r) * stride + v * LANES), weight) };
            lanes[r] = _mm512_add_ps(lanes[r], weight);
        }
    }
    let sum = _mm_fmadd_ps(old_sum, factor, fold4::<false>(lanes));
    let (mut maxima, mut sums, mut all) = ([0.0f32; 4], [0.0f32; 4], [0.0f32; 4]);
    // SAFETY: four floats each.
    unsafe {
        _mm_storeu_ps(maxima.as_mut_ptr(), max);
        _mm_storeu_ps(sums.as_mut_ptr(), sum);
        _mm_storeu_ps(all.as_mut_ptr(), factor);
    }
    for r in 0..rows {
        states[r] = OnlineSoftmax { max: maxima[r], sum: sums[r] };
        factors[r] = all[r];
    }
}

/// `2^x`; see [`super::exp2::exp2`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let f = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*coefficient));
    }
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0));
    let seen = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(LEAST));
    _mm512_maskz_scalef_ps(seen, p, n)
}

/// Folds the 16 lanes of each of four vectors, to the largest or to their sum: halves, quarters, pairs, as
/// `sum_lanes`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn fold4<const MAX: bool>(vectors: [__m512; 4]) -> __m128 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    #[inline]
    fn op<const MAX: bool>(a: __m128, b: __m128) -> __m128 {
        if MAX { _mm_max_ps(a, b) } else { _mm_add_ps(a, b) }
    }
    let mut quarters = [_mm_setzero_ps(); 4];
    for i in 0..4 {
        let v = vectors[i];
        let even = op::<MAX>(_mm512_castps512_ps128(v), _mm512_extractf32x4_ps::<2>(v));
        let odd = op::<MAX>(_mm512_extractf32x4_ps::<1>(v), _mm512_extractf32x4_ps::<3>(v));
        quarters[i] = op::<MAX>(even, odd);
    }
    let [a, b, c, d] = quarters;
    let (ab_lo, ab_hi) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
    let (cd_lo, cd_hi) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    // Lane i of each.
    let t0 = _mm_movelh_ps(ab_lo, cd_lo);
    let t1 = _mm_movehl_ps(cd_lo, ab_lo);
    let t2 = _mm_movelh_ps(ab_hi, cd_hi);
    let t3 = _mm_movehl_ps(cd_hi, ab_hi);
    op::<MAX>(op::<MAX>(t0, t2), op::<MAX>(t1, t3))
}

/// Rows of values as the kernels below take them.
pub(super) trait Element: Copy {
    /// One vector of floats.
    ///
    /// # Safety
    /// The processor must have AVX-512, and `at` point to [`LANES`] elements.
    unsafe fn load(at: *const Self) -> __m512;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load(at: *const Self) -> __m512 {
        // SAFETY: forwarded from the caller.
        unsafe { _mm512_loadu_ps(at) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load(at: *const Self) -> __m512 {
        // SAFETY: forwarded from the caller.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
}

/// See [`super::portable::mix`]; `next` is fetched meanwhile.
pub(super) fn mix<T: Element>(
    part: &Part,
    weights: &[f32],
    factors: &[f32; ROWS],
    values: &[T],
    sums: &mut [f32],
    stride: usize,
    next: &[u8],
) {
    let &Part { dim, n, tokens, from, to, .. } = part;
    assert!(dim.is_multiple_of(LANES) && n > 0 && stride >= dim && to <= tokens);
    assert!(weights.len() >= n * tokens && values.len() >= to * dim);
    assert!(sums.len() >= (n - 1) * stride + dim);
    let shape = Shape { dim, tokens, from, to, stride };
    let mut next = Fetch::new(next, to.saturating_sub(from));
    let mut d = 0;
    while d < dim {
        let four = d + 4 * LANES <= dim;
        by_rows!(n, [6, 4, 3, 2, 1], |R, first| {
            // SAFETY: the processor has AVX-512; the asserts cover tokens `from .. to` of one or four vectors from
            // channel `d` on, and rows `first .. first + R` of weights and sums.
            unsafe {
                let weights = weights.as_ptr().add(first * tokens);
                let factors = factors.as_ptr().add(first);
                let values = values.as_ptr().add(d);
                let sums = sums.as_mut_ptr().add(first * stride + d);
                if four {
                    mix_tile::<T, R, 4>(&shape, weights, factors, values, sums, &mut next);
                } else {
                    mix_tile::<T, R, 1>(&shape, weights, factors, values, sums, &mut next);
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

/// R rows against NV vectors of values.
///
/// # Safety
/// The processor must have AVX-512; pointers are good for the tokens, rows and vectors that shape, R and NV say.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn mix_tile<T: Element, const R: usize, const NV: usize>(
    shape: &Shape,
    weights: *const f32,
    factors: *const f32,
    values: *const T,
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
        for t in from..to {
            next.step();
            let mut vs = [_mm512_setzero_ps(); NV];
            for v in 0..NV {
                vs[v] = T::load(values.add(t * dim + v * LANES));
            }
            for r in 0..R {
                let weight = _mm512_set1_ps(*weights.add(r * tokens + t));
                for v in 0..NV {
                    acc[r][v] = _mm512_fmadd_ps(weight, vs[v], acc[r][v]);
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

/// See [`super::portable::turn_on`]; `dim` is a multiple of 32.
pub(super) fn turn(
    rows: &[f32],
    (first, group): (usize, usize),
    dim: usize,
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
) {
    let pairs = dim / 2;
    assert!(dim.is_multiple_of(2 * LANES) && rows.len() == out.len());
    assert!(rows.len().is_multiple_of(dim) && group > 0);
    let (mut token, mut member) = (first / group, first % group);
    let mut row = 0;
    while row < rows.len() / dim {
        let n = (group - member).min(rows.len() / dim - row);
        let (cos, sin) = (&cos[token * pairs..][..pairs], &sin[token * pairs..][..pairs]);
        // SAFETY: the processor has AVX-512; rows `row .. row + n` are inside, and angles for all their pairs.
        unsafe {
            let (from, to) = (rows.as_ptr().add(row * dim), out.as_mut_ptr().add(row * dim));
            turn_token(from, n, pairs, cos.as_ptr(), sin.as_ptr(), to);
        }
        (token, member, row) = (token + 1, 0, row + n);
    }
}

/// Rotates `n` rows by the same angles.
///
/// # Safety
/// The processor must have AVX-512; `from` and `to` point to `n` rows of twice `pairs` floats, `cos` and `sin` to
/// `pairs`, a multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn turn_token(
    from: *const f32,
    n: usize,
    pairs: usize,
    cos: *const f32,
    sin: *const f32,
    to: *mut f32,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        for i in (0..pairs).step_by(LANES) {
            let (c, s) = (_mm512_loadu_ps(cos.add(i)), _mm512_loadu_ps(sin.add(i)));
            for r in 0..n {
                let at = r * 2 * pairs + i;
                let (a, b) = (_mm512_loadu_ps(from.add(at)), _mm512_loadu_ps(from.add(at + pairs)));
                let x = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s));
                let y = _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s));
                _mm512_storeu_ps(to.add(at), x);
                _mm512_storeu_ps(to.add(at + pairs), y);
            }
        }
    }
}

/// Widens whole vectors.
pub(super) fn widen(from: &[f16], to: &mut [f32]) {
    assert!(from.len() == to.len() && from.len().is_multiple_of(LANES));
    // SAFETY: the processor has AVX-512, and both are as long.
    unsafe { widen_vectors(from.as_ptr(), from.len() / LANES, to.as_mut_ptr()) }
}

/// # Safety
/// The processor must have AVX-512; `from` and `to` point to so many vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn widen_vectors(from: *const f16, vectors: usize, to: *mut f32) {
    for i in 0..vectors {
        // SAFETY: forwarded from the caller.
        unsafe { _mm512_storeu_ps(to.add(i * LANES), f16::load(from.add(i * LANES))) };
    }
}

/// See [`super::tile::prepare`]: f16 keys, `filled` in whole vectors; `dim` is a multiple of 8.
pub(super) fn transpose_stored(keys: &[f16], dim: usize, tokens: usize, out: &mut [f32]) {
    assert!(dim.is_multiple_of(8) && tokens.is_multiple_of(LANES));
    assert!(keys.len() >= tokens * dim && out.len() >= dim * tokens);
    for t in (0..tokens).step_by(LANES) {
        for c in (0..dim).step_by(8) {
            // SAFETY: the processor has AVX-512; 16 rows of 8 channels from (t, c) on are inside `keys`, and their
            // places inside `out`.
            unsafe {
                let keys = keys.as_ptr().add(t * dim + c);
                transpose8(keys.cast(), dim, out.as_mut_ptr().add(c * tokens + t), tokens);
            }
        }
    }
}

/// # Safety
/// As for [`transposed`]; `out` points to 8 rows of 16 floats every `tokens`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn transpose8(keys: *const u16, dim: usize, out: *mut f32, tokens: usize) {
    // SAFETY: forwarded from the caller.
    unsafe {
        let channels = transposed(keys, dim);
        for i in 0..8 {
            _mm512_storeu_ps(out.add(i * tokens), _mm512_cvtph_ps(channels[i]));
        }
    }
}

/// See [`super::tile::prepare`]: f32 keys; `dim` is a multiple of 4.
pub(super) fn transpose(
    rows: &[f32],
    (filled, dim): (usize, usize),
    tokens: usize,
    out: &mut [f32],
) {
    assert!(dim.is_multiple_of(4) && filled > 0 && filled <= tokens);
    assert!(
        tokens.is_multiple_of(LANES) && rows.len() >= filled * dim && out.len() >= dim * tokens
    );
    for t in (0..filled).step_by(LANES) {
        for c in (0..dim).step_by(4) {
            // SAFETY: the processor has AVX-512; rows are not read past the last filled one, and four rows of a
            // vector from (c, t) on are inside `out`.
            unsafe {
                transpose4(
                    rows.as_ptr().add(t * dim + c),
                    dim,
                    filled - t,
                    out.as_mut_ptr().add(c * tokens + t),
                    tokens,
                );
            }
        }
    }
}

/// Four channels of 16 tokens; tokens from `filled` on are the last filled one again.
///
/// # Safety
/// The processor must have AVX-512; `rows` points to `filled.min(16)` rows of 4 floats every `dim`, `out` to 4 rows
/// of 16 floats every `tokens`; `filled` > 0.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn transpose4(rows: *const f32, dim: usize, filled: usize, out: *mut f32, tokens: usize) {
    // Quarter q of the i-th register is token 4 q + i.
    let mut a = [_mm512_setzero_ps(); 4];
    for i in 0..4 {
        let mut quarters = [_mm_setzero_ps(); 4];
        for q in 0..4 {
            // SAFETY: a row below `filled`, by contract.
            quarters[q] = unsafe { _mm_loadu_ps(rows.add((4 * q + i).min(filled - 1) * dim)) };
        }
        let v = _mm512_broadcast_f32x4(quarters[0]);
        let v = _mm512_mask_broadcast_f32x4(v, 0x00f0, quarters[1]);
        let v = _mm512_mask_broadcast_f32x4(v, 0x0f00, quarters[2]);
        a[i] = _mm512_mask_broadcast_f32x4(v, 0xf000, quarters[3]);
    }
    let lows = [_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpacklo_ps(a[2], a[3])];
    let highs = [_mm512_unpackhi_ps(a[0], a[1]), _mm512_unpackhi_ps(a[2], a[3])];
    for (i, [x, y]) in [lows, highs].into_iter().enumerate() {
        let (x, y) = (_mm512_castps_pd(x), _mm512_castps_pd(y));
        // SAFETY: rows 2 i and 2 i + 1 of `out`, by contract.
        unsafe {
            let (even, odd) = (_mm512_unpacklo_pd(x, y), _mm512_unpackhi_pd(x, y));
            _mm512_storeu_ps(out.add(2 * i * tokens), _mm512_castpd_ps(even));
            _mm512_storeu_ps(out.add((2 * i + 1) * tokens), _mm512_castpd_ps(odd));
        }
    }
}
