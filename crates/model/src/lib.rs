//! Models: files, weights, tokenizer, chat template, forward pass. (Skeleton.)
#![deny(unsafe_code)]

pub mod dequant;
mod error;
mod file_bytes;
pub mod gguf;
mod safetensors_dir;
mod source;
pub mod tokenizer;

use std::sync::Arc;

pub use error::{ModelError, Result};
pub use safetensors_dir::{SafetensorsDir, SafetensorsTensor};
pub use source::TensorSource;
pub use tokenizer::Tokenizer;

/// A model ready to run.
#[derive(Debug)]
pub struct Model {
    tokenizer: Arc<Tokenizer>,
}

impl Model {
    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }
}
