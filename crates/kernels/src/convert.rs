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
    #[cfg(target_arch = "x86_64")]
    if Isa::best() == Isa::Avx512 {
        assert!(from.len() == to.len(), "{} numbers into {}", from.len(), to.len());
        // SAFETY: the processor has it.
        return unsafe { narrow(from, to) };
    }
    to.convert_from_f32_slice(from);
}

/// 16 at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn narrow(from: &[f32], to: &mut [f16]) {
    use std::arch::x86_64::*;

    let (from, from_rest) = from.as_chunks::<16>();
    let (to, to_rest) = to.as_chunks_mut::<16>();
    for (from, to) in from.iter().zip(to) {
        // SAFETY: 16 numbers each.
        unsafe {
            let halves =
                _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_loadu_ps(from.as_ptr()));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), halves);
        }
    }
    to_rest.convert_from_f32_slice(from_rest);
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

    #[test]
    fn all_magnitudes_narrow_to_the_nearest() {
        let from: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| [0, 0x0FFF, 0x1000, 0x1001, 0x3000].map(|low| (high, low)))
            .map(|(high, low)| f32::from_bits(u32::from(high) << 16 | low))
            .collect();
        let mut to = vec![f16::ZERO; from.len()];
        f32_to_f16(&from, &mut to);
        for (from, to) in from.iter().zip(to) {
            let same = to.to_bits() == f16::from_f32(*from).to_bits();
            assert!(same || to.is_nan() && from.is_nan(), "{from}: {to}");
        }
    }
}
