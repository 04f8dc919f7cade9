//! In what form matrices are held, by the type that a file has them in.

use kvasir_kernels::{ActivationKind, CodeFormat, FloatFormat, GROUP, KFormat, Linear};

use crate::dequant::{
    BlockDecoder, DecodeCodes, DecodeK, Quantize, block_decoder, code_decoder, k_decoder,
};
use crate::footprint::HeldAs;
use crate::gguf::GgmlType;

/// In what form weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// As the file has them: codes, f16 and bf16 as they are, f32 rounded to bf16. (With AMX f16 becomes bf16.)
    /// Inputs are what the processor multiplies fastest: of layers with codes bytes with a step
    /// for 16, of others bf16 where products of it are faster than those of f32, else f32.
    #[default]
    Auto,
    /// The same with all inputs in bf16.
    Bfloat16,
    /// Weights as the file has them, f32 too; inputs and products, attention's too, in f32: slow, a control for the others.
    Float32,
}

/// What a model's matrices are held as.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    /// What codes are multiplied with.
    codes: ActivationKind,
    /// What other weights are multiplied with.
    others: ActivationKind,
    /// Whether f32 stays f32.
    exact: bool,
    quantize: Option<Quantize>,
}

/// How a matrix is held, and how it is read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Held {
    K(KFormat, ActivationKind, DecodeK),
    Codes(CodeFormat, ActivationKind, DecodeCodes),
    /// Floats that are quantised.
    Quantized(Quantize, ActivationKind, BlockDecoder),
    Floats(FloatFormat, ActivationKind, BlockDecoder),
}

impl Form {
    /// Of a model that has matrices of some types.
    pub(crate) fn of(
        dtype: Dtype,
        quantize: Option<Quantize>,
        mut types: impl Iterator<Item = GgmlType>,
    ) -> Self {
        let (f32, bf16) = (ActivationKind::F32, ActivationKind::Bf16);
        let [codes, others] = match dtype {
            Dtype::Auto => [true, false].map(ActivationKind::fastest),
            Dtype::Bfloat16 => [bf16, bf16],
            Dtype::Float32 => [f32, f32],
        };
        // There are no products of K types by tiles, and layers that read the same inputs read them in one form.
        let bytes = codes == ActivationKind::Tiles && types.any(|ty| k_decoder(ty).is_some());
        let codes = if bytes { ActivationKind::Bytes } else { codes };
        Self { codes, others, exact: dtype == Dtype::Float32, quantize }
    }

    /// Of a head, which is read for the last token of a prompt and for each one that is generated, so for few rows: codes that
    /// layers have as tiles it has for bytes, which then need no turning. It is not quantised to 4 bits, nor is an embedding.
    pub(crate) fn head(self) -> Self {
        let codes = match self.codes {
            ActivationKind::Tiles => ActivationKind::Bytes,
            kind => kind,
        };
        Self { codes, quantize: self.quantize.map(|_| Quantize::Q8_0), ..self }
    }

    /// With the same inputs for all weights.
    pub(crate) fn alike(self) -> Self {
        let kind = match self.others {
            // Which K types do not take.
            ActivationKind::Tiles => ActivationKind::Bf16,
            kind => kind,
        };
        Self { codes: kind, others: kind, ..self }
    }

    /// How a matrix with so many inputs is held; `None` for a type that this build cannot read.
    pub(crate) fn held(self, ty: GgmlType, inputs: usize) -> Option<Held> {
        let groups = inputs.is_multiple_of(GROUP);
        if let Some((format, decode)) = k_decoder(ty) {
            return Some(Held::K(format, self.codes, decode));
        }
        if let (Some((format, decode)), true) = (code_decoder(ty), groups) {
            // Without products with bytes it is like other weights.
            let kind = if format.takes(self.codes) { self.codes } else { self.others };
            return Some(Held::Codes(format, kind, decode));
        }
        let decode = block_decoder(ty)?;
        let is_float = matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        if let (Some(quantize), true, true) = (self.quantize, groups, is_float) {
            return Some(Held::Quantized(quantize, self.codes, decode));
        }
        Some(self.floats(ty, decode))
    }

    /// How numbers are held that a layout of codes cannot hold, or that are none.
    pub(crate) fn floats(self, ty: GgmlType, decode: BlockDecoder) -> Held {
        let format = match ty {
            GgmlType::F16 if FloatFormat::F16.takes(self.others) => FloatFormat::F16,
            GgmlType::BF16 => FloatFormat::Bf16,
            _ if self.exact => FloatFormat::F32,
            _ => FloatFormat::Bf16,
        };
        Held::Floats(format, self.others, decode)
    }
}

impl Held {
    pub(crate) fn held_as(self) -> HeldAs {
        match self {
            Self::K(..) | Self::Codes(..) | Self::Quantized(..) => HeldAs::Codes,
            Self::Floats(FloatFormat::F16, ..) => HeldAs::F16,
            Self::Floats(FloatFormat::Bf16, ..) => HeldAs::Bf16,
            Self::Floats(FloatFormat::F32, ..) => HeldAs::F32,
        }
    }

    /// Bytes of a matrix without its bias.
    pub(crate) fn num_bytes(self, [outputs, inputs]: [usize; 2]) -> usize {
        match self {
            Self::K(format, ..) => Linear::bytes_of_k(format, inputs, outputs),
            Self::Codes(format, ..) => Linear::bytes_of_codes(format, inputs, outputs),
            Self::Quantized(to, ..) => Linear::bytes_of_codes(to.format(), inputs, outputs),
            Self::Floats(format, ..) => Linear::bytes_of_floats(format, inputs, outputs),
        }
    }
}
