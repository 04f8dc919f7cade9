//! HOT PATH. 16 channels to a register, four coefficients to a lane.

use std::arch::x86_64::*;

use super::LevelBlock;
use crate::trellis::SEGMENT;

/// Tokens turned back together: with four registers of channels, an integer and a floating sum each.
const TOKENS: usize = 3;

/// See [`super::ByteRows::turn_back`]; `entries`, `offsets`, `scales`: of the head.
///
/// # Safety
/// Slices must have the lengths that `turn_back_on` asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn turn_back(
    block: &LevelBlock<'_>,
    entries: &[u8],
    offsets: &[u8],
    scales: &[f32],
    out: &mut [f32],
) {
    let dim = scales.len();
    let mut d = 0;
    while d < dim {
        let taken = if dim - d >= 64 { 4 } else { 1 };
        for t in (0..block.tokens).step_by(TOKENS) {
            // SAFETY: tokens from `t` on and 16 · `taken` channels from `d` on are in bounds.
            unsafe {
                let place = Place {
                    dim,
                    t,
                    entries: entries.as_ptr().add(4 * d),
                    offsets: offsets.as_ptr().add(4 * d),
                    scales: scales.as_ptr().add(d),
                    means: block.means.as_ptr().add(t * block.mean_stride + d),
                    out: out.as_mut_ptr().add(t * dim + d),
                };
                match (TOKENS.min(block.tokens - t), taken) {
                    (3, 4) => tile::<3, 4>(block, &place),
                    (2, 4) => tile::<2, 4>(block, &place),
                    (_, 4) => tile::<1, 4>(block, &place),
                    (3, _) => tile::<3, 1>(block, &place),
                    (2, _) => tile::<2, 1>(block, &place),
                    _ => tile::<1, 1>(block, &place),
                }
            }
        }
        d += 16 * taken;
    }
}

/// A tile's first token and channel.
struct Place {
    dim: usize,
    t: usize,
    entries: *const u8,
    offsets: *const u8,
    scales: *const f32,
    means: *const f32,
    out: *mut f32,
}

/// # Safety
/// `R` tokens and 16 `C` channels must be there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn tile<const R: usize, const C: usize>(block: &LevelBlock<'_>, place: &Place) {
    let (dim, tokens) = (place.dim, block.tokens);
    // SAFETY: by contract.
    unsafe {
        let mut all = [[_mm512_setzero_ps(); C]; R];
        for segment in 0..block.segments {
            let mut begin = [_mm512_setzero_si512(); C];
            for (c, begin) in begin.iter_mut().enumerate() {
                let at = place.offsets.add(4 * segment * dim + 64 * c);
                *begin = _mm512_loadu_epi8(at.cast());
            }
            let mut sums = [begin; R];
            for k in 4 * segment..4 * segment + SEGMENT / 4 {
                let mut entries = [_mm512_setzero_si512(); C];
                for (c, entries) in entries.iter_mut().enumerate() {
                    let at = place.entries.add(4 * k * dim + 64 * c);
                    *entries = _mm512_loadu_epi8(at.cast());
                }
                let levels = block.levels.as_ptr().add((k * tokens + place.t) * 4);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let level = levels.add(4 * r).cast::<i32>().read_unaligned();
                    let level = _mm512_set1_epi32(level);
                    for (sum, entries) in sums.iter_mut().zip(entries) {
                        *sum = _mm512_dpbusd_epi32(*sum, level, entries);
                    }
                }
            }
            let factors = block.factors.as_ptr().add(segment * tokens + place.t);
            for (r, (all, sums)) in all.iter_mut().zip(sums).enumerate() {
                let factor = _mm512_set1_ps(*factors.add(r));
                for (all, sum) in all.iter_mut().zip(sums) {
                    *all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, *all);
                }
            }
        }
        let gain = _mm512_set1_ps(block.gain);
        for (r, all) in all.iter().enumerate() {
            for (c, all) in all.iter().enumerate() {
                let scale = _mm512_mul_ps(gain, _mm512_loadu_ps(place.scales.add(16 * c)));
                let mean = _mm512_loadu_ps(place.means.add(r * block.mean_stride + 16 * c));
                let row = _mm512_fmadd_ps(*all, scale, mean);
                _mm512_storeu_ps(place.out.add(r * dim + 16 * c), row);
            }
        }
    }
}
