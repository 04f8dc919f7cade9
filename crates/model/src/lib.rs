//! Models: files, weights, tokenizer, chat template, forward pass. (Skeleton.)
#![deny(unsafe_code)]

pub mod chat_template;
mod error;
pub mod gguf;
mod source;
pub mod tokenizer;

use std::sync::Arc;

pub use chat_template::{ChatTemplate, RenderOptions};
pub use error::{ModelError, Result};
pub use source::TensorSource;
pub use tokenizer::{TokenDecoder, Tokenizer};

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
