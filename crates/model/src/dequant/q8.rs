//! Q8_0: 32 elements of 8 bits.

use super::f16_at;

/// `{ d: f16, quants: [i8; 32] }`, element = `d * quant`.
#[inline(always)]
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16_at(block[0], block[1]);
    for j in 0..32 {
        out[j] = d * f32::from(block[2 + j] as i8);
    }
}
