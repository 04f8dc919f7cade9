//! AVX2: a vector is two registers, lanes 0 to 7 and 8 to 15.

use std::arch::x86_64::*;

use super::{Simd, Steps, count};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());
/// With products of bytes.
#[derive(Clone, Copy)]
pub(crate) struct AvxVnni(());

type F = [__m256; 2];
type I = [__m256i; 2];

/// Bits of the first `n` of 8 lanes from `from` on, as masks of lanes.
#[inline(always)]
unsafe fn below(n: usize, from: usize) -> __m256i {
    // SAFETY: AVX2, by contract.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let left = n.saturating_sub(from).min(8) as i32;
        _mm256_cmpgt_epi32(_mm256_set1_epi32(left), lanes)
    }
}

/// The sum of the lanes: quarters, pairs.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub(super) unsafe fn sum(half: __m256) -> f32 {
    // SAFETY: by contract.
    unsafe {
        let quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
        let pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
}

/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub(super) unsafe fn largest(half: __m256) -> f32 {
    // SAFETY: by contract.
    unsafe {
        let quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
        let pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
        _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
}

/// `vpdpwssd`, as in `avx512.rs`.
///
/// # Safety
/// The processor has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
pub(super) unsafe fn dot_words(mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: registers only; the instruction is there by contract.
    unsafe {
        std::arch::asm!(
            "{{vex}} vpdpwssd {sums}, {a}, {b}",
            sums = inout(ymm_reg) sums, a = in(ymm_reg) a, b = in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Folds the lanes of each of four vectors.
macro_rules! fold4 {
    ($v:expr, $op256:ident, $op128:ident) => {{
        let v: [I; 4] = $v;
        let mut quarters = [_mm_setzero_si128(); 4];
        for i in 0..4 {
            let half = $op256(v[i][0], v[i][1]);
            quarters[i] = $op128(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
        }
        let [a, b, c, d] = quarters;
        let ab = $op128(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
        let cd = $op128(_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
        let all = $op128(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
        std::mem::transmute::<__m128i, _>(all)
    }};
}

macro_rules! registers {
    ($set:ident) => {
        impl $set {
            /// # Safety
            /// The processor has the set.
            #[inline(always)]
            pub(crate) unsafe fn new() -> Self {
                Self(())
            }
        }

        impl Simd for $set {
            const REGISTERS: usize = 8;
            type F = F;
            type I = I;
            /// Lanes of ones or of zeros.
            type M = F;

            memory! {
                load(from: *const f32) -> F = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
                store(to: *mut f32, v: F) = {
                    _mm256_storeu_ps(to, v[0]);
                    _mm256_storeu_ps(to.add(8), v[1]);
                };
                load_first(from: *const f32, n: usize) -> F = [
                    _mm256_maskload_ps(from, below(n, 0)),
                    _mm256_maskload_ps(from.wrapping_add(8), below(n, 8)),
                ];
                store_first(to: *mut f32, v: F, n: usize) = {
                    _mm256_maskstore_ps(to, below(n, 0), v[0]);
                    _mm256_maskstore_ps(to.wrapping_add(8), below(n, 8), v[1]);
                };
                load_f16(from: *const u16) -> F = [
                    _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
                ];
                store_f16(to: *mut u16, v: F) = {
                    let halves = both!(|v| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
                    _mm_storeu_si128(to.cast(), halves[0]);
                    _mm_storeu_si128(to.add(8).cast(), halves[1]);
                };
                iload(from: *const u8) -> I =
                    [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())];
                istore(to: *mut u8, v: I) = {
                    _mm256_storeu_si256(to.cast(), v[0]);
                    _mm256_storeu_si256(to.add(32).cast(), v[1]);
                };
                store_low_bytes(to: *mut u8, v: I) = {
                    let low = _mm256_set1_epi32(255);
                    let v = both!(|v| _mm256_and_si256(v, low));
                    let halves = _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(v[0], v[1]));
                    let bytes = _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi16(halves, halves));
                    _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(bytes));
                };
                store_low_halves(to: *mut u16, v: I) = {
                    let low = _mm256_set1_epi32(0xffff);
                    let v = both!(|v| _mm256_and_si256(v, low));
                    let halves = _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(v[0], v[1]));
                    _mm256_storeu_si256(to.cast(), halves);
                };
                load_halves(from: *const u16) -> I = [
                    _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())),
                    _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast())),
                ];
                load_signed(from: *const u8) -> I = [
                    _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())),
                    _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast())),
                ];
            }
            methods! {
                shuffle(v: I, at: I) -> I = both!(|v, at| _mm256_shuffle_epi8(v, at));
                zero() -> F = [_mm256_setzero_ps(); 2];
                splat(x: f32) -> F = [_mm256_set1_ps(x); 2];
                add(a: F, b: F) -> F = both!(|a, b| _mm256_add_ps(a, b));
                sub(a: F, b: F) -> F = both!(|a, b| _mm256_sub_ps(a, b));
                mul(a: F, b: F) -> F = both!(|a, b| _mm256_mul_ps(a, b));
                div(a: F, b: F) -> F = both!(|a, b| _mm256_div_ps(a, b));
                fma(a: F, b: F, c: F) -> F = both!(|a, b, c| _mm256_fmadd_ps(a, b, c));
                fms(a: F, b: F, c: F) -> F = both!(|a, b, c| _mm256_fmsub_ps(a, b, c));
                max(a: F, b: F) -> F = both!(|a, b| _mm256_max_ps(a, b));
                min(a: F, b: F) -> F = both!(|a, b| _mm256_min_ps(a, b));
                round(a: F) -> F =
                    both!(|a| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a));
                scale(p: F, n: F) -> F = both!(|p, n| {
                    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                    _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
                });
                lt(a: F, b: F) -> F = both!(|a, b| _mm256_cmp_ps::<_CMP_LT_OQ>(a, b));
                mask(bits: u16) -> F = {
                    let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
                    let bits = [_mm256_set1_epi32(i32::from(bits)), _mm256_set1_epi32(i32::from(bits >> 8))];
                    both!(|bits| {
                        _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, lanes), lanes))
                    })
                };
                select(mask: F, yes: F, no: F) -> F = both!(|mask, yes, no| _mm256_blendv_ps(no, yes, mask));
                sum(v: F) -> f32 = sum(_mm256_add_ps(v[0], v[1]));
                largest(v: F) -> f32 = largest(_mm256_max_ps(v[0], v[1]));
                to_int(v: F) -> I = both!(|v| _mm256_cvtps_epi32(v));
                from_int(v: I) -> F = both!(|v| _mm256_cvtepi32_ps(v));
                bits(v: F) -> I = both!(|v| _mm256_castps_si256(v));
                from_bits(v: I) -> F = both!(|v| _mm256_castsi256_ps(v));
                izero() -> I = [_mm256_setzero_si256(); 2];
                isplat(x: i32) -> I = [_mm256_set1_epi32(x); 2];
                and(a: I, b: I) -> I = both!(|a, b| _mm256_and_si256(a, b));
                or(a: I, b: I) -> I = both!(|a, b| _mm256_or_si256(a, b));
                xor(a: I, b: I) -> I = both!(|a, b| _mm256_xor_si256(a, b));
                iadd(a: I, b: I) -> I = both!(|a, b| _mm256_add_epi32(a, b));
                isub(a: I, b: I) -> I = both!(|a, b| _mm256_sub_epi32(a, b));
                imax_u(a: I, b: I) -> I = both!(|a, b| _mm256_max_epu32(a, b));
                shl(a: I, n: u32) -> I = both!(|a| _mm256_sll_epi32(a, count(n)));
                shr(a: I, n: u32) -> I = both!(|a| _mm256_srl_epi32(a, count(n)));
                sar(a: I, n: u32) -> I = both!(|a| _mm256_sra_epi32(a, count(n)));
                shl16(a: I, n: u32) -> I = both!(|a| _mm256_sll_epi16(a, count(n)));
                shr16(a: I, n: u32) -> I = both!(|a| _mm256_srl_epi16(a, count(n)));
                add16(a: I, b: I) -> I = both!(|a, b| _mm256_add_epi16(a, b));
                fold4_max_u(v: [I; 4]) -> [u32; 4] = fold4!(v, _mm256_max_epu32, _mm_max_epu32);
                fold4_add(v: [I; 4]) -> [i32; 4] = fold4!(v, _mm256_add_epi32, _mm_add_epi32);
            }
            products! { $set }

            /// High halves, low halves, as numbers.
            type Pairs = [F; 2];
            methods! {
                pairs(v: I) -> [F; 2] = [
                    both!(|v| _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff_0000_u32 as i32)))),
                    both!(|v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v))),
                ];
                dot_pairs(sums: F, a: [F; 2], b: [F; 2]) -> F = {
                    let [[a, c], [b, d]] = [a, b];
                    let high = both!(|a, b, sums| _mm256_fmadd_ps(a, b, sums));
                    both!(|c, d, high| _mm256_fmadd_ps(c, d, high))
                };
                round_bf16(v: F) -> I = both!(|v| {
                    let bits = _mm256_castps_si256(v);
                    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                    // NaN, made quiet, so that it does not become infinite.
                    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
                    _mm256_srli_epi32::<16>(_mm256_blendv_epi8(up, quiet, nan))
                });
            }
        }
    };
}

/// What sets do differently: products of bytes and of codes.
macro_rules! products {
    (Avx2) => {
        /// The even bytes and the odd ones, 16 bits each.
        type Quads = [I; 2];
        /// Magnitudes, and what they are of.
        type Bytes = [I; 2];
        const SUMS_AS_STORED: bool = false;
        methods! {
            quads_u(v: I) -> [I; 2] = [
                both!(|v| _mm256_and_si256(v, _mm256_set1_epi16(255))),
                both!(|v| _mm256_srli_epi16::<8>(v)),
            ];
            quads_i(v: I) -> [I; 2] = [
                both!(|v| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v))),
                both!(|v| _mm256_srai_epi16::<8>(v)),
            ];
            dot_quads(sums: I, u: [I; 2], i: [I; 2]) -> I = {
                let [[u, v], [i, j]] = [u, i];
                let even = both!(|sums, u, i| _mm256_add_epi32(sums, _mm256_madd_epi16(u, i)));
                both!(|even, v, j| _mm256_add_epi32(even, _mm256_madd_epi16(v, j)))
            };
            bytes(stored: I) -> [I; 2] = {
                let signed = both!(|stored| _mm256_xor_si256(stored, _mm256_set1_epi8(-128)));
                [both!(|signed| _mm256_abs_epi8(signed)), signed]
            };
            // Two products of 128 and 127 stay below 2^15.
            dot_bytes(sums: I, a: [I; 2], b: I) -> I = {
                let [a, signed] = a;
                both!(|sums, a, signed, b| {
                    let pairs = _mm256_maddubs_epi16(a, _mm256_sign_epi8(b, signed));
                    _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                })
            };
            // Eight sums of products of 31 and 127 stay below 2^15, and four of 63 and 127.
            dot_codes(sums: I, codes: I, bytes: I) -> I =
                both!(|sums, codes, bytes| _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, bytes)));
            add_codes(sums: I, codes: I) -> I = both!(|sums, codes| {
                _mm256_add_epi32(sums, _mm256_madd_epi16(codes, _mm256_set1_epi16(1)))
            });
            join_codes(first: I, last: I, steps: &Steps, begin: I) -> I = {
                let [even, odd] = steps.each;
                let (even, odd) = (_mm256_set1_epi16(even as i16), _mm256_set1_epi16(odd as i16));
                both!(|first, last, begin| {
                    let begin = _mm256_add_epi32(begin, _mm256_madd_epi16(first, even));
                    _mm256_add_epi32(begin, _mm256_madd_epi16(last, odd))
                })
            };
        }
    };
    (AvxVnni) => {
        type Quads = I;
        type Bytes = I;
        const SUMS_AS_STORED: bool = true;
        methods! {
            quads_u(v: I) -> I = v;
            quads_i(v: I) -> I = v;
            dot_quads(sums: I, u: I, i: I) -> I = both!(|sums, u, i| _mm256_dpbusd_avx_epi32(sums, u, i));
            bytes(stored: I) -> I = stored;
            dot_bytes(sums: I, a: I, b: I) -> I = both!(|sums, a, b| _mm256_dpbusd_avx_epi32(sums, a, b));
            dot_codes(sums: I, codes: I, bytes: I) -> I =
                both!(|sums, codes, bytes| _mm256_dpbusd_avx_epi32(sums, codes, bytes));
            add_codes(sums: I, codes: I) -> I = both!(|sums, codes| _mm256_add_epi32(sums, codes));
            // Sums of half a group of codes fit 16 bits.
            join_codes(first: I, last: I, steps: &Steps, begin: I) -> I = {
                let steps = _mm256_set1_epi32(steps.both);
                both!(|first, last, begin| {
                    let last = _mm256_slli_epi32::<16>(last);
                    let both = _mm256_blend_epi16::<0xaa>(first, last);
                    dot_words(begin, both, steps)
                })
            };
        }
    };
}

registers!(Avx2);
registers!(AvxVnni);
