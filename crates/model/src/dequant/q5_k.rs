//! Q5_K: 256 elements of 5 bits in 8 groups of 32.

use super::f16_at;
use super::k_scales::{packed_scales, scale_and_min};

/// `{ d: f16, dmin: f16, scales: [u8; 12], high: [u8; 32], quants: [u8; 128] }`.
///
/// As Q4_K; bit `g` of `high[j]` is the fifth bit of element `j` of group `g`.
#[inline(always)]
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let d = f16_at(block[0], block[1]);
    let dmin = f16_at(block[2], block[3]);
    let scales = packed_scales(block);
    for group in 0..8 {
        let (scale, min) = scale_and_min(&scales, group);
        let (dl, ml) = (d * f32::from(scale), dmin * f32::from(min));
        let shift = group % 2 * 4;
        for j in 0..32 {
            let low = (block[48 + group / 2 * 32 + j] >> shift) & 15;
            let fifth = (block[16 + j] >> group) & 1;
            out[group * 32 + j] = dl * f32::from(low | fifth << 4) - ml;
        }
    }
}
