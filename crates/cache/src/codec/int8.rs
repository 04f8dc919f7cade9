//! HOT PATH (decode). Eight bits a channel, one scale for up to 64 channels of a token.

use half::f16;
use kvasir_kernels::{BYTE_GROUP as GROUP, StoredRows, expand_bytes, scale_bytes_to_f32};

use super::Codec;

/// `x ≈ s · c` with `c` in -127..=127 and `s = max|x| / 127` per group of 64 channels, in f16: a token with one large
/// channel (attention sinks have some) would round all the others of a wide head away. Slot: scales
/// `[tokens, groups]` f16, then codes `[tokens, dim]` i8.
#[derive(Debug)]
pub struct Int8;

fn scale_bytes(dim: usize) -> usize {
    2 * dim.div_ceil(GROUP)
}

/// The largest finite magnitude.
fn largest(group: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for x in group.chunks(lanes.len()) {
        for (lane, x) in lanes.iter_mut().zip(x) {
            let x = x.abs();
            let above = x > *lane && x < f32::INFINITY;
            *lane = if above { x } else { *lane };
        }
    }
    lanes.into_iter().fold(0.0, f32::max)
}

/// The nearest code, as two's complement; 0 for NaN.
fn nearest(x: f32) -> u8 {
    /// 1.5 · 2^23: a number that is added to it is rounded to an integer in its low bits.
    const INTEGERS: f32 = 12_582_912.0;
    let x = if x.is_nan() { 0.0 } else { x };
    (x.clamp(-127.0, 127.0) + INTEGERS).to_bits() as u8
}

impl Codec for Int8 {
    fn name(&self) -> &'static str {
        "int8"
    }

    fn slot_bytes(&self, tokens: usize, dim: usize) -> usize {
        tokens * (scale_bytes(dim) + dim)
    }

    fn encode(&self, rows: &[f32], dim: usize, slot: &mut [u8]) {
        let tokens = rows.len() / dim;
        let (scales, codes) = slot.split_at_mut(tokens * scale_bytes(dim));
        let rows = rows.chunks_exact(dim).zip(codes.chunks_exact_mut(dim));
        let groups = rows.flat_map(|(row, codes)| row.chunks(GROUP).zip(codes.chunks_mut(GROUP)));
        for ((group, codes), scale) in groups.zip(scales.chunks_exact_mut(2)) {
            let largest = largest(group);
            // Rounded as it will be read, so that codes are right for the scale that is stored.
            let s = f16::from_f32(largest / 127.0);
            scale.copy_from_slice(&s.to_le_bytes());
            let s = s.to_f32();
            let inverse = if s > 0.0 { 1.0 / s } else { 0.0 };
            for (code, x) in codes.iter_mut().zip(group) {
                *code = nearest(x * inverse);
            }
        }
    }

    fn decode(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f32]) {
        let (scales, codes) = slot.split_at(tokens * scale_bytes(dim));
        if dim.is_multiple_of(GROUP) {
            return scale_bytes_to_f32(codes, scales, GROUP, out);
        }
        let rows = out.chunks_exact_mut(dim).zip(codes.chunks_exact(dim));
        for ((row, codes), scales) in rows.zip(scales.chunks_exact(scale_bytes(dim))) {
            scale_bytes_to_f32(codes, scales, GROUP, row);
        }
    }

    fn stored_bytes<'a>(
        &self,
        slot: &'a [u8],
        tokens: usize,
        dim: usize,
    ) -> Option<StoredRows<'a>> {
        let (scales, codes) = slot.split_at(tokens * scale_bytes(dim));
        Some(StoredRows::Bytes { codes: &codes[..tokens * dim], scales })
    }

    /// Half a step of max / 127 uniformly: with max ≈ 2.4 σ of 64 Gaussian channels, 3e-5.
    fn decode_halves(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f16]) -> bool {
        let whole = dim.is_multiple_of(GROUP);
        if whole {
            let (scales, codes) = slot.split_at(tokens * scale_bytes(dim));
            expand_bytes(codes, scales, GROUP, out);
        }
        whole
    }

    fn expected_error(&self) -> f32 {
        5e-5
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

    #[test]
    fn codes_are_nearest() {
        let codes = [(0.0, 0), (-0.4, 0), (0.6, 1), (-0.6, -1), (126.4, 126), (1e9, 127)];
        let odd = [(f32::NAN, 0), (f32::INFINITY, 127), (f32::NEG_INFINITY, -127)];
        for (x, code) in codes.into_iter().chain(odd) {
            assert_eq!(nearest(x) as i8, code, "{x}");
        }
        assert_eq!(largest(&[1.0, -3.0, f32::NAN, f32::INFINITY, 2.0]), 3.0);
    }

    #[test]
    fn conforms() {
        conformance::check(&Int8);
    }

    #[test]
    fn no_value_is_off_by_more_than_half_a_step() {
        let rows = conformance::gaussian(32 * 64, 3);
        let mut slot = vec![0; Int8.slot_bytes(32, 64)];
        Int8.encode(&rows, 64, &mut slot);
        let mut out = vec![0.0; 32 * 64];
        Int8.decode(&slot, 32, 64, &mut out);
        for (row, got) in rows.chunks(64).zip(out.chunks(64)) {
            let step = row.iter().fold(0.0f32, |a, x| a.max(x.abs())) / 127.0;
            for (x, y) in row.iter().zip(got) {
                assert!((x - y).abs() <= step * 0.51 + 1e-3 * x.abs(), "{x} {y} {step}");
            }
        }
    }
}
