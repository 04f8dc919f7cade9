//! 64 levels in three instructions: a byte permutation brings the bytes around their codes together, a multishift cuts
//! the codes out, and another permutation looks the levels up. For sets that have them ([`Bytes::PERMUTES`]).

use super::{OFFSET, TABLES};
use crate::simd::bytes::{BYTES, Bytes};

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
const fn key_bytes(bits: usize, k: usize) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    let mut i = 0;
    while i < BYTES {
        let row = if bits > 4 { i / 4 % 8 } else { i / 4 };
        let at = 2 * bits * row + (4 * bits * k / 8 + i % 4) % (2 * bits);
        out[i] = if at < 64 { at } else { 64 + at - second(bits) } as u8;
        i += 1;
    }
    out
}

/// Which bits of a 64-bit lane each byte takes: two rows of four codes.
const fn key_shifts(bits: usize, k: usize) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    let mut i = 0;
    while i < BYTES {
        out[i] = (i / 4 % 2 * 32 + 4 * bits * k % 8 + bits * (i % 4)) as u8;
        i += 1;
    }
    out
}

/// A vector's worth of constants.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Constants([u8; BYTES]);

/// [`key_bytes`] and [`key_shifts`] of one width.
struct KeyPattern {
    bytes: [Constants; 4],
    shifts: [Constants; 4],
}

impl KeyPattern {
    const fn new(bits: usize) -> Self {
        let mut pattern = Self { bytes: [Constants([0; 64]); 4], shifts: [Constants([0; 64]); 4] };
        let mut k = 0;
        while k < 4 {
            pattern.bytes[k] = Constants(key_bytes(bits, k));
            pattern.shifts[k] = Constants(key_shifts(bits, k));
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

static VALUE_PATTERNS: [[Constants; 2]; 6] = [
    [Constants(value_bytes(1)), Constants(value_shifts(1))],
    [Constants(value_bytes(2)), Constants(value_shifts(2))],
    [Constants(value_bytes(3)), Constants(value_shifts(3))],
    [Constants(value_bytes(4)), Constants(value_shifts(4))],
    [Constants(value_bytes(5)), Constants(value_shifts(5))],
    [Constants(value_bytes(6)), Constants(value_shifts(6))],
];

/// The upper half.
static UPPER: Constants = {
    let mut bytes = [0; BYTES];
    let mut i = BYTES / 2;
    while i < BYTES {
        bytes[i] = 255;
        i += 1;
    }
    Constants(bytes)
};

#[inline(always)]
fn constant<S: Bytes>(set: S, bytes: &Constants) -> S::I {
    // SAFETY: 64 bytes.
    unsafe { set.iload(bytes.0.as_ptr()) }
}

/// Levels plus 128 of 16 rows of a segment, four coefficients at a time.
#[derive(Clone, Copy)]
pub(crate) struct KeyLevels<S: Bytes, const BITS: usize> {
    set: S,
    codes: [S::I; 4],
    bytes: [S::I; 4],
    shifts: [S::I; 4],
    table: S::I,
}

impl<S: Bytes, const BITS: usize> KeyLevels<S, BITS> {
    /// Of the codes of 16 rows.
    ///
    /// # Safety
    /// 32 · `BITS` bytes must be readable.
    #[inline(always)]
    pub(crate) unsafe fn new(set: S, at: *const u8) -> Self {
        let pattern = &KEY_PATTERNS[BITS - 1];
        let [a, b, c, d] = &pattern.bytes;
        let bytes = [constant(set, a), constant(set, b), constant(set, c), constant(set, d)];
        let [a, b, c, d] = &pattern.shifts;
        let shifts = [constant(set, a), constant(set, b), constant(set, c), constant(set, d)];
        let second = const { second(BITS) };
        // SAFETY: all loads end at 32 · `BITS` or before.
        let codes = unsafe {
            // One or two registers of codes; with more than 4 bits, two for each half of the rows.
            match BITS {
                1 => [set.load_half(at); 4],
                2 => [set.iload(at); 4],
                3 | 4 => [set.iload(at), set.iload(at.add(second)), set.izero(), set.izero()],
                _ => [
                    set.iload(at),
                    set.iload(at.add(second)),
                    set.iload(at.add(16 * BITS)),
                    set.iload(at.add(16 * BITS + second)),
                ],
            }
        };
        let [table, ..] = set.table(&OFFSET[BITS]);
        Self { set, codes, bytes, shifts, table }
    }

    /// Levels of coefficients 4k to 4k + 3: 32-bit lane t has those of row t.
    #[inline(always)]
    pub(crate) fn levels(self, k: usize) -> S::I {
        let Self { set, codes: [a, b, c, d], bytes, shifts, table } = self;
        let near = match BITS {
            1 | 2 => set.permute(a, bytes[k]),
            3 | 4 => set.permute2(a, b, bytes[k]),
            _ => {
                let upper = constant(set, &UPPER);
                set.merge(upper, set.permute2(c, d, bytes[k]), set.permute2(a, b, bytes[k]))
            }
        };
        set.permute(table, set.multishift(near, shifts[k]))
    }
}

/// Bytes that are loaded for four rows of values; the last ones are theirs. (Loads under a mask would take
/// several times as long.)
const fn value_span(bits: usize) -> usize {
    if bits > 4 { 64 } else { 32 }
}

/// For four rows: 64-bit lane c gets, of every row, the two bytes around the codes of coefficients 2c
/// and 2c + 1.
const fn value_bytes(bits: usize) -> [u8; BYTES] {
    let before = value_span(bits) - 8 * bits;
    let mut out = [0; BYTES];
    let mut i = 0;
    while i < BYTES {
        let (pair, row) = (i / 8, i / 2 % 4);
        out[i] = (before + 2 * bits * row + (2 * bits * pair / 8 + i % 2) % (2 * bits)) as u8;
        i += 1;
    }
    out
}

const fn value_shifts(bits: usize) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    let mut i = 0;
    while i < BYTES {
        let (pair, second, row) = (i / 8, i / 4 % 2, i % 4);
        out[i] = (16 * row + 2 * bits * pair % 8 + bits * second) as u8;
        i += 1;
    }
    out
}

/// Levels of four rows of a segment, as two's complement: 32-bit lane c has those of coefficient c.
#[derive(Clone, Copy)]
pub(crate) struct ValueLevels<S: Bytes, const BITS: usize> {
    set: S,
    codes: *const u8,
    bytes: S::I,
    shifts: S::I,
    table: S::I,
}

impl<S: Bytes, const BITS: usize> ValueLevels<S, BITS> {
    /// Of the rows whose codes begin there.
    #[inline(always)]
    pub(crate) fn new(set: S, codes: *const u8) -> Self {
        let [bytes, shifts] = &VALUE_PATTERNS[BITS - 1];
        let (bytes, shifts) = (constant(set, bytes), constant(set, shifts));
        Self { set, codes, bytes, shifts, table: set.table(&TABLES[BITS])[0] }
    }

    /// Of rows 4 `quad` to 4 `quad` + 3.
    ///
    /// # Safety
    /// Their 8 · `BITS` bytes of codes must be readable, and as many before them that it makes 32 bytes, or 64
    /// with more than 4 bits: the headers of 16 rows are enough.
    #[inline(always)]
    pub(crate) unsafe fn levels(self, quad: usize) -> S::I {
        let Self { set, codes, bytes, shifts, table } = self;
        // SAFETY: by contract.
        let all = unsafe {
            let at = codes.add(8 * BITS * quad).sub(const { value_span(BITS) - 8 * BITS });
            match BITS {
                5.. => set.iload(at),
                _ => set.load_half(at),
            }
        };
        set.permute(table, set.multishift(set.permute(all, bytes), shifts))
    }
}
