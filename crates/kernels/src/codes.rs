//! HOT PATH (decode over quantised caches). Codes with scales and zeros to rows in f16, which is how attention reads few
//! queries' blocks fastest.

use half::f16;

use crate::isa::{Isa, Set};

/// Channels that are expanded together.
const CHANNELS: usize = 32;

/// Where the scale and the zero of a code are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleAxis {
    /// One for each channel, `[dim]`.
    Channel,
    /// One for each token and 32 channels, `[tokens, ⌈dim / 32⌉]`.
    Token,
}

/// `out[t, c] = codes[t, c] · scale + zero`, rounded to f16. Codes have `BITS` bits (2 or 4), lowest bits first, and a row
/// of them begins with a byte. Scales and zeros are little-endian f16. `out`: `[tokens, dim]`; its length says how many tokens.
///
/// # Panics
/// If a slice is shorter than its shape says.
pub fn expand_codes<const BITS: usize>(
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    axis: ScaleAxis,
    dim: usize,
    out: &mut [f16],
) {
    expand_codes_on::<BITS>(Isa::best(), codes, scales, zeros, axis, dim, out);
}

fn expand_codes_on<const BITS: usize>(
    isa: Isa,
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    axis: ScaleAxis,
    dim: usize,
    out: &mut [f16],
) {
    let tokens = out.len() / dim;
    let groups = dim.div_ceil(CHANNELS);
    let pairs = match axis {
        ScaleAxis::Channel => dim,
        ScaleAxis::Token => tokens * groups,
    };
    let row_bytes = (dim * BITS).div_ceil(8);
    assert!(codes.len() >= tokens * row_bytes, "{} bytes of codes", codes.len());
    assert!(scales.len() >= 2 * pairs && zeros.len() >= 2 * pairs, "{} scales", scales.len());
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) {
        // SAFETY: the processor has AVX-512; lengths were checked.
        return unsafe { x86::expand::<BITS>(codes, scales, zeros, axis, (tokens, dim), out) };
    }
    let _ = isa;
    let half =
        |bytes: &[u8], i: usize| f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32();
    let rows = out.chunks_exact_mut(dim).zip(codes.chunks_exact(row_bytes));
    for (t, (row, codes)) in rows.enumerate() {
        for (c, x) in row.iter_mut().enumerate() {
            let at = match axis {
                ScaleAxis::Channel => c,
                ScaleAxis::Token => t * groups + c / CHANNELS,
            };
            let per_byte = 8 / BITS;
            let code = (codes[c / per_byte] >> (BITS * (c % per_byte))) & ((1 << BITS) - 1);
            *x = f16::from_f32(f32::from(code) * half(scales, at) + half(zeros, at));
        }
    }
}

/// `out[i] = codes[i] · scales[i / group]`, rounded to f16; codes are signed, scales little-endian f16. `group`: a multiple of
/// 16 that divides the length.
///
/// # Panics
/// If a slice is shorter than its shape says.
pub fn expand_bytes(codes: &[u8], scales: &[u8], group: usize, out: &mut [f16]) {
    expand_bytes_on(Isa::best(), codes, scales, group, out);
}

fn expand_bytes_on(isa: Isa, codes: &[u8], scales: &[u8], group: usize, out: &mut [f16]) {
    assert!(codes.len() >= out.len() && out.len().is_multiple_of(group), "{} codes", codes.len());
    assert!(scales.len() >= 2 * (out.len() / group), "{} bytes of scales", scales.len());
    let groups = out.chunks_exact_mut(group).zip(codes.chunks_exact(group));
    for ((out, codes), scale) in groups.zip(scales.chunks_exact(2)) {
        let scale = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
        #[cfg(target_arch = "x86_64")]
        if isa.has(Set::Avx512) && group.is_multiple_of(16) {
            // SAFETY: the processor has AVX-512; both are `group` long.
            unsafe { x86::scale_bytes(codes, scale, out) };
            continue;
        }
        for (x, code) in out.iter_mut().zip(codes) {
            *x = f16::from_f32(f32::from(*code as i8) * scale);
        }
    }
    let _ = isa;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::{CHANNELS, ScaleAxis};

    /// # Safety
    /// The processor must have AVX-512; both slices have one length, a multiple of 16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn scale_bytes(codes: &[u8], scale: f32, out: &mut [f16]) {
        let scale = _mm512_set1_ps(scale);
        for (codes, out) in codes.chunks_exact(16).zip(out.chunks_exact_mut(16)) {
            // SAFETY: 16 of each.
            unsafe {
                let x = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
                let x = _mm512_mul_ps(_mm512_cvtepi32_ps(x), scale);
                let x = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                _mm256_storeu_si256(out.as_mut_ptr().cast(), x);
            }
        }
    }

    /// `n` codes as bytes, in order, of 32 at most.
    ///
    /// # Safety
    /// The processor must have AVX-512; `codes` points to the bytes of `n` codes.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn bytes<const BITS: usize>(codes: *const u8, n: usize) -> __m256i {
        let whole = ((1u32 << (n * BITS).div_ceil(8)) - 1) as u16;
        // SAFETY: by contract.
        unsafe {
            let codes = _mm_maskz_loadu_epi8(whole, codes.cast());
            if BITS == 4 {
                let words = _mm256_cvtepu8_epi16(codes);
                let both = _mm256_or_si256(words, _mm256_slli_epi16::<4>(words));
                _mm256_and_si256(both, _mm256_set1_epi8(15))
            } else {
                let words = _mm256_cvtepu8_epi32(codes);
                let two = _mm256_or_si256(words, _mm256_slli_epi32::<6>(words));
                let four = _mm256_or_si256(two, _mm256_slli_epi32::<12>(two));
                _mm256_and_si256(four, _mm256_set1_epi8(3))
            }
        }
    }

    /// # Safety
    /// The processor must have AVX-512; `out` points to as many numbers as `whole` has bits, the lowest ones.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn put(
        codes: __m256i,
        scales: [__m512; 2],
        zeros: [__m512; 2],
        whole: u32,
        out: *mut f16,
    ) {
        let halves = [_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes)];
        for i in 0..2 {
            let x = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(halves[i]));
            let x = _mm512_fmadd_ps(x, scales[i], zeros[i]);
            let x = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            // SAFETY: by contract.
            unsafe {
                _mm256_mask_storeu_epi16(out.add(16 * i).cast(), (whole >> (16 * i)) as u16, x)
            };
        }
    }

    /// # Safety
    /// The processor must have AVX-512; slices are as long as their shapes say.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn expand<const BITS: usize>(
        codes: &[u8],
        scales: &[u8],
        zeros: &[u8],
        axis: ScaleAxis,
        (tokens, dim): (usize, usize),
        out: &mut [f16],
    ) {
        let (groups, row_bytes) = (dim.div_ceil(CHANNELS), (dim * BITS).div_ceil(8));
        let (codes, out) = (codes.as_ptr(), out.as_mut_ptr());
        // SAFETY: rows, groups and their scales exist by contract.
        unsafe {
            let wide = |from: *const u8, whole: u32| -> [__m512; 2] {
                let halves = |i: usize| {
                    _mm256_maskz_loadu_epi16((whole >> (16 * i)) as u16, from.add(32 * i).cast())
                };
                [_mm512_cvtph_ps(halves(0)), _mm512_cvtph_ps(halves(1))]
            };
            let one = |from: *const u8| -> [__m512; 2] {
                let bits = from.cast::<u16>().read_unaligned();
                let x = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
                [x; 2]
            };
            for group in 0..groups {
                // Its channels: the last group may have fewer.
                let n = CHANNELS.min(dim - group * CHANNELS);
                let whole = ((1u64 << n) - 1) as u32;
                let channel = (axis == ScaleAxis::Channel).then(|| {
                    let at = 2 * CHANNELS * group;
                    (wide(scales.as_ptr().add(at), whole), wide(zeros.as_ptr().add(at), whole))
                });
                for t in 0..tokens {
                    let (s, z) = match channel {
                        Some(pair) => pair,
                        None => {
                            let at = 2 * (t * groups + group);
                            (one(scales.as_ptr().add(at)), one(zeros.as_ptr().add(at)))
                        }
                    };
                    let from = codes.add(t * row_bytes + group * CHANNELS * BITS / 8);
                    let codes = bytes::<BITS>(from, n);
                    put(codes, s, z, whole, out.add(t * dim + group * CHANNELS));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const BITS: usize>(isa: Isa, tokens: usize, dim: usize, axis: ScaleAxis) {
        let row_bytes = (dim * BITS).div_ceil(8);
        let codes: Vec<u8> = (0..tokens * row_bytes).map(|i| (i * 151 % 253) as u8).collect();
        let pairs = tokens.max(1) * dim;
        let halves = |by: f32| -> Vec<u8> {
            (0..pairs)
                .flat_map(|i| f16::from_f32((i % 37) as f32 * by - 1.0).to_le_bytes())
                .collect()
        };
        let (scales, zeros) = (halves(0.125), halves(0.25));
        let mut out = vec![f16::NAN; tokens * dim];
        expand_codes_on::<BITS>(isa, &codes, &scales, &zeros, axis, dim, &mut out);
        for (i, x) in out.iter().enumerate() {
            let (t, c) = (i / dim, i % dim);
            let at = match axis {
                ScaleAxis::Channel => c,
                ScaleAxis::Token => t * dim.div_ceil(32) + c / 32,
            };
            let byte = codes[t * row_bytes + c * BITS / 8];
            let code = (byte >> (c * BITS % 8)) & ((1 << BITS) - 1);
            let (s, z) = ((at % 37) as f32 * 0.125 - 1.0, (at % 37) as f32 * 0.25 - 1.0);
            // Exact: few bits everywhere.
            assert_eq!(x.to_f32(), f32::from(code) * s + z, "{isa} {BITS} {axis:?} {t} {c}");
        }
    }

    #[test]
    fn bytes_meet_their_scales() {
        let codes: Vec<u8> = (0..5 * 64).map(|i| (i * 37 % 251) as u8).collect();
        let scales: Vec<u8> =
            (0..20).flat_map(|i| f16::from_f32(0.25 * i as f32).to_le_bytes()).collect();
        for isa in Isa::available() {
            for group in [16, 64] {
                let mut out = vec![f16::NAN; codes.len()];
                expand_bytes_on(isa, &codes, &scales, group, &mut out);
                for (i, x) in out.iter().enumerate() {
                    let exact = f32::from(codes[i] as i8) * (0.25 * (i / group) as f32);
                    assert_eq!(*x, f16::from_f32(exact), "{isa} {group} {i}");
                }
            }
        }
    }

    #[test]
    fn codes_become_what_they_stand_for() {
        for isa in Isa::available() {
            for axis in [ScaleAxis::Channel, ScaleAxis::Token] {
                for (tokens, dim) in
                    [(32, 64), (5, 128), (1, 32), (3, 16), (4, 39), (3, 51), (2, 256)]
                {
                    check::<4>(isa, tokens, dim, axis);
                    check::<2>(isa, tokens, dim, axis);
                }
            }
        }
    }
}
