//! HOT PATH. Folded queries against the levels of a block's keys.

use crate::coded::ByteIsa;
use crate::trellis::Layout;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Bytes of a segment in a row.
const SEGMENT: usize = crate::trellis::SEGMENT;

/// Query rows against one block.
#[derive(Debug, Clone, Copy)]
pub struct Scores<'a> {
    /// How the block is stored.
    pub layout: &'a Layout,
    /// The block.
    pub slot: &'a [u8],
    /// What a level is worth, by segment and row of the block: `[segments, tokens]`.
    pub factors: &'a [f32],
    /// Rows of the block.
    pub tokens: usize,
    /// Segments that are taken in, from the first on.
    pub segments: usize,
    /// Folded queries: `[rows, stride]`.
    pub queries: &'a [i8],
    /// See `queries`.
    pub stride: usize,
    /// What the queries' bytes make of levels that are 128 too large, by segment: `[rows, stride / 4]`,
    /// four times the same for each segment.
    pub offsets: &'a [i32],
    /// What a byte is worth, by query: `[rows]`.
    pub scales: &'a [f32],
}

/// `out[i, t] += scales[i] · Σ factors[s, t] · (query i · levels of row t in segment s)`, `[rows,
/// tokens]` with stride `out_stride`.
///
/// # Panics
/// If `tokens` is no multiple of 16, or a slice is shorter than its shape says.
pub fn add_scores(s: &Scores<'_>, out: &mut [f32], out_stride: usize) {
    add_scores_on(ByteIsa::best(), s, out, out_stride);
}

pub(super) fn add_scores_on(isa: ByteIsa, s: &Scores<'_>, out: &mut [f32], out_stride: usize) {
    let rows = s.scales.len();
    if rows == 0 {
        return;
    }
    let width = s.segments * SEGMENT;
    assert!(s.tokens.is_multiple_of(16), "{} tokens", s.tokens);
    assert!(s.slot.len() == s.layout.slot_bytes(s.tokens), "slot: {}", s.slot.len());
    assert!(s.segments <= s.layout.bits().len(), "{} segments", s.segments);
    assert!(s.factors.len() >= s.segments * s.tokens, "factors: {}", s.factors.len());
    assert!(
        s.stride >= width && s.queries.len() >= rows * s.stride,
        "queries: {}",
        s.queries.len()
    );
    assert!(s.offsets.len() >= rows * s.stride / 4, "offsets: {}", s.offsets.len());
    assert!(out_stride >= s.tokens, "stride {out_stride}");
    assert!(out.len() >= (rows - 1) * out_stride + s.tokens, "out: {}", out.len());
    #[cfg(target_arch = "x86_64")]
    if isa == ByteIsa::Vnni {
        // SAFETY: `ByteIsa` names only what the processor has; lengths are asserted above.
        return unsafe { x86::add_scores(s, out, out_stride) };
    }
    let mut levels = vec![0; width * s.tokens];
    s.layout.levels_on(isa, s.slot, s.tokens, s.segments, &mut levels);
    for row in 0..rows {
        for t in 0..s.tokens {
            let mut all = 0.0f32;
            for segment in 0..s.segments {
                let first = segment * SEGMENT;
                let mut sum = s.offsets[(row * s.stride + first) / 4];
                for c in first..first + SEGMENT {
                    let level = levels[(c / 4 * s.tokens + t) * 4 + c % 4];
                    sum += i32::from(level) * i32::from(s.queries[row * s.stride + c]);
                }
                all = (sum as f32).mul_add(s.factors[segment * s.tokens + t], all);
            }
            let out = &mut out[row * out_stride + t];
            *out = s.scales[row].mul_add(all, *out);
        }
    }
}
