//! Q5_0 and Q5_1: 32 elements of 5 bits. The low four bits are stored as in Q4_0; bit `j` of the
//! 32-bit word `high` is the fifth bit of element `j`.

use super::f16_at;

/// `{ d: f16, high: u32, quants: [u8; 16] }`, element = `d * (quant - 16)`.
#[inline(always)]
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16_at(block[0], block[1]);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for j in 0..16 {
        let quants = block[6 + j];
        out[j] = d * ((i32::from(quants & 15) | fifth_bit(high, j)) - 16) as f32;
        out[16 + j] = d * ((i32::from(quants >> 4) | fifth_bit(high, 16 + j)) - 16) as f32;
    }
}

/// `{ d: f16, min: f16, high: u32, quants: [u8; 16] }`, element = `d * quant + min`.
#[inline(always)]
pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let d = f16_at(block[0], block[1]);
    let min = f16_at(block[2], block[3]);
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for j in 0..16 {
        let quants = block[8 + j];
        out[j] = d * (i32::from(quants & 15) | fifth_bit(high, j)) as f32 + min;
        out[16 + j] = d * (i32::from(quants >> 4) | fifth_bit(high, 16 + j)) as f32 + min;
    }
}

/// 16 if bit `j` is set: a comparison with a constant mask, which vectorises where a shift by a
/// different amount for each element does not.
#[inline(always)]
fn fifth_bit(high: u32, j: usize) -> i32 {
    if high & (1 << j) != 0 { 16 } else { 0 }
}
