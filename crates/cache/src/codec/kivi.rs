//! HOT PATH (decode). KIVI (arXiv 2402.02750): asymmetric min-max quantisation, keys per channel over
//! groups of 32 tokens, values per token over groups of 32 channels.
//!
//! `x ≈ s · c + z` with `z = min`, `s = (max − min) / (2^B − 1)`, both f16. A control for our own codecs;
//! its recipes store keys in the absolute frame, as the paper does, and its residual window R is a block: keys
//! are coded when their block is full, of the values the last R are exact (`residual.rs`). Differences: a
//! group of equal values has s = 0 instead of 0/0; a prompt longer than a chunk attends to its earlier
//! chunks as decode does, and a prefix found in the cache is read as it is stored.

use half::f16;
use kvasir_kernels::{ScaleAxis, expand_codes};

use super::Codec;
use super::pack::{code, pack, packed_bytes};

/// Elements in a group.
const GROUP: usize = 32;

/// Keys: slot is scales `[groups, dim]`, zeros `[groups, dim]` (f16), then codes `[tokens, dim]`.
#[derive(Debug)]
pub struct KiviKeys<const BITS: usize>;

/// Values: slot is scales `[tokens, groups]`, zeros `[tokens, groups]` (f16), then codes
/// `[tokens, dim]`.
#[derive(Debug)]
pub struct KiviValues<const BITS: usize>;

/// Scale and zero of one group, rounded as they are stored. Values that are not finite do not count.
fn range<const BITS: usize>(values: impl Iterator<Item = f32>) -> (f16, f16) {
    let finite = values.filter(|x| x.is_finite());
    let (low, high) = finite.fold((f32::MAX, f32::MIN), |(l, h), x| (l.min(x), h.max(x)));
    if low > high {
        return (f16::ZERO, f16::ZERO);
    }
    let levels = ((1 << BITS) - 1) as f32;
    (f16::from_f32((high - low) / levels), f16::from_f32(low))
}

#[inline(always)]
fn quantise<const BITS: usize>(x: f32, scale: f16, zero: f16) -> u8 {
    let (s, z) = (scale.to_f32(), zero.to_f32());
    let inverse = if s > 0.0 { 1.0 / s } else { 0.0 };
    // `as` saturates, and turns NaN into 0.
    ((x - z) * inverse).round().clamp(0.0, ((1 << BITS) - 1) as f32) as u8
}

fn put(slot: &mut [u8], index: usize, value: f16) {
    slot[2 * index..2 * index + 2].copy_from_slice(&value.to_le_bytes());
}

fn get(slot: &[u8], index: usize) -> f32 {
    f16::from_le_bytes([slot[2 * index], slot[2 * index + 1]]).to_f32()
}

/// Relative squared error on Gaussian groups of 32, whose range is 4.14 σ wide on average.
fn gaussian_error(bits: usize) -> f32 {
    match bits {
        4 => 0.0068,
        _ => 0.17,
    }
}

impl<const BITS: usize> Codec for KiviKeys<BITS> {
    fn name(&self) -> &'static str {
        if BITS == 4 { "kivi4 keys" } else { "kivi2 keys" }
    }

    fn slot_bytes(&self, tokens: usize, dim: usize) -> usize {
        4 * tokens.div_ceil(GROUP) * dim + tokens * packed_bytes(dim, BITS)
    }

    fn encode(&self, rows: &[f32], dim: usize, slot: &mut [u8]) {
        let tokens = rows.len() / dim;
        let pairs = tokens.div_ceil(GROUP) * dim;
        let (scales, rest) = slot.split_at_mut(2 * pairs);
        let (zeros, codes) = rest.split_at_mut(2 * pairs);
        let mut codes = codes.chunks_exact_mut(packed_bytes(dim, BITS));
        for (group, rows) in rows.chunks(GROUP * dim).enumerate() {
            for channel in 0..dim {
                let values = rows[channel..].iter().step_by(dim).copied();
                let (scale, zero) = range::<BITS>(values);
                put(scales, group * dim + channel, scale);
                put(zeros, group * dim + channel, zero);
            }
            for (row, codes) in rows.chunks_exact(dim).zip(&mut codes) {
                let quantised = row.iter().enumerate().map(|(channel, x)| {
                    let at = group * dim + channel;
                    let (s, z) = (get(scales, at), get(zeros, at));
                    quantise::<BITS>(*x, f16::from_f32(s), f16::from_f32(z))
                });
                pack::<BITS>(quantised, codes);
            }
        }
    }

    fn decode(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f32]) {
        let pairs = tokens.div_ceil(GROUP) * dim;
        let (scales, rest) = slot.split_at(2 * pairs);
        let (zeros, codes) = rest.split_at(2 * pairs);
        let rows = out.chunks_exact_mut(dim).zip(codes.chunks_exact(packed_bytes(dim, BITS)));
        for (token, (row, codes)) in rows.enumerate() {
            let group = token / GROUP * dim;
            for (channel, x) in row.iter_mut().enumerate() {
                let (s, z) = (get(scales, group + channel), get(zeros, group + channel));
                *x = f32::from(code::<BITS>(codes, channel)) * s + z;
            }
        }
    }

    fn decode_halves(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f16]) -> bool {
        let pairs = tokens.div_ceil(GROUP) * dim;
        let (scales, rest) = slot.split_at(2 * pairs);
        let (zeros, codes) = rest.split_at(2 * pairs);
        let codes = codes.chunks(GROUP * packed_bytes(dim, BITS));
        let pairs = scales.chunks_exact(2 * dim).zip(zeros.chunks_exact(2 * dim));
        for ((out, codes), (scales, zeros)) in out.chunks_mut(GROUP * dim).zip(codes).zip(pairs) {
            expand_codes::<BITS>(codes, scales, zeros, ScaleAxis::Channel, dim, out);
        }
        true
    }

    fn expected_error(&self) -> f32 {
        gaussian_error(BITS)
    }
}

impl<const BITS: usize> Codec for KiviValues<BITS> {
    fn name(&self) -> &'static str {
        if BITS == 4 { "kivi4 values" } else { "kivi2 values" }
    }

    fn slot_bytes(&self, tokens: usize, dim: usize) -> usize {
        tokens * (4 * dim.div_ceil(GROUP) + packed_bytes(dim, BITS))
    }

    fn encode(&self, rows: &[f32], dim: usize, slot: &mut [u8]) {
        let groups = dim.div_ceil(GROUP);
        let pairs = rows.len() / dim * groups;
        let (scales, rest) = slot.split_at_mut(2 * pairs);
        let (zeros, codes) = rest.split_at_mut(2 * pairs);
        let codes = codes.chunks_exact_mut(packed_bytes(dim, BITS));
        for (token, (row, codes)) in rows.chunks_exact(dim).zip(codes).enumerate() {
            for (group, values) in row.chunks(GROUP).enumerate() {
                let (scale, zero) = range::<BITS>(values.iter().copied());
                put(scales, token * groups + group, scale);
                put(zeros, token * groups + group, zero);
            }
            let quantised = row.iter().enumerate().map(|(channel, x)| {
                let at = token * groups + channel / GROUP;
                let (s, z) = (get(scales, at), get(zeros, at));
                quantise::<BITS>(*x, f16::from_f32(s), f16::from_f32(z))
            });
            pack::<BITS>(quantised, codes);
        }
    }

    fn decode(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f32]) {
        let groups = dim.div_ceil(GROUP);
        let pairs = tokens * groups;
        let (scales, rest) = slot.split_at(2 * pairs);
        let (zeros, codes) = rest.split_at(2 * pairs);
        let rows = out.chunks_exact_mut(dim).zip(codes.chunks_exact(packed_bytes(dim, BITS)));
        for (token, (row, codes)) in rows.enumerate() {
            for (group, values) in row.chunks_mut(GROUP).enumerate() {
                let at = token * groups + group;
                let (s, z) = (get(scales, at), get(zeros, at));
                for (i, x) in values.iter_mut().enumerate() {
                    *x = f32::from(code::<BITS>(codes, group * GROUP + i)) * s + z;
                }
            }
        }
    }

    fn decode_halves(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f16]) -> bool {
        let pairs = tokens * dim.div_ceil(GROUP);
        let (scales, rest) = slot.split_at(2 * pairs);
        let (zeros, codes) = rest.split_at(2 * pairs);
        expand_codes::<BITS>(codes, scales, zeros, ScaleAxis::Token, dim, out);
        true
    }

    fn expected_error(&self) -> f32 {
        gaussian_error(BITS)
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

    #[test]
    fn all_conform() {
        conformance::check(&KiviKeys::<4>);
        conformance::check(&KiviKeys::<2>);
        conformance::check(&KiviValues::<4>);
        conformance::check(&KiviValues::<2>);
    }

    #[test]
    fn bits_per_element_are_the_papers() {
        // 2 bits + 4 bytes per 32 elements are 3 bits; 4 + 1 are 5.
        assert_eq!(KiviKeys::<2>.slot_bytes(32, 64) * 8, 32 * 64 * 3);
        assert_eq!(KiviValues::<2>.slot_bytes(32, 64) * 8, 32 * 64 * 3);
        assert_eq!(KiviKeys::<4>.slot_bytes(32, 64) * 8, 32 * 64 * 5);
        assert_eq!(KiviValues::<4>.slot_bytes(32, 64) * 8, 32 * 64 * 5);
    }

    #[test]
    fn no_value_is_off_by_more_than_half_a_step() {
        let rows = conformance::gaussian(32 * 64, 5);
        let mut slot = vec![0; KiviKeys::<4>.slot_bytes(32, 64)];
        KiviKeys::<4>.encode(&rows, 64, &mut slot);
        let mut out = vec![0.0; 32 * 64];
        KiviKeys::<4>.decode(&slot, 32, 64, &mut out);
        for channel in 0..64 {
            let column: Vec<f32> = rows[channel..].iter().step_by(64).copied().collect();
            let low = column.iter().copied().fold(f32::MAX, f32::min);
            let high = column.iter().copied().fold(f32::MIN, f32::max);
            let half = (high - low) / 15.0 / 2.0;
            for (x, y) in column.iter().zip(out[channel..].iter().step_by(64)) {
                // Scale and zero are rounded to f16.
                assert!((x - y).abs() <= half + 0.01, "{x} {y} {half}");
            }
        }
    }
}
