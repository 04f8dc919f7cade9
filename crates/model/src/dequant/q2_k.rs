//! Q2_K: 256 elements of 2 bits in 16 groups of 16.

use super::f16_at;

/// `{ scales: [u8; 16], quants: [u8; 64], d: f16, dmin: f16 }`.
///
/// A byte of `scales` holds a group's scale (low half) and minimum (high half); element =
/// `d * scale * quant - dmin * minimum`. Each half of 128 elements has 32 bytes of quants, whose
/// bit pairs 0–1, 2–3, 4–5, 6–7 are four runs of 32 elements.
#[inline(always)]
pub(super) fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let d = f16_at(block[80], block[81]);
    let dmin = f16_at(block[82], block[83]);
    for group in 0..16 {
        let scale = block[group];
        let (dl, ml) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        let (half, shift, part) = (group / 8, group % 8 / 2 * 2, group % 2);
        for j in 0..16 {
            let quant = (block[16 + half * 32 + part * 16 + j] >> shift) & 3;
            out[group * 16 + j] = dl * f32::from(quant) - ml;
        }
    }
}
