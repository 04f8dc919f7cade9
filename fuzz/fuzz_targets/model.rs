//! Any bytes as a GGUF file that is loaded: tokenizer, weights of every type as they are packed, and what that takes. An error is the
//! normal outcome; a panic, or a size foretold that is not the one found, is a bug.
//!
//! `cargo +nightly fuzz run model`

#![no_main]

use std::path::Path;

use kvasir_model::gguf::GgufFile;
use kvasir_model::{Footprint, LoadOptions, Model};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = GgufFile::from_bytes(bytes.to_vec(), Path::new("fuzz.gguf")) else {
        return;
    };
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let footprint = Footprint::of(&file, &options);
    if let (Ok(model), Ok(footprint)) = (Model::from_gguf(&file, &options), footprint) {
        // Norms are counted there and not here; nothing else is.
        assert!(footprint.weights() + bytes.len() >= model.weight_bytes());
    }
});
