//! GGUF files: header, metadata, tensors, dequantisation.

mod metadata;

pub use metadata::{Metadata, Value};
