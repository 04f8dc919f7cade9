//! Any bytes as a GGUF file: the header is parsed and every tensor read. An error is the normal
//! outcome; a panic, an overflow or memory beyond a small multiple of the input is a bug.
//!
//! `cargo +nightly fuzz run gguf`

#![no_main]

use std::path::Path;

use kvasir_model::TensorSource;
use kvasir_model::gguf::{GgufFile, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("fuzz.gguf");
    let Ok(header) = parse(bytes, path) else {
        return;
    };
    let file = GgufFile::from_bytes(bytes.to_vec(), path).expect("parse accepted these bytes");
    assert_eq!(file.tensors(), header.tensors());
    for tensor in file.tensors() {
        let stored = file.tensor_bytes(&tensor.name).expect("a listed tensor has bytes");
        assert_eq!(stored.len() as u64, tensor.num_bytes);
        match file.read_f32(&tensor.name) {
            Ok(values) => assert_eq!(values.len(), tensor.num_elements()),
            Err(error) => assert!(!tensor.ty.is_readable(), "{error}"),
        }
    }
});
