//! GGUF files: header, metadata, tensors.
//!
//! [`GgufFile`] maps a file and checks all of its header; [`parse`] does the checking on any bytes.
//! Versions 2 and 3, little endian. Dequantisation is in [`crate::dequant`].

mod file;
mod ggml_type;
mod header;
mod metadata;
mod reader;
mod strings;
mod tensor_info;
#[doc(hidden)]
pub mod testkit;
mod values;

#[cfg(test)]
mod bad_input_tests;

pub use file::GgufFile;
pub use ggml_type::GgmlType;
pub use header::{Header, parse};
pub use metadata::{Metadata, Value};
pub use strings::Strings;
pub use tensor_info::TensorInfo;
