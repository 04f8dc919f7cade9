//! HOT PATH. f16 ↔ f32, with the processor's own instructions where it has them.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Widens; exact.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn f16_to_f32(from: &[f16], to: &mut [f32]) {
    from.convert_to_f32_slice(to);
}

/// Rounds to nearest, ties to even; out of range becomes infinite.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn f32_to_f16(from: &[f32], to: &mut [f16]) {
    to.convert_from_f32_slice(from);
}
