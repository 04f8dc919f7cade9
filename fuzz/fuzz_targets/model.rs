//! Any bytes as a GGUF file that is loaded: what that takes, tokenizer, weights of every type as they are packed. An error is the
//! normal outcome; a panic, or a size that is not foretold where loading succeeds, is a bug.
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
    // Sizes may differ: scales that a layout cannot hold make a matrix larger.
    assert!(footprint.is_ok() || Model::from_gguf(&file, &options).is_err());
});
