//! HOT PATH. f16 ↔ f32, with the processor's own instructions where it has them.

use half::f16;

use crate::isa::{Isa, dispatch};
use crate::simd::{LANES, Simd, compiled};

/// Widens; exact.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn f16_to_f32(from: &[f16], to: &mut [f32]) {
    widen(Isa::best(), from, to);
}

/// Rounds to nearest, ties to even; out of range becomes infinite.
///
/// # Panics
/// If the lengths differ.
#[inline]
pub fn f32_to_f16(from: &[f32], to: &mut [f16]) {
    narrow(Isa::best(), from, to);
}

compiled! {
    fn widen(from: &[f16], to: &mut [f32]) = widen_body for [Avx512, Avx2, Sse2];
}
compiled! {
    fn narrow(from: &[f32], to: &mut [f16]) = narrow_body for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn widen_body<S: Simd>(s: S, from: &[f16], to: &mut [f32]) {
    assert!(from.len() == to.len(), "{} numbers into {}", from.len(), to.len());
    let (from, from_rest) = from.as_chunks::<LANES>();
    let (to, to_rest) = to.as_chunks_mut::<LANES>();
    for (from, to) in from.iter().zip(to) {
        // SAFETY: 16 numbers each.
        unsafe { s.store(to.as_mut_ptr(), s.load_f16(from.as_ptr().cast())) };
    }
    let mut last = [f16::ZERO; LANES];
    last[..from_rest.len()].copy_from_slice(from_rest);
    // SAFETY: a whole vector, of which as many numbers are stored as there are.
    unsafe { s.store_first(to_rest.as_mut_ptr(), s.load_f16(last.as_ptr().cast()), to_rest.len()) };
}

#[inline(always)]
fn narrow_body<S: Simd>(s: S, from: &[f32], to: &mut [f16]) {
    assert!(from.len() == to.len(), "{} numbers into {}", from.len(), to.len());
    let (from, from_rest) = from.as_chunks::<LANES>();
    let (to, to_rest) = to.as_chunks_mut::<LANES>();
    for (from, to) in from.iter().zip(to) {
        // SAFETY: 16 numbers each.
        unsafe { s.store_f16(to.as_mut_ptr().cast(), s.load(from.as_ptr())) };
    }
    let mut last = [f16::ZERO; LANES];
    // SAFETY: as many numbers are read as there are, and a whole vector is stored.
    unsafe {
        let rest = s.load_first(from_rest.as_ptr(), from_rest.len());
        s.store_f16(last.as_mut_ptr().cast(), rest);
    }
    to_rest.copy_from_slice(&last[..to_rest.len()]);
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
        for isa in Isa::available() {
            widen(isa, &from, &mut to);
            for (from, to) in from.iter().zip(&to) {
                assert!(*to == from.to_f32() || to.is_nan() && from.is_nan(), "{isa} {from}: {to}");
            }
            to.fill(9.0);
        }
    }

    #[test]
    fn all_magnitudes_narrow_to_the_nearest() {
        let from: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| [0, 0x0FFF, 0x1000, 0x1001, 0x3000].map(|low| (high, low)))
            .map(|(high, low)| f32::from_bits(u32::from(high) << 16 | low))
            .collect();
        let mut to = vec![f16::ZERO; from.len()];
        for isa in Isa::available() {
            narrow(isa, &from, &mut to);
            for (from, to) in from.iter().zip(&to) {
                let same = to.to_bits() == f16::from_f32(*from).to_bits();
                assert!(same || to.is_nan() && from.is_nan(), "{isa} {from}: {to}");
            }
            to.fill(f16::ONE);
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
