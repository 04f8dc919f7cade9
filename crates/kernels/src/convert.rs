//! HOT PATH. f16 ↔ f32, with the processor's own instructions where it has them.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::isa::Isa;

/// Widens; exact.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn f16_to_f32(from: &[f16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if Isa::best() == Isa::Avx512 {
        assert!(from.len() == to.len(), "{} numbers into {}", from.len(), to.len());
        // SAFETY: the processor has it.
        return unsafe { widen(from, to) };
    }
    from.convert_to_f32_slice(to);
}

/// 16 at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widen(from: &[f16], to: &mut [f32]) {
    use std::arch::x86_64::*;

    let (from, from_rest) = from.as_chunks::<16>();
    let (to, to_rest) = to.as_chunks_mut::<16>();
    for (from, to) in from.iter().zip(to) {
        // SAFETY: 16 numbers each.
        unsafe {
            let halves = _mm256_loadu_si256(from.as_ptr().cast());
            _mm512_storeu_ps(to.as_mut_ptr(), _mm512_cvtph_ps(halves));
        }
    }
    from_rest.convert_to_f32_slice(to_rest);
}

/// Rounds to nearest, ties to even; out of range becomes infinite.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn f32_to_f16(from: &[f32], to: &mut [f16]) {
    to.convert_from_f32_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_halves_widen_exactly() {
        let from: Vec<f16> = (0..=u16::MAX).chain(0..7).map(f16::from_bits).collect();
        let mut to = vec![0.0; from.len()];
        f16_to_f32(&from, &mut to);
        for (from, to) in from.iter().zip(to) {
            assert!(to == from.to_f32() || to.is_nan() && from.is_nan(), "{from}: {to}");
        }
    }
}
