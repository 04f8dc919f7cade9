//! HOT PATH. 16 coefficients to a register, four tokens to a lane: no sum runs across lanes. Levels are
//! looked up where they are used, on pipes that the products leave idle.

use std::arch::x86_64::*;

use super::{ValueBlock, Weights};
use crate::trellis::levels::x86::ValueLevels;
use crate::trellis::{Boosts, SEGMENT, segment_bytes};

/// Query rows summed together.
const ROWS: usize = 9;

/// See [`super::add_values`].
///
/// # Safety
/// Slices must have the lengths that `add_values_on` asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn add_values(
    weights: &Weights<'_>,
    blocks: &[ValueBlock<'_>],
    tokens: usize,
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    let rows = weights.scales.len();
    // Where the segment's codes begin, in every block.
    let mut offsets = [0; MAX_BLOCKS];
    for (offset, block) in offsets.iter_mut().zip(blocks) {
        *offset = block.layout.segments(tokens).next().map_or(0, |(_, _, offset)| offset);
    }
    assert!(blocks.len() <= MAX_BLOCKS);
    for segment in 0..segments {
        let mut row = 0;
        while row < rows {
            let n = ROWS.min(rows - row);
            // SAFETY: rows `row .. row + n` and the segment are in bounds.
            unsafe {
                let out = sums.as_mut_ptr().add(row * stride + segment * SEGMENT);
                let at = Place { segment, row, tokens, offsets: &offsets, out, stride };
                match n {
                    9 => tile::<9>(weights, blocks, &at),
                    8 => tile::<8>(weights, blocks, &at),
                    7 => tile::<7>(weights, blocks, &at),
                    6 => tile::<6>(weights, blocks, &at),
                    5 => tile::<5>(weights, blocks, &at),
                    4 => tile::<4>(weights, blocks, &at),
                    3 => tile::<3>(weights, blocks, &at),
                    2 => tile::<2>(weights, blocks, &at),
                    _ => tile::<1>(weights, blocks, &at),
                }
            }
            row += n;
        }
        for (offset, block) in offsets.iter_mut().zip(blocks) {
            *offset += tokens * segment_bytes(block.layout.bits()[segment]);
        }
    }
}

/// Most blocks at once.
const MAX_BLOCKS: usize = 8;

/// A segment of some rows' sums.
struct Place<'a> {
    segment: usize,
    row: usize,
    tokens: usize,
    offsets: &'a [usize; MAX_BLOCKS],
    out: *mut f32,
    stride: usize,
}

/// # Safety
/// `R` rows, the segment, and the rows of its boosts must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn tile<const R: usize>(weights: &Weights<'_>, blocks: &[ValueBlock<'_>], at: &Place<'_>) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [_mm512_setzero_si512(); R];
        let stride = weights.stride;
        for (i, block) in blocks.iter().enumerate() {
            let codes = block.slot.as_ptr().add(at.offsets[i]);
            let bytes = weights.bytes.as_ptr().add(at.row * stride + i * at.tokens);
            // Pasted, not called: what is summed must stay in registers.
            macro_rules! add {
                ($bits:literal) => {{
                    let levels = ValueLevels::<$bits>::new();
                    for quad in (0..at.tokens / 4).step_by(4) {
                        let codes = codes.add(8 * $bits * quad);
                        for i in 0..4 {
                            let levels = levels.levels(codes.add(8 * $bits * i));
                            for (r, sum) in sums.iter_mut().enumerate() {
                                let w = bytes.add(r * stride + 4 * (quad + i)).cast::<i32>();
                                let w = _mm512_set1_epi32(w.read_unaligned());
                                *sum = _mm512_dpbusd_epi32(*sum, w, levels);
                            }
                        }
                    }
                }};
            }
            match block.layout.bits()[at.segment] {
                0 => {}
                1 => add!(1),
                2 => add!(2),
                3 => add!(3),
                4 => add!(4),
                5 => add!(5),
                _ => add!(6),
            }
        }
        let mut all = [_mm512_setzero_ps(); R];
        for (r, (all, sum)) in all.iter_mut().zip(sums).enumerate() {
            let scale = _mm512_set1_ps(*weights.scales.as_ptr().add(at.row + r));
            let before = _mm512_loadu_ps(at.out.add(r * at.stride));
            *all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, before);
        }
        for (i, block) in blocks.iter().enumerate() {
            let codes = block.slot.as_ptr().add(at.offsets[i]);
            let weights = weights.weights.as_ptr().add(at.row * stride + i * at.tokens);
            macro_rules! add {
                ($bits:literal) => {{
                    let levels = ValueLevels::<$bits>::new();
                    let mut tokens = block.boosts.rows(at.segment);
                    while let Some(token) = Boosts::next(&mut tokens) {
                        let quad = levels.levels(codes.add(8 * $bits * (token / 4)));
                        let left = _mm_cvtsi32_si128(24 - 8 * (token % 4) as i32);
                        let level = _mm512_srai_epi32::<24>(_mm512_sll_epi32(quad, left));
                        let factor = _mm512_set1_ps(block.boosts.factor(token) - 1.0);
                        let level = _mm512_mul_ps(_mm512_cvtepi32_ps(level), factor);
                        for (r, all) in all.iter_mut().enumerate() {
                            let weight = _mm512_set1_ps(*weights.add(r * stride + token));
                            *all = _mm512_fmadd_ps(weight, level, *all);
                        }
                    }
                }};
            }
            match block.layout.bits()[at.segment] {
                0 => {}
                1 => add!(1),
                2 => add!(2),
                3 => add!(3),
                4 => add!(4),
                5 => add!(5),
                _ => add!(6),
            }
        }
        for (r, all) in all.iter().enumerate() {
            _mm512_storeu_ps(at.out.add(r * at.stride), *all);
        }
    }
}
