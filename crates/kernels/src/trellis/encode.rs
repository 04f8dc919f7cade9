//! HOT PATH (no allocation, locks or logging). Rows of coefficients to codes: choice of the row
//! scale and of the boost, then the best codes for them.
//!
//! Headers are chosen in floating point, where nothing is fused or reordered; codes are found by sums of
//! integers. So every instruction set writes the same bytes.

use super::{BOOSTS, Layout, ROW_SCALES, SEGMENT, segment_bytes};
use crate::Isa;

pub(super) mod definition;
pub(super) mod header;
mod lanes;
mod paths;
mod plain;

/// Rows encoded together, segment by segment.
const ROWS: usize = 32;

/// A segment of up to [`ROWS`] rows.
#[derive(Clone, Copy)]
pub(super) struct Segment<'a> {
    /// Coefficients from the first row's segment on.
    pub(super) z: &'a [f32],
    /// From one row to the next.
    pub(super) stride: usize,
    /// What turns coefficients into multiples of the unit that codes are found in, by row; as many as
    /// there are rows.
    pub(super) inverses: &'a [f32],
}

impl Layout {
    /// Encodes a block: `z`: `[rows, width]` coefficients with their means removed; `slot`:
    /// [`Self::slot_bytes`] of as many rows, all of it overwritten.
    ///
    /// NaN and infinities count as 0 and do not touch other coefficients. What a row becomes does not
    /// depend on the others.
    ///
    /// # Panics
    /// If `z` is not whole rows, or the slot has another length.
    pub fn encode(&self, z: &[f32], slot: &mut [u8]) {
        self.encode_on(Isa::best(), z, slot);
    }

    pub(super) fn encode_on(&self, isa: Isa, z: &[f32], slot: &mut [u8]) {
        let width = self.width();
        let rows = z.len() / width;
        assert!(z.len() == rows * width, "z: {} of rows of {width}", z.len());
        assert!(slot.len() == self.slot_bytes(rows), "slot: {} for {rows} rows", slot.len());
        for (t, z) in z.chunks_exact(width).enumerate() {
            [slot[t], slot[rows + t]] = header::choose(isa, &self.search, z).bytes();
        }
        for (chunk, z) in z.chunks(ROWS * width).enumerate() {
            let (first, count) = (chunk * ROWS, z.len() / width);
            let factors = Factors::read(&slot[first..], rows, count);
            for (i, (bits, scale, offset)) in self.segments(rows).enumerate() {
                let inverses = factors.inverses(i, scale, unit(bits));
                let segment =
                    Segment { z: &z[i * SEGMENT..], stride: width, inverses: &inverses[..count] };
                let bytes = segment_bytes(bits);
                let codes = &mut slot[offset + first * bytes..][..count * bytes];
                encode_segment(isa, bits, &segment, codes);
            }
        }
    }
}

/// Factors of up to [`ROWS`] rows.
struct Factors {
    plain: [f32; ROWS],
    boosted: [f32; ROWS],
    boosted_segment: [u32; ROWS],
}

impl Factors {
    /// `headers`: from the first row's scale code on, in a block of `rows` rows.
    fn read(headers: &[u8], rows: usize, count: usize) -> Self {
        let mut factors =
            Self { plain: [0.0; ROWS], boosted: [0.0; ROWS], boosted_segment: [0; ROWS] };
        for t in 0..count.min(ROWS) {
            let boost = headers[rows + t];
            factors.plain[t] = ROW_SCALES[usize::from(headers[t])];
            factors.boosted[t] = factors.plain[t] * BOOSTS[usize::from(boost >> 4)];
            factors.boosted_segment[t] = u32::from(boost & 15);
        }
        factors
    }

    /// Over the factors of segment `i`.
    fn inverses(&self, i: usize, scale: f32, unit: f32) -> [f32; ROWS] {
        std::array::from_fn(|t| {
            let boosted = self.boosted_segment[t] == i as u32;
            let factor = scale * if boosted { self.boosted[t] } else { self.plain[t] };
            // Infinity would make numbers of zeros that are none.
            if factor > f32::MIN_POSITIVE { (unit / factor).min(f32::MAX) } else { 0.0 }
        })
    }
}

/// Steps that codes of so many bits are found in, in a factor.
pub(super) fn unit(bits: u8) -> f32 {
    match bits {
        0 => 0.0,
        1..=4 => paths::UNIT,
        5 => plain::TABLES_5.unit,
        _ => plain::TABLES_6.unit,
    }
}

/// Writes the best codes of a segment's rows.
pub(super) fn encode_segment(isa: Isa, bits: u8, segment: &Segment<'_>, codes: &mut [u8]) {
    if bits == 0 {
        return;
    }
    lanes::encode_segment(isa, bits, segment, codes);
}
