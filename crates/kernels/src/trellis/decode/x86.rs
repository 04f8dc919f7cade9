//! HOT PATH. AVX-512 decoding of one segment in about ten instructions: the segment's bytes are
//! broadcast, a byte shuffle gives each lane the four bytes around its code, a shift brings the code
//! to bit 0, and a register permutation looks the level up.

use std::arch::x86_64::*;

use super::{Block, LEVELS_1, LEVELS_2, LEVELS_3, LEVELS_4, LEVELS_5, LEVELS_6};
use super::{Layout, SEGMENT, Segment, copy_means, for_segments};

/// See [`super::decode_block`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
pub(super) fn decode_block(layout: &Layout, block: Block<'_>, out: &mut [f32]) {
    for_segments(layout, block, |i, bits, segment| {
        let out = &mut out[i * SEGMENT..];
        match bits {
            0 => copy_means(&segment, out),
            1 => decode_segment::<1, 8>(&LEVELS_1, &segment, out),
            2 => decode_segment::<2, 16>(&LEVELS_2, &segment, out),
            3 => decode_segment::<3, 32>(&LEVELS_3, &segment, out),
            4 => decode_segment::<4, 64>(&LEVELS_4, &segment, out),
            5 => decode_segment::<5, 32>(&LEVELS_5, &segment, out),
            _ => decode_segment::<6, 64>(&LEVELS_6, &segment, out),
        }
    });
}

/// Byte shuffle within 128-bit lanes: 32-bit lane j gets the bytes from bit `BITS · j` on, circular
/// in the segment's bytes.
const fn byte_shuffle(bits: usize) -> [u8; 64] {
    let mut shuffle = [0; 64];
    let mut i = 0;
    while i < 64 {
        shuffle[i] = ((bits * (i / 4) / 8 + i % 4) % (2 * bits)) as u8;
        i += 1;
    }
    shuffle
}

/// What remains to shift lane j by.
const fn bit_shifts(bits: usize) -> [u32; SEGMENT] {
    let mut shifts = [0; SEGMENT];
    let mut j = 0;
    while j < SEGMENT {
        shifts[j] = (bits * j % 8) as u32;
        j += 1;
    }
    shifts
}

/// Levels by the low bits of lanes, whatever their high bits.
#[derive(Clone, Copy)]
struct Lookup<const N: usize>([__m512; 4]);

impl<const N: usize> Lookup<N> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    #[inline]
    fn new(levels: &[f32; N]) -> Self {
        // A table of 8 is repeated, for the permutation takes four bits.
        let all: [f32; 64] = std::array::from_fn(|i| levels[i % N]);
        // SAFETY: 16 floats from 0, 16, 32 and 48 on are within the 64.
        Self(std::array::from_fn(|i| unsafe { _mm512_loadu_ps(all.as_ptr().add(16 * i)) }))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    #[inline]
    fn levels(self, codes: __m512i) -> __m512 {
        let [a, b, c, d] = self.0;
        match N {
            8 | 16 => _mm512_permutexvar_ps(codes, a),
            32 => _mm512_permutex2var_ps(a, codes, b),
            _ => {
                let low = _mm512_permutex2var_ps(a, codes, b);
                let high = _mm512_permutex2var_ps(c, codes, d);
                let in_high = _mm512_test_epi32_mask(codes, _mm512_set1_epi32(32));
                _mm512_mask_blend_ps(in_high, low, high)
            }
        }
    }
}

/// See [`super::decode_segment`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn decode_segment<const BITS: usize, const N: usize>(
    levels: &[f32; N],
    s: &Segment<'_>,
    out: &mut [f32],
) {
    let n = s.factors.len();
    if n == 0 {
        return;
    }
    assert!(s.codes.len() >= n * 2 * BITS);
    assert!(s.means.len() >= (n - 1) * s.mean_stride + SEGMENT);
    assert!(out.len() >= (n - 1) * s.out_stride + SEGMENT);
    let table = Lookup::new(levels);
    let (shuffle, shifts) = (const { byte_shuffle(BITS) }, const { bit_shifts(BITS) });
    // SAFETY: the constants are 64 bytes each; rows t < n of codes, means and out are in bounds by
    // the asserts.
    unsafe {
        let shuffle = _mm512_loadu_epi8(shuffle.as_ptr().cast());
        let shifts = _mm512_loadu_epi32(shifts.as_ptr().cast());
        for t in 0..n {
            let bytes = broadcast::<BITS>(s.codes.as_ptr().add(t * 2 * BITS));
            let codes = _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, shuffle), shifts);
            let mean = _mm512_loadu_ps(s.means.as_ptr().add(t * s.mean_stride));
            let factor = _mm512_set1_ps(s.factors[t]);
            let value = _mm512_add_ps(_mm512_mul_ps(factor, table.levels(codes)), mean);
            _mm512_storeu_ps(out.as_mut_ptr().add(t * s.out_stride), value);
        }
    }
}

/// A segment's bytes at the start of each 128-bit lane.
///
/// # Safety
/// `2 · BITS` bytes must be readable.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
unsafe fn broadcast<const BITS: usize>(codes: *const u8) -> __m512i {
    // SAFETY: reads 2 · BITS bytes, by contract.
    unsafe {
        match BITS {
            1 => _mm512_set1_epi16(codes.cast::<i16>().read_unaligned()),
            2 => _mm512_set1_epi32(codes.cast::<i32>().read_unaligned()),
            4 => _mm512_set1_epi64(codes.cast::<i64>().read_unaligned()),
            _ => {
                let bytes = _mm_maskz_loadu_epi8((1 << (2 * BITS)) - 1, codes.cast());
                _mm512_broadcast_i32x4(bytes)
            }
        }
    }
}
