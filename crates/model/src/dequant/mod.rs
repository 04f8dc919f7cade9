//! Stored tensor types to f32.
//!
//! One file a family; each describes its block. A block decoder turns the bytes of one block into
//! its elements, in order, with the operations and the rounding of the reference implementation,
//! so that results are equal to the bit.

mod codes;
mod float;
mod iq4;
mod k_codes;
mod k_scales;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4;
mod q4_k;
mod q5;
mod q5_k;
mod q6_k;
mod q8;
mod quantize;

use half::f16;

use crate::error::{ModelError, Result};
use crate::gguf::GgmlType;

pub(crate) use codes::{DecodeCodes, code_decoder};
pub(crate) use k_codes::{DecodeK, k_decoder};
pub use quantize::Quantize;

/// Decodes whole blocks: `(bytes, out)`. What does not fill a block on either side is left alone.
pub(crate) type BlockDecoder = fn(&[u8], &mut [f32]);

/// The decoder of a type, `None` for a type that this build cannot read.
pub(crate) fn block_decoder(ty: GgmlType) -> Option<BlockDecoder> {
    Some(match ty {
        GgmlType::F32 => float::f32,
        GgmlType::F16 => float::f16,
        GgmlType::BF16 => float::bf16,
        GgmlType::Q4_0 => |bytes, out| blocks(bytes, out, q4::q4_0),
        GgmlType::Q4_1 => |bytes, out| blocks(bytes, out, q4::q4_1),
        GgmlType::Q5_0 => |bytes, out| blocks(bytes, out, q5::q5_0),
        GgmlType::Q5_1 => |bytes, out| blocks(bytes, out, q5::q5_1),
        GgmlType::Q8_0 => |bytes, out| blocks(bytes, out, q8::q8_0),
        GgmlType::Q2_K => |bytes, out| blocks(bytes, out, q2_k::q2_k),
        GgmlType::Q3_K => |bytes, out| blocks(bytes, out, q3_k::q3_k),
        GgmlType::Q4_K => |bytes, out| blocks(bytes, out, q4_k::q4_k),
        GgmlType::Q5_K => |bytes, out| blocks(bytes, out, q5_k::q5_k),
        GgmlType::Q6_K => |bytes, out| blocks(bytes, out, q6_k::q6_k),
        GgmlType::IQ4_NL => |bytes, out| blocks(bytes, out, iq4::iq4_nl),
        GgmlType::IQ4_XS => |bytes, out| blocks(bytes, out, iq4::iq4_xs),
        GgmlType::MXFP4 => |bytes, out| blocks(bytes, out, mxfp4::mxfp4),
        _ => return None,
    })
}

/// Dequantises all of `bytes`. `name` is the tensor that an error names.
///
/// # Errors
/// [`ModelError::TensorType`] for a type that this build cannot read, or for bytes that are not a
/// whole number of its blocks.
pub fn dequantize(name: &str, ty: GgmlType, bytes: &[u8]) -> Result<Vec<f32>> {
    let num_blocks = bytes.len() / ty.block_bytes();
    let mut out = vec![0.0; num_blocks * ty.block_elements()];
    dequantize_into(name, ty, bytes, &mut out)?;
    Ok(out)
}

/// Dequantises `bytes` into `out`: whole rows of a tensor, for instance. Parts that start at a
/// block may be decoded on their own, in any order and on any thread.
///
/// # Errors
/// As [`dequantize`], and [`ModelError::TensorShape`] if `out` has another length than `bytes`
/// holds elements.
pub fn dequantize_into(name: &str, ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let decoder = block_decoder(ty).ok_or_else(|| ModelError::TensorType {
        name: name.to_owned(),
        ty: ty.name().to_owned(),
    })?;
    if !bytes.len().is_multiple_of(ty.block_bytes()) {
        return Err(ModelError::TensorType {
            name: name.to_owned(),
            ty: format!("{ty} in {} bytes, no multiple of {}", bytes.len(), ty.block_bytes()),
        });
    }
    let num_elements = bytes.len() / ty.block_bytes() * ty.block_elements();
    if out.len() != num_elements {
        return Err(ModelError::TensorShape {
            name: name.to_owned(),
            expected: vec![num_elements],
            found: vec![out.len()],
        });
    }
    decoder(bytes, out);
    Ok(())
}

/// Runs a decoder of one block over all of them. Arrays instead of slices let the compiler drop
/// bounds checks and vectorise inside the block.
#[inline(always)]
fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (out, _) = out.as_chunks_mut::<ELEMENTS>();
    for (block, out) in blocks.iter().zip(out) {
        decode(block, out);
    }
}

/// The f16 in two bytes, as f32.
#[inline(always)]
fn f16_at(low: u8, high: u8) -> f32 {
    f16::from_le_bytes([low, high]).to_f32()
}

#[cfg(test)]
mod tests;
