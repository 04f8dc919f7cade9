//! HOT PATH. Blocks as bytes: every coefficient's level as a multiple of the common step, in the
//! orders that sums of byte products run in ([`crate::coded`]).

use super::{BOOSTS, Layout, MAX_SEGMENTS, ROW_SCALES, SEGMENT, segment_bytes, tables};
use crate::coded::ByteIsa;
use crate::isa::dispatch;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Rows that a block of levels comes in multiples of.
pub(crate) const ROW_GROUP: usize = 16;

/// Rows that have a factor of their own for one of their segments.
#[derive(Debug, Clone)]
pub struct Boosts {
    /// Row and factor, by segment.
    entries: Vec<(usize, f32)>,
    /// Rows of the block: all entries' are below it.
    rows: usize,
    /// Where each segment's begin.
    starts: [usize; MAX_SEGMENTS + 1],
}

impl Default for Boosts {
    fn default() -> Self {
        Self { entries: Vec::new(), rows: 0, starts: [0; MAX_SEGMENTS + 1] }
    }
}

impl Boosts {
    /// Rows whose levels in a segment are multiplied with a factor beside the row's.
    #[inline]
    pub fn of(&self, segment: usize) -> &[(usize, f32)] {
        &self.entries[self.starts[segment]..self.starts[segment + 1]]
    }

    /// Rows of their block.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }
}

/// How levels follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `[width / 4, rows, 4]`: four coefficients of a row together, plus 128.
    Keys,
    /// `[width / 16, rows / 4, 16, 4]`: a coefficient of four rows together, as two's complement.
    Values,
}

impl Layout {
    /// Segments up to the last that has bits.
    pub fn used_segments(&self) -> usize {
        self.bits.iter().rposition(|b| *b > 0).map_or(0, |last| last + 1)
    }

    /// Levels of the first `segments` segments of a block of `rows` rows, without any scale.
    ///
    /// # Panics
    /// If `rows` is no multiple of 16, `slot` has another length, there are fewer segments, or `out`
    /// is shorter than `16 · segments · rows`.
    #[inline]
    pub fn levels(&self, order: Order, slot: &[u8], rows: usize, segments: usize, out: &mut [u8]) {
        self.levels_on(ByteIsa::best(), order, slot, rows, segments, out);
    }

    pub(super) fn levels_on(
        &self,
        isa: ByteIsa,
        order: Order,
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
            match (bits, order) {
                (0, Order::Keys) => out.fill(128),
                (0, Order::Values) => out.fill(0),
                #[cfg(target_arch = "x86_64")]
                _ if isa == ByteIsa::Vnni => {
                    // SAFETY: `ByteIsa` names only what the processor has; the slices are those of
                    // `rows` rows of a segment.
                    unsafe { x86::segment(bits, order, codes, rows, out) };
                }
                _ => segment(bits, order, codes, rows, out),
            }
        }
        let _ = isa;
    }

    /// Factors of every row of a block in its first `segments` segments, as levels without any scale
    /// need them: `[segments, rows]`.
    ///
    /// # Panics
    /// If `slot` is shorter than the headers of `rows` rows, or `out` is not of its shape.
    pub fn segment_factors(&self, slot: &[u8], rows: usize, segments: usize, out: &mut [f32]) {
        assert!(out.len() == segments * rows, "out: {}", out.len());
        let (codes, boosts) = slot.split_at(rows);
        let Some((first, others)) = out.split_at_mut_checked(rows) else { return };
        row_scales(codes, first);
        others.chunks_exact_mut(rows).for_each(|out| out.copy_from_slice(first));
        for (row, boost) in boosts[..rows].iter().enumerate() {
            if let Some(out) = out.get_mut(usize::from(boost & 15) * rows + row) {
                *out *= BOOSTS[usize::from(boost >> 4)];
            }
        }
    }

    /// Factors of every row of a block (`[rows]`), and the boosts of its first `segments` segments
    /// beside them.
    ///
    /// # Panics
    /// If `slot` is shorter than the headers of as many rows as `out` has, or `segments` is above 16.
    pub fn row_factors(&self, slot: &[u8], segments: usize, out: &mut [f32], boosts: &mut Boosts) {
        let rows = out.len();
        let (codes, headers) = slot.split_at(rows);
        let headers = &headers[..rows];
        row_scales(codes, out);
        let asked = |header: u8| header >= 16 && usize::from(header & 15) < segments;
        let mut starts = [0; MAX_SEGMENTS + 1];
        for header in headers.iter().filter(|h| asked(**h)) {
            starts[usize::from(header & 15) + 1] += 1;
        }
        for i in 0..MAX_SEGMENTS {
            starts[i + 1] += starts[i];
        }
        boosts.starts = starts;
        boosts.rows = rows;
        boosts.entries.clear();
        boosts.entries.resize(starts[segments], (0, 1.0));
        for (row, header) in headers.iter().enumerate().filter(|(_, h)| asked(**h)) {
            let at = &mut starts[usize::from(header & 15)];
            boosts.entries[*at] = (row, BOOSTS[usize::from(header >> 4)]);
            *at += 1;
        }
    }
}

dispatch! {
    /// Row scales by their codes, without looking them up one by one.
    fn row_scales / row_scales_on(codes: &[u8], out: &mut [f32]) = row_scales_body;
}

#[inline(always)]
fn row_scales_body<const FMA: bool>(codes: &[u8], out: &mut [f32]) {
    for (out, code) in out.iter_mut().zip(codes) {
        let code = u32::from(*code);
        // The table's own product: a power of two times one of eight.
        let power = f32::from_bits((code / 8 + 127 - 16) << 23);
        let eighth = ROW_SCALES[128 + (code % 8) as usize];
        *out = if code == 0 { 0.0 } else { power * eighth };
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
fn segment(bits: u8, order: Order, codes: &[u8], rows: usize, out: &mut [u8]) {
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
            match order {
                Order::Keys => out[(j / 4 * rows + t) * 4 + j % 4] = (level as u8) ^ 128,
                Order::Values => out[((t / 4) * SEGMENT + j) * 4 + t % 4] = level as u8,
            }
        }
    }
}
