//! HOT PATH (decode). Eight bits a channel, one scale a token.

use half::f16;

use super::Codec;

/// `x ≈ s · c` with `c` in -127..=127 and `s = max|x| / 127` per row, in f16. Slot: scales
/// `[tokens]` f16, then codes `[tokens, dim]` i8.
#[derive(Debug)]
pub struct Int8;

impl Codec for Int8 {
    fn name(&self) -> &'static str {
        "int8"
    }

    fn slot_bytes(&self, tokens: usize, dim: usize) -> usize {
        tokens * (2 + dim)
    }

    fn encode(&self, rows: &[f32], dim: usize, slot: &mut [u8]) {
        let tokens = rows.len() / dim;
        let (scales, codes) = slot.split_at_mut(2 * tokens);
        let rows = rows.chunks_exact(dim).zip(codes.chunks_exact_mut(dim));
        for ((row, codes), scale) in rows.zip(scales.chunks_exact_mut(2)) {
            let finite = row.iter().filter(|x| x.is_finite());
            let largest = finite.fold(0.0f32, |a, x| a.max(x.abs()));
            // Rounded as it will be read, so that codes are right for the scale that is stored.
            let s = f16::from_f32(largest / 127.0);
            scale.copy_from_slice(&s.to_le_bytes());
            let s = s.to_f32();
            let inverse = if s > 0.0 { 1.0 / s } else { 0.0 };
            for (code, x) in codes.iter_mut().zip(row) {
                // `as` saturates, and turns NaN into 0.
                *code = (x * inverse).round().clamp(-127.0, 127.0) as i8 as u8;
            }
        }
    }

    fn decode(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f32]) {
        let (scales, codes) = slot.split_at(2 * tokens);
        let rows = out.chunks_exact_mut(dim).zip(codes.chunks_exact(dim));
        for ((row, codes), scale) in rows.zip(scales.chunks_exact(2)) {
            let s = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
            for (x, code) in row.iter_mut().zip(codes) {
                *x = f32::from(*code as i8) * s;
            }
        }
    }

    /// Half a step of max / 127 uniformly: with max ≈ 2.9 σ of 256 Gaussian channels, 4.3e-5.
    fn expected_error(&self) -> f32 {
        5e-5
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

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
