//! `2^x` for x ≤ 0, as softmax needs it.

use crate::isa::mul_add;

/// Coefficients of `(2^f - 1) / f` for |f| ≤ ½, highest power first (Cephes `exp2f`).
pub(super) const POLYNOMIAL: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1];

/// Below it `2^x` is taken to be 0, so that results are never denormal by more than a bit.
pub(super) const LEAST: f32 = -126.0;

/// `2^x` to about 2e-7 relative for x ≤ 0, 0 for x < [`LEAST`]. Branch free, so that loops over it
/// vectorise; the same operations as the AVX-512 one.
#[inline(always)]
pub(super) fn exp2<const FMA: bool>(x: f32) -> f32 {
    // Adding 1.5 · 2^23 rounds to an integer without a rounding instruction.
    const ROUND: f32 = 12_582_912.0;
    // Not `max`: NaN is to pass.
    let clamped = if x < LEAST { LEAST } else { x };
    let rounded = clamped + ROUND;
    let f = clamped - (rounded - ROUND);
    let mut p = POLYNOMIAL[0];
    for coefficient in &POLYNOMIAL[1..] {
        p = mul_add::<FMA>(p, f, *coefficient);
    }
    p = mul_add::<FMA>(p, f, 1.0);
    // The integer is in the low bits; a cast would be checked lane by lane.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    let scale = f32::from_bits(n.wrapping_add(127) << 23);
    if x < LEAST { 0.0 } else { p * scale }
}
