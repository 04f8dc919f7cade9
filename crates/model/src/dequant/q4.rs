//! Q4_0 and Q4_1: 32 elements of 4 bits. The low halves of the 16 bytes of quants are elements
//! 0–15, the high halves 16–31.

use super::f16_at;

/// `{ d: f16, quants: [u8; 16] }`, element = `d * (quant - 8)`.
#[inline(always)]
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16_at(block[0], block[1]);
    for j in 0..16 {
        let quants = block[2 + j];
        out[j] = d * f32::from((quants & 15) as i8 - 8);
        out[16 + j] = d * f32::from((quants >> 4) as i8 - 8);
    }
}

/// `{ d: f16, min: f16, quants: [u8; 16] }`, element = `d * quant + min`.
#[inline(always)]
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let d = f16_at(block[0], block[1]);
    let min = f16_at(block[2], block[3]);
    for j in 0..16 {
        let quants = block[4 + j];
        out[j] = d * f32::from(quants & 15) + min;
        out[16 + j] = d * f32::from(quants >> 4) + min;
    }
}
