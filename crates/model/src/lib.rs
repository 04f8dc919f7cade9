//! Models: files, weights, tokenizer, chat template, forward pass.
//!
//! Read first: [`Model`] (load, forward, logits), [`arch::DecoderSpec`] (what architectures differ in),
//! [`Tokenizer`]. Weights come through [`TensorSource`] from GGUF files or safetensors folders; the
//! forward pass keeps keys and values in a [`kvasir_cache::KvCache`].
//!
//! Not its job: fetching files, requests, sampling.
#![deny(unsafe_code)]

pub mod arch;
mod calibrate;
pub mod chat_template;
pub mod corpus;
mod decoder;
pub mod dequant;
mod embedding;
mod error;
mod file_bytes;
mod footprint;
pub mod gguf;
mod machine;
mod model;
mod safetensors_dir;
mod share_layers;
mod source;
mod statistics_file;
mod stored_tensor;
mod tables;
mod tensor_names;
pub mod testkit;
pub mod tokenizer;
mod train_less;
mod weigh_contexts;
mod weight_form;
mod weights;

pub use calibrate::{Calibration, CorpusInfo};
pub use chat_template::{ChatTemplate, RenderOptions};
pub use decoder::{ForwardBatch, Runner};
pub use dequant::Quantize;
pub use error::{ModelError, Result};
pub use file_bytes::Access;
pub use footprint::{Footprint, HeldAs, TensorFootprint};
pub use kvasir_kernels::{
    Isa, IsaError, Threads, ThreadsError, argmax, log_sum_exp, num_threads, parallel_for,
    parallel_zip,
};
pub use machine::Machine;
pub use model::{CacheOptions, LoadOptions, Model};
pub use safetensors_dir::{SafetensorsDir, SafetensorsTensor};
pub use source::TensorSource;
pub use stored_tensor::{StoredRows, StoredTensor};
pub use tokenizer::{TokenDecoder, Tokenizer};
pub use weight_form::Dtype;
