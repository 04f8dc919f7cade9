//! [`Lanes`] of the sets of x86-64.

use std::arch::x86_64::*;

use super::super::{Avx2, Avx512, Avx512Bf16, Avx512Icl, Avx512Vnni, AvxVnni, Simd, Sse2};
use super::{LANES, Lanes};

/// Folds the lanes of each of four quarters: halves, pairs.
macro_rules! fold_quarters {
    ($quarters:expr, $op:ident) => {{
        let [a, b, c, d] = $quarters;
        let (ab_low, ab_high) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let (cd_low, cd_high) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        // Lanes 0 and 2, 1 and 3 of each.
        let even = $op(_mm_movelh_ps(ab_low, cd_low), _mm_movelh_ps(ab_high, cd_high));
        let odd = $op(_mm_movehl_ps(cd_low, ab_low), _mm_movehl_ps(cd_high, ab_high));
        $op(even, odd)
    }};
}

/// A quarter from the halves of a vector.
macro_rules! quarter {
    ($low:expr, $high:expr, $op256:ident, $op128:ident) => {{
        let half = $op256($low, $high);
        $op128(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
    }};
}

/// 8 halves of 16 rows: the halves of the `c`-th register are half `c` of rows 0 to 7 and 8 to 15.
///
/// # Safety
/// The processor has AVX2; as for [`Lanes::halves8`].
#[inline(always)]
unsafe fn transposed(rows: *const u16, stride: usize, n: usize) -> [__m256i; 8] {
    // SAFETY: rows below `n`, by contract.
    unsafe {
        // The halves of the i-th register are rows i and 8 + i.
        let mut a = [_mm256_setzero_si256(); 8];
        for i in 0..8 {
            let low = _mm_loadu_si128(rows.add(i.min(n - 1) * stride).cast());
            let high = _mm_loadu_si128(rows.add((8 + i).min(n - 1) * stride).cast());
            a[i] = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high);
        }
        // 8 × 8 elements in each half: pairs of rows × columns 0-3 and 4-7, ...
        let mut b = a;
        for i in 0..4 {
            b[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
        }
        // ... fours × columns 01, 23, 45, 67, ...
        for i in 0..2 {
            let (x, y) = ([b[4 * i], b[4 * i + 1]], [b[4 * i + 2], b[4 * i + 3]]);
            for half in 0..2 {
                a[4 * i + 2 * half] = _mm256_unpacklo_epi32(x[half], y[half]);
                a[4 * i + 2 * half + 1] = _mm256_unpackhi_epi32(x[half], y[half]);
            }
        }
        // ... and eights × one column.
        for i in 0..4 {
            b[2 * i] = _mm256_unpacklo_epi64(a[i], a[4 + i]);
            b[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[4 + i]);
        }
        b
    }
}

/// Columns from four registers of rows, in each quarter.
macro_rules! columns4 {
    ($a:ident, $low32:ident, $high32:ident, $low64:ident, $high64:ident) => {{
        let (x, y) = ($low32($a[0], $a[1]), $low32($a[2], $a[3]));
        let (z, w) = ($high32($a[0], $a[1]), $high32($a[2], $a[3]));
        [$low64(x, y), $high64(x, y), $low64(z, w), $high64(z, w)]
    }};
}

macro_rules! avx512 {
    ($set:ident $($more:item)*) => {
        impl Lanes for $set {
            const SUMS: usize = 24;

            #[inline(always)]
            fn four(self, x: [f32; 4]) -> __m512 {
                // SAFETY: the processor has the set.
                unsafe { _mm512_zextps128_ps512(_mm_setr_ps(x[0], x[1], x[2], x[3])) }
            }

            #[inline(always)]
            fn largest4(self, v: [__m512; 4]) -> __m512 {
                // SAFETY: as above.
                unsafe {
                    let mut quarters = [_mm_setzero_ps(); 4];
                    for i in 0..4 {
                        let (low, high) = (_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps::<1>(v[i]));
                        quarters[i] = quarter!(low, high, _mm256_max_ps, _mm_max_ps);
                    }
                    _mm512_zextps128_ps512(fold_quarters!(quarters, _mm_max_ps))
                }
            }

            #[inline(always)]
            fn sum4(self, v: [__m512; 4]) -> __m512 {
                // SAFETY: as above.
                unsafe {
                    let mut quarters = [_mm_setzero_ps(); 4];
                    for i in 0..4 {
                        let (low, high) = (_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps::<1>(v[i]));
                        quarters[i] = quarter!(low, high, _mm256_add_ps, _mm_add_ps);
                    }
                    _mm512_zextps128_ps512(fold_quarters!(quarters, _mm_add_ps))
                }
            }

            #[inline(always)]
            unsafe fn words4(self, rows: *const u32, stride: usize, n: usize) -> [__m512i; 4] {
                // SAFETY: rows below `n`, by contract.
                unsafe {
                    // Quarter q of the i-th register is row 4 q + i.
                    let mut a = [_mm512_setzero_si512(); 4];
                    for i in 0..4 {
                        let mut quarters = [_mm_setzero_si128(); 4];
                        for q in 0..4 {
                            let row = (4 * q + i).min(n - 1);
                            quarters[q] = _mm_loadu_si128(rows.add(row * stride).cast());
                        }
                        let v = _mm512_broadcast_i32x4(quarters[0]);
                        let v = _mm512_mask_broadcast_i32x4(v, 0x00f0, quarters[1]);
                        let v = _mm512_mask_broadcast_i32x4(v, 0x0f00, quarters[2]);
                        a[i] = _mm512_mask_broadcast_i32x4(v, 0xf000, quarters[3]);
                    }
                    columns4!(
                        a, _mm512_unpacklo_epi32, _mm512_unpackhi_epi32, _mm512_unpacklo_epi64,
                        _mm512_unpackhi_epi64
                    )
                }
            }

            #[inline(always)]
            unsafe fn halves8(self, rows: *const u16, stride: usize, n: usize) -> [__m512; 8] {
                // SAFETY: by contract.
                unsafe {
                    let columns = transposed(rows, stride, n);
                    let mut out = [_mm512_setzero_ps(); 8];
                    for c in 0..8 {
                        out[c] = _mm512_cvtph_ps(columns[c]);
                    }
                    out
                }
            }

            #[inline(always)]
            unsafe fn load_bytes(self, from: *const i8) -> __m512i {
                // SAFETY: by contract.
                unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
            }

            #[inline(always)]
            fn spread<const BITS: usize>(self, codes: u64) -> __m512i {
                let steps = BITS as i32;
                // SAFETY: as above.
                unsafe {
                    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                    let shifts = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(steps));
                    // With 4 bits the second half of the lanes is in the second half of the codes.
                    let words = match BITS {
                        4 => _mm512_mask_set1_epi32(
                            _mm512_set1_epi32(codes as i32), 0xff00, (codes >> 32) as i32,
                        ),
                        _ => _mm512_set1_epi32(codes as i32),
                    };
                    let shifts = _mm512_and_si512(shifts, _mm512_set1_epi32(31));
                    let codes = _mm512_srlv_epi32(words, shifts);
                    _mm512_and_si512(codes, _mm512_set1_epi32((1 << BITS) - 1))
                }
            }

            $($more)*
        }
    };
}

avx512!(Avx512);
avx512!(Avx512Vnni);
avx512!(Avx512Icl);
avx512! { Avx512Bf16
    #[inline(always)]
    fn join(self, low: __m512, high: __m512) -> __m512i {
        // SAFETY: as above; all registers are 64 bytes of any bits.
        unsafe {
            let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            // A half's word, and the other's 16 words further on.
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let others = _mm512_slli_epi32::<16>(_mm512_add_epi32(lanes, _mm512_set1_epi32(LANES as i32)));
            _mm512_permutexvar_epi16(_mm512_or_si512(lanes, others), rounded)
        }
    }

    #[inline(always)]
    fn narrowed(self, v: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let low = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
            let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(v));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }
}

macro_rules! avx2 {
    ($set:ident) => {
        impl Lanes for $set {
            const SUMS: usize = 6;

            #[inline(always)]
            fn four(self, x: [f32; 4]) -> [__m256; 2] {
                // SAFETY: the processor has the set.
                unsafe {
                    [
                        _mm256_zextps128_ps256(_mm_setr_ps(x[0], x[1], x[2], x[3])),
                        _mm256_setzero_ps(),
                    ]
                }
            }

            #[inline(always)]
            fn largest4(self, v: [[__m256; 2]; 4]) -> [__m256; 2] {
                // SAFETY: as above.
                unsafe {
                    let mut quarters = [_mm_setzero_ps(); 4];
                    for i in 0..4 {
                        quarters[i] = quarter!(v[i][0], v[i][1], _mm256_max_ps, _mm_max_ps);
                    }
                    [
                        _mm256_zextps128_ps256(fold_quarters!(quarters, _mm_max_ps)),
                        _mm256_setzero_ps(),
                    ]
                }
            }

            #[inline(always)]
            fn sum4(self, v: [[__m256; 2]; 4]) -> [__m256; 2] {
                // SAFETY: as above.
                unsafe {
                    let mut quarters = [_mm_setzero_ps(); 4];
                    for i in 0..4 {
                        quarters[i] = quarter!(v[i][0], v[i][1], _mm256_add_ps, _mm_add_ps);
                    }
                    [
                        _mm256_zextps128_ps256(fold_quarters!(quarters, _mm_add_ps)),
                        _mm256_setzero_ps(),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn words4(self, rows: *const u32, stride: usize, n: usize) -> [[__m256i; 2]; 4] {
                let row = |t: usize| rows.wrapping_add(t.min(n - 1) * stride).cast::<__m128i>();
                // SAFETY: rows below `n`, by contract.
                unsafe {
                    let mut out = [[_mm256_setzero_si256(); 2]; 4];
                    for half in 0..2 {
                        // Half q of the i-th register is row 4 q + i.
                        let mut a = [_mm256_setzero_si256(); 4];
                        for i in 0..4 {
                            let low = _mm_loadu_si128(row(8 * half + i));
                            let high = _mm_loadu_si128(row(8 * half + 4 + i));
                            a[i] = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high);
                        }
                        let columns = columns4!(
                            a,
                            _mm256_unpacklo_epi32,
                            _mm256_unpackhi_epi32,
                            _mm256_unpacklo_epi64,
                            _mm256_unpackhi_epi64
                        );
                        for c in 0..4 {
                            out[c][half] = columns[c];
                        }
                    }
                    out
                }
            }

            #[inline(always)]
            unsafe fn halves8(self, rows: *const u16, stride: usize, n: usize) -> [[__m256; 2]; 8] {
                // SAFETY: by contract.
                unsafe {
                    let columns = transposed(rows, stride, n);
                    let mut out = [[_mm256_setzero_ps(); 2]; 8];
                    for c in 0..8 {
                        out[c][0] = _mm256_cvtph_ps(_mm256_castsi256_si128(columns[c]));
                        out[c][1] = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(columns[c]));
                    }
                    out
                }
            }

            #[inline(always)]
            unsafe fn load_bytes(self, from: *const i8) -> [__m256i; 2] {
                // SAFETY: by contract.
                unsafe {
                    let bytes = _mm_loadu_si128(from.cast());
                    [_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))]
                }
            }

            #[inline(always)]
            fn spread<const BITS: usize>(self, codes: u64) -> [__m256i; 2] {
                let step = BITS as i32;
                // SAFETY: as above.
                unsafe {
                    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                    let shifts = _mm256_mullo_epi32(lanes, _mm256_set1_epi32(step));
                    let mask = _mm256_set1_epi32((1 << BITS) - 1);
                    let high = (codes >> (8 * BITS)) as i32;
                    let low = _mm256_srlv_epi32(_mm256_set1_epi32(codes as i32), shifts);
                    let high = _mm256_srlv_epi32(_mm256_set1_epi32(high), shifts);
                    [_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)]
                }
            }
        }
    };
}

avx2!(Avx2);
avx2!(AvxVnni);

impl Lanes for Sse2 {
    const SUMS: usize = 2;

    #[inline(always)]
    fn four(self, x: [f32; 4]) -> [__m128; 4] {
        // SAFETY: part of x86-64.
        unsafe {
            let none = _mm_setzero_ps();
            [_mm_setr_ps(x[0], x[1], x[2], x[3]), none, none, none]
        }
    }

    #[inline(always)]
    unsafe fn words4(self, rows: *const u32, stride: usize, n: usize) -> [[__m128i; 4]; 4] {
        // SAFETY: rows below `n`, by contract.
        unsafe {
            let mut out = [[_mm_setzero_si128(); 4]; 4];
            for quarter in 0..4 {
                let mut a = [_mm_setzero_si128(); 4];
                for i in 0..4 {
                    let row = (4 * quarter + i).min(n - 1);
                    a[i] = _mm_loadu_si128(rows.add(row * stride).cast());
                }
                let columns = columns4!(
                    a,
                    _mm_unpacklo_epi32,
                    _mm_unpackhi_epi32,
                    _mm_unpacklo_epi64,
                    _mm_unpackhi_epi64
                );
                for c in 0..4 {
                    out[c][quarter] = columns[c];
                }
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn halves8(self, rows: *const u16, stride: usize, n: usize) -> [[__m128; 4]; 8] {
        let mut columns = [[0u16; LANES]; 8];
        // SAFETY: rows below `n`, by contract, and places in `columns`.
        unsafe {
            for half in 0..2 {
                // Pairs of rows × columns 0-3 and 4-7, and so on as in `transposed`.
                let (mut a, mut b) = ([_mm_setzero_si128(); 8], [_mm_setzero_si128(); 8]);
                for i in 0..8 {
                    let row = (8 * half + i).min(n - 1);
                    a[i] = _mm_loadu_si128(rows.add(row * stride).cast());
                }
                for i in 0..4 {
                    b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
                    b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
                }
                for i in 0..2 {
                    for h in 0..2 {
                        let (x, y) = (b[4 * i + h], b[4 * i + 2 + h]);
                        a[4 * i + 2 * h] = _mm_unpacklo_epi32(x, y);
                        a[4 * i + 2 * h + 1] = _mm_unpackhi_epi32(x, y);
                    }
                }
                for i in 0..4 {
                    let (even, odd) = columns[2 * i..2 * i + 2].split_at_mut(1);
                    let (low, high) =
                        (_mm_unpacklo_epi64(a[i], a[4 + i]), _mm_unpackhi_epi64(a[i], a[4 + i]));
                    _mm_storeu_si128(even[0].as_mut_ptr().add(8 * half).cast(), low);
                    _mm_storeu_si128(odd[0].as_mut_ptr().add(8 * half).cast(), high);
                }
            }
            let mut out = [self.zero(); 8];
            for c in 0..8 {
                out[c] = self.load_f16(columns[c].as_ptr());
            }
            out
        }
    }
}
