//! HOT PATH. Folded queries against the levels of a block's keys.

use crate::coded::ByteIsa;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Bytes of a segment in a row.
const SEGMENT: usize = crate::trellis::SEGMENT;

/// Query rows against some segments of one block.
#[derive(Debug, Clone, Copy)]
pub struct Scores<'a> {
    /// Key levels of the block ([`crate::trellis::Order::Keys`]).
    pub levels: &'a [u8],
    /// Rows of the block.
    pub tokens: usize,
    /// Segments to take in.
    pub segments: &'a [u8],
    /// Folded queries: `[rows, stride]`.
    pub queries: &'a [i8],
    /// See `queries`.
    pub stride: usize,
    /// Sum of each query's bytes in those segments: `[rows]`.
    pub sums: &'a [i32],
    /// What a byte times a level is worth, by query: `[rows]`.
    pub scales: &'a [f32],
    /// Factors of the block's rows: `[tokens]`.
    pub factors: &'a [f32],
}

/// `out[i, t] += scales[i] · factors[t] · Σ query i · levels of row t`, over the segments; `[rows,
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
    let most = s.segments.iter().max().map_or(0, |last| (usize::from(*last) + 1) * SEGMENT);
    assert!(s.tokens.is_multiple_of(16), "{} tokens", s.tokens);
    assert!(s.levels.len() >= most * s.tokens, "levels: {} for {most}", s.levels.len());
    assert!(s.stride >= most && s.queries.len() >= rows * s.stride, "queries: {}", s.queries.len());
    assert!(s.sums.len() >= rows, "sums: {}", s.sums.len());
    assert!(s.factors.len() >= s.tokens, "factors: {}", s.factors.len());
    assert!(out_stride >= s.tokens, "stride {out_stride}");
    assert!(out.len() >= (rows - 1) * out_stride + s.tokens, "out: {}", out.len());
    #[cfg(target_arch = "x86_64")]
    if isa == ByteIsa::Vnni {
        // SAFETY: `ByteIsa` names only what the processor has; lengths are asserted above.
        return unsafe { x86::add_scores(s, out, out_stride) };
    }
    let _ = isa;
    for row in 0..rows {
        for t in 0..s.tokens {
            let mut sum = -128 * s.sums[row];
            for segment in s.segments {
                for c in (0..SEGMENT).map(|j| usize::from(*segment) * SEGMENT + j) {
                    let level = s.levels[(c / 4 * s.tokens + t) * 4 + c % 4];
                    sum += i32::from(level) * i32::from(s.queries[row * s.stride + c]);
                }
            }
            let out = &mut out[row * out_stride + t];
            *out = (s.scales[row] * s.factors[t]).mul_add(sum as f32, *out);
        }
    }
}
