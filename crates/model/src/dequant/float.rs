//! F32, F16, BF16: plain little-endian floats, one element a block.

use half::slice::HalfFloatSliceExt;

/// Elements converted at once: `half` looks for hardware conversion once a call.
const CHUNK: usize = 256;

pub(super) fn f32(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *out = f32::from_le_bytes(*bytes);
    }
}

pub(super) fn f16(bytes: &[u8], out: &mut [f32]) {
    // Copied first, because a tensor's bytes need not be aligned for u16.
    let mut buffer = [half::f16::ZERO; CHUNK];
    for (bytes, out) in bytes.chunks(2 * CHUNK).zip(out.chunks_mut(CHUNK)) {
        for (bytes, half) in bytes.as_chunks::<2>().0.iter().zip(&mut buffer) {
            *half = half::f16::from_le_bytes(*bytes);
        }
        if let Some(filled) = buffer.get(..out.len()) {
            filled.convert_to_f32_slice(out);
        }
    }
}

pub(super) fn bf16(bytes: &[u8], out: &mut [f32]) {
    for (bytes, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}
