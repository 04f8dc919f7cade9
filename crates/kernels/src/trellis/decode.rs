//! HOT PATH (no allocation, locks or logging). Encoded rows back to coefficients.
//!
//! Products are not fused with sums, so every instruction set gives the same bits.

use super::levels::{PLAIN_BEFORE, plain_rows, with_bits};
use super::{BOOSTS, HEADER_BYTES, Layout, MAX_BITS, ROW_SCALES, SEGMENT, STEP, segment_bytes};
use crate::Isa;
use crate::simd::bytes::Bytes;
use crate::simd::compiled;

/// Rows decoded together, segment by segment: as many as are unpacked together.
const ROWS: usize = 16;

/// Up to [`ROWS`] rows of a slot and what to add them to.
#[derive(Clone, Copy)]
struct Block<'a> {
    slot: &'a [u8],
    /// Rows of the slot.
    rows: usize,
    /// Those that are decoded: `first .. first + count`.
    first: usize,
    count: usize,
    gain: f32,
    means: &'a [f32],
    mean_stride: usize,
    out_stride: usize,
}

impl Layout {
    /// `out[t][i] = means[t][i] + gain · row_scale · boost_i · scales_i · level`.
    ///
    /// `slot`: a block of as many rows as its length says; the first `tokens` of them are decoded.
    /// `means`: `[tokens, width]` with stride `mean_stride`, or one row for all with stride 0. `out`:
    /// `[tokens, width]` with stride `out_stride`; what lies between rows is left alone. Any bytes
    /// decode to something.
    ///
    /// # Panics
    /// If `slot` is not whole rows or fewer than `tokens`, a stride other than 0 for the means is
    /// below the width, or a slice is shorter than its shape and stride say.
    #[allow(clippy::too_many_arguments)]
    pub fn decode(
        &self,
        slot: &[u8],
        tokens: usize,
        gain: f32,
        means: &[f32],
        mean_stride: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        self.decode_on(Isa::best(), slot, tokens, gain, means, mean_stride, out, out_stride);
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn decode_on(
        &self,
        isa: Isa,
        slot: &[u8],
        tokens: usize,
        gain: f32,
        means: &[f32],
        mean_stride: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let (width, row_bytes) = (self.width(), self.row_bytes);
        let rows = slot.len() / row_bytes;
        assert!(slot.len() == rows * row_bytes, "{} bytes / {row_bytes} a row", slot.len());
        assert!(tokens <= rows, "{tokens} of {rows} rows");
        if tokens == 0 {
            return;
        }
        assert!(mean_stride == 0 || mean_stride >= width, "means: stride {mean_stride}");
        assert!(means.len() >= (tokens - 1) * mean_stride + width, "means: {}", means.len());
        assert!(out_stride >= width, "out: stride {out_stride} of {width}");
        assert!(out.len() >= (tokens - 1) * out_stride + width, "out: {}", out.len());

        for first in (0..tokens).step_by(ROWS) {
            let count = ROWS.min(tokens - first);
            let block = Block {
                slot,
                rows,
                first,
                count,
                gain,
                means: &means[first * mean_stride..],
                mean_stride,
                out_stride,
            };
            decode_block(isa, self, block, &mut out[first * out_stride..]);
        }
    }
}

compiled! {
    fn decode_block(layout: &Layout, block: Block<'_>, out: &mut [f32]) = decode_body for [Avx512, Avx2];
}

#[inline(always)]
fn decode_body<S: Bytes>(set: S, layout: &Layout, block: Block<'_>, out: &mut [f32]) {
    let scales = RowScales::read(&block);
    let count = block.count.min(ROWS);
    // Codes of as many rows as are unpacked together, whether they are there or not.
    let mut codes = [0; PLAIN_BEFORE + ROWS * segment_bytes(MAX_BITS)];
    let mut levels = [[0; SEGMENT]; ROWS];
    let mut at = HEADER_BYTES * block.rows;
    let segments = layout.bits.iter().zip(&layout.scales);
    for (i, (bits, scale)) in segments.enumerate() {
        let bytes = segment_bytes(*bits);
        let own = &block.slot[at + block.first * bytes..][..count * bytes];
        codes[PLAIN_BEFORE..][..own.len()].copy_from_slice(own);
        at += block.rows * bytes;
        if *bits > 0 {
            // SAFETY: codes of `ROWS` rows, and what must be before them.
            unsafe {
                let codes = codes.as_ptr().add(PLAIN_BEFORE);
                with_bits!(*bits, plain_rows::<S>(set, codes, &mut levels));
            }
        }
        for (t, levels) in levels.iter().enumerate().take(count) {
            let means = &block.means[t * block.mean_stride + i * SEGMENT..][..SEGMENT];
            let out = &mut out[t * block.out_stride + i * SEGMENT..][..SEGMENT];
            if *bits == 0 {
                out.copy_from_slice(means);
                continue;
            }
            let factor = set.splat(scales.of_segment(i, t, *scale));
            // SAFETY: 16 of each.
            unsafe {
                let levels = set.from_int(set.load_signed(levels.as_ptr().cast()));
                let levels = set.mul(levels, set.splat(STEP));
                let value = set.add(set.mul(factor, levels), set.load(means.as_ptr()));
                set.store(out.as_mut_ptr(), value);
            }
        }
    }
}

/// Scales of up to [`ROWS`] rows.
struct RowScales {
    /// gain · row scale.
    plain: [f32; ROWS],
    /// gain · row scale · boost.
    boosted: [f32; ROWS],
    boosted_segment: [u32; ROWS],
}

impl RowScales {
    #[inline(always)]
    fn read(block: &Block<'_>) -> Self {
        let mut scales =
            Self { plain: [0.0; ROWS], boosted: [0.0; ROWS], boosted_segment: [0; ROWS] };
        let (codes, boosts) = block.slot.split_at(block.rows);
        let rows = codes[block.first..].iter().zip(&boosts[block.first..]).take(block.count);
        for (t, (&code, &boost)) in rows.enumerate().take(ROWS) {
            scales.plain[t] = block.gain * ROW_SCALES[usize::from(code)];
            scales.boosted[t] = scales.plain[t] * BOOSTS[usize::from(boost >> 4)];
            scales.boosted_segment[t] = u32::from(boost & 15);
        }
        scales
    }

    /// Factor of segment `i` in row `t`.
    #[inline(always)]
    fn of_segment(&self, i: usize, t: usize, scale: f32) -> f32 {
        let boosted = self.boosted_segment[t] == i as u32;
        scale * if boosted { self.boosted[t] } else { self.plain[t] }
    }
}
