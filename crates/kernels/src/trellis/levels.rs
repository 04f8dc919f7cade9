//! HOT PATH. Blocks as bytes: every coefficient's level as a multiple of the common step, in the
//! order that sums of byte products run in ([`crate::coded`]).

use super::{BOOSTS, Layout, MAX_SEGMENTS, ROW_SCALES, SEGMENT, segment_bytes, tables};
use crate::Isa;
use crate::simd::bytes::{BYTES, Bytes, Table};
use crate::simd::{LANES, compiled};

mod permuted;
mod unpack;

pub(crate) use permuted::{KeyLevels, ValueLevels};
pub(super) use unpack::{BEFORE as PLAIN_BEFORE, plain_rows};
use unpack::{by_coefficient, by_row, one_by_one};

/// Rows that a block of levels comes in multiples of.
pub(crate) const ROW_GROUP: usize = 16;

/// Most rows of a block whose boosts are named.
const MAX_ROWS: usize = 64;

/// Rows that have a factor of their own for one of their segments.
#[derive(Debug, Clone)]
pub struct Boosts {
    /// By segment, rows as bits.
    rows: [u64; MAX_SEGMENTS],
    /// Exponents by row, in the high nibble.
    headers: [u8; MAX_ROWS],
}

impl Default for Boosts {
    fn default() -> Self {
        Self { rows: [0; MAX_SEGMENTS], headers: [0; MAX_ROWS] }
    }
}

impl Boosts {
    /// Rows whose levels in a segment are multiplied with a factor beside the row's, as bits.
    #[inline]
    pub fn rows(&self, segment: usize) -> u64 {
        self.rows[segment]
    }

    /// The factor of a row's boosted segment.
    #[inline]
    pub fn factor(&self, row: usize) -> f32 {
        BOOSTS[usize::from(self.headers[row] >> 4)]
    }

    /// The first of `rows`, which loses it.
    #[inline]
    pub(crate) fn next(rows: &mut u64) -> Option<usize> {
        let row = rows.trailing_zeros() as usize;
        *rows &= rows.wrapping_sub(1);
        (row < MAX_ROWS).then_some(row)
    }
}

impl Layout {
    /// Segments up to the last that has bits.
    pub fn used_segments(&self) -> usize {
        self.bits.iter().rposition(|b| *b > 0).map_or(0, |last| last + 1)
    }

    /// Levels of the first `segments` segments of a block of `rows` rows, plus 128, without any scale: four
    /// coefficients of a row together, `[width / 4, rows, 4]`.
    ///
    /// # Panics
    /// If `rows` is no multiple of 16, `slot` has another length, there are fewer segments, or `out`
    /// is shorter than `16 · segments · rows`.
    #[inline]
    pub fn levels(&self, slot: &[u8], rows: usize, segments: usize, out: &mut [u8]) {
        self.levels_on(Isa::best(), slot, rows, segments, out);
    }

    pub(crate) fn levels_on(
        &self,
        isa: Isa,
        slot: &[u8],
        rows: usize,
        segments: usize,
        out: &mut [u8],
    ) {
        assert!(rows.is_multiple_of(ROW_GROUP), "{rows} rows");
        assert!(slot.len() == self.slot_bytes(rows), "slot: {} for {rows} rows", slot.len());
        assert!(segments <= self.bits.len(), "{segments} segments");
        let bytes = SEGMENT * rows;
        assert!(out.len() >= segments * bytes, "out: {}", out.len());
        for ((bits, _, offset), out) in
            self.segments(rows).zip(out.chunks_exact_mut(bytes)).take(segments)
        {
            match bits {
                0 => out.fill(128),
                _ => segment(isa, bits, slot, offset, out),
            }
        }
    }

    /// Factors of every row of a block (`[rows]`), and its boosts beside them.
    ///
    /// # Panics
    /// If `slot` is shorter than the headers of as many rows as `out` has, or these are no multiple of 16
    /// up to 64.
    pub fn row_factors(&self, slot: &[u8], out: &mut [f32], boosts: &mut Boosts) {
        self.row_factors_on(Isa::best(), slot, out, boosts);
    }

    pub(super) fn row_factors_on(
        &self,
        isa: Isa,
        slot: &[u8],
        out: &mut [f32],
        boosts: &mut Boosts,
    ) {
        let rows = out.len();
        assert!(rows.is_multiple_of(ROW_GROUP) && rows <= MAX_ROWS, "{rows} rows");
        let (codes, headers) = slot.split_at(rows);
        boosts.headers[..rows].copy_from_slice(&headers[..rows]);
        row_factors(isa, codes, out, boosts);
    }

    /// What a level is worth in every row of a block and its first `segments` segments: `[segments, rows]`.
    /// `factors`, `boosts`: what [`Self::row_factors`] gives.
    ///
    /// # Panics
    /// If a slice is not of its shape.
    pub fn segment_factors(
        &self,
        factors: &[f32],
        boosts: &Boosts,
        segments: usize,
        out: &mut [f32],
    ) {
        self.segment_factors_on(Isa::best(), factors, boosts, segments, out);
    }

    pub(super) fn segment_factors_on(
        &self,
        isa: Isa,
        factors: &[f32],
        boosts: &Boosts,
        segments: usize,
        out: &mut [f32],
    ) {
        let rows = factors.len();
        assert!(rows.is_multiple_of(ROW_GROUP) && rows <= MAX_ROWS, "{rows} rows");
        assert!(
            out.len() == segments * rows && segments <= self.scales.len(),
            "out: {}",
            out.len()
        );
        segment_factors(isa, factors, boosts, &self.scales, out);
    }
}

/// Levels by bits and then by the low bits of a code, whatever its two high bits.
static TABLES: [Table; 7] = tables(0);

/// The same, plus 128.
static OFFSET: [Table; 7] = tables(-128);

const fn tables(offset: i8) -> [Table; 7] {
    [
        Table([offset; BYTES]),
        repeated(&tables::LEVELS_1, offset),
        repeated(&tables::LEVELS_2, offset),
        repeated(&tables::LEVELS_3, offset),
        repeated(&tables::LEVELS_4, offset),
        repeated(&tables::LEVELS_5, offset),
        repeated(&tables::LEVELS_6, offset),
    ]
}

const fn repeated<const N: usize>(levels: &[i8; N], offset: i8) -> Table {
    let mut out = [0; BYTES];
    let mut i = 0;
    while i < BYTES {
        out[i] = levels[i % N].wrapping_add(offset);
        i += 1;
    }
    Table(out)
}

/// Levels plus 128 of 16 rows of a segment: in vector k, 32-bit lane t has those of coefficients 4 k to 4 k + 3 of row t.
///
/// # Safety
/// `codes`: of 16 rows, and 16 bytes before them.
#[inline(always)]
pub(crate) unsafe fn key_levels<S: Bytes, const BITS: usize>(
    set: S,
    codes: *const u8,
) -> [S::I; 4] {
    // SAFETY: by contract.
    unsafe {
        if S::PERMUTES {
            let levels = KeyLevels::<S, BITS>::new(set, codes);
            return [levels.levels(0), levels.levels(1), levels.levels(2), levels.levels(3)];
        }
        if !S::VECTORS {
            let place = |t, j| BYTES * (j / 4) + 4 * t + j % 4;
            let levels = one_by_one::<BITS>(codes, &OFFSET[BITS], place);
            let at = levels.as_ptr();
            return [
                set.iload(at),
                set.iload(at.add(64)),
                set.iload(at.add(128)),
                set.iload(at.add(192)),
            ];
        }
        by_row(set, unpack::rows::<S, BITS>(set, codes, &OFFSET[BITS]))
    }
}

/// Levels of 16 rows of a segment as bytes with a sign: those of rows 4 q to 4 q + 3 from byte 64 q on, four for each
/// coefficient.
///
/// # Safety
/// `codes`: of 16 rows, and 16 bytes before them; `out`: room for 256 bytes.
#[inline(always)]
pub(crate) unsafe fn value_levels<S: Bytes, const BITS: usize>(
    set: S,
    codes: *const u8,
    out: *mut u8,
) {
    // SAFETY: by contract.
    unsafe {
        if !S::VECTORS {
            let place = |t, j| BYTES * (t / 4) + 4 * j + t % 4;
            let levels = one_by_one::<BITS>(codes, &TABLES[BITS], place);
            out.copy_from_nonoverlapping(levels.as_ptr(), levels.len());
            return;
        }
        let rows = unpack::rows::<S, BITS>(set, codes, &TABLES[BITS]);
        for (c, levels) in by_coefficient(set, rows).into_iter().enumerate() {
            set.store_quarters(out.add(16 * c), BYTES, levels);
        }
    }
}

/// Calls `$f::<S, BITS>` for the width that a number names, which is not 0.
macro_rules! with_bits {
    ($bits:expr, $f:ident::<$S:ty $(, $more:ident)?> $args:tt) => {
        match $bits {
            1 => $f::<$S, 1 $(, $more)?> $args,
            2 => $f::<$S, 2 $(, $more)?> $args,
            3 => $f::<$S, 3 $(, $more)?> $args,
            4 => $f::<$S, 4 $(, $more)?> $args,
            5 => $f::<$S, 5 $(, $more)?> $args,
            _ => $f::<$S, 6 $(, $more)?> $args,
        }
    };
}
pub(crate) use with_bits;

compiled! {
    /// Levels of one segment: see [`Layout::levels`].
    fn segment(bits: u8, slot: &[u8], offset: usize, out: &mut [u8]) = segment_body
        for [Avx512Icl, Avx512, Avx2];
}

#[inline(always)]
fn segment_body<S: Bytes>(set: S, bits: u8, slot: &[u8], offset: usize, out: &mut [u8]) {
    let groups = out.len() / (SEGMENT * ROW_GROUP);
    let bytes = ROW_GROUP * segment_bytes(bits);
    assert!(slot.len() >= offset + groups * bytes && offset >= 16 && bits > 0);
    for g in 0..groups {
        // SAFETY: codes of a group are 32 · `bits` bytes, before them lie headers; the outputs of quad k and group g are
        // 64 bytes at 64 (k · groups + g), below 256 · groups.
        unsafe {
            let codes = slot.as_ptr().add(offset + g * bytes);
            let levels = with_bits!(bits, key_levels::<S>(set, codes));
            for (k, levels) in levels.into_iter().enumerate() {
                set.istore(out.as_mut_ptr().add(BYTES * (k * groups + g)), levels);
            }
        }
    }
}

compiled! {
    /// See [`Layout::row_factors`]; headers are among the boosts already.
    fn row_factors(codes: &[u8], out: &mut [f32], boosts: &mut Boosts) = row_factors_body for [Avx512, Avx2];
}

#[inline(always)]
fn row_factors_body<S: Bytes>(set: S, codes: &[u8], out: &mut [f32], boosts: &mut Boosts) {
    let rows = out.len();
    assert!(codes.len() >= rows && rows > 0 && rows <= MAX_ROWS && rows.is_multiple_of(LANES));
    for t in (0..rows).step_by(LANES) {
        // SAFETY: 16 codes and factors from each multiple of 16 below `rows` on.
        unsafe {
            let code = set.and(set.load_signed(codes.as_ptr().add(t)), set.isplat(255));
            // The table's own product: a power of two times one of eight.
            let power = power(set, set.isub(set.shr(code, 3), set.isplat(16)));
            let mut eighths = [set.zero(); 8];
            for (e, eighth) in eighths.iter_mut().enumerate() {
                *eighth = set.splat(ROW_SCALES[128 + e]);
            }
            for bit in [4, 2, 1] {
                let high = has(set, code, bit as i32);
                for e in 0..bit {
                    eighths[e] = set.select(high, eighths[e + bit], eighths[e]);
                }
            }
            let scale = set.select(has(set, code, 255), set.mul(power, eighths[0]), set.zero());
            set.store(out.as_mut_ptr().add(t), scale);
        }
    }
    // SAFETY: as many headers as there are bytes in a vector.
    let headers = unsafe { set.iload(boosts.headers.as_ptr()) };
    let exponents = set.and(headers, set.isplat(0xf0f0_f0f0_u32 as i32));
    let boosted = !set.equal8(exponents, set.izero()) & (u64::MAX >> (MAX_ROWS - rows));
    let segments = set.and(headers, set.isplat(0x0f0f_0f0f));
    for (segment, rows) in boosts.rows.iter_mut().enumerate() {
        *rows = boosted & set.equal8(segments, set.isplat(0x0101_0101 * segment as i32));
    }
}

/// `2^n`.
#[inline(always)]
fn power<S: Bytes>(set: S, n: S::I) -> S::F {
    set.from_bits(set.shl(set.iadd(n, set.isplat(127)), 23))
}

/// Which numbers, none of them negative, have one of these bits.
#[inline(always)]
fn has<S: Bytes>(set: S, x: S::I, bits: i32) -> S::M {
    set.lt(set.zero(), set.from_int(set.and(x, set.isplat(bits))))
}

compiled! {
    /// See [`Layout::segment_factors`].
    fn segment_factors(factors: &[f32], boosts: &Boosts, scales: &[f32], out: &mut [f32])
        = segment_factors_body for [Avx512, Avx2];
}

#[inline(always)]
fn segment_factors_body<S: Bytes>(
    set: S,
    factors: &[f32],
    boosts: &Boosts,
    scales: &[f32],
    out: &mut [f32],
) {
    let rows = factors.len();
    assert!(rows.is_multiple_of(LANES) && rows <= MAX_ROWS && out.len().is_multiple_of(rows));
    for t in (0..rows).step_by(LANES) {
        // SAFETY: 16 factors and headers from each multiple of 16 below `rows` on, in every segment.
        unsafe {
            let plain = set.load(factors.as_ptr().add(t));
            let headers = set.load_signed(boosts.headers.as_ptr().add(t));
            let exponents = set.and(set.shr(headers, 4), set.isplat(15));
            // The table's own product.
            let half = has(set, exponents, 1);
            let half = set.select(half, set.splat(std::f32::consts::SQRT_2), set.splat(1.0));
            let boost = set.mul(power(set, set.shr(exponents, 1)), half);
            let boosted = set.mul(plain, boost);
            for (segment, scale) in scales[..out.len() / rows].iter().enumerate() {
                let own = set.mask((boosts.rows[segment] >> t) as u16);
                let scale = set.splat(scale * tables::STEP);
                let factor = set.mul(scale, set.select(own, boosted, plain));
                set.store(out.as_mut_ptr().add(segment * rows + t), factor);
            }
        }
    }
}
