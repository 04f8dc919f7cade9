//! GGML tensor types: number in the file, name, and block geometry.

use std::fmt;

/// How a GGUF file stores the elements of a tensor. Every type that the format names is here, so
/// that any file can be listed; [`GgmlType::is_readable`] tells which ones can be dequantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(non_camel_case_types, reason = "the names under which the format is known")]
pub enum GgmlType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    BF16,
    /// 64-bit float.
    F64,
    /// Signed byte.
    I8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// 4 bits, one scale for 32 elements.
    Q4_0,
    /// 4 bits, scale and minimum for 32 elements.
    Q4_1,
    /// 5 bits, one scale for 32 elements.
    Q5_0,
    /// 5 bits, scale and minimum for 32 elements.
    Q5_1,
    /// 8 bits, one scale for 32 elements.
    Q8_0,
    /// 8 bits, scale and sum for 32 elements; an intermediate of matrix products.
    Q8_1,
    /// 2 bits, super-blocks of 256 elements.
    Q2_K,
    /// 3 bits, super-blocks of 256 elements.
    Q3_K,
    /// 4 bits, super-blocks of 256 elements.
    Q4_K,
    /// 5 bits, super-blocks of 256 elements.
    Q5_K,
    /// 6 bits, super-blocks of 256 elements.
    Q6_K,
    /// 8 bits, super-blocks of 256 elements; an intermediate of matrix products.
    Q8_K,
    /// 2-bit codebook.
    IQ2_XXS,
    /// 2-bit codebook.
    IQ2_XS,
    /// 2-bit codebook.
    IQ2_S,
    /// 3-bit codebook.
    IQ3_XXS,
    /// 3-bit codebook.
    IQ3_S,
    /// 1.5-bit codebook.
    IQ1_S,
    /// 1.75-bit codebook.
    IQ1_M,
    /// 4-bit non-linear, 32 elements.
    IQ4_NL,
    /// 4-bit non-linear, super-blocks of 256 elements.
    IQ4_XS,
    /// Ternary, 1.69 bits.
    TQ1_0,
    /// Ternary, 2.06 bits.
    TQ2_0,
    /// OCP microscaling 4-bit float, 32 elements.
    MXFP4,
}

/// Type, number in the file, name, elements of a block, bytes of a block.
const TYPES: [(GgmlType, u32, &str, usize, usize); 32] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q8_1, 9, "Q8_1", 32, 40),
    (GgmlType::Q2_K, 10, "Q2_K", 256, 84),
    (GgmlType::Q3_K, 11, "Q3_K", 256, 110),
    (GgmlType::Q4_K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5_K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6_K, 14, "Q6_K", 256, 210),
    (GgmlType::Q8_K, 15, "Q8_K", 256, 292),
    (GgmlType::IQ2_XXS, 16, "IQ2_XXS", 256, 66),
    (GgmlType::IQ2_XS, 17, "IQ2_XS", 256, 74),
    (GgmlType::IQ3_XXS, 18, "IQ3_XXS", 256, 98),
    (GgmlType::IQ1_S, 19, "IQ1_S", 256, 50),
    (GgmlType::IQ4_NL, 20, "IQ4_NL", 32, 18),
    (GgmlType::IQ3_S, 21, "IQ3_S", 256, 110),
    (GgmlType::IQ2_S, 22, "IQ2_S", 256, 82),
    (GgmlType::IQ4_XS, 23, "IQ4_XS", 256, 136),
    (GgmlType::I8, 24, "I8", 1, 1),
    (GgmlType::I16, 25, "I16", 1, 2),
    (GgmlType::I32, 26, "I32", 1, 4),
    (GgmlType::I64, 27, "I64", 1, 8),
    (GgmlType::F64, 28, "F64", 1, 8),
    (GgmlType::IQ1_M, 29, "IQ1_M", 256, 56),
    (GgmlType::BF16, 30, "BF16", 1, 2),
    (GgmlType::TQ1_0, 34, "TQ1_0", 256, 54),
    (GgmlType::TQ2_0, 35, "TQ2_0", 256, 66),
    (GgmlType::MXFP4, 39, "MXFP4", 32, 17),
];

impl GgmlType {
    /// The type with this number in a GGUF file, or `None` for a number the format does not name.
    pub fn from_number(number: u32) -> Option<Self> {
        TYPES.iter().find(|row| row.1 == number).map(|row| row.0)
    }

    fn row(self) -> (u32, &'static str, usize, usize) {
        // Every variant has a row (tested); F32's stands in so that this is total.
        TYPES
            .iter()
            .find(|row| row.0 == self)
            .map_or((0, "F32", 1, 4), |row| (row.1, row.2, row.3, row.4))
    }

    /// The type's number in a GGUF file.
    pub fn number(self) -> u32 {
        self.row().0
    }

    /// The name the format uses, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Elements of one block. A tensor's innermost dimension is a multiple of it.
    pub fn block_elements(self) -> usize {
        self.row().2
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Stored bits per element, scales included.
    pub fn bits_per_weight(self) -> f64 {
        self.block_bytes() as f64 * 8.0 / self.block_elements() as f64
    }

    /// Whether [`crate::dequant::dequantize`] reads it.
    pub fn is_readable(self) -> bool {
        crate::dequant::block_decoder(self).is_some()
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_unique_and_named_like_their_variant() {
        for (i, row) in TYPES.iter().enumerate() {
            assert_eq!(format!("{:?}", row.0), row.2);
            assert_eq!(GgmlType::from_number(row.1), Some(row.0));
            assert_eq!(row.0.number(), row.1);
            assert!(TYPES[i + 1..].iter().all(|other| other.0 != row.0 && other.1 != row.1));
        }
    }

    #[test]
    fn numbers_without_a_type() {
        for number in [4, 5, 31, 33, 36, 1000, u32::MAX] {
            assert_eq!(GgmlType::from_number(number), None);
        }
    }

    #[test]
    fn bits_per_weight_include_scales() {
        assert_eq!(GgmlType::Q4_1.bits_per_weight(), 5.0);
        assert_eq!(GgmlType::Q4_K.bits_per_weight(), 4.5);
        assert_eq!(GgmlType::F16.bits_per_weight(), 16.0);
    }
}
