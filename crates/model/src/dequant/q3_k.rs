//! Q3_K: 256 elements of 3 bits in 16 groups of 16.

use super::f16_at;

/// `{ high: [u8; 32], quants: [u8; 64], scales: [u8; 12], d: f16 }`.
///
/// The low two bits are stored as in Q2_K. Bit `r` of `high[j]` is the third bit of element `j` of
/// the `r`-th run of 32; where it is clear, 4 is subtracted. Scales have 6 bits, offset 32: low
/// four bits in the halves of bytes 0–7, high two in bytes 8–11. Element = `d * scale * quant`.
#[inline(always)]
pub(super) fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = f16_at(block[108], block[109]);
    for group in 0..16 {
        let low = block[96 + group % 8] >> (group / 8 * 4) & 15;
        let high = block[104 + group % 4] >> (group / 4 * 2) & 3;
        let dl = d * f32::from((low | high << 4) as i8 - 32);
        let (half, run, part) = (group / 8, group / 2, group % 2);
        let shift = run % 4 * 2;
        for j in 0..16 {
            let quant = (block[32 + half * 32 + part * 16 + j] >> shift) & 3;
            let third = (block[part * 16 + j] >> run) & 1;
            out[group * 16 + j] = dl * f32::from((quant | third << 2) as i8 - 4);
        }
    }
}
