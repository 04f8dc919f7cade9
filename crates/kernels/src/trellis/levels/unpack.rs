//! Levels without permutations of bytes: a shuffle brings the 16 bits around each pair of neighbouring codes together, a
//! multiplication moves the pair to their top, constant shifts bring each code to the bottom of a byte.

use super::TABLES;
use crate::simd::bytes::{BYTES, Bytes, Table};
use crate::trellis::SEGMENT;

/// Bits that a level is looked up by: windows have two more than they pay for.
const fn window(bits: usize) -> usize {
    if bits < 5 { bits + 2 } else { bits }
}

/// What one width is unpacked by, the same for every quarter.
#[repr(C, align(64))]
struct Pattern {
    /// For each pair of codes the two bytes around it, in 16 bytes that end where a row's codes do.
    bytes: [u8; BYTES],
    /// Powers of two by which pairs come to the top of their 16 bits.
    factors: [u16; BYTES / 2],
}

impl Pattern {
    const fn new(bits: usize) -> Self {
        let mut pattern = Self { bytes: [0; BYTES], factors: [0; BYTES / 2] };
        let mut i = 0;
        while i < BYTES / 2 {
            let at = 2 * bits * (i % 8);
            pattern.bytes[2 * i] = (16 - 2 * bits + at / 8) as u8;
            pattern.bytes[2 * i + 1] = (16 - 2 * bits + (at / 8 + 1) % (2 * bits)) as u8;
            pattern.factors[i] = 1 << (16 - at % 8 - bits - window(bits));
            i += 1;
        }
        pattern
    }
}

static PATTERNS: [Pattern; 6] = [
    Pattern::new(1),
    Pattern::new(2),
    Pattern::new(3),
    Pattern::new(4),
    Pattern::new(5),
    Pattern::new(6),
];

/// Bytes before the codes that must be readable.
pub(in crate::trellis) const BEFORE: usize = 16;

/// Levels of 16 rows of a segment by the table of its width: quarter q of vector i has those of row 4 q + i, in their
/// order.
///
/// # Safety
/// `codes`: of 16 rows, and [`BEFORE`] bytes before them.
#[inline(always)]
pub(super) unsafe fn rows<S: Bytes, const BITS: usize>(
    set: S,
    codes: *const u8,
    table: &Table,
) -> [S::I; 4] {
    let table = set.table(table);
    let width = window(BITS) as u32;
    let mask = (1 << width) - 1;
    let (low, high) = (set.splat16(mask), set.splat16(mask << 8));
    let pattern = &PATTERNS[BITS - 1];
    let mut out = [set.izero(); 4];
    // SAFETY: loads are the 16 bytes that end where codes of a row do; patterns are whole vectors.
    unsafe {
        let bytes = set.iload(pattern.bytes.as_ptr());
        let factors = set.iload(pattern.factors.as_ptr().cast());
        for (i, out) in out.iter_mut().enumerate() {
            let all = set.load_quarters(codes.add(2 * BITS * (i + 1)).sub(16), 8 * BITS);
            let pairs = set.mul16(set.shuffle(all, bytes), factors);
            let first = set.and(set.shr16(pairs, 16 - BITS as u32 - width), low);
            let second = set.and(set.shr16(pairs, 8 - width), high);
            let codes = set.or(first, second);
            *out = match BITS {
                1 | 2 => set.look_up::<16>(table, codes),
                3 | 5 => set.look_up::<32>(table, codes),
                _ => set.look_up::<64>(table, codes),
            };
        }
    }
    out
}

/// Levels of rows as products with keys take them: in vector k, lane t has those of coefficients 4 k to 4 k + 3 of row t.
#[inline(always)]
pub(super) fn by_row<S: Bytes>(set: S, [a, b, c, d]: [S::I; 4]) -> [S::I; 4] {
    let low = [set.zip32::<false>(a, b), set.zip32::<false>(c, d)];
    let high = [set.zip32::<true>(a, b), set.zip32::<true>(c, d)];
    [
        set.zip64::<false>(low[0], low[1]),
        set.zip64::<true>(low[0], low[1]),
        set.zip64::<false>(high[0], high[1]),
        set.zip64::<true>(high[0], high[1]),
    ]
}

/// The same as products with values take them: quarter q of vector c has those of coefficients 4 c to 4 c + 3, of each
/// coefficient those of rows 4 q to 4 q + 3.
#[inline(always)]
pub(super) fn by_coefficient<S: Bytes>(set: S, [a, b, c, d]: [S::I; 4]) -> [S::I; 4] {
    let low = [set.zip8::<false>(a, b), set.zip8::<false>(c, d)];
    let high = [set.zip8::<true>(a, b), set.zip8::<true>(c, d)];
    [
        set.zip16::<false>(low[0], low[1]),
        set.zip16::<true>(low[0], low[1]),
        set.zip16::<false>(high[0], high[1]),
        set.zip16::<true>(high[0], high[1]),
    ]
}

/// Levels of 16 rows, one after the other, where there are no instructions for it: that of coefficient j of row t goes to
/// byte `place(t, j)`.
///
/// # Safety
/// As [`rows`].
#[inline(always)]
pub(super) unsafe fn one_by_one<const BITS: usize>(
    codes: *const u8,
    table: &Table,
    place: impl Fn(usize, usize) -> usize,
) -> [u8; 16 * SEGMENT] {
    let mut out = [0; 16 * SEGMENT];
    for t in 0..16 {
        let mut bytes = [0; 16];
        // SAFETY: by contract.
        let own = unsafe { std::slice::from_raw_parts(codes.add(2 * BITS * t), 2 * BITS) };
        bytes[..2 * BITS].copy_from_slice(own);
        let word = u128::from_le_bytes(bytes);
        // Windows of the second half wrap; plain codes do not reach so far.
        let halves = [word as u64, (word >> (8 * BITS) | word << (8 * BITS)) as u64];
        for j in 0..SEGMENT {
            let window = halves[j / 8] >> (BITS * (j % 8));
            out[place(t, j)] = table.0[window as usize % BYTES] as u8;
        }
    }
    out
}

/// [`rows`] as numbers of a byte each, row after row.
///
/// # Safety
/// As [`rows`].
#[inline(always)]
pub(in crate::trellis) unsafe fn plain_rows<S: Bytes, const BITS: usize>(
    set: S,
    codes: *const u8,
    out: &mut [[i8; SEGMENT]; 16],
) {
    // SAFETY: as required; row 4 q + i is 64 q + 16 i bytes after the first.
    unsafe {
        if !S::VECTORS {
            let levels = one_by_one::<BITS>(codes, &TABLES[BITS], |t, j| SEGMENT * t + j);
            let levels = levels.as_chunks::<SEGMENT>().0;
            out.iter_mut().zip(levels).for_each(|(out, row)| *out = row.map(|level| level as i8));
            return;
        }
        for (i, levels) in rows::<S, BITS>(set, codes, &TABLES[BITS]).into_iter().enumerate() {
            set.store_quarters(out.as_mut_ptr().add(i).cast(), 4 * SEGMENT, levels);
        }
    }
}
