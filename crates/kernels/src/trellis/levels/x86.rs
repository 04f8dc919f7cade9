//! HOT PATH. 64 levels in three instructions: a byte permutation brings the bytes around their codes
//! together, a multishift cuts the codes out, and another permutation looks the levels up.

use std::arch::x86_64::*;

use super::{BOOSTS, Boosts, MAX_ROWS, ROW_GROUP, ROW_SCALES, TABLES};
use crate::trellis::STEP;

/// See [`super::segment`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(super) fn segment(bits: u8, codes: &[u8], rows: usize, out: &mut [u8]) {
    match bits {
        1 => keys::<1>(codes, rows, out),
        2 => keys::<2>(codes, rows, out),
        3 => keys::<3>(codes, rows, out),
        4 => keys::<4>(codes, rows, out),
        5 => keys::<5>(codes, rows, out),
        _ => keys::<6>(codes, rows, out),
    }
}

/// Where the second register of codes begins: the end of the rows that are permuted together.
const fn second(bits: usize) -> usize {
    match bits {
        1 | 2 => 0,
        3 | 4 => 32 * bits - 64,
        // Eight rows at a time.
        _ => 16 * bits - 64,
    }
}

/// For 16 rows and coefficients 4k to 4k + 3: 32-bit lane t gets the four bytes around the codes of
/// row t.
const fn key_bytes(bits: usize, k: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let row = if bits > 4 { i / 4 % 8 } else { i / 4 };
        let at = 2 * bits * row + (4 * bits * k / 8 + i % 4) % (2 * bits);
        out[i] = if at < 64 { at } else { 64 + at - second(bits) } as u8;
        i += 1;
    }
    out
}

/// Which bits of a 64-bit lane each byte takes: two rows of four codes.
const fn key_shifts(bits: usize, k: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        out[i] = (i / 4 % 2 * 32 + 4 * bits * k % 8 + bits * (i % 4)) as u8;
        i += 1;
    }
    out
}

/// A register's worth of constants.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Bytes([u8; 64]);

/// [`key_bytes`] and [`key_shifts`] of one width.
struct KeyPattern {
    bytes: [Bytes; 4],
    shifts: [Bytes; 4],
}

impl KeyPattern {
    const fn new(bits: usize) -> Self {
        let mut pattern = Self { bytes: [Bytes([0; 64]); 4], shifts: [Bytes([0; 64]); 4] };
        let mut k = 0;
        while k < 4 {
            pattern.bytes[k] = Bytes(key_bytes(bits, k));
            pattern.shifts[k] = Bytes(key_shifts(bits, k));
            k += 1;
        }
        pattern
    }
}

static KEY_PATTERNS: [KeyPattern; 6] = [
    KeyPattern::new(1),
    KeyPattern::new(2),
    KeyPattern::new(3),
    KeyPattern::new(4),
    KeyPattern::new(5),
    KeyPattern::new(6),
];

static VALUE_PATTERNS: [[Bytes; 2]; 6] = [
    [Bytes(value_bytes(1)), Bytes(value_shifts(1))],
    [Bytes(value_bytes(2)), Bytes(value_shifts(2))],
    [Bytes(value_bytes(3)), Bytes(value_shifts(3))],
    [Bytes(value_bytes(4)), Bytes(value_shifts(4))],
    [Bytes(value_bytes(5)), Bytes(value_shifts(5))],
    [Bytes(value_bytes(6)), Bytes(value_shifts(6))],
];

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
#[inline]
fn constant(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_epi8(bytes.as_ptr().cast()) }
}

/// Levels plus 128 of 16 rows of a segment, four coefficients at a time.
#[derive(Clone, Copy)]
pub(crate) struct KeyLevels<const BITS: usize> {
    bytes: [__m512i; 4],
    shifts: [__m512i; 4],
    table: __m512i,
}

impl<const BITS: usize> KeyLevels<BITS> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    #[inline]
    pub(crate) fn new() -> Self {
        let pattern = &KEY_PATTERNS[BITS - 1];
        let table: &[i8; 64] = &TABLES[BITS].0;
        // SAFETY: 64 bytes.
        let table = unsafe { _mm512_loadu_epi8(table.as_ptr()) };
        Self {
            bytes: std::array::from_fn(|k| constant(&pattern.bytes[k].0)),
            shifts: std::array::from_fn(|k| constant(&pattern.shifts[k].0)),
            table: _mm512_xor_si512(table, _mm512_set1_epi8(-128)),
        }
    }

    /// Codes of 16 rows.
    ///
    /// # Safety
    /// 32 · `BITS` bytes must be readable.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    #[inline]
    pub(crate) unsafe fn codes(self, at: *const u8) -> [__m512i; 4] {
        // SAFETY: all loads end at 32 · `BITS` or before.
        unsafe {
            let load = |offset: usize| _mm512_loadu_epi8(at.add(offset).cast());
            let second = const { second(BITS) };
            // One or two registers of codes; with more than 4 bits, two for each half of the rows.
            match BITS {
                1 => [_mm512_zextsi256_si512(_mm256_loadu_epi8(at.cast())); 4],
                2 => [load(0); 4],
                3 | 4 => [load(0), load(second), load(0), load(0)],
                _ => [load(0), load(second), load(16 * BITS), load(16 * BITS + second)],
            }
        }
    }

    /// Levels of coefficients 4k to 4k + 3: 32-bit lane t has those of row t.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    #[inline]
    pub(crate) fn levels(self, codes: [__m512i; 4], k: usize) -> __m512i {
        let near = match BITS {
            1 | 2 => _mm512_permutexvar_epi8(self.bytes[k], codes[0]),
            3 | 4 => _mm512_permutex2var_epi8(codes[0], self.bytes[k], codes[1]),
            _ => _mm512_mask_blend_epi64(
                0xF0,
                _mm512_permutex2var_epi8(codes[0], self.bytes[k], codes[1]),
                _mm512_permutex2var_epi8(codes[2], self.bytes[k], codes[3]),
            ),
        };
        let codes = _mm512_multishift_epi64_epi8(self.shifts[k], near);
        _mm512_permutexvar_epi8(codes, self.table)
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
#[inline]
fn keys<const BITS: usize>(codes: &[u8], rows: usize, out: &mut [u8]) {
    let groups = rows / ROW_GROUP;
    assert!(codes.len() >= groups * 32 * BITS && out.len() >= groups * 256);
    let levels = KeyLevels::<BITS>::new();
    for g in 0..groups {
        // SAFETY: codes of a group are 32 · BITS bytes from 32 · BITS · g on; the outputs of quad k
        // and group g are 64 bytes at 64 (k · groups + g), below 256 · groups.
        unsafe {
            let codes = levels.codes(codes.as_ptr().add(32 * BITS * g));
            for k in 0..4 {
                let out = out.as_mut_ptr().add(64 * (k * groups + g));
                _mm512_storeu_epi8(out.cast(), levels.levels(codes, k));
            }
        }
    }
}

/// Bytes that are loaded for four rows of values; the last ones are theirs. (Loads under a mask would take
/// several times as long.)
const fn value_span(bits: usize) -> usize {
    if bits > 4 { 64 } else { 32 }
}

/// For four rows: 64-bit lane c gets, of every row, the two bytes around the codes of coefficients 2c
/// and 2c + 1.
const fn value_bytes(bits: usize) -> [u8; 64] {
    let before = value_span(bits) - 8 * bits;
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let (pair, row) = (i / 8, i / 2 % 4);
        out[i] = (before + 2 * bits * row + (2 * bits * pair / 8 + i % 2) % (2 * bits)) as u8;
        i += 1;
    }
    out
}

const fn value_shifts(bits: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let (pair, second, row) = (i / 8, i / 4 % 2, i % 4);
        out[i] = (16 * row + 2 * bits * pair % 8 + bits * second) as u8;
        i += 1;
    }
    out
}

/// Levels of four rows of a segment, as two's complement: 32-bit lane c has those of coefficient c.
#[derive(Clone, Copy)]
pub(crate) struct ValueLevels<const BITS: usize> {
    bytes: __m512i,
    shifts: __m512i,
    table: __m512i,
}

impl<const BITS: usize> ValueLevels<BITS> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    #[inline]
    pub(crate) fn new() -> Self {
        let [bytes, shifts] = &VALUE_PATTERNS[BITS - 1];
        let table: &[i8; 64] = &TABLES[BITS].0;
        // SAFETY: 64 bytes.
        let table = unsafe { _mm512_loadu_epi8(table.as_ptr()) };
        Self { bytes: constant(&bytes.0), shifts: constant(&shifts.0), table }
    }

    /// # Safety
    /// 8 · `BITS` bytes of codes must be readable, and as many before them that it makes 32 bytes, or 64
    /// with more than 4 bits: the headers of 16 rows are enough.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    #[inline]
    pub(crate) unsafe fn levels(self, codes: *const u8) -> __m512i {
        // SAFETY: by contract.
        let all = unsafe {
            let at = codes.sub(const { value_span(BITS) - 8 * BITS });
            match BITS {
                5.. => _mm512_loadu_epi8(at.cast()),
                _ => _mm512_zextsi256_si512(_mm256_loadu_epi8(at.cast())),
            }
        };
        let near = _mm512_permutexvar_epi8(self.bytes, all);
        let codes = _mm512_multishift_epi64_epi8(self.shifts, near);
        _mm512_permutexvar_epi8(codes, self.table)
    }
}

/// See [`super::Layout::row_factors`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(super) fn row_factors(codes: &[u8], out: &mut [f32], boosts: &mut Boosts) {
    let rows = out.len();
    assert!(codes.len() >= rows && rows <= MAX_ROWS);
    // SAFETY: 16 codes and factors from each multiple of 16 below `rows` on; 64 headers.
    unsafe {
        let eighths = _mm512_loadu_ps(ROW_SCALES.as_ptr().add(128));
        for t in (0..rows).step_by(ROW_GROUP) {
            let code = _mm512_cvtepu8_epi32(_mm_loadu_epi8(codes.as_ptr().add(t).cast()));
            // The table's own product: a power of two times one of eight.
            let exponent = _mm512_add_epi32(_mm512_srli_epi32::<3>(code), _mm512_set1_epi32(111));
            let power = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent));
            let eighth = _mm512_and_si512(code, _mm512_set1_epi32(7));
            let eighth = _mm512_permutexvar_ps(eighth, eighths);
            let some = _mm512_test_epi32_mask(code, code);
            let scale = _mm512_maskz_mul_ps(some, power, eighth);
            _mm512_storeu_ps(out.as_mut_ptr().add(t), scale);
        }
        let headers = _mm512_loadu_epi8(boosts.headers.as_ptr().cast());
        let own = (u64::MAX >> (MAX_ROWS - rows.max(1))) * u64::from(rows > 0);
        let boosted = own & _mm512_cmpge_epu8_mask(headers, _mm512_set1_epi8(16));
        let segments = _mm512_and_si512(headers, _mm512_set1_epi8(15));
        for (segment, rows) in boosts.rows.iter_mut().enumerate() {
            let segment = _mm512_set1_epi8(segment as i8);
            *rows = _mm512_mask_cmpeq_epi8_mask(boosted, segments, segment);
        }
    }
}

/// See [`super::Layout::segment_factors`]. `out`: `[segments, rows]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(super) fn segment_factors(factors: &[f32], boosts: &Boosts, scales: &[f32], out: &mut [f32]) {
    let rows = factors.len();
    assert!(rows.is_multiple_of(ROW_GROUP) && rows <= MAX_ROWS && out.len().is_multiple_of(rows));
    // SAFETY: 16 factors and headers from each multiple of 16 below `rows` on, in every segment.
    unsafe {
        let table = _mm512_loadu_ps(BOOSTS.as_ptr());
        for t in (0..rows).step_by(ROW_GROUP) {
            let headers = _mm_loadu_epi8(boosts.headers.as_ptr().add(t).cast());
            let exponents = _mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(headers));
            let plain = _mm512_loadu_ps(factors.as_ptr().add(t));
            let boosted = _mm512_mul_ps(plain, _mm512_permutexvar_ps(exponents, table));
            for (segment, scale) in scales[..out.len() / rows].iter().enumerate() {
                let own = (boosts.rows[segment] >> t) as u16;
                let scale = _mm512_set1_ps(scale * STEP);
                let factor = _mm512_mul_ps(scale, _mm512_mask_blend_ps(own, plain, boosted));
                _mm512_storeu_ps(out.as_mut_ptr().add(segment * rows + t), factor);
            }
        }
    }
}
