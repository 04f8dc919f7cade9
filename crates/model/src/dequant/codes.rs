//! Stored types whose elements are small integers in groups of 32 with a scale: these integers, for layers
//! that keep them. All others are in `k_codes.rs`.

use kvasir_kernels::{CodeFormat, GroupCodes};

use super::f16_at;
use crate::gguf::GgmlType;

/// Turns blocks into groups, as many as there are of both.
pub(crate) type DecodeCodes = fn(&[u8], &mut [GroupCodes]);

const Q4: CodeFormat = CodeFormat { lowest: -8, bits: 4, has_min: false };
pub(super) const Q4_MIN: CodeFormat = CodeFormat { lowest: 0, bits: 4, has_min: true };
pub(super) const Q8: CodeFormat = CodeFormat { lowest: -128, bits: 8, has_min: false };

/// What codes of a type are like, and how its blocks are read; `None` for another type.
pub(crate) fn code_decoder(ty: GgmlType) -> Option<(CodeFormat, DecodeCodes)> {
    Some(match ty {
        GgmlType::Q4_0 => (Q4, |bytes, out| blocks(bytes, out, q4_0)),
        GgmlType::Q4_1 => (Q4_MIN, |bytes, out| blocks(bytes, out, q4_1)),
        GgmlType::Q8_0 => (Q8, |bytes, out| blocks(bytes, out, q8_0)),
        _ => return None,
    })
}

fn blocks<const BYTES: usize, const GROUPS: usize>(
    bytes: &[u8],
    out: &mut [GroupCodes],
    decode: impl Fn(&[u8; BYTES], &mut [GroupCodes; GROUPS]),
) {
    let (blocks, _) = bytes.as_chunks::<BYTES>();
    let (out, _) = out.as_chunks_mut::<GROUPS>();
    for (block, out) in blocks.iter().zip(out) {
        decode(block, out);
    }
}

/// Elements 0–15 are the low halves of 16 bytes, 16–31 the high ones.
pub(super) fn halves(quants: &[u8], add: impl Fn(usize, u8) -> i8) -> [i8; 32] {
    std::array::from_fn(|j| {
        let byte = quants[j % 16];
        add(j, if j < 16 { byte & 15 } else { byte >> 4 })
    })
}

fn q4_0(block: &[u8; 18], [out]: &mut [GroupCodes; 1]) {
    out.scale = f16_at(block[0], block[1]);
    out.codes = halves(&block[2..], |_, quant| quant as i8 - 8);
}

fn q4_1(block: &[u8; 20], [out]: &mut [GroupCodes; 1]) {
    (out.scale, out.min) = (f16_at(block[0], block[1]), f16_at(block[2], block[3]));
    out.codes = halves(&block[4..], |_, quant| quant as i8);
}

fn q8_0(block: &[u8; 34], [out]: &mut [GroupCodes; 1]) {
    out.scale = f16_at(block[0], block[1]);
    out.codes = std::array::from_fn(|j| block[2 + j] as i8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequant::dequantize;

    #[test]
    fn codes_are_what_dequantisation_reads() {
        for ty in [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q8_0] {
            let (rows, width) = (3, 512);
            let mut bytes = vec![0u8; rows * width / ty.block_elements() * ty.block_bytes()];
            let mut state = 7u32;
            for byte in &mut bytes {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            // Scales that are numbers.
            for block in bytes.chunks_exact_mut(ty.block_bytes()) {
                (block[1], block[3]) = (0x2c, 0x28);
            }
            let exact = dequantize("t", ty, &bytes).unwrap();
            let (format, decode) = code_decoder(ty).unwrap();
            for (row, exact) in exact.chunks_exact(width).enumerate() {
                let mut groups = vec![GroupCodes::default(); width / 32];
                decode(&bytes[row * bytes.len() / rows..], &mut groups);
                for (group, exact) in groups.iter().zip(exact.chunks_exact(32)) {
                    let highest = if format.bits == 4 { 15 } else { 255 };
                    for (code, exact) in group.codes.iter().zip(exact) {
                        let from_lowest = i16::from(*code) - i16::from(format.lowest);
                        assert!((0..=highest).contains(&from_lowest), "{ty}: {code}");
                        assert_eq!(group.scale * f32::from(*code) + group.min, *exact, "{ty}");
                    }
                    assert!(format.has_min || group.min == 0.0);
                }
            }
        }
        assert!(code_decoder(GgmlType::Q6_K).is_none());
    }
}
