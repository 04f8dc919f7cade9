//! Where tensors come from: the seam between file formats and architectures.

use crate::error::{ModelError, Result};
use crate::stored_tensor::StoredTensor;

/// A set of named tensors that can be read as f32. GGUF files and safetensors folders implement it.
pub trait TensorSource: Send + Sync {
    /// Row-major shape (outermost dimension first; `[out_features, in_features]` for a linear
    /// layer), or `None` if there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// Reads and dequantises a tensor into row-major f32. The length is the product of `shape`.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>>;

    /// A matrix as it is stored, if it has whole blocks in each row.
    fn stored(&self, _name: &str) -> Option<StoredTensor> {
        None
    }

    /// Reads a tensor whose shape must be `expected`.
    fn read_shaped(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        self.check_shape(name, expected)?;
        self.read_f32(name)
    }

    /// Whether there is a tensor of this name and shape.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], [`ModelError::TensorShape`].
    fn check_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        let found =
            self.shape(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        if found != expected {
            return Err(ModelError::TensorShape {
                name: name.to_owned(),
                expected: expected.to_vec(),
                found,
            });
        }
        Ok(())
    }
}
