//! f32 to codes, for files that have none: what `llama-quantize` makes of a matrix of floats as Q8_0 or Q4_1.

use std::fmt;
use std::str::FromStr;

use kvasir_kernels::{CodeFormat, GROUP, GroupCodes};

use super::codes::{Q4_MIN, Q8};

/// A type that floats are quantised to when they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    /// 8 bits and a scale for 32.
    Q8_0,
    /// 4 bits, a scale and a minimum for 32. Embedding and head have 8 bits: they are where most is lost.
    Q4_1,
}

impl Quantize {
    /// Names, as `--quantize` takes them.
    pub const ALL: [Self; 2] = [Self::Q8_0, Self::Q4_1];

    pub(crate) fn format(self) -> CodeFormat {
        match self {
            Self::Q8_0 => Q8,
            Self::Q4_1 => Q4_MIN,
        }
    }

    /// The codes of a group.
    pub(crate) fn group(self, weights: &[f32; GROUP]) -> GroupCodes {
        match self {
            Self::Q8_0 => {
                let largest = weights.iter().fold(0.0f32, |most, w| most.max(w.abs()));
                let scale = largest / 127.0;
                let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
                let codes = weights.map(|w| (w * inverse).round() as i8);
                GroupCodes { scale, min: 0.0, codes }
            }
            Self::Q4_1 => {
                let (min, max) = weights
                    .iter()
                    .fold((f32::MAX, f32::MIN), |(min, max), w| (min.min(*w), max.max(*w)));
                let scale = (max - min) / 15.0;
                let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
                let codes = weights.map(|w| ((w - min) * inverse + 0.5).clamp(0.0, 15.0) as i8);
                GroupCodes { scale, min, codes }
            }
        }
    }
}

impl fmt::Display for Quantize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_1 => "q4_1",
        })
    }
}

impl FromStr for Quantize {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|ty| ty.to_string() == name);
        known.ok_or_else(|| format!("{name:?} is neither q8_0 nor q4_1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequant::code_decoder;
    use crate::gguf::GgmlType;

    /// As the `gguf` package (0.17.1) has it: `gguf.quants.quantize(weights, type)`, whose blocks are turned into codes here.
    #[test]
    fn codes_are_those_of_the_reference() {
        let weights: [f32; GROUP] =
            std::array::from_fn(|i| ((i * 7919 + 13) % 2003) as f32 / 1001.0 - 1.0);
        let q8_0: [u8; 34] = [
            245, 31, 129, 119, 107, 95, 83, 71, 59, 47, 35, 23, 11, 255, 243, 231, 219, 207, 195,
            183, 171, 159, 147, 135, 125, 113, 101, 89, 77, 65, 53, 41, 29, 17,
        ];
        let q4_1: [u8; 20] = [
            45, 48, 229, 187, 64, 63, 62, 45, 28, 12, 251, 234, 234, 217, 200, 184, 183, 166, 149,
            149,
        ];
        let expected: [(Quantize, GgmlType, &[u8]); 2] =
            [(Quantize::Q8_0, GgmlType::Q8_0, &q8_0), (Quantize::Q4_1, GgmlType::Q4_1, &q4_1)];
        for (quantize, ty, block) in expected {
            let (format, decode) = code_decoder(ty).unwrap();
            assert_eq!(format, quantize.format());
            let mut expected = [GroupCodes::default()];
            decode(block, &mut expected);
            let found = quantize.group(&weights);
            assert_eq!(found.codes, expected[0].codes, "{quantize}");
            // The reference rounds both to f16, which packing does here.
            assert!((found.scale / expected[0].scale - 1.0).abs() < 1e-3, "{quantize}");
            assert!((found.min - expected[0].min).abs() < 1e-3, "{quantize}");
        }
        for ty in Quantize::ALL {
            let zeros = ty.group(&[0.0; GROUP]);
            assert_eq!((zeros.scale, zeros.min, zeros.codes), (0.0, 0.0, [0; GROUP]));
            assert_eq!(ty.to_string().parse(), Ok(ty));
        }
        assert!("q4_0".parse::<Quantize>().is_err());
    }
}
