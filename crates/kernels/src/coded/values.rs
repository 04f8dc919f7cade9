//! HOT PATH. Weighted sums of the levels of values.

use crate::coded::{ByteIsa, Weights};
use crate::trellis::{Boost, SEGMENT};

#[cfg(target_arch = "x86_64")]
mod x86;

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

/// What boosted segments of a block's values are more than plain ones: `sums[i] += (boost - 1) ·
/// weights[i, t] · levels`, for each boost's row `t` and segment. `levels`: of the block; `weights`:
/// `[rows, ..]` with stride `weight_stride`, from the block's first token on, row factors taken in.
///
/// # Panics
/// If a slice is shorter than its shape or a boost says.
pub fn add_boosted_values(
    boosts: &[Boost],
    levels: &[u8],
    tokens: usize,
    weights: &[f32],
    weight_stride: usize,
    sums: &mut [f32],
    stride: usize,
) {
    for boost in boosts {
        let at = (boost.segment * tokens + boost.row / 4 * 4) * SEGMENT + boost.row % 4;
        let levels = &levels[at..at + 4 * SEGMENT - 3];
        let levels: [f32; SEGMENT] =
            std::array::from_fn(|j| f32::from(levels[4 * j] as i8) * (boost.factor - 1.0));
        let weights = weights[boost.row..].iter().step_by(weight_stride);
        for (weight, sums) in weights.zip(sums.chunks_mut(stride)) {
            let sums = &mut sums[boost.segment * SEGMENT..][..SEGMENT];
            for (sum, level) in sums.iter_mut().zip(levels) {
                *sum += weight * level;
            }
        }
    }
}
