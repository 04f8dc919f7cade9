//! Rows on their way into tiles.

use std::arch::x86_64::*;

use half::f16;

use super::super::LANES;
use super::{Element, pair_rows, transposed};

/// Where rotated rows go.
pub(in crate::attention) enum Turned<'a> {
    F32(&'a mut [f32]),
    /// Rounded to bf16.
    Bf16(&'a mut [u16]),
}

/// See [`super::super::portable::turn_on`]; `dim` is a multiple of 32.
pub(in crate::attention) fn turn(
    rows: &[f32],
    (first, group): (usize, usize),
    dim: usize,
    cos: &[f32],
    sin: &[f32],
    out: &mut Turned<'_>,
) {
    let pairs = dim / 2;
    let room = match out {
        Turned::F32(out) => out.len(),
        Turned::Bf16(out) => out.len(),
    };
    assert!(dim.is_multiple_of(2 * LANES) && rows.len() <= room);
    assert!(rows.len().is_multiple_of(dim) && group > 0);
    let (mut token, mut member) = (first / group, first % group);
    let mut row = 0;
    while row < rows.len() / dim {
        let n = (group - member).min(rows.len() / dim - row);
        let (cos, sin) = (&cos[token * pairs..][..pairs], &sin[token * pairs..][..pairs]);
        let (cos, sin) = (cos.as_ptr(), sin.as_ptr());
        // SAFETY: the processor has AVX-512, and BF16 where that is asked for; rows `row .. row + n` are inside, and
        // angles for all their pairs.
        unsafe {
            let from = rows.as_ptr().add(row * dim);
            match out {
                Turned::F32(out) => {
                    turn_token(from, n, pairs, cos, sin, out.as_mut_ptr().add(row * dim));
                }
                Turned::Bf16(out) => {
                    turn_token_bf16(from, n, pairs, cos, sin, out.as_mut_ptr().add(row * dim));
                }
            }
        }
        (token, member, row) = (token + 1, 0, row + n);
    }
}

macro_rules! turn_token {
    ($name:ident, $element:ty, $features:literal, $put:path) => {
        /// Rotates `n` rows by the same angles.
        ///
        /// # Safety
        /// The processor must have the features; `from` and `to` point to `n` rows of twice `pairs` elements, `cos` and
        /// `sin` to `pairs`, a multiple of 16.
        #[target_feature(enable = $features)]
        unsafe fn $name(
            from: *const f32,
            n: usize,
            pairs: usize,
            cos: *const f32,
            sin: *const f32,
            to: *mut $element,
        ) {
            // SAFETY: forwarded from the caller.
            unsafe {
                for i in (0..pairs).step_by(LANES) {
                    let (c, s) = (_mm512_loadu_ps(cos.add(i)), _mm512_loadu_ps(sin.add(i)));
                    for r in 0..n {
                        let at = r * 2 * pairs + i;
                        let a = _mm512_loadu_ps(from.add(at));
                        let b = _mm512_loadu_ps(from.add(at + pairs));
                        let x = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s));
                        let y = _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s));
                        $put(to.add(at), x);
                        $put(to.add(at + pairs), y);
                    }
                }
            }
        }
    };
}

turn_token!(turn_token, f32, "avx512f,avx512bw,avx512dq,avx512vl,fma", _mm512_storeu_ps);
turn_token!(
    turn_token_bf16,
    u16,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma",
    pair_rows::put_rounded
);

/// Widens whole vectors.
pub(in crate::attention) fn widen(from: &[f16], to: &mut [f32]) {
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

/// See [`super::super::tile::prepare`]: f16 keys, `filled` in whole vectors; `dim` is a multiple of 8.
pub(in crate::attention) fn transpose_stored(
    keys: &[f16],
    dim: usize,
    tokens: usize,
    out: &mut [f32],
) {
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

/// See [`super::super::tile::prepare`]: f32 keys; `dim` is a multiple of 4.
pub(in crate::attention) fn transpose(
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
