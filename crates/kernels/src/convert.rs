//! HOT PATH. f16 ↔ f32, with the processor's own instructions where it has them.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::isa::{Isa, Set, dispatch};

/// Widens; exact.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn f16_to_f32(from: &[f16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if Isa::best().has(Set::Avx512) {
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
    if Isa::best().has(Set::Avx512) {
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

dispatch! {
    /// `out[i] = codes[i] · scales[i / group]`, codes being signed and scales little-endian f16; what is shortest says
    /// how many.
    pub fn scale_bytes_to_f32 / scale_bytes_on(codes: &[u8], scales: &[u8], group: usize, out: &mut [f32]) = scale_bytes;
}

#[inline(always)]
fn scale_bytes<const FMA: bool>(codes: &[u8], scales: &[u8], group: usize, out: &mut [f32]) {
    /// Scales that are widened together.
    const SCALES: usize = 64;
    let (mut narrow, mut wide) = ([f16::ZERO; SCALES], [0.0; SCALES]);
    let rows = out.chunks_mut(SCALES * group).zip(codes.chunks(SCALES * group));
    for ((out, codes), scales) in rows.zip(scales.chunks(2 * SCALES)) {
        for (narrow, scale) in narrow.iter_mut().zip(scales.chunks_exact(2)) {
            *narrow = f16::from_le_bytes([scale[0], scale[1]]);
        }
        f16_to_f32(&narrow, &mut wide);
        let groups = out.chunks_mut(group).zip(codes.chunks(group));
        for ((out, codes), scale) in groups.zip(&wide[..scales.len() / 2]) {
            for (x, code) in out.iter_mut().zip(codes) {
                *x = f32::from(*code as i8) * scale;
            }
        }
    }
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

    #[test]
    fn codes_meet_their_scales() {
        let codes: Vec<u8> = (0..70 * 24).map(|i| (i * 37 % 251) as u8).collect();
        let scales: Vec<u8> =
            (0..70).flat_map(|i| f16::from_f32(0.25 * i as f32).to_le_bytes()).collect();
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; codes.len() - 5];
            scale_bytes_on(isa, &codes, &scales, 24, &mut out);
            for (i, x) in out.iter().enumerate() {
                assert_eq!(*x, f32::from(codes[i] as i8) * (0.25 * (i / 24) as f32), "{isa} {i}");
            }
        }
    }
}
