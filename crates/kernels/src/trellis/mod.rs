//! Rows of Gaussian-like coefficients in few bits: a tail-biting trellis per segment.
//!
//! A row has `width` coefficients in segments of [`SEGMENT`]; each segment has a bit width of its
//! own, 0 to [`MAX_BITS`]. With 1 to 4 bits a coefficient's code is a *window* of two bits more than
//! it pays for: windows overlap by two bits, circularly within the segment, so that the reproduction
//! levels are those of a finer quantiser of which each step may choose a part (trellis-coded
//! quantisation, Marcellin & Fischer 1990; overlapping windows as the bitshift trellis of QTIP,
//! arXiv 2406.11235, here with four states and tables small enough for one register permutation).
//! That is worth 0.6 dB (1 bit) to 1.3 dB (3, 4 bits) over the best scalar quantiser. With 5 and 6
//! bits codes are plain.
//!
//! All levels are whole multiples of one step below 128, so that products with them can be sums of
//! bytes ([`crate::coded`]).
//!
//! # Slot layout
//!
//! The rows of a block stand beside each other, segment by segment, so that one register holds the
//! codes of several:
//!
//! | bytes, for n rows | content |
//! |---|---|
//! | n | row scale codes c: 2^((c - 128) / 8); 0: every coefficient decodes to its mean |
//! | n | boosts: low nibble a segment's index, high nibble e; that segment's factor is 2^(e / 2) |
//! | n · 2 bits_i | per segment, for each row a little-endian integer `word` of 16 bits_i bits |
//!
//! Window j of a trellis segment is the low bits_i + 2 bits of `word` rotated right by bits_i · j
//! (circular in its 16 bits_i bits); code j of a plain segment is bits bits_i · j onwards.

mod decode;
mod encode;
pub(crate) mod levels;
mod tables;
#[cfg(test)]
mod tests;

pub use levels::Boosts;
pub use tables::{DISTORTION, STEP};

/// Coefficients in a segment.
pub const SEGMENT: usize = 16;

/// Most bits per coefficient.
pub const MAX_BITS: u8 = 6;

/// Most segments in a row: the boost's index has four bits.
const MAX_SEGMENTS: usize = 16;

/// Bytes before the codes: scale and boost.
const HEADER_BYTES: usize = 2;

/// How rows of one kind are stored: bits and expected magnitude of each segment.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    bits: Vec<u8>,
    scales: Vec<f32>,
    row_bytes: usize,
    search: encode::header::Search,
}

impl Layout {
    /// `bits`: per segment, at most [`MAX_BITS`]; 0 stores nothing. `scales`: per segment, the root
    /// mean square expected of its coefficients (units of the coefficients, finite, not negative).
    ///
    /// `None` unless both have the same length of 1 to 16 and their values are in range.
    pub fn new(bits: Vec<u8>, scales: Vec<f32>) -> Option<Self> {
        let fits = (1..=MAX_SEGMENTS).contains(&bits.len()) && bits.len() == scales.len();
        let in_range = bits.iter().all(|b| *b <= MAX_BITS)
            && scales.iter().all(|s| s.is_finite() && *s >= 0.0);
        let row_bytes = HEADER_BYTES + bits.iter().map(|b| segment_bytes(*b)).sum::<usize>();
        (fits && in_range).then(|| {
            let search = encode::header::Search::new(&bits, &scales);
            Self { bits, scales, row_bytes, search }
        })
    }

    /// Coefficients in a row.
    pub fn width(&self) -> usize {
        self.bits.len() * SEGMENT
    }

    /// Bytes of an encoded row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Bytes of a block of `rows` rows.
    pub fn slot_bytes(&self, rows: usize) -> usize {
        rows * self.row_bytes
    }

    /// Segments with their bits, their scale, and where the codes of a block of `rows` rows begin.
    pub(crate) fn segments(&self, rows: usize) -> impl Iterator<Item = (u8, f32, usize)> {
        let mut offset = HEADER_BYTES * rows;
        self.bits.iter().zip(&self.scales).map(move |(bits, scale)| {
            let at = offset;
            offset += rows * segment_bytes(*bits);
            (*bits, *scale, at)
        })
    }

    /// Bits per coefficient of each segment.
    pub fn bits(&self) -> &[u8] {
        &self.bits
    }

    /// Expected root mean square of each segment.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }
}

/// Bytes of a segment's codes.
pub(crate) const fn segment_bytes(bits: u8) -> usize {
    SEGMENT * bits as usize / 8
}

/// Row scales by code: 2^((c - 128) / 8), and 0 for code 0.
const ROW_SCALES: [f32; 256] = {
    /// 2^(i / 8).
    const EIGHTHS: [f32; 8] = [
        1.0,
        1.090_507_7,
        1.189_207_1,
        1.296_839_6,
        std::f32::consts::SQRT_2,
        1.542_210_8,
        1.681_792_9,
        1.834_008_1,
    ];
    let mut scales = [0.0; 256];
    let mut c = 1;
    while c < 256 {
        let power = f32::from_bits((c as u32 / 8 + 127 - 16) << 23);
        scales[c] = power * EIGHTHS[c % 8];
        c += 1;
    }
    scales
};

/// Boost factors by exponent: 2^(e / 2).
const BOOSTS: [f32; 16] = {
    let mut boosts = [0.0; 16];
    let mut e = 0;
    while e < 16 {
        let half = if e % 2 == 1 { std::f32::consts::SQRT_2 } else { 1.0 };
        boosts[e] = (1 << (e / 2)) as f32 * half;
        e += 1;
    }
    boosts
};
