//! Rows on their way into pairs of bf16: two channels of a key, or two tokens' values.

use std::arch::x86_64::*;

use half::f16;

use super::super::LANES;

/// A register of 32 f16 in bf16.
///
/// # Safety
/// The processor must have AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
#[inline]
pub(super) fn narrowed(halves: __m512i) -> __m512i {
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

/// Four pairs of channels of 16 tokens: register p is pair p of all of them. Tokens from `filled` on are the last
/// filled one again.
///
/// # Safety
/// The processor must have AVX-512; `rows` points to `filled.min(16)` rows of 4 pairs every `stride`; `filled` > 0.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
#[inline]
pub(super) unsafe fn transposed(rows: *const u32, stride: usize, filled: usize) -> [__m512i; 4] {
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
