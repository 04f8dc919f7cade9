//! Q4_K: 256 elements of 4 bits in 8 groups of 32.

use super::f16_at;
use super::k_scales::{packed_scales, scale_and_min};

/// `{ d: f16, dmin: f16, scales: [u8; 12], quants: [u8; 128] }`.
///
/// Element = `d * scale * quant - dmin * minimum`. Groups `2i` and `2i + 1` are the low and the
/// high halves of bytes `32 i … 32 i + 31` of the quants.
#[inline(always)]
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let d = f16_at(block[0], block[1]);
    let dmin = f16_at(block[2], block[3]);
    let scales = packed_scales(block);
    for group in 0..8 {
        let (scale, min) = scale_and_min(&scales, group);
        let (dl, ml) = (d * f32::from(scale), dmin * f32::from(min));
        let shift = group % 2 * 4;
        for j in 0..32 {
            let quant = (block[16 + group / 2 * 32 + j] >> shift) & 15;
            out[group * 32 + j] = dl * f32::from(quant) - ml;
        }
    }
}
