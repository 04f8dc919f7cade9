//! Test support for this and other crates: tiny random models, as GGUF files in memory.
//!
//! Weights are random but fixed, so outputs are gibberish that never changes. Misuse panics.
#![doc(hidden)]
#![allow(clippy::expect_used)]

use std::path::Path;
use std::sync::Arc;

use crate::gguf::testkit::GgufBuilder;
use crate::gguf::{GgufFile, Strings, Value};
use crate::model::{LoadOptions, Model};
use crate::weight_form::Dtype;

/// Token that ends a sequence: the last of the vocabulary.
pub const TINY_EOS: u32 = 257;
/// 256 bytes, `<|bos|>`, `<|eos|>`.
pub const TINY_VOCAB: usize = 258;
/// Context length of [`tiny_model`].
pub const TINY_CONTEXT: usize = 512;

/// The characters GPT-2 writes bytes as, in byte order.
fn byte_characters() -> Vec<String> {
    let printable = |b: u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256;
    (0..256u32)
        .map(|b| {
            let c = if printable(b) {
                b
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(c).map(String::from).expect("a character")
        })
        .collect()
}

/// Uniform values in ±`scale` from a fixed seed.
fn random(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 / (1u64 << 30) as f32 - 1.0) * scale
        })
        .collect()
}

/// A two-layer Llama of 258 byte-level tokens (hidden 32, 4 query and 2 KV heads of 16 channels).
pub fn tiny_gguf(seed: u64) -> GgufBuilder {
    tiny_gguf_of(seed, 2)
}

/// The same with `layers` layers.
fn tiny_gguf_of(seed: u64, layers: u64) -> GgufBuilder {
    const HIDDEN: usize = 32;
    const FFN: usize = 48;
    let mut tokens = byte_characters();
    tokens.extend(["<|bos|>".to_owned(), "<|eos|>".to_owned()]);
    let mut types = vec![1u64; 256];
    types.extend([3, 3]);
    let mut file = GgufBuilder::new()
        .string("general.architecture", "llama")
        .string("general.name", "tiny")
        .uint("llama.block_count", layers)
        .uint("llama.context_length", TINY_CONTEXT as u64)
        .uint("llama.embedding_length", HIDDEN as u64)
        .uint("llama.feed_forward_length", FFN as u64)
        .uint("llama.attention.head_count", 4)
        .uint("llama.attention.head_count_kv", 2)
        .uint("llama.attention.key_length", 16)
        .uint("llama.attention.value_length", 16)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .float("llama.rope.freq_base", 10_000.0)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "gpt-2")
        .metadata("tokenizer.ggml.tokens", Value::StringArray(tokens.iter().collect()))
        .metadata("tokenizer.ggml.token_type", Value::UintArray(types))
        .metadata("tokenizer.ggml.merges", Value::StringArray(Strings::default()))
        .uint("tokenizer.ggml.bos_token_id", 256)
        .uint("tokenizer.ggml.eos_token_id", u64::from(TINY_EOS))
        .tensor_f32(
            "token_embd.weight",
            &[TINY_VOCAB, HIDDEN],
            &random(TINY_VOCAB * HIDDEN, seed, 1.0),
        )
        .tensor_f32("output_norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
    let mut tensor_seed = seed;
    for layer in 0..layers {
        let shapes: [(&str, [usize; 2]); 7] = [
            ("attn_q", [64, HIDDEN]),
            ("attn_k", [32, HIDDEN]),
            ("attn_v", [32, HIDDEN]),
            ("attn_output", [HIDDEN, 64]),
            ("ffn_gate", [FFN, HIDDEN]),
            ("ffn_up", [FFN, HIDDEN]),
            ("ffn_down", [HIDDEN, FFN]),
        ];
        for (name, shape) in shapes {
            tensor_seed += 1;
            let values = random(shape[0] * shape[1], tensor_seed, 0.4);
            file = file.tensor_f32(&format!("blk.{layer}.{name}.weight"), &shape, &values);
        }
        for name in ["attn_norm", "ffn_norm"] {
            file =
                file.tensor_f32(&format!("blk.{layer}.{name}.weight"), &[HIDDEN], &[1.0; HIDDEN]);
        }
    }
    file
}

/// [`tiny_gguf`], loaded.
pub fn tiny_model(seed: u64) -> Arc<Model> {
    deep_tiny_model(seed, 2)
}

/// [`tiny_model`] with f32 weights and inputs: where a difference in the last bits must stay one.
pub fn tiny_model_in_f32(seed: u64) -> Arc<Model> {
    load(seed, 2, Dtype::Float32)
}

/// [`tiny_model`] with `layers` layers.
pub fn deep_tiny_model(seed: u64, layers: u64) -> Arc<Model> {
    load(seed, layers, Dtype::Auto)
}

fn load(seed: u64, layers: u64, dtype: Dtype) -> Arc<Model> {
    let bytes = tiny_gguf_of(seed, layers).build();
    let file = GgufFile::from_bytes(bytes, Path::new("tiny.gguf")).expect("a GGUF file");
    Arc::new(
        Model::from_gguf(&file, &LoadOptions { threads: 1, dtype, ..LoadOptions::default() })
            .expect("a model"),
    )
}
