//! MXFP4: 32 elements of 4 bits, floats with one bit of mantissa, and a power of two for all.

use kvasir_kernels::MXFP4_LEVELS as LEVELS;

/// `{ exponent: u8, quants: [u8; 16] }`, element = `2^(exponent − 128) * LEVELS[quant]`.
#[inline(always)]
pub(super) fn mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    super::iq4::put(half_of_power(block[0]), &block[1..], &LEVELS, out);
}

/// Half of the power of two that a byte says, which is no normal number for the two smallest.
#[inline(always)]
pub(super) fn half_of_power(exponent: u8) -> f32 {
    f32::from_bits(match exponent {
        0 | 1 => 0x0020_0000 << exponent,
        _ => (u32::from(exponent) - 1) << 23,
    })
}
