//! HOT PATH (prefill). Blocks of levels back into rows of channels.

use half::f16;

use crate::coded::ByteIsa;
use crate::trellis::SEGMENT;
use crate::{AlignedBytes, f16_to_f32};

#[cfg(target_arch = "x86_64")]
mod x86;

/// Largest magnitude of a byte.
const MOST: f32 = 127.0;

/// A basis that levels are turned back with, as bytes.
#[derive(Debug)]
pub struct ByteRows {
    dim: usize,
    width: usize,
    /// `[heads, width / 4, dim, 4]`: entries over their channel's scale.
    entries: AlignedBytes,
    /// What those make of levels that are 128 too large: `[heads, width / 16, dim]` of i32.
    offsets: AlignedBytes,
    /// By channel, what a byte times a level is worth: `[width]`.
    scales: Vec<f32>,
}

impl Default for ByteRows {
    fn default() -> Self {
        let (entries, offsets) = (AlignedBytes::zeroed(0), AlignedBytes::zeroed(0));
        Self { dim: 16, width: 0, entries, offsets, scales: Vec::new() }
    }
}

/// One block that is turned back.
#[derive(Debug, Clone, Copy)]
pub struct LevelBlock<'a> {
    /// Levels ([`crate::trellis::Layout::levels`]).
    pub levels: &'a [u8],
    /// What a level is worth, by segment and row of the block: `[segments, tokens]`.
    pub factors: &'a [f32],
    /// Rows of the block.
    pub tokens: usize,
    /// Segments that are taken in, from the first on.
    pub segments: usize,
    /// What all levels are multiplied with besides.
    pub gain: f32,
    /// What rows are added to: `[tokens, mean_stride]`, the head's channels first, or one row with
    /// stride 0.
    pub means: &'a [f32],
    /// See `means`.
    pub mean_stride: usize,
}

impl ByteRows {
    /// Takes in a basis: `[channels, coefficients]`, of as many channels as `weights`, in heads of `dim`
    /// channels, each to be multiplied with its weight.
    ///
    /// # Panics
    /// If the shapes do not fit, or `dim` is no multiple of 16.
    pub fn load(&mut self, dim: usize, basis: &[f16], weights: &[f32]) {
        let width = weights.len();
        assert!(dim.is_multiple_of(16) && width.is_multiple_of(dim), "heads of {dim} in {width}");
        assert!(basis.len() == width * width, "a basis of {} for {width} channels", basis.len());
        if (self.dim, self.width) != (dim, width) {
            self.entries = AlignedBytes::zeroed(width * width);
            self.offsets = AlignedBytes::zeroed(4 * width * width / SEGMENT);
        }
        (self.dim, self.width) = (dim, width);
        self.scales.resize(width, 0.0);
        let mut row = vec![0.0; width];
        let channels = basis.chunks_exact(width).zip(weights).zip(&mut self.scales);
        for (channel, ((basis, weight), scale)) in channels.enumerate() {
            f16_to_f32(basis, &mut row);
            let most =
                row.iter().fold(0.0f32, |most, x| if x.abs() > most { x.abs() } else { most });
            *scale = weight * most / MOST;
            let inverse = if most > 0.0 { MOST / most } else { 0.0 };
            let (head, d) = (channel / dim, channel % dim);
            let entries = &mut self.entries.as_mut_slice()[head * dim * width..];
            let offsets = &mut self.offsets.as_mut_slice()[4 * head * dim * width / SEGMENT..];
            for (segment, row) in row.chunks_exact(SEGMENT).enumerate() {
                let mut sum = 0;
                for (k, row) in row.chunks_exact(4).enumerate() {
                    let at = ((segment * 4 + k) * dim + d) * 4;
                    for (entry, x) in entries[at..at + 4].iter_mut().zip(row) {
                        // Adding 1.5 · 2^23 rounds to an integer, which the low bits then hold.
                        let byte = (x * inverse + 12_582_912.0).to_bits() as i8;
                        *entry = byte as u8;
                        sum += i32::from(byte);
                    }
                }
                let at = 4 * (segment * dim + d);
                offsets[at..at + 4].copy_from_slice(&(-128 * sum).to_le_bytes());
            }
        }
    }

    /// Rows of one head: `out[t, d] = means[t, d] + gain · scales[d] · Σ factors[s, t] · (levels of row t ·
    /// entries of channel d, in segment s)`, `[tokens, dim]`.
    ///
    /// # Panics
    /// If a slice is shorter than its shape says, `tokens` is no multiple of 16, or there is no such
    /// head or segment.
    pub fn turn_back(&self, head: usize, block: &LevelBlock<'_>, out: &mut [f32]) {
        self.turn_back_on(ByteIsa::best(), head, block, out);
    }

    pub(super) fn turn_back_on(
        &self,
        isa: ByteIsa,
        head: usize,
        block: &LevelBlock<'_>,
        out: &mut [f32],
    ) {
        let LevelBlock { levels, factors, tokens, segments, gain, means, mean_stride } = *block;
        let (dim, width) = (self.dim, self.width);
        assert!(tokens.is_multiple_of(16) && tokens > 0, "{tokens} tokens");
        assert!(segments * SEGMENT <= width && (head + 1) * dim <= width, "{segments}, {head}");
        assert!(levels.len() >= segments * SEGMENT * tokens, "levels: {}", levels.len());
        assert!(factors.len() >= segments * tokens, "factors: {}", factors.len());
        assert!(means.len() >= (tokens - 1) * mean_stride + dim, "means: {}", means.len());
        assert!(out.len() >= tokens * dim, "out: {}", out.len());
        let entries = &self.entries.as_slice()[head * dim * width..][..dim * width];
        let offsets = &self.offsets.as_slice()[4 * head * dim * width / SEGMENT..];
        let offsets = &offsets[..4 * dim * width / SEGMENT];
        let scales = &self.scales[head * dim..(head + 1) * dim];
        #[cfg(target_arch = "x86_64")]
        if isa == ByteIsa::Vnni {
            // SAFETY: `ByteIsa` names only what the processor has; lengths are asserted above.
            return unsafe { x86::turn_back(block, entries, offsets, scales, out) };
        }
        let _ = isa;
        for t in 0..tokens {
            for d in 0..dim {
                let mut all = 0.0f32;
                for segment in 0..segments {
                    let at = 4 * (segment * dim + d);
                    let mut sum = i32::from_le_bytes([
                        offsets[at],
                        offsets[at + 1],
                        offsets[at + 2],
                        offsets[at + 3],
                    ]);
                    for c in segment * SEGMENT..(segment + 1) * SEGMENT {
                        let level = levels[(c / 4 * tokens + t) * 4 + c % 4];
                        let entry = entries[(c / 4 * dim + d) * 4 + c % 4] as i8;
                        sum += i32::from(level) * i32::from(entry);
                    }
                    all = (sum as f32).mul_add(factors[segment * tokens + t], all);
                }
                out[t * dim + d] = all.mul_add(gain * scales[d], means[t * mean_stride + d]);
            }
        }
    }
}
