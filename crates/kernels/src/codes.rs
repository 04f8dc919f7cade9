//! HOT PATH (decode over quantised caches). Codes with scales and zeros to rows in f16, which is how attention reads few
//! queries' blocks fastest.

use half::f16;

use crate::isa::Isa;
use crate::simd::{LANES, Lanes, compiled};

/// Channels that share a scale.
const CHANNELS: usize = 32;

/// Where the scale and the zero of a code are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleAxis {
    /// One for each channel, `[dim]`.
    Channel,
    /// One for each token and 32 channels, `[tokens, ⌈dim / 32⌉]`.
    Token,
}

/// `out[t, c] = codes[t, c] · scale + zero`, rounded to f16. Codes have `BITS` bits (2 or 4), lowest bits first, and a row
/// of them begins with a byte. Scales and zeros are little-endian f16. `out`: `[tokens, dim]`; its length says how many tokens.
///
/// # Panics
/// If a slice is shorter than its shape says.
pub fn expand_codes<const BITS: usize>(
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    axis: ScaleAxis,
    dim: usize,
    out: &mut [f16],
) {
    expand_codes_on::<BITS>(Isa::best(), codes, scales, zeros, axis, dim, out);
}

fn expand_codes_on<const BITS: usize>(
    isa: Isa,
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    axis: ScaleAxis,
    dim: usize,
    out: &mut [f16],
) {
    let tokens = out.len() / dim;
    let groups = dim.div_ceil(CHANNELS);
    let pairs = match axis {
        ScaleAxis::Channel => dim,
        ScaleAxis::Token => tokens * groups,
    };
    let row_bytes = (dim * BITS).div_ceil(8);
    assert!(codes.len() >= tokens * row_bytes, "{} bytes of codes", codes.len());
    assert!(scales.len() >= 2 * pairs && zeros.len() >= 2 * pairs, "{} scales", scales.len());
    expand::<BITS>(isa, codes, scales, zeros, axis, dim, out);
}

compiled! {
    #[allow(clippy::too_many_arguments)]
    fn expand[const BITS: usize][BITS](codes: &[u8], scales: &[u8], zeros: &[u8], axis: ScaleAxis, dim: usize, out: &mut [f16]) = expand_body
        for [Avx512, Avx2, Sse2];
}

/// See [`expand_codes`], which checked the lengths.
#[inline(always)]
fn expand_body<S: Lanes, const BITS: usize>(
    s: S,
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    axis: ScaleAxis,
    dim: usize,
    out: &mut [f16],
) {
    let (groups, row_bytes) = (dim.div_ceil(CHANNELS), (dim * BITS).div_ceil(8));
    let tokens = out.len() / dim;
    for first in (0..dim).step_by(LANES) {
        // The last channels may be fewer, and so may their bytes.
        let n = LANES.min(dim - first);
        let whole = (first + LANES) * BITS / 8 <= row_bytes;
        let channel = match axis {
            ScaleAxis::Channel => [halves(s, scales, first, n), halves(s, zeros, first, n)],
            ScaleAxis::Token => [s.zero(); 2],
        };
        for t in 0..tokens {
            let [scale, zero] = match axis {
                ScaleAxis::Channel => channel,
                ScaleAxis::Token => {
                    let at = t * groups + first / CHANNELS;
                    [splat_half(s, scales, at), splat_half(s, zeros, at)]
                }
            };
            // SAFETY: bytes of `n` channels of row `t`, and their places.
            unsafe {
                let from = codes.as_ptr().add(t * row_bytes + first * BITS / 8);
                let codes = match (whole, BITS) {
                    (true, 4) => from.cast::<u64>().read_unaligned(),
                    (true, _) => u64::from(from.cast::<u32>().read_unaligned()),
                    (false, _) => {
                        let mut bytes = [0u8; 8];
                        let n = (n * BITS).div_ceil(8);
                        bytes.as_mut_ptr().copy_from_nonoverlapping(from, n);
                        u64::from_ne_bytes(bytes)
                    }
                };
                let x = s.from_int(s.spread::<BITS>(u64::from_le(codes)));
                put(s, s.fma(x, scale, zero), out.as_mut_ptr().add(t * dim + first), n);
            }
        }
    }
}

/// The first `n` of 16 little-endian f16 from number `first` on.
#[inline(always)]
fn halves<S: Lanes>(s: S, bytes: &[u8], first: usize, n: usize) -> S::F {
    let mut all = [0u16; LANES];
    for (half, bytes) in all.iter_mut().zip(bytes[2 * first..][..2 * n].as_chunks::<2>().0) {
        *half = u16::from_le_bytes(*bytes);
    }
    // SAFETY: a whole vector.
    unsafe { s.load_f16(all.as_ptr()) }
}

/// Number `at` in all lanes.
#[inline(always)]
fn splat_half<S: Lanes>(s: S, bytes: &[u8], at: usize) -> S::F {
    let half = u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]);
    // SAFETY: a whole vector.
    unsafe { s.load_f16([half; LANES].as_ptr()) }
}

/// Rounds the first `n` of 16 numbers.
///
/// # Safety
/// `to` has room.
#[inline(always)]
unsafe fn put<S: Lanes>(s: S, v: S::F, to: *mut f16, n: usize) {
    let mut all = [0u16; LANES];
    // SAFETY: by contract, and a whole vector in between.
    unsafe {
        if n == LANES {
            return s.store_f16(to.cast(), v);
        }
        s.store_f16(all.as_mut_ptr(), v);
        to.cast::<u16>().copy_from_nonoverlapping(all.as_ptr(), n);
    }
}

/// `out[i] = codes[i] · scales[i / group]`, rounded to f16; codes are signed, scales little-endian f16. `group`: a multiple of
/// 16 that divides the length.
///
/// # Panics
/// If a slice is shorter than its shape says.
pub fn expand_bytes(codes: &[u8], scales: &[u8], group: usize, out: &mut [f16]) {
    expand_bytes_on(Isa::best(), codes, scales, group, out);
}

fn expand_bytes_on(isa: Isa, codes: &[u8], scales: &[u8], group: usize, out: &mut [f16]) {
    assert!(codes.len() >= out.len() && out.len().is_multiple_of(group), "{} codes", codes.len());
    assert!(scales.len() >= 2 * (out.len() / group), "{} bytes of scales", scales.len());
    assert!(group.is_multiple_of(LANES), "groups of {group}");
    scale_bytes(isa, codes, scales, group, out);
}

compiled! {
    fn scale_bytes(codes: &[u8], scales: &[u8], group: usize, out: &mut [f16]) = scale_body
        for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn scale_body<S: Lanes>(s: S, codes: &[u8], scales: &[u8], group: usize, out: &mut [f16]) {
    let groups = out.chunks_exact_mut(group).zip(codes.chunks_exact(group));
    for (i, (out, codes)) in groups.enumerate() {
        let scale = splat_half(s, scales, i);
        for at in (0..group).step_by(LANES) {
            // SAFETY: 16 of each; the group is a multiple of that.
            unsafe {
                let codes = s.from_int(s.load_bytes(codes.as_ptr().add(at).cast()));
                s.store_f16(out.as_mut_ptr().add(at).cast(), s.mul(codes, scale));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const BITS: usize>(isa: Isa, tokens: usize, dim: usize, axis: ScaleAxis) {
        let row_bytes = (dim * BITS).div_ceil(8);
        let codes: Vec<u8> = (0..tokens * row_bytes).map(|i| (i * 151 % 253) as u8).collect();
        let pairs = tokens.max(1) * dim;
        let halves = |by: f32| -> Vec<u8> {
            (0..pairs)
                .flat_map(|i| f16::from_f32((i % 37) as f32 * by - 1.0).to_le_bytes())
                .collect()
        };
        let (scales, zeros) = (halves(0.125), halves(0.25));
        let mut out = vec![f16::NAN; tokens * dim];
        expand_codes_on::<BITS>(isa, &codes, &scales, &zeros, axis, dim, &mut out);
        for (i, x) in out.iter().enumerate() {
            let (t, c) = (i / dim, i % dim);
            let at = match axis {
                ScaleAxis::Channel => c,
                ScaleAxis::Token => t * dim.div_ceil(32) + c / 32,
            };
            let byte = codes[t * row_bytes + c * BITS / 8];
            let code = (byte >> (c * BITS % 8)) & ((1 << BITS) - 1);
            let (s, z) = ((at % 37) as f32 * 0.125 - 1.0, (at % 37) as f32 * 0.25 - 1.0);
            // Exact: few bits everywhere.
            assert_eq!(x.to_f32(), f32::from(code) * s + z, "{isa} {BITS} {axis:?} {t} {c}");
        }
    }

    #[test]
    fn bytes_meet_their_scales() {
        let codes: Vec<u8> = (0..5 * 64).map(|i| (i * 37 % 251) as u8).collect();
        let scales: Vec<u8> =
            (0..20).flat_map(|i| f16::from_f32(0.25 * i as f32).to_le_bytes()).collect();
        for isa in Isa::available() {
            for group in [16, 64] {
                let mut out = vec![f16::NAN; codes.len()];
                expand_bytes_on(isa, &codes, &scales, group, &mut out);
                for (i, x) in out.iter().enumerate() {
                    let exact = f32::from(codes[i] as i8) * (0.25 * (i / group) as f32);
                    assert_eq!(*x, f16::from_f32(exact), "{isa} {group} {i}");
                }
            }
        }
    }

    #[test]
    fn codes_become_what_they_stand_for() {
        for isa in Isa::available() {
            for axis in [ScaleAxis::Channel, ScaleAxis::Token] {
                for (tokens, dim) in
                    [(32, 64), (5, 128), (1, 32), (3, 16), (4, 39), (3, 51), (2, 256)]
                {
                    check::<4>(isa, tokens, dim, axis);
                    check::<2>(isa, tokens, dim, axis);
                }
            }
        }
    }
}
