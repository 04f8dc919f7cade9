//! HOT PATH. Blocks as bytes: every coefficient's level as a multiple of the common step, in the
//! order that sums of byte products run in ([`crate::coded`]).

use super::{BOOSTS, Layout, MAX_SEGMENTS, ROW_SCALES, SEGMENT, segment_bytes, tables};
use crate::coded::ByteIsa;

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

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

    /// The definition.
    fn read(&mut self, headers: &[u8]) {
        self.rows = [0; MAX_SEGMENTS];
        for (row, header) in headers.iter().enumerate().filter(|(_, h)| **h >= 16) {
            self.rows[usize::from(header & 15)] |= 1 << row;
        }
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
        self.levels_on(ByteIsa::best(), slot, rows, segments, out);
    }

    pub(crate) fn levels_on(
        &self,
        isa: ByteIsa,
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
        let each = self.segments(rows).zip(out.chunks_exact_mut(bytes)).take(segments);
        for ((bits, _, offset), out) in each {
            let codes = &slot[offset..offset + rows * segment_bytes(bits)];
            match bits {
                0 => out.fill(128),
                #[cfg(target_arch = "x86_64")]
                _ if isa == ByteIsa::Vnni => {
                    // SAFETY: `ByteIsa` names only what the processor has; the slices are those of
                    // `rows` rows of a segment.
                    unsafe { x86::segment(bits, codes, rows, out) };
                }
                _ => segment(bits, codes, rows, out),
            }
        }
        let _ = isa;
    }

    /// Factors of every row of a block (`[rows]`), and its boosts beside them.
    ///
    /// # Panics
    /// If `slot` is shorter than the headers of as many rows as `out` has, or these are no multiple of 16
    /// up to 64.
    pub fn row_factors(&self, slot: &[u8], out: &mut [f32], boosts: &mut Boosts) {
        self.row_factors_on(ByteIsa::best(), slot, out, boosts);
    }

    pub(super) fn row_factors_on(
        &self,
        isa: ByteIsa,
        slot: &[u8],
        out: &mut [f32],
        boosts: &mut Boosts,
    ) {
        let rows = out.len();
        assert!(rows.is_multiple_of(ROW_GROUP) && rows <= MAX_ROWS, "{rows} rows");
        let (codes, headers) = slot.split_at(rows);
        boosts.headers[..rows].copy_from_slice(&headers[..rows]);
        #[cfg(target_arch = "x86_64")]
        if isa == ByteIsa::Vnni {
            // SAFETY: `ByteIsa` names only what the processor has.
            return unsafe { x86::row_factors(codes, out, boosts) };
        }
        let _ = isa;
        boosts.read(&headers[..rows]);
        for (out, code) in out.iter_mut().zip(codes) {
            *out = ROW_SCALES[usize::from(*code)];
        }
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
        self.segment_factors_on(ByteIsa::best(), factors, boosts, segments, out);
    }

    pub(super) fn segment_factors_on(
        &self,
        isa: ByteIsa,
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
        #[cfg(target_arch = "x86_64")]
        if isa == ByteIsa::Vnni {
            // SAFETY: `ByteIsa` names only what the processor has.
            return unsafe { x86::segment_factors(factors, boosts, &self.scales, out) };
        }
        let _ = isa;
        for (segment, out) in out.chunks_exact_mut(rows).enumerate() {
            let scale = self.scales[segment] * tables::STEP;
            for (row, (out, factor)) in out.iter_mut().zip(factors).enumerate() {
                let boosted = boosts.rows(segment) >> row & 1 == 1;
                *out = scale * if boosted { factor * boosts.factor(row) } else { *factor };
            }
        }
    }
}

/// Levels by the low bits of a code, whatever its two high bits.
#[repr(C, align(64))]
struct Table([i8; 64]);

/// By bits.
static TABLES: [Table; 7] = [
    Table([0; 64]),
    repeated(&tables::LEVELS_1),
    repeated(&tables::LEVELS_2),
    repeated(&tables::LEVELS_3),
    repeated(&tables::LEVELS_4),
    repeated(&tables::LEVELS_5),
    repeated(&tables::LEVELS_6),
];

const fn repeated<const N: usize>(levels: &[i8; N]) -> Table {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        out[i] = levels[i % N];
        i += 1;
    }
    Table(out)
}

/// The definition.
fn segment(bits: u8, codes: &[u8], rows: usize, out: &mut [u8]) {
    let bits = usize::from(bits);
    let table = &TABLES[bits].0;
    for (t, codes) in codes.chunks_exact(2 * bits).enumerate() {
        let mut bytes = [0; 16];
        bytes[..codes.len()].copy_from_slice(codes);
        let word = u128::from_le_bytes(bytes);
        for j in 0..SEGMENT {
            // The window of the last codes wraps; a plain code does not reach so far.
            let at = bits * j;
            let window = word >> at | word.checked_shl((16 * bits - at) as u32).unwrap_or(0);
            let level = table[window as usize % 64];
            out[(j / 4 * rows + t) * 4 + j % 4] = (level as u8) ^ 128;
        }
    }
}
