//! HOT PATH. Blocks as bytes: every coefficient's level as a multiple of the common step, in the
//! orders that sums of byte products run in ([`crate::coded`]).

use super::{BOOSTS, Layout, MAX_SEGMENTS, ROW_SCALES, SEGMENT, segment_bytes, tables};
use crate::coded::ByteIsa;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Rows that a block of levels comes in multiples of.
pub(crate) const ROW_GROUP: usize = 16;

/// A row that has a factor of its own for one segment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Boost {
    /// Row of the block.
    pub row: usize,
    /// Segment it is about.
    pub segment: usize,
    /// What that segment's levels are multiplied with, beside the row's factor.
    pub factor: f32,
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

    /// `out[t] = gain · row scale` of every row of a block, and the rows with a boost. `boosts` is
    /// emptied first.
    ///
    /// # Panics
    /// If `slot` is shorter than the headers of as many rows as `out` has.
    pub fn row_factors(&self, slot: &[u8], gain: f32, out: &mut [f32], boosts: &mut Vec<Boost>) {
        let rows = out.len();
        let (codes, rest) = slot.split_at(rows);
        for (out, code) in out.iter_mut().zip(codes) {
            *out = gain * ROW_SCALES[usize::from(*code)];
        }
        boosts.clear();
        for (row, boost) in rest[..rows].iter().enumerate().filter(|(_, b)| **b >= 16) {
            let segment = usize::from(boost & 15);
            if self.bits.get(segment).is_some_and(|b| *b > 0) {
                boosts.push(Boost { row, segment, factor: BOOSTS[usize::from(boost >> 4)] });
            }
        }
    }
}

/// Most boosted segments of a block.
pub const MAX_BOOSTED_SEGMENTS: usize = MAX_SEGMENTS;

/// Levels by the low bits of a code, whatever its two high bits.
fn table(bits: u8) -> [i8; 64] {
    fn repeated<const N: usize>(levels: &[i8; N]) -> [i8; 64] {
        std::array::from_fn(|i| levels[i % N])
    }
    match bits {
        0 => [0; 64],
        1 => repeated(&tables::LEVELS_1),
        2 => repeated(&tables::LEVELS_2),
        3 => repeated(&tables::LEVELS_3),
        4 => repeated(&tables::LEVELS_4),
        5 => repeated(&tables::LEVELS_5),
        _ => repeated(&tables::LEVELS_6),
    }
}

/// The definition.
fn segment(bits: u8, order: Order, codes: &[u8], rows: usize, out: &mut [u8]) {
    let table = table(bits);
    let bits = usize::from(bits);
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
