//! Products of queries and keys.

use std::arch::x86_64::*;

use half::f16;

use super::super::{LANES, Part};
use super::{Fetch, by_rows, transposed};

/// Scores against keys as stored, transposed in registers 32 at a time; `next` is fetched meanwhile. For at most
/// 8 rows, and a dimension of whole vectors.
pub(in crate::attention) fn scores_of_stored(
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

/// Scores against transposed keys.
pub(in crate::attention) fn scores_of_tile(
    part: &Part,
    keys: &[f32],
    queries: &[f32],
    scores: &mut [f32],
) {
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
