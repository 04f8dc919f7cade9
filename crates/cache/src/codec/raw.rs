//! HOT PATH. Uncompressed blocks, in f16 and f32.

use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;
use kvasir_kernels::{StoredRows, f16_to_f32, f32_to_f16};

use super::{Codec, TailCodec};

/// Rows in half precision: 2 bytes a channel. Values beyond ±65,504 become infinite.
#[derive(Debug)]
pub struct RawF16;

/// Rows in single precision: 4 bytes a channel, exact.
#[derive(Debug)]
pub struct RawF32;

impl Codec for RawF16 {
    fn name(&self) -> &'static str {
        "f16"
    }

    fn slot_bytes(&self, tokens: usize, dim: usize) -> usize {
        2 * tokens * dim
    }

    fn encode(&self, rows: &[f32], _dim: usize, slot: &mut [u8]) {
        f32_to_f16(rows, cast_slice_mut(&mut slot[..2 * rows.len()]));
    }

    fn decode(&self, slot: &[u8], _tokens: usize, _dim: usize, out: &mut [f32]) {
        let stored: &[f16] = cast_slice(&slot[..2 * out.len()]);
        f16_to_f32(stored, out);
    }

    fn stored_rows<'a>(&self, slot: &'a [u8], dim: usize) -> Option<StoredRows<'a>> {
        let rows = slot.len() / (2 * dim);
        Some(StoredRows::F16(cast_slice(&slot[..2 * rows * dim])))
    }

    fn expected_error(&self) -> f32 {
        0.0
    }
}

impl TailCodec for RawF16 {
    fn write_row(&self, row: usize, x: &[f32], slot: &mut [u8]) {
        let at = 2 * row * x.len();
        f32_to_f16(x, cast_slice_mut(&mut slot[at..at + 2 * x.len()]));
    }

    fn largest(&self) -> f32 {
        f16::MAX.to_f32()
    }
}

impl Codec for RawF32 {
    fn name(&self) -> &'static str {
        "f32"
    }

    fn slot_bytes(&self, tokens: usize, dim: usize) -> usize {
        4 * tokens * dim
    }

    fn encode(&self, rows: &[f32], _dim: usize, slot: &mut [u8]) {
        slot[..4 * rows.len()].copy_from_slice(cast_slice(rows));
    }

    fn decode(&self, slot: &[u8], _tokens: usize, _dim: usize, out: &mut [f32]) {
        let bytes = 4 * out.len();
        cast_slice_mut::<f32, u8>(out).copy_from_slice(&slot[..bytes]);
    }

    fn stored_rows<'a>(&self, slot: &'a [u8], dim: usize) -> Option<StoredRows<'a>> {
        let rows = slot.len() / (4 * dim);
        Some(StoredRows::F32(cast_slice(&slot[..4 * rows * dim])))
    }

    fn expected_error(&self) -> f32 {
        0.0
    }
}

impl TailCodec for RawF32 {
    fn write_row(&self, row: usize, x: &[f32], slot: &mut [u8]) {
        let at = 4 * row * x.len();
        slot[at..at + 4 * x.len()].copy_from_slice(cast_slice(x));
    }

    fn largest(&self) -> f32 {
        f32::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

    #[test]
    fn f16_conforms() {
        conformance::check(&RawF16);
        conformance::check_tail(&RawF16);
    }

    #[test]
    fn f32_conforms() {
        conformance::check(&RawF32);
        conformance::check_tail(&RawF32);
    }

    #[test]
    fn f32_is_exact_to_the_bit() {
        let rows = [1.0e-40f32, -0.0, 3.4e38, 0.1];
        let mut slot = vec![0u8; 16];
        RawF32.encode(&rows, 2, &mut slot);
        let mut out = [0.0f32; 4];
        RawF32.decode(&slot, 2, 2, &mut out);
        assert_eq!(rows.map(f32::to_bits), out.map(f32::to_bits));
    }
}
