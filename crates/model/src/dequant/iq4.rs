//! IQ4_NL and IQ4_XS: 4 bits that name one of 16 uneven levels.

use kvasir_kernels::IQ4_LEVELS as LEVELS;

use super::f16_at;

/// 32 elements: the low halves of 16 bytes, then the high ones.
#[inline(always)]
pub(super) fn put(d: f32, quants: &[u8], levels: &[i8; 16], out: &mut [f32]) {
    for (j, quants) in quants.iter().enumerate().take(16) {
        out[j] = d * f32::from(levels[usize::from(quants & 15)]);
        out[16 + j] = d * f32::from(levels[usize::from(quants >> 4)]);
    }
}

/// `{ d: f16, quants: [u8; 16] }`, element = `d * LEVELS[quant]`.
#[inline(always)]
pub(super) fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    put(f16_at(block[0], block[1]), &block[2..], &LEVELS, out);
}

/// `{ d: f16, high: u16, low: [u8; 4], quants: [u8; 128] }`, 8 groups of 32.
///
/// A group's scale has 6 bits, offset 32: four in a half of `low`, two in `high`. Element =
/// `d * scale * LEVELS[quant]`.
#[inline(always)]
pub(super) fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = f16_at(block[0], block[1]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        put(d * f32::from(iq4_xs_scale(block, group)), &block[8 + 16 * group..], &LEVELS, out);
    }
}

/// The scale of group `group` (0–7) of a block of IQ4_XS.
#[inline(always)]
pub(super) fn iq4_xs_scale(block: &[u8; 136], group: usize) -> i8 {
    let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * group) & 3;
    let low = block[4 + group / 2] >> (group % 2 * 4) & 15;
    (low | (high as u8) << 4) as i8 - 32
}
