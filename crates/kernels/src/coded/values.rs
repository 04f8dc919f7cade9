//! HOT PATH. Weighted sums of coded values.

use crate::coded::ByteIsa;
use crate::trellis::{Boosts, Layout, SEGMENT};

#[cfg(target_arch = "x86_64")]
mod x86;

/// One block of values.
#[derive(Debug, Clone, Copy)]
pub struct ValueBlock<'a> {
    /// How it is stored.
    pub layout: &'a Layout,
    /// The block.
    pub slot: &'a [u8],
    /// Boosts of its rows ([`Layout::row_factors`]).
    pub boosts: &'a Boosts,
}

/// Weights of some blocks' tokens, block after block, factors of rows taken in.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// `[rows, stride]`.
    pub weights: &'a [f32],
    /// The same, rounded. `[rows, stride]`.
    pub bytes: &'a [u8],
    /// What a byte is worth: `[rows]`.
    pub scales: &'a [f32],
    /// See `weights` and `bytes`.
    pub stride: usize,
}

/// `sums[i] += Σ weights[i, t] · levels of token t`, over the first `segments` segments of blocks of
/// `tokens` tokens each, levels multiplied with their boosts: `[rows, ..]` with stride `stride`. Boosts
/// meet the weights as they are, all else their bytes.
///
/// # Panics
/// If `tokens` is no multiple of 16, or a slice is shorter than its shape says.
pub fn add_values(
    weights: &Weights<'_>,
    blocks: &[ValueBlock<'_>],
    tokens: usize,
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    add_values_on(ByteIsa::best(), weights, blocks, tokens, segments, sums, stride);
}

pub(super) fn add_values_on(
    isa: ByteIsa,
    weights: &Weights<'_>,
    blocks: &[ValueBlock<'_>],
    tokens: usize,
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    let rows = weights.scales.len();
    if rows == 0 || blocks.is_empty() || segments == 0 {
        return;
    }
    let width = segments * SEGMENT;
    assert!(tokens.is_multiple_of(16), "{tokens} tokens a block");
    assert!(weights.stride >= blocks.len() * tokens, "weights: {}", weights.stride);
    assert!(weights.bytes.len() >= rows * weights.stride, "bytes: {}", weights.bytes.len());
    assert!(weights.weights.len() >= rows * weights.stride, "weights: {}", weights.weights.len());
    assert!(stride >= width && sums.len() >= (rows - 1) * stride + width, "sums: {}", sums.len());
    for block in blocks {
        assert!(block.slot.len() == block.layout.slot_bytes(tokens), "slot: {}", block.slot.len());
        assert!(block.layout.bits().len() >= segments, "{segments} segments");
        let beyond = |s: usize| block.boosts.rows(s).checked_shr(tokens as u32).unwrap_or(0) != 0;
        assert!(!(0..segments).any(beyond), "boosts beyond {tokens} rows");
    }
    #[cfg(target_arch = "x86_64")]
    if isa == ByteIsa::Vnni {
        // SAFETY: `ByteIsa` names only what the processor has; lengths are asserted above.
        return unsafe { x86::add_values(weights, blocks, tokens, segments, sums, stride) };
    }
    let mut levels = vec![0; blocks.len() * width * tokens];
    for (block, levels) in blocks.iter().zip(levels.chunks_exact_mut(width * tokens)) {
        block.layout.levels_on(isa, block.slot, tokens, segments, levels);
    }
    let level = |block: usize, c: usize, t: usize| {
        i32::from(levels[block * width * tokens + (c / 4 * tokens + t) * 4 + c % 4]) - 128
    };
    for row in 0..rows {
        for c in 0..width {
            let (mut sum, out) = (0, &mut sums[row * stride + c]);
            for (block, t) in (0..blocks.len()).flat_map(|b| (0..tokens).map(move |t| (b, t))) {
                let weight = weights.bytes[row * weights.stride + block * tokens + t];
                sum += level(block, c, t) * i32::from(weight);
            }
            *out = (sum as f32).mul_add(weights.scales[row], *out);
            for (number, block) in blocks.iter().enumerate() {
                let mut boosted = block.boosts.rows(c / SEGMENT);
                while let Some(t) = Boosts::next(&mut boosted) {
                    let weight = weights.weights[row * weights.stride + number * tokens + t];
                    let level = level(number, c, t) as f32 * (block.boosts.factor(t) - 1.0);
                    *out = weight.mul_add(level, *out);
                }
            }
        }
    }
}
