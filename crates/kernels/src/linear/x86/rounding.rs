//! HOT PATH. Inputs to bytes with AVX-512: see [`super::super::bytes`], whose results these give bit for bit.
//!
//! No closures over arrays: `map` is compiled without the processor's features, and calls them one by one.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::super::bytes::{BYTE, GroupHeader, MOST_STEP, NOT_FINITE, SMALLEST, STEP_BITS};
use super::super::packed::GROUP;

/// Two groups to bytes: what is folded over lanes is for four halves at once.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
pub(in crate::linear) unsafe fn round_two(
    x: [&[f32; GROUP]; 2],
    bytes: [&mut [i8; GROUP]; 2],
    headers: [&mut GroupHeader; 2],
) {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let mut halves = [[_mm512_setzero_ps(); 2]; 2];
    let mut magnitudes = [[_mm512_setzero_si512(); 2]; 2];
    for g in 0..2 {
        for h in 0..2 {
            // SAFETY: a group is two registers of f32.
            halves[g][h] = unsafe { _mm512_loadu_ps(x[g].as_ptr().add(16 * h)) };
            magnitudes[g][h] = _mm512_and_si512(_mm512_castps_si512(halves[g][h]), magnitude);
        }
    }
    // As integers, so that a NaN is larger than anything.
    let largest = _mm_castsi128_ps(fold::<true>(magnitudes));
    let finite = _mm_cmp_ps_mask::<_CMP_LE_OQ>(largest, _mm_set1_ps(f32::MAX));
    let counts = finite & _mm_cmp_ps_mask::<_CMP_GT_OQ>(largest, _mm_set1_ps(SMALLEST));
    let wanted = _mm_maskz_mul_ps(counts, largest, _mm_set1_ps(BYTE));
    // The larger of the halves of a group, in both their lanes.
    let most = _mm_max_ps(wanted, _mm_shuffle_ps::<0xb1>(wanted, wanted));
    let exponent = _mm_srli_epi32::<23>(_mm_castps_si128(most));
    let exponent = _mm_sub_epi32(exponent, _mm_set1_epi32(STEP_BITS));
    let inverse_unit = power(_mm_sub_epi32(_mm_set1_epi32(254), exponent));
    let steps = _mm_ceil_ps(_mm_mul_ps(wanted, inverse_unit));
    let steps = _mm_min_ps(steps, _mm_set1_ps(MOST_STEP));
    let step = _mm_mul_ps(steps, power(exponent));
    let inverse = _mm_maskz_div_ps(counts, _mm_set1_ps(1.0), step);
    let inverse = _mm512_castps128_ps512(inverse);
    let mut rounded = [[_mm512_setzero_si512(); 2]; 2];
    for (g, bytes) in bytes.into_iter().enumerate() {
        for h in 0..2 {
            let own = _mm512_permutexvar_ps(_mm512_set1_epi32((2 * g + h) as i32), inverse);
            let v = _mm512_mul_ps(halves[g][h], own);
            // NaN becomes 0.
            let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(v, v);
            rounded[g][h] = _mm512_maskz_cvtps_epi32(number, v);
            // SAFETY: half of a group's bytes.
            unsafe {
                let at = bytes.as_mut_ptr().cast::<__m128i>().add(h);
                _mm_storeu_si128(at, _mm512_cvtepi32_epi8(rounded[g][h]));
            }
        }
    }
    let minus = _mm_sub_epi32(_mm_setzero_si128(), fold::<false>(rounded));
    let minus: [i32; 4] = lanes(minus);
    let steps: [i32; 4] = lanes(_mm_maskz_cvtps_epi32(counts, steps));
    let exponents: [i32; 4] = lanes(_mm_max_epi32(exponent, _mm_setzero_si128()));
    for (g, header) in headers.into_iter().enumerate() {
        let all = (finite >> (2 * g)) & 3 == 3;
        *header = GroupHeader {
            steps: [steps[2 * g] as i16, steps[2 * g + 1] as i16],
            minus: [minus[2 * g], minus[2 * g + 1]],
            exponent: if all { exponents[2 * g] } else { NOT_FINITE },
        };
    }
}

/// f32 of exponents.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn power(exponents: __m128i) -> __m128 {
    _mm_castsi128_ps(_mm_slli_epi32::<23>(exponents))
}

fn lanes(v: __m128i) -> [i32; 4] {
    // SAFETY: both are 16 bytes of any bits.
    unsafe { std::mem::transmute(v) }
}

/// The largest, or the sum, of the lanes of each of four registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn fold<const MAX: bool>([[a, b], [c, d]]: [[__m512i; 2]; 2]) -> __m128i {
    let op = |x, y| if MAX { _mm512_max_epu32(x, y) } else { _mm512_add_epi32(x, y) };
    let eights = |x, y| op(_mm512_shuffle_i64x2::<0x44>(x, y), _mm512_shuffle_i64x2::<0xee>(x, y));
    let (ab, cd) = (eights(a, b), eights(c, d));
    let fours = op(_mm512_shuffle_i64x2::<0x88>(ab, cd), _mm512_shuffle_i64x2::<0xdd>(ab, cd));
    let twos = op(fours, _mm512_shuffle_epi32::<0x4e>(fours));
    let ones = op(twos, _mm512_shuffle_epi32::<0xb1>(twos));
    let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm512_castsi512_si128(_mm512_permutexvar_epi32(firsts, ones))
}

/// Steps of a row to the unit of `exponent`, its largest, and the sums of its groups.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
pub(in crate::linear) unsafe fn settle(headers: &mut [GroupHeader], sums: &mut [u16]) -> i32 {
    // The exponents' lanes of four headers.
    const EXPONENTS: u16 = 0x8888;
    let of = |chunk: &[GroupHeader]| ((1u32 << (4 * chunk.len())) - 1) as u16;
    let mut most = _mm512_setzero_si512();
    for chunk in headers.chunks(4) {
        // SAFETY: a header is four lanes.
        let four = unsafe { _mm512_maskz_loadu_epi32(of(chunk), chunk.as_ptr().cast()) };
        most = _mm512_max_epi32(most, four);
    }
    let largest = _mm512_mask_reduce_max_epi32(EXPONENTS, most);
    let one = _mm512_set1_epi32(1);
    for (chunk, sums) in headers.chunks_mut(4).zip(sums.chunks_mut(4)) {
        let mask = of(chunk);
        // SAFETY: as above.
        let four = unsafe { _mm512_maskz_loadu_epi32(mask, chunk.as_ptr().cast()) };
        let exponents = _mm512_shuffle_epi32::<0xff>(four);
        let shift = _mm512_sub_epi32(_mm512_set1_epi32(largest), exponents);
        let shift = _mm512_min_epi32(shift, _mm512_set1_epi32(16));
        let half = _mm512_srli_epi32::<1>(_mm512_sllv_epi32(one, shift));
        let steps = _mm512_shuffle_epi32::<0>(four);
        let first = _mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(steps));
        let last = _mm512_srai_epi32::<16>(steps);
        let first = _mm512_srlv_epi32(_mm512_add_epi32(first, half), shift);
        let last = _mm512_srlv_epi32(_mm512_add_epi32(last, half), shift);
        let total = _mm512_add_epi32(
            _mm512_mullo_epi32(first, _mm512_shuffle_epi32::<0x55>(four)),
            _mm512_mullo_epi32(last, _mm512_shuffle_epi32::<0xaa>(four)),
        );
        let total = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_setzero_si512(), total));
        let bits = _mm512_castps_si512(total);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), one);
        let up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let bits = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, up));
        let both = _mm512_or_si512(first, _mm512_slli_epi32::<16>(last));
        // SAFETY: the first lane of each header; as many sums as there are headers.
        unsafe {
            _mm512_mask_storeu_epi32(chunk.as_mut_ptr().cast(), mask & 0x1111, both);
            let firsts = _mm512_maskz_compress_epi32(0x1111, bits);
            let own = ((1u32 << chunk.len().min(sums.len())) - 1) as u16;
            _mm512_mask_cvtepi32_storeu_epi16(sums.as_mut_ptr().cast(), own, firsts);
        }
    }
    largest
}
