//! HOT PATH (no allocation, locks or logging). Encoded rows back to coefficients.
//!
//! Products are not fused with sums, so every instruction set gives the same bits.

// Lanes are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::{BOOSTS, Layout, ROW_SCALES, SEGMENT, scaled, segment_bytes, tables};
use crate::isa::{Isa, Set};

#[cfg(target_arch = "x86_64")]
mod x86;

const LEVELS_1: [f32; 8] = scaled(&tables::LEVELS_1);
const LEVELS_2: [f32; 16] = scaled(&tables::LEVELS_2);
const LEVELS_3: [f32; 32] = scaled(&tables::LEVELS_3);
const LEVELS_4: [f32; 64] = scaled(&tables::LEVELS_4);
const LEVELS_5: [f32; 32] = scaled(&tables::LEVELS_5);
const LEVELS_6: [f32; 64] = scaled(&tables::LEVELS_6);

/// Rows decoded together, segment by segment: enough to spread the cost of choosing the code for a
/// segment's bit width, few enough that their outputs stay in L1.
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

/// One segment of a block.
struct Segment<'a> {
    /// The first row's code and those after it.
    codes: &'a [u8],
    /// Factor of the levels, by row; as many as there are rows.
    factors: &'a [f32],
    /// Means from the segment's first coefficient on.
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

fn decode_block(isa: Isa, layout: &Layout, block: Block<'_>, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512) {
        // SAFETY: `Isa::best` and `Isa::available` name only sets the processor has.
        return unsafe { x86::decode_block(layout, block, out) };
    }
    // No copy for AVX2: there the compiler turns the lookups into gathers, which take six times as
    // long as the loads (Zen 4).
    let _ = isa;
    for_segments(layout, block, |i, bits, segment| {
        decode_segment(bits, &segment, &mut out[i * SEGMENT..]);
    });
}

/// Calls `decode(index, bits, segment)` for each segment of the block.
#[inline(always)]
fn for_segments(layout: &Layout, block: Block<'_>, mut decode: impl FnMut(usize, u8, Segment<'_>)) {
    let scales = RowScales::read(&block);
    for (i, (bits, scale, offset)) in layout.segments(block.rows).enumerate() {
        let factors = scales.of_segment(i, scale);
        let segment = Segment {
            codes: &block.slot[offset + block.first * segment_bytes(bits)..],
            factors: &factors[..block.count.min(ROWS)],
            means: &block.means[i * SEGMENT..],
            mean_stride: block.mean_stride,
            out_stride: block.out_stride,
        };
        decode(i, bits, segment);
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

    /// Factor of segment `i` in each row.
    #[inline(always)]
    fn of_segment(&self, i: usize, scale: f32) -> [f32; ROWS] {
        std::array::from_fn(|t| {
            let boosted = self.boosted_segment[t] == i as u32;
            scale * if boosted { self.boosted[t] } else { self.plain[t] }
        })
    }
}

/// `out[t][..16] = means[t] + factors[t] · levels`, `t` over the rows that have factors.
#[inline(always)]
fn decode_segment(bits: u8, s: &Segment<'_>, out: &mut [f32]) {
    match bits {
        0 => copy_means(s, out),
        1 => trellis_segment::<1, 8>(&LEVELS_1, s, out),
        2 => trellis_segment::<2, 16>(&LEVELS_2, s, out),
        3 => trellis_segment::<3, 32>(&LEVELS_3, s, out),
        4 => trellis_segment::<4, 64>(&LEVELS_4, s, out),
        5 => plain_segment::<5, 32>(&LEVELS_5, s, out),
        _ => plain_segment::<6, 64>(&LEVELS_6, s, out),
    }
}

#[inline(always)]
fn copy_means(s: &Segment<'_>, out: &mut [f32]) {
    for t in 0..s.factors.len() {
        out[t * s.out_stride..][..SEGMENT]
            .copy_from_slice(&s.means[t * s.mean_stride..][..SEGMENT]);
    }
}

/// Levels of windows. `N` = 2^(BITS + 2).
#[inline(always)]
fn trellis_segment<const BITS: usize, const N: usize>(
    levels: &[f32; N],
    s: &Segment<'_>,
    out: &mut [f32],
) {
    segment_rows::<BITS, N>(levels, s, out, |codes| {
        let word = little_endian(&codes[..2 * BITS]);
        // Repeated to 64 bits, or past the last window, so that one rotation wraps all of them.
        let word = match BITS {
            1 => word * 0x0001_0001_0001_0001,
            2 => word | word << 32,
            3 => word | word << 48,
            _ => word,
        };
        [word, word.rotate_right(8 * BITS as u32)]
    });
}

/// Levels of plain codes. `N` = 2^BITS.
#[inline(always)]
fn plain_segment<const BITS: usize, const N: usize>(
    levels: &[f32; N],
    s: &Segment<'_>,
    out: &mut [f32],
) {
    segment_rows::<BITS, N>(levels, s, out, |codes| {
        [little_endian(&codes[..BITS]), little_endian(&codes[BITS..2 * BITS])]
    });
}

/// `halves(codes)`: two words with the codes of 8 coefficients each, from bit 0 on, `BITS` apart.
#[inline(always)]
fn segment_rows<const BITS: usize, const N: usize>(
    levels: &[f32; N],
    s: &Segment<'_>,
    out: &mut [f32],
    halves: impl Fn(&[u8]) -> [u64; 2],
) {
    for (t, factor) in s.factors.iter().enumerate() {
        let halves = halves(&s.codes[t * 2 * BITS..][..2 * BITS]);
        let means = &s.means[t * s.mean_stride..][..SEGMENT];
        let out = &mut out[t * s.out_stride..][..SEGMENT];
        for j in 0..SEGMENT {
            let code = (halves[j / 8] >> (BITS * (j % 8))) as usize % N;
            out[j] = *factor * levels[code] + means[j];
        }
    }
}

#[inline(always)]
fn little_endian(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}
