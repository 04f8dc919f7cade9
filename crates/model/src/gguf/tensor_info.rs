//! What a file says about one tensor.

use super::ggml_type::GgmlType;
use crate::error::ModelError;

/// One tensor of a GGUF file. A value of this type was checked: its bytes lie inside the file and
/// its row length is a multiple of the type's block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the file.
    pub name: String,
    /// Row-major shape, outermost dimension first: `[out_features, in_features]` for a linear
    /// layer. (The file stores the innermost first.) No dimension is zero.
    pub shape: Vec<usize>,
    /// How the elements are stored.
    pub ty: GgmlType,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Bytes in the file.
    pub num_bytes: u64,
}

impl TensorInfo {
    /// Number of elements: the product of the shape.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The error of a type that this build cannot read.
    pub(crate) fn bad_type(&self) -> ModelError {
        ModelError::TensorType { name: self.name.clone(), ty: self.ty.name().to_owned() }
    }

    /// Stored bits per element, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.ty.bits_per_weight()
    }
}
