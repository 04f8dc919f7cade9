//! AVX-512 and AVX2.

use std::arch::x86_64::*;

use super::portable::{bytes, of_bytes};
use super::{BYTES, Bytes, Table, Words};
use crate::simd::{
    Avx2, Avx512, Avx512Bf16, Avx512Icl, Avx512Vnni, AvxVnni, LANES, Portable, Simd, avx2, avx512,
};

/// The same by other methods of the set.
macro_rules! by_set {
    ($set:ident: $($name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {
        $(#[inline(always)]
        unsafe fn $name(self, $($arg: $ty),*) $(-> $ret)? {
            let $set = self;
            // SAFETY: by contract.
            unsafe { $body }
        })*
    };
}

type I = [__m256i; 2];

/// Low and high halves of quarters by one of two instructions.
macro_rules! zips {
    ($of:ident: $($name:ident $low:ident $high:ident)*) => {
        $(#[inline(always)]
        fn $name<const HIGH: bool>(self, a: $of, b: $of) -> $of {
            // SAFETY: having `self` means that the processor has the set.
            unsafe { zip!($of, a, b, if HIGH { $high } else { $low }) }
        })*
    };
}
macro_rules! zip {
    (__m512i, $a:ident, $b:ident, if $H:ident { $high:ident } else { $low:ident }) => {
        if $H { $high($a, $b) } else { $low($a, $b) }
    };
    (I, $a:ident, $b:ident, if $H:ident { $high:ident } else { $low:ident }) => {
        if $H { both!(|$a, $b| $high($a, $b)) } else { both!(|$a, $b| $low($a, $b)) }
    };
}

/// Operands as products of bytes take them: as they are (VNNI), or as 16 bits.
macro_rules! quads {
    (vnni) => {
        quads! {}
        const QUAD: usize = 4;
        const PREPARED: usize = BYTES;
        #[inline(always)]
        unsafe fn widen<const SIGNED: bool>(self, to: *mut u8, from: *const u8) {
            // SAFETY: by contract.
            unsafe { std::ptr::copy(from, to, 16) };
        }
        by_set! { set:
            spread(from: *const u8) -> Self::Quad = set.isplat(from.cast::<i32>().read_unaligned());
            store_quads(to: *mut u8, v: Self::Quad) = set.istore(to, v);
            load_quads(from: *const u8) -> Self::Quad = set.iload(from);
            load_byte(from: *const u8, e: usize) -> Self::I =
                set.sar(set.shl(set.iload(from), 24 - 8 * e as u32), 24);
        }
    };
    () => {
        const VECTORS: bool = true;
        type Quad = Self::Quads;
        #[inline(always)]
        fn quad_u(self, v: Self::I) -> Self::Quad {
            self.quads_u(v)
        }
        #[inline(always)]
        fn quad_i(self, v: Self::I) -> Self::Quad {
            self.quads_i(v)
        }
        #[inline(always)]
        fn dot(self, sums: Self::I, u: Self::Quad, i: Self::Quad) -> Self::I {
            self.dot_quads(sums, u, i)
        }
    };
    (words) => {
        quads! {}
        const QUAD: usize = 8;
        const PREPARED: usize = 2 * BYTES;
        #[inline(always)]
        unsafe fn widen<const SIGNED: bool>(self, to: *mut u8, from: *const u8) {
            // SAFETY: AVX2, and by contract.
            unsafe {
                // The even bytes of a quad, then the odd ones.
                let order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
                let all = _mm_shuffle_epi8(_mm_loadu_si128(from.cast()), order);
                let wide = if SIGNED { _mm256_cvtepi8_epi16(all) } else { _mm256_cvtepu8_epi16(all) };
                _mm256_storeu_si256(to.cast(), wide);
            }
        }
        by_set! { set:
            spread(from: *const u8) -> Self::Quad = [
                set.isplat(from.cast::<i32>().read_unaligned()),
                set.isplat(from.add(4).cast::<i32>().read_unaligned()),
            ];
            store_quads(to: *mut u8, v: Self::Quad) = {
                set.istore(to, v[0]);
                set.istore(to.add(BYTES), v[1]);
            };
            load_quads(from: *const u8) -> Self::Quad = [set.iload(from), set.iload(from.add(BYTES))];
            load_byte(from: *const u8, e: usize) -> Self::I = {
                let words = set.iload(from.add(BYTES * (e % 2)));
                set.sar(set.shl(words, 16 - 16 * (e as u32 / 2)), 16)
            };
        }
    };
}

/// A set without [`Bytes::PERMUTES`]: through arrays.
macro_rules! by_arrays {
    ($($name:ident($($arg:ident),*);)*) => {
        $(#[inline(always)]
        fn $name(self, $($arg: Self::I),*) -> Self::I {
            $(let $arg = to_array(self, $arg);)*
            of_array(self, Portable.$name($($arg),*))
        })*
    };
}

#[inline(always)]
fn to_array<S: Simd>(set: S, v: S::I) -> [i32; LANES] {
    let mut out = [0; BYTES];
    // SAFETY: 64 bytes.
    unsafe { set.istore(out.as_mut_ptr(), v) };
    of_bytes(out)
}

#[inline(always)]
fn of_array<S: Simd>(set: S, v: [i32; LANES]) -> S::I {
    // SAFETY: 64 bytes.
    unsafe { set.iload(bytes(v).as_ptr()) }
}

macro_rules! avx512 {
    ($set:ident $quads:ident $look_up:ident) => {
        impl Bytes for $set {
            const ROWS: usize = 9;
            quads! { $quads }
            dot_halves512! { $quads }
            $look_up! {}

            #[inline(always)]
            fn look_up16<const N: usize>(self, table: &Words, at: __m512i) -> __m512i {
                let words = table.words.as_ptr();
                // SAFETY: 64 words, and as above.
                unsafe {
                    let low = _mm512_loadu_si512(words.cast());
                    match N {
                        64 => _mm512_permutex2var_epi16(low, at, _mm512_loadu_si512(words.add(32).cast())),
                        _ => _mm512_permutexvar_epi16(at, low),
                    }
                }
            }

            type W = __mmask32;
            zips! { __m512i: zip8 _mm512_unpacklo_epi8 _mm512_unpackhi_epi8 zip16 _mm512_unpacklo_epi16 _mm512_unpackhi_epi16
                zip32 _mm512_unpacklo_epi32 _mm512_unpackhi_epi32 zip64 _mm512_unpacklo_epi64 _mm512_unpackhi_epi64 }
            methods! {
                fused(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
                sub16(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi16(a, b);
                adds16(a: __m512i, b: __m512i) -> __m512i = _mm512_adds_epi16(a, b);
                subs16(a: __m512i, b: __m512i) -> __m512i = _mm512_subs_epi16(a, b);
                adds16_u(a: __m512i, b: __m512i) -> __m512i = _mm512_adds_epu16(a, b);
                min16_u(a: __m512i, b: __m512i) -> __m512i = _mm512_min_epu16(a, b);
                max16_u(a: __m512i, b: __m512i) -> __m512i = _mm512_max_epu16(a, b);
                abs16(a: __m512i) -> __m512i = _mm512_abs_epi16(a);
                mul16(a: __m512i, b: __m512i) -> __m512i = _mm512_mullo_epi16(a, b);
                mulhrs16(a: __m512i, b: __m512i) -> __m512i = _mm512_mulhrs_epi16(a, b);
                gt16(a: __m512i, b: __m512i) -> __mmask32 = _mm512_cmpgt_epi16_mask(a, b);
                has16(a: __m512i, bit: i16) -> __mmask32 = _mm512_test_epi16_mask(a, _mm512_set1_epi16(bit));
                select16(mask: __mmask32, yes: __m512i, no: __m512i) -> __m512i =
                    _mm512_mask_blend_epi16(mask, no, yes);
                merge(mask: __m512i, a: __m512i, b: __m512i) -> __m512i =
                    _mm512_ternarylogic_epi32::<0xCA>(mask, a, b);
                pack32(a: __m512i, b: __m512i) -> __m512i = _mm512_packs_epi32(a, b);
                pack16(a: __m512i, b: __m512i) -> __m512i = _mm512_packs_epi16(a, b);
                halves_of(a: __m512i, b: __m512i) -> __m512i = {
                    let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
                    _mm512_permutexvar_epi64(order, _mm512_packs_epi32(a, b))
                };
                equal8(a: __m512i, b: __m512i) -> u64 = _mm512_cmpeq_epi8_mask(a, b);
                swap32(v: __m512i) -> __m512i = _mm512_shuffle_epi32::<0xb1>(v);
                swap64(v: __m512i) -> __m512i = _mm512_shuffle_epi32::<0x4e>(v);
            }
            memory! {
                load_half(from: *const u8) -> __m512i =
                    _mm512_zextsi256_si512(_mm256_loadu_si256(from.cast()));
                load_quarters(from: *const u8, stride: usize) -> __m512i = {
                    let v = _mm512_castsi128_si512(_mm_loadu_si128(from.cast()));
                    let v = _mm512_inserti32x4::<1>(v, _mm_loadu_si128(from.add(stride).cast()));
                    let v = _mm512_inserti32x4::<2>(v, _mm_loadu_si128(from.add(2 * stride).cast()));
                    _mm512_inserti32x4::<3>(v, _mm_loadu_si128(from.add(3 * stride).cast()))
                };
                store_quarters(to: *mut u8, stride: usize, v: __m512i) = {
                    _mm_storeu_si128(to.cast(), _mm512_castsi512_si128(v));
                    _mm_storeu_si128(to.add(stride).cast(), _mm512_extracti32x4_epi32::<1>(v));
                    _mm_storeu_si128(to.add(2 * stride).cast(), _mm512_extracti32x4_epi32::<2>(v));
                    _mm_storeu_si128(to.add(3 * stride).cast(), _mm512_extracti32x4_epi32::<3>(v));
                };
                load_signed16(from: *const u8) -> __m512i =
                    _mm512_cvtepi8_epi16(_mm256_loadu_si256(from.cast()));
            }
        }
    };
}

/// Look-ups by shuffles of 16 bytes.
macro_rules! shuffles512 {
    () => {
        const PERMUTES: bool = false;
        #[inline(always)]
        fn table(self, table: &Table) -> [__m512i; 4] {
            let at = table.0.as_ptr();
            // SAFETY: 16 bytes each, and as above.
            unsafe {
                [
                    _mm512_broadcast_i32x4(_mm_loadu_si128(at.cast())),
                    _mm512_broadcast_i32x4(_mm_loadu_si128(at.add(16).cast())),
                    _mm512_broadcast_i32x4(_mm_loadu_si128(at.add(32).cast())),
                    _mm512_broadcast_i32x4(_mm_loadu_si128(at.add(48).cast())),
                ]
            }
        }
        #[inline(always)]
        fn look_up<const N: usize>(self, table: [__m512i; 4], at: __m512i) -> __m512i {
            let [a, b, c, d] = table;
            // SAFETY: as above.
            unsafe {
                let first = _mm512_shuffle_epi8(a, at);
                if N == 16 {
                    return first;
                }
                let odd = _mm512_test_epi8_mask(at, _mm512_set1_epi8(16));
                let low = _mm512_mask_shuffle_epi8(first, odd, b, at);
                if N == 32 {
                    return low;
                }
                let high = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(c, at), odd, d, at);
                _mm512_mask_blend_epi8(_mm512_test_epi8_mask(at, _mm512_set1_epi8(32)), low, high)
            }
        }
        by_arrays! { permute(v, at); permute2(a, b, at); multishift(v, at); }
    };
}

/// Look-ups by permutations of 64 bytes.
macro_rules! permutes512 {
    () => {
        const PERMUTES: bool = true;
        #[inline(always)]
        fn look_up<const N: usize>(self, table: [__m512i; 4], at: __m512i) -> __m512i {
            self.permute(table[0], at)
        }
        methods! {
            table(table: &Table) -> [__m512i; 4] = [_mm512_loadu_si512(table.0.as_ptr().cast()); 4];
            permute(v: __m512i, at: __m512i) -> __m512i = _mm512_permutexvar_epi8(at, v);
            permute2(a: __m512i, b: __m512i, at: __m512i) -> __m512i = _mm512_permutex2var_epi8(a, at, b);
            multishift(v: __m512i, at: __m512i) -> __m512i = _mm512_multishift_epi64_epi8(at, v);
        }
    };
}

macro_rules! dot_halves512 {
    (words) => {
        methods! {
            dot_halves(sums: __m512i, a: __m512i, b: __m512i) -> __m512i =
                _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
        }
    };
    (vnni) => {
        methods! {
            dot_halves(sums: __m512i, a: __m512i, b: __m512i) -> __m512i = avx512::dot_words(sums, a, b);
        }
    };
}

avx512!(Avx512 words shuffles512);
avx512!(Avx512Vnni vnni shuffles512);
avx512!(Avx512Icl vnni permutes512);
avx512!(Avx512Bf16 vnni shuffles512);

macro_rules! dot_halves256 {
    (words) => {
        methods! {
            dot_halves(sums: I, a: I, b: I) -> I =
                both!(|sums, a, b| _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)));
        }
    };
    (vnni) => {
        methods! {
            dot_halves(sums: I, a: I, b: I) -> I =
                both!(|sums, a, b| avx2::dot_words(sums, a, b));
        }
    };
}

macro_rules! avx2 {
    ($set:ident $quads:ident $rows:literal) => {
        impl Bytes for $set {
            const PERMUTES: bool = false;
            const ROWS: usize = $rows;
            quads! { $quads }
            dot_halves256! { $quads }

            /// Halves of ones or of zeros.
            type W = I;
            zips! { I: zip8 _mm256_unpacklo_epi8 _mm256_unpackhi_epi8 zip16 _mm256_unpacklo_epi16 _mm256_unpackhi_epi16
                zip32 _mm256_unpacklo_epi32 _mm256_unpackhi_epi32 zip64 _mm256_unpacklo_epi64 _mm256_unpackhi_epi64 }
            methods! {
                fused(a: Self::F, b: Self::F, c: Self::F) -> Self::F = both!(|a, b, c| _mm256_fmadd_ps(a, b, c));
                sub16(a: I, b: I) -> I = both!(|a, b| _mm256_sub_epi16(a, b));
                adds16(a: I, b: I) -> I = both!(|a, b| _mm256_adds_epi16(a, b));
                subs16(a: I, b: I) -> I = both!(|a, b| _mm256_subs_epi16(a, b));
                adds16_u(a: I, b: I) -> I = both!(|a, b| _mm256_adds_epu16(a, b));
                min16_u(a: I, b: I) -> I = both!(|a, b| _mm256_min_epu16(a, b));
                max16_u(a: I, b: I) -> I = both!(|a, b| _mm256_max_epu16(a, b));
                abs16(a: I) -> I = both!(|a| _mm256_abs_epi16(a));
                mul16(a: I, b: I) -> I = both!(|a, b| _mm256_mullo_epi16(a, b));
                mulhrs16(a: I, b: I) -> I = both!(|a, b| _mm256_mulhrs_epi16(a, b));
                gt16(a: I, b: I) -> I = both!(|a, b| _mm256_cmpgt_epi16(a, b));
                has16(a: I, bit: i16) -> I = {
                    let bit = _mm256_set1_epi16(bit);
                    both!(|a| _mm256_cmpeq_epi16(_mm256_and_si256(a, bit), bit))
                };
                select16(mask: I, yes: I, no: I) -> I = both!(|mask, yes, no| _mm256_blendv_epi8(no, yes, mask));
                merge(mask: I, a: I, b: I) -> I = both!(|mask, a, b| {
                    _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b))
                });
                pack32(a: I, b: I) -> I = both!(|a, b| _mm256_packs_epi32(a, b));
                pack16(a: I, b: I) -> I = both!(|a, b| _mm256_packs_epi16(a, b));
                halves_of(a: I, b: I) -> I = [
                    _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(a[0], a[1])),
                    _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi32(b[0], b[1])),
                ];
                equal8(a: I, b: I) -> u64 = {
                    let bits = both!(|a, b| _mm256_movemask_epi8(_mm256_cmpeq_epi8(a, b)) as u32);
                    u64::from(bits[0]) | u64::from(bits[1]) << 32
                };
                swap32(v: I) -> I = both!(|v| _mm256_shuffle_epi32::<0xb1>(v));
                swap64(v: I) -> I = both!(|v| _mm256_shuffle_epi32::<0x4e>(v));
            }
            memory! {
                load_half(from: *const u8) -> I =
                    [_mm256_loadu_si256(from.cast()), _mm256_setzero_si256()];
                load_quarters(from: *const u8, stride: usize) -> I = [
                    _mm256_loadu2_m128i(from.add(stride).cast(), from.cast()),
                    _mm256_loadu2_m128i(from.add(3 * stride).cast(), from.add(2 * stride).cast()),
                ];
                store_quarters(to: *mut u8, stride: usize, v: I) = {
                    _mm256_storeu2_m128i(to.add(stride).cast(), to.cast(), v[0]);
                    _mm256_storeu2_m128i(to.add(3 * stride).cast(), to.add(2 * stride).cast(), v[1]);
                };
                load_signed16(from: *const u8) -> I = [
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(from.add(16).cast())),
                ];
            }

            #[inline(always)]
            fn table(self, table: &Table) -> [I; 4] {
                let at = table.0.as_ptr();
                // SAFETY: 16 bytes each, and as above.
                unsafe {
                    [
                        [_mm256_broadcastsi128_si256(_mm_loadu_si128(at.cast())); 2],
                        [_mm256_broadcastsi128_si256(_mm_loadu_si128(at.add(16).cast())); 2],
                        [_mm256_broadcastsi128_si256(_mm_loadu_si128(at.add(32).cast())); 2],
                        [_mm256_broadcastsi128_si256(_mm_loadu_si128(at.add(48).cast())); 2],
                    ]
                }
            }
            #[inline(always)]
            fn look_up<const N: usize>(self, table: [I; 4], at: I) -> I {
                let [a, b, c, d] = table;
                // SAFETY: as above.
                unsafe {
                    both!(|a, b, c, d, at| {
                        let first = _mm256_shuffle_epi8(a, at);
                        if N == 16 {
                            first
                        } else {
                            // Blends go by the highest bit of a byte.
                            let odd = _mm256_slli_epi16::<3>(at);
                            let low = _mm256_blendv_epi8(first, _mm256_shuffle_epi8(b, at), odd);
                            if N == 32 {
                                low
                            } else {
                                let (c, d) = (_mm256_shuffle_epi8(c, at), _mm256_shuffle_epi8(d, at));
                                let high = _mm256_blendv_epi8(c, d, odd);
                                _mm256_blendv_epi8(low, high, _mm256_slli_epi16::<2>(at))
                            }
                        }
                    })
                }
            }
            by_arrays! { permute(v, at); permute2(a, b, at); multishift(v, at); }
        }
    };
}

avx2!(Avx2 words 4);
avx2!(AvxVnni vnni 5);
