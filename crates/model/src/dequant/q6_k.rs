//! Q6_K: 256 elements of 6 bits in 16 groups of 16.

use super::f16_at;

/// `{ low: [u8; 128], high: [u8; 64], scales: [i8; 16], d: f16 }`.
///
/// Each half of 128 elements has 64 bytes of low bits and 32 of high bits, and four runs of 32
/// elements: runs 0 and 1 take the low halves of the first and last 32 bytes of `low`, runs 2 and
/// 3 the high halves; run `r` takes bits `2r` and `2r + 1` of `high`. Element =
/// `d * scale * (quant - 32)`.
#[inline(always)]
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = f16_at(block[208], block[209]);
    for group in 0..16 {
        let dl = d * f32::from(block[192 + group] as i8);
        let (half, run, part) = (group / 8, group % 8 / 2, group % 2);
        let (low_shift, high_shift) = (run / 2 * 4, run * 2);
        for j in 0..16 {
            let low = (block[half * 64 + run % 2 * 32 + part * 16 + j] >> low_shift) & 15;
            let high = (block[128 + half * 32 + part * 16 + j] >> high_shift) & 3;
            out[group * 16 + j] = dl * f32::from((low | high << 4) as i8 - 32);
        }
    }
}
