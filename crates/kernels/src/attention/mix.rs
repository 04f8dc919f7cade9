//! Weighted values.

use half::f16;

use super::fetch::Fetch;
use super::kind::{Kind, StoredValues};
use super::numbers::by_numbers;
use super::{LANES, Part, ROWS};
use crate::simd::Lanes;
use crate::simd::tile::{self, Matrix, accumulate, by_rows, tiles};

/// Values that sums are of.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    /// As they are stored, `[tokens, dim]`, `dim` in whole vectors. Bytes to fetch meanwhile.
    Stored(&'a [f16], &'a [u8]),
    /// In words, `[tokens / depth, stride]`, in whole vectors; the stride, and bytes to fetch meanwhile.
    Tile(&'a [f32], usize, &'a [u8]),
}

by_numbers! {
    /// `sums[i] = sums[i] · factors[i] + Σ_t weights[i, t] · values[t]`, the latter times `shares[i]` where numbers are whole. `weights`, and
    /// `by`, which is factors and shares: what [`super::weigh`] leaves.
    pub(super) fn mix(part: &Part, weights: &[f32], by: (&[f32; ROWS], &[f32; ROWS]), values: Values<'_>, sums: &mut [f32], stride: usize) = mix_body;
}

#[inline(always)]
fn mix_body<S: Lanes>(
    s: S,
    kind: impl Kind<S>,
    part: &Part,
    weights: &[f32],
    (factors, shares): (&[f32; ROWS], &[f32; ROWS]),
    values: Values<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    let &Part { dim, n, tokens, vectors, from, to } = part;
    let depth = kind.depth();
    assert!(n > 0 && n <= ROWS && stride >= dim && to <= tokens && vectors.0 * LANES <= from);
    assert!(weights.len() >= n * tokens && sums.len() >= (n - 1) * stride + dim);
    let range = (from / depth, to.div_ceil(depth));
    let sums = sums.as_mut_ptr();
    // SAFETY: a row's first weight is that of vector `vectors.0`, so that of word `range.0` is inside the row.
    let weights = unsafe { weights.as_ptr().add(vectors.0 * LANES - vectors.0 * LANES / depth) };
    let weights = |first: usize| (weights.wrapping_add(first * tokens), tokens);
    let by =
        |first: usize| (factors.as_ptr().wrapping_add(first), shares.as_ptr().wrapping_add(first));
    match values {
        Values::Stored(values, next) => {
            assert!(dim.is_multiple_of(LANES) && values.len() >= to * dim);
            let mut next = Fetch::new(next, (range.1 - range.0) * tiles_of::<S>(n, dim));
            // SAFETY: the asserts cover tokens `from .. to` of NV vectors, and rows `first .. first + R` of weights and
            // sums.
            tiles!(S, n, dim / LANES, |R, first, NV, v| unsafe {
                let from = values.as_ptr().add(v * LANES);
                let values = StoredValues { from, dim, tokens: to };
                let at = sums.add(first * stride + v * LANES);
                let begin = begin::<S, _, R, NV>(s, kind, at, stride, by(first));
                let of = kind.stored_values(s, values, range, weights(first), &mut next, begin);
                tile::store(s, end(s, kind, of, at, stride, by(first)), at, stride);
            });
        }
        Values::Tile(values, step, next) => {
            let mut next = Fetch::new(next, (range.1 - range.0) * tiles_of::<S>(n, dim));
            assert!(step >= dim.next_multiple_of(LANES) && values.len() >= range.1 * step);
            let values = |v: usize| {
                let from = values.as_ptr().wrapping_add(v * LANES);
                Matrix { from, step, pitch: LANES }
            };
            // SAFETY: as above.
            tiles!(S, n, dim / LANES, |R, first, NV, v| unsafe {
                let at = sums.add(first * stride + v * LANES);
                let begin = begin::<S, _, R, NV>(s, kind, at, stride, by(first));
                let weights = (weights(first).0, tokens, 1);
                let of = accumulate((s, kind), values(v), range, weights, &mut next, begin);
                tile::store(s, end(s, kind, of, at, stride, by(first)), at, stride);
            });
            let (whole, left) = (dim / LANES, dim % LANES);
            if left > 0 {
                // SAFETY: as above; `left` channels are there.
                by_rows!(S, 1, n, [1], |R, first| unsafe {
                    let at = sums.add(first * stride + whole * LANES);
                    let begin = s.mul(s.load_first(at, left), s.splat(factors[first]));
                    let (values, begin) = (values(whole), [[begin]; R]);
                    let weights = (weights(first).0, tokens, 1);
                    let of = accumulate((s, kind), values, range, weights, &mut (), begin);
                    s.store_first(at, of[0][0], left);
                });
            }
        }
    }
}

/// Tiles that cover the channels.
#[inline(always)]
fn tiles_of<S: Lanes>(rows: usize, dim: usize) -> usize {
    (dim / LANES).div_ceil(tile::at_once::<S>(rows).min(4)).max(1)
}

/// What R rows of NV vectors of products are added to: sums so far times their factors, or, as integers, nothing.
///
/// # Safety
/// They are readable, a row every `stride`.
#[inline(always)]
unsafe fn begin<S: Lanes, K: Kind<S>, const R: usize, const NV: usize>(
    s: S,
    _kind: K,
    from: *const f32,
    stride: usize,
    (factors, _): (*const f32, *const f32),
) -> [[S::F; NV]; R] {
    if K::WHOLE {
        return [[s.zero(); NV]; R];
    }
    // SAFETY: by contract.
    unsafe { scaled(s, from, stride, factors) }
}

/// The sums when products are added.
///
/// # Safety
/// As [`begin`].
#[inline(always)]
unsafe fn end<S: Lanes, K: Kind<S>, const R: usize, const NV: usize>(
    s: S,
    _kind: K,
    mut of: [[S::F; NV]; R],
    from: *const f32,
    stride: usize,
    (factors, shares): (*const f32, *const f32),
) -> [[S::F; NV]; R] {
    if K::WHOLE {
        // SAFETY: by contract.
        unsafe {
            let sums = scaled::<S, R, NV>(s, from, stride, factors);
            for r in 0..R {
                let share = s.splat(*shares.add(r));
                for v in 0..NV {
                    of[r][v] = s.fma(s.from_int(s.bits(of[r][v])), share, sums[r][v]);
                }
            }
        }
    }
    of
}

/// R rows of NV vectors of sums so far, times their factors.
///
/// # Safety
/// They are readable, a row every `stride`.
#[inline(always)]
unsafe fn scaled<S: Lanes, const R: usize, const NV: usize>(
    s: S,
    from: *const f32,
    stride: usize,
    factors: *const f32,
) -> [[S::F; NV]; R] {
    // SAFETY: by contract.
    unsafe {
        let mut sums = tile::load::<S, R, NV>(s, from, stride);
        for r in 0..R {
            let factor = s.splat(*factors.add(r));
            for v in 0..NV {
                sums[r][v] = s.mul(sums[r][v], factor);
            }
        }
        sums
    }
}
