//! HOT PATH. Weighted sums of the levels of values.

use crate::coded::ByteIsa;
use crate::trellis::{Boosts, SEGMENT};

#[cfg(target_arch = "x86_64")]
mod x86;

/// Weights as bytes.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// `[rows, stride]`.
    pub bytes: &'a [u8],
    /// See `bytes`.
    pub stride: usize,
    /// What a byte is worth: `[rows]`.
    pub scales: &'a [f32],
}

/// `sums[i] += scales[i] · Σ weights[i, t] · levels of token t`, over `tokens` tokens of one or more
/// blocks and the first `segments` segments. `levels`: by block, [`crate::trellis::Order::Values`],
/// `block_bytes` apart, of `block_tokens` tokens each. `sums`: `[rows, ..]` with stride `stride`.
///
/// # Panics
/// If tokens are not whole blocks, or a slice is shorter than its shape says.
pub fn add_values(
    weights: &Weights<'_>,
    levels: &[u8],
    (blocks, block_tokens, block_bytes): (usize, usize, usize),
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    let shape = (blocks, block_tokens, block_bytes);
    add_values_on(ByteIsa::best(), weights, levels, shape, segments, sums, stride);
}

pub(super) fn add_values_on(
    isa: ByteIsa,
    weights: &Weights<'_>,
    levels: &[u8],
    (blocks, block_tokens, block_bytes): (usize, usize, usize),
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    let rows = weights.scales.len();
    if rows == 0 || blocks == 0 || segments == 0 {
        return;
    }
    let width = segments * SEGMENT;
    assert!(block_tokens.is_multiple_of(16), "{block_tokens} tokens a block");
    assert!(weights.stride >= blocks * block_tokens, "weights: {}", weights.stride);
    assert!(weights.bytes.len() >= rows * weights.stride, "weights: {}", weights.bytes.len());
    assert!(block_bytes >= width * block_tokens, "{block_bytes} bytes a block");
    assert!(levels.len() >= (blocks - 1) * block_bytes + width * block_tokens, "{}", levels.len());
    assert!(stride >= width && sums.len() >= (rows - 1) * stride + width, "sums: {}", sums.len());
    #[cfg(target_arch = "x86_64")]
    if isa == ByteIsa::Vnni {
        let shape = (blocks, block_tokens, block_bytes);
        // SAFETY: `ByteIsa` names only what the processor has; lengths are asserted above.
        return unsafe { x86::add_values(weights, levels, shape, segments, sums, stride) };
    }
    let _ = isa;
    for row in 0..rows {
        for c in 0..width {
            let mut sum = 0;
            for block in 0..blocks {
                for t in 0..block_tokens {
                    let at = (c / SEGMENT * block_tokens + t / 4 * 4) * SEGMENT;
                    let level = levels[block * block_bytes + at + c % SEGMENT * 4 + t % 4] as i8;
                    let weight = weights.bytes[row * weights.stride + block * block_tokens + t];
                    sum += i32::from(level) * i32::from(weight);
                }
            }
            let out = &mut sums[row * stride + c];
            *out = (sum as f32).mul_add(weights.scales[row], *out);
        }
    }
}

/// Boosted segments of some blocks' values.
#[derive(Debug, Clone, Copy)]
pub struct BoostedValues<'a> {
    /// By block.
    pub boosts: &'a [&'a Boosts],
    /// As in [`add_values`], with tokens of a block and bytes from one to the next.
    pub levels: &'a [u8],
    /// See `levels`.
    pub block_tokens: usize,
    /// See `levels`.
    pub block_bytes: usize,
    /// Segments that are taken in, from the first on.
    pub segments: usize,
    /// Weights of all blocks' tokens, row factors taken in: `[rows, stride]`.
    pub weights: &'a [f32],
    /// See `weights`.
    pub stride: usize,
}

/// What boosted segments are more than plain ones: `sums[i] += Σ (boost - 1) · weights[i, t] · levels of
/// token t`, over the boosts' tokens and segments. `sums`: `[rows, stride]`.
///
/// # Panics
/// If a slice is shorter than its shape or a boost says.
pub fn add_boosted_values(values: &BoostedValues<'_>, sums: &mut [f32], stride: usize) {
    add_boosted_values_on(ByteIsa::best(), values, sums, stride);
}

pub(super) fn add_boosted_values_on(
    isa: ByteIsa,
    values: &BoostedValues<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    let rows = values.weights.len() / values.stride;
    if rows == 0 {
        return;
    }
    let (blocks, block_tokens) = (values.boosts.len(), values.block_tokens);
    let bytes = values.segments * SEGMENT * block_tokens;
    assert!(block_tokens.is_multiple_of(4), "{block_tokens} tokens a block");
    assert!(values.stride >= blocks * block_tokens, "weights: {}", values.stride);
    assert!(blocks == 0 || values.levels.len() >= (blocks - 1) * values.block_bytes + bytes);
    assert!(sums.len() >= (rows - 1) * stride + values.segments * SEGMENT, "{}", sums.len());
    let beyond = |b: &&Boosts| {
        (0..values.segments).any(|s| b.rows(s).checked_shr(block_tokens as u32).unwrap_or(0) != 0)
    };
    assert!(!values.boosts.iter().any(beyond), "boosts beyond {block_tokens} rows");
    #[cfg(target_arch = "x86_64")]
    if isa == ByteIsa::Vnni {
        // SAFETY: `ByteIsa` names only what the processor has; lengths are asserted above.
        return unsafe { x86::add_boosted_values(values, sums, stride) };
    }
    let _ = isa;
    for segment in 0..values.segments {
        for (block, boosts) in values.boosts.iter().enumerate() {
            let mut rows_left = boosts.rows(segment);
            while let Some(token) = Boosts::next(&mut rows_left) {
                let factor = boosts.factor(token);
                let first = block * values.block_bytes
                    + (segment * block_tokens + token / 4 * 4) * SEGMENT
                    + token % 4;
                for row in 0..rows {
                    let at = row * values.stride + block * block_tokens + token;
                    let weight = values.weights[at];
                    for j in 0..SEGMENT {
                        let level = f32::from(values.levels[first + 4 * j] as i8) * (factor - 1.0);
                        let sum = &mut sums[row * stride + segment * SEGMENT + j];
                        *sum = weight.mul_add(level, *sum);
                    }
                }
            }
        }
    }
}
