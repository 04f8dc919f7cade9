//! Stored types whose elements are small integers in groups of 32 with a scale: these integers, for layers
//! that keep them. For AMX, which has no products with codes as `k_codes.rs` has them, K types are here too, as far as they have groups of
//! 32, and Q5_0 and Q5_1.

use kvasir_kernels::{CodeFormat, GroupCodes};

use super::f16_at;
use super::k_scales::{packed_scales, scale_and_min};
use super::q5::fifth_bit;
use super::{iq4, mxfp4};
use crate::gguf::GgmlType;

/// Turns the bytes of a row into its groups.
type DecodeRow = fn(&[u8], &mut [GroupCodes]);

/// A tensor's bytes as groups of codes.
#[derive(Clone, Copy)]
pub struct CodedTensor<'a> {
    /// What the codes are like.
    pub format: CodeFormat,
    decode: DecodeRow,
    row_bytes: usize,
    bytes: &'a [u8],
}

impl std::fmt::Debug for CodedTensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodedTensor").field("format", &self.format).finish_non_exhaustive()
    }
}

const Q4: CodeFormat = CodeFormat { lowest: -8, bits: 4, has_min: false };
const Q4_MIN: CodeFormat = CodeFormat { lowest: 0, bits: 4, has_min: true };
const Q8: CodeFormat = CodeFormat { lowest: -128, bits: 8, has_min: false };
const Q8_MIN: CodeFormat = CodeFormat { lowest: -128, bits: 8, has_min: true };

impl<'a> CodedTensor<'a> {
    /// `None` for a type without groups of 32, or rows that are not whole blocks.
    pub(crate) fn new(ty: GgmlType, bytes: &'a [u8], row_elements: usize) -> Option<Self> {
        let (format, decode): (_, DecodeRow) = match ty {
            GgmlType::Q4_0 => (Q4, |bytes, out| blocks::<18, 1>(bytes, out, q4_0)),
            GgmlType::Q4_1 => (Q4_MIN, |bytes, out| blocks::<20, 1>(bytes, out, q4_1)),
            GgmlType::Q5_0 => (Q8, |bytes, out| blocks::<22, 1>(bytes, out, q5_0)),
            GgmlType::Q5_1 => (Q8_MIN, |bytes, out| blocks::<24, 1>(bytes, out, q5_1)),
            GgmlType::Q8_0 => (Q8, |bytes, out| blocks::<34, 1>(bytes, out, q8_0)),
            GgmlType::Q4_K => (Q4_MIN, |bytes, out| blocks::<144, 8>(bytes, out, q4_k)),
            GgmlType::Q5_K => (Q8_MIN, |bytes, out| blocks::<176, 8>(bytes, out, q5_k)),
            GgmlType::IQ4_NL => (Q8, |bytes, out| blocks::<18, 1>(bytes, out, iq4_nl)),
            GgmlType::MXFP4 => (Q8, |bytes, out| blocks::<17, 1>(bytes, out, mxfp4)),
            _ => return None,
        };
        let whole = row_elements.is_multiple_of(ty.block_elements());
        let row_bytes = row_elements / ty.block_elements() * ty.block_bytes();
        (whole && row_bytes > 0).then_some(Self { format, decode, row_bytes, bytes })
    }

    /// The groups of a row; nothing if there is no such row. `out`: a row's groups.
    pub fn row(&self, row: usize, out: &mut [GroupCodes]) {
        if let Some(bytes) = self.bytes.chunks_exact(self.row_bytes).nth(row) {
            (self.decode)(bytes, out);
        }
    }
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

pub(super) fn high_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn q4_0(block: &[u8; 18], [out]: &mut [GroupCodes; 1]) {
    out.scale = f16_at(block[0], block[1]);
    out.codes = halves(&block[2..], |_, quant| quant as i8 - 8);
}

fn q4_1(block: &[u8; 20], [out]: &mut [GroupCodes; 1]) {
    (out.scale, out.min) = (f16_at(block[0], block[1]), f16_at(block[2], block[3]));
    out.codes = halves(&block[4..], |_, quant| quant as i8);
}

fn q5_0(block: &[u8; 22], [out]: &mut [GroupCodes; 1]) {
    out.scale = f16_at(block[0], block[1]);
    let high = high_bits(block, 2);
    out.codes = halves(&block[6..], |j, quant| (quant as i8 | fifth_bit(high, j) as i8) - 16);
}

fn q5_1(block: &[u8; 24], [out]: &mut [GroupCodes; 1]) {
    (out.scale, out.min) = (f16_at(block[0], block[1]), f16_at(block[2], block[3]));
    let high = high_bits(block, 4);
    out.codes = halves(&block[8..], |j, quant| quant as i8 | fifth_bit(high, j) as i8);
}

fn q8_0(block: &[u8; 34], [out]: &mut [GroupCodes; 1]) {
    out.scale = f16_at(block[0], block[1]);
    out.codes = std::array::from_fn(|j| block[2 + j] as i8);
}

/// Scales are products of two numbers here, rounded to f16 where they are stored.
fn k_group<const BYTES: usize>(block: &[u8; BYTES], group: usize, out: &mut GroupCodes) {
    let (d, dmin) = (f16_at(block[0], block[1]), f16_at(block[2], block[3]));
    let (scale, min) = scale_and_min(&packed_scales(block), group);
    (out.scale, out.min) = (d * f32::from(scale), -(dmin * f32::from(min)));
}

fn q4_k(block: &[u8; 144], out: &mut [GroupCodes; 8]) {
    for (group, out) in out.iter_mut().enumerate() {
        k_group(block, group, out);
        let quants = &block[16 + group / 2 * 32..][..32];
        out.codes = std::array::from_fn(|j| ((quants[j] >> (group % 2 * 4)) & 15) as i8);
    }
}

fn q5_k(block: &[u8; 176], out: &mut [GroupCodes; 8]) {
    for (group, out) in out.iter_mut().enumerate() {
        k_group(block, group, out);
        let quants = &block[48 + group / 2 * 32..][..32];
        out.codes = std::array::from_fn(|j| {
            let fifth = (block[16 + j] >> group) & 1;
            ((quants[j] >> (group % 2 * 4)) & 15) as i8 | (fifth << 4) as i8
        });
    }
}

fn iq4_nl(block: &[u8; 18], [out]: &mut [GroupCodes; 1]) {
    out.scale = f16_at(block[0], block[1]);
    out.codes = halves(&block[2..], |_, quant| iq4::LEVELS[usize::from(quant)]);
}

/// Scales that f16 has not are left to layers in bf16, which holds such weights exactly.
fn mxfp4(block: &[u8; 17], [out]: &mut [GroupCodes; 1]) {
    out.scale = mxfp4::half_of_power(block[0]);
    out.codes = halves(&block[1..], |_, quant| mxfp4::LEVELS[usize::from(quant)]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequant::dequantize;

    #[test]
    fn codes_are_what_dequantisation_reads() {
        let types = [
            GgmlType::Q4_0,
            GgmlType::Q4_1,
            GgmlType::Q5_0,
            GgmlType::Q5_1,
            GgmlType::Q8_0,
            GgmlType::Q4_K,
            GgmlType::Q5_K,
            GgmlType::IQ4_NL,
            GgmlType::MXFP4,
        ];
        for ty in types {
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
                if ty == GgmlType::MXFP4 {
                    block[0] = 120;
                }
            }
            let exact = dequantize("t", ty, &bytes).unwrap();
            let coded = CodedTensor::new(ty, &bytes, width).unwrap();
            for (row, exact) in exact.chunks_exact(width).enumerate() {
                let mut groups = vec![GroupCodes::default(); width / 32];
                coded.row(row, &mut groups);
                for (group, exact) in groups.iter().zip(exact.chunks_exact(32)) {
                    let highest = if coded.format.bits == 4 { 15 } else { 255 };
                    for (code, exact) in group.codes.iter().zip(exact) {
                        let from_lowest = i16::from(*code) - i16::from(coded.format.lowest);
                        assert!((0..=highest).contains(&from_lowest), "{ty}: {code}");
                        assert_eq!(group.scale * f32::from(*code) + group.min, *exact, "{ty}");
                    }
                    assert!(coded.format.has_min || group.min == 0.0);
                }
            }
        }
        assert!(CodedTensor::new(GgmlType::Q6_K, &[0; 210], 256).is_none());
        assert!(CodedTensor::new(GgmlType::Q4_0, &[0; 18], 16).is_none());
    }
}
