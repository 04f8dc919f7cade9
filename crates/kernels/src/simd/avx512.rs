//! AVX-512: a vector is a register.

use std::arch::x86_64::*;

use super::{Simd, Steps, count};

/// F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());
/// With products of bytes.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vnni(());
/// With permutations of bytes.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Icl(());
/// With products of bytes and of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

/// What a product of bytes takes without VNNI: the even and the odd ones, 16 bits each.
type Words = [__m512i; 2];

#[inline(always)]
fn below(n: usize) -> __mmask16 {
    ((1u32 << n.min(16)) - 1) as __mmask16
}

/// What all sets with AVX-512 do alike.
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
            const REGISTERS: usize = 32;
            type F = __m512;
            type I = __m512i;
            type M = __mmask16;

            memory! {
                load(from: *const f32) -> __m512 = _mm512_loadu_ps(from);
                store(to: *mut f32, v: __m512) = _mm512_storeu_ps(to, v);
                load_first(from: *const f32, n: usize) -> __m512 = _mm512_maskz_loadu_ps(below(n), from);
                store_first(to: *mut f32, v: __m512, n: usize) = _mm512_mask_storeu_ps(to, below(n), v);
                load_f16(from: *const u16) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
                store_f16(to: *mut u16, v: __m512) =
                    _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
                iload(from: *const u8) -> __m512i = _mm512_loadu_si512(from.cast());
                istore(to: *mut u8, v: __m512i) = _mm512_storeu_si512(to.cast(), v);
                store_low_bytes(to: *mut u8, v: __m512i) =
                    _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(v));
                store_low_halves(to: *mut u16, v: __m512i) =
                    _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(v));
                load_halves(from: *const u16) -> __m512i =
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                load_signed(from: *const u8) -> __m512i = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
            }
            methods! {
                shuffle(v: __m512i, at: __m512i) -> __m512i = _mm512_shuffle_epi8(v, at);
                zero() -> __m512 = _mm512_setzero_ps();
                splat(x: f32) -> __m512 = _mm512_set1_ps(x);
                add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
                sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
                mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
                div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
                fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
                fms(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmsub_ps(a, b, c);
                max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
                min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
                round(a: __m512) -> __m512 =
                    _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
                scale(p: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(p, n);
                lt(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b);
                mask(bits: u16) -> __mmask16 = bits;
                select(mask: __mmask16, yes: __m512, no: __m512) -> __m512 =
                    _mm512_mask_mov_ps(no, mask, yes);
                sum(v: __m512) -> f32 = {
                    let half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                    super::avx2::sum(half)
                };
                largest(v: __m512) -> f32 = {
                    let half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                    super::avx2::largest(half)
                };
                to_int(v: __m512) -> __m512i = _mm512_cvtps_epi32(v);
                from_int(v: __m512i) -> __m512 = _mm512_cvtepi32_ps(v);
                bits(v: __m512) -> __m512i = _mm512_castps_si512(v);
                from_bits(v: __m512i) -> __m512 = _mm512_castsi512_ps(v);
                izero() -> __m512i = _mm512_setzero_si512();
                isplat(x: i32) -> __m512i = _mm512_set1_epi32(x);
                and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
                or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
                xor(a: __m512i, b: __m512i) -> __m512i = _mm512_xor_si512(a, b);
                iadd(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
                isub(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi32(a, b);
                imax_u(a: __m512i, b: __m512i) -> __m512i = _mm512_max_epu32(a, b);
                shl(a: __m512i, n: u32) -> __m512i = _mm512_sll_epi32(a, count(n));
                shr(a: __m512i, n: u32) -> __m512i = _mm512_srl_epi32(a, count(n));
                sar(a: __m512i, n: u32) -> __m512i = _mm512_sra_epi32(a, count(n));
                shl16(a: __m512i, n: u32) -> __m512i = _mm512_sll_epi16(a, count(n));
                shr16(a: __m512i, n: u32) -> __m512i = _mm512_srl_epi16(a, count(n));
                add16(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi16(a, b);
                fold4_max_u(v: [__m512i; 4]) -> [u32; 4] = fold4!(v, _mm512_max_epu32);
                fold4_add(v: [__m512i; 4]) -> [i32; 4] = fold4!(v, _mm512_add_epi32);
            }
            products! { $set }
        }
    };
}

/// Folds the lanes of each of four registers.
macro_rules! fold4 {
    ($v:expr, $op:ident) => {{
        let [a, b, c, d] = $v;
        let ab = $op(_mm512_shuffle_i64x2::<0x44>(a, b), _mm512_shuffle_i64x2::<0xee>(a, b));
        let cd = $op(_mm512_shuffle_i64x2::<0x44>(c, d), _mm512_shuffle_i64x2::<0xee>(c, d));
        let fours = $op(_mm512_shuffle_i64x2::<0x88>(ab, cd), _mm512_shuffle_i64x2::<0xdd>(ab, cd));
        let twos = $op(fours, _mm512_shuffle_epi32::<0x4e>(fours));
        let ones = $op(twos, _mm512_shuffle_epi32::<0xb1>(twos));
        let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        let firsts = _mm512_castsi512_si128(_mm512_permutexvar_epi32(firsts, ones));
        std::mem::transmute::<__m128i, _>(firsts)
    }};
}

/// What sets do differently: products of bytes, of codes, of pairs.
macro_rules! products {
    (Avx512) => {
        type Quads = Words;
        /// Magnitudes, and which are negative.
        type Bytes = (__m512i, __mmask64);
        const SUMS_AS_STORED: bool = false;
        methods! {
            quads_u(v: __m512i) -> Words =
                [_mm512_and_si512(v, _mm512_set1_epi16(255)), _mm512_srli_epi16::<8>(v)];
            quads_i(v: __m512i) -> Words =
                [_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(v)), _mm512_srai_epi16::<8>(v)];
            dot_quads(sums: __m512i, u: Words, i: Words) -> __m512i = {
                let even = _mm512_add_epi32(sums, _mm512_madd_epi16(u[0], i[0]));
                _mm512_add_epi32(even, _mm512_madd_epi16(u[1], i[1]))
            };
            bytes(stored: __m512i) -> (__m512i, __mmask64) = {
                let signed = _mm512_xor_si512(stored, _mm512_set1_epi8(-128));
                (_mm512_abs_epi8(signed), _mm512_movepi8_mask(signed))
            };
            // Two products of 128 and 127 stay below 2^15.
            dot_bytes(sums: __m512i, a: (__m512i, __mmask64), b: __m512i) -> __m512i = {
                let b = _mm512_mask_sub_epi8(b, a.1, _mm512_setzero_si512(), b);
                let pairs = _mm512_maddubs_epi16(a.0, b);
                _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
            };
            // Eight sums of products of 31 and 127 stay below 2^15, and four of 63 and 127.
            dot_codes(sums: __m512i, codes: __m512i, bytes: __m512i) -> __m512i =
                _mm512_add_epi16(sums, _mm512_maddubs_epi16(codes, bytes));
            add_codes(sums: __m512i, codes: __m512i) -> __m512i =
                _mm512_add_epi32(sums, _mm512_madd_epi16(codes, _mm512_set1_epi16(1)));
            join_codes(first: __m512i, last: __m512i, steps: &Steps, begin: __m512i) -> __m512i = {
                let [even, odd] = steps.each;
                let (even, odd) = (_mm512_set1_epi16(even as i16), _mm512_set1_epi16(odd as i16));
                let begin = _mm512_add_epi32(begin, _mm512_madd_epi16(first, even));
                _mm512_add_epi32(begin, _mm512_madd_epi16(last, odd))
            };
        }
        pairs_by_fma! {}
    };
    (Avx512Bf16) => {
        vnni! {}
        join_codes! { blend }
        type Pairs = __m512i;
        methods! {
            pairs(v: __m512i) -> __m512i = v;
            dot_pairs(sums: __m512, a: __m512i, b: __m512i) -> __m512 = {
                let a = std::mem::transmute::<__m512i, __m512bh>(a);
                _mm512_dpbf16_ps(sums, a, std::mem::transmute::<__m512i, __m512bh>(b))
            };
            round_bf16(v: __m512) -> __m512i =
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)));
        }
    };
    ($set:ident) => {
        vnni! {}
        join_codes! { twice }
        pairs_by_fma! {}
    };
}

macro_rules! vnni {
    () => {
        type Quads = __m512i;
        type Bytes = __m512i;
        const SUMS_AS_STORED: bool = true;
        methods! {
            quads_u(v: __m512i) -> __m512i = v;
            quads_i(v: __m512i) -> __m512i = v;
            dot_quads(sums: __m512i, u: __m512i, i: __m512i) -> __m512i = _mm512_dpbusd_epi32(sums, u, i);
            bytes(stored: __m512i) -> __m512i = stored;
            dot_bytes(sums: __m512i, a: __m512i, b: __m512i) -> __m512i = _mm512_dpbusd_epi32(sums, a, b);
            dot_codes(sums: __m512i, codes: __m512i, bytes: __m512i) -> __m512i =
                _mm512_dpbusd_epi32(sums, codes, bytes);
            add_codes(sums: __m512i, codes: __m512i) -> __m512i = _mm512_add_epi32(sums, codes);
        }
    };
}

/// `vpdpwssd`: `sums + a · b` of 16 bits with sign, two neighbours added. As the instruction itself, since compilers make a
/// multiplication and an addition of the intrinsic where they believe that to wait less, which is half as fast.
///
/// # Safety
/// The processor has AVX-512 VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) unsafe fn dot_words(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: registers only; the instruction is there by contract.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {sums}, {a}, {b}",
            sums = inout(zmm_reg) sums, a = in(zmm_reg) a, b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Sums of half a group of codes fit 16 bits.
macro_rules! join_codes {
    // Processors that have products of bf16 and are fast at them shift and blend on units of their own.
    (blend) => {
        methods! {
            join_codes(first: __m512i, last: __m512i, steps: &Steps, begin: __m512i) -> __m512i = {
                let last = _mm512_slli_epi32::<16>(last);
                let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, first, last);
                dot_words(begin, both, _mm512_set1_epi32(steps.both))
            };
        }
    };
    // Others have two units for everything: what is above a sum's 16 bits is its sign, which meets a 0.
    (twice) => {
        methods! {
            join_codes(first: __m512i, last: __m512i, steps: &Steps, begin: __m512i) -> __m512i = {
                let begin = dot_words(begin, first, _mm512_set1_epi32(steps.each[0]));
                dot_words(begin, last, _mm512_set1_epi32(steps.each[1]))
            };
        }
    };
}

macro_rules! pairs_by_fma {
    () => {
        /// High halves, low halves, as numbers.
        type Pairs = [__m512; 2];
        methods! {
            pairs(v: __m512i) -> [__m512; 2] = [
                _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32))),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)),
            ];
            dot_pairs(sums: __m512, a: [__m512; 2], b: [__m512; 2]) -> __m512 =
                _mm512_fmadd_ps(a[1], b[1], _mm512_fmadd_ps(a[0], b[0], sums));
            round_bf16(v: __m512) -> __m512i = {
                let bits = _mm512_castps_si512(v);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                // NaN, made quiet, so that it does not become infinite.
                let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(up, nan, quiet))
            };
        }
    };
}

registers!(Avx512);
registers!(Avx512Vnni);
registers!(Avx512Icl);
registers!(Avx512Bf16);

impl super::WordTables for Avx512Bf16 {
    methods! {
        lookup16(table: __m512i, indices: __m512i) -> __m512i = _mm512_permutexvar_epi16(indices, table);
    }
}
