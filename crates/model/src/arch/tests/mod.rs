//! Metadata to spec: what transformers and llama.cpp make of the same keys, and messages for what is
//! not supported or wrong. That the specs compute the right thing is tested in `tests/architectures.rs`.

mod gguf;
mod hf;
mod tensors;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::*;
use crate::file_bytes::FileBytes;
use crate::gguf::{GgmlType, Metadata, Value};
use crate::source::TensorSource;
use crate::stored_tensor::StoredTensor;

/// Tensors of these shapes; every value is 1.
#[derive(Default, Clone)]
struct Shapes(HashMap<String, Vec<usize>>);

impl Shapes {
    fn with(mut self, name: &str, shape: &[usize]) -> Self {
        self.0.insert(name.to_owned(), shape.to_vec());
        self
    }

    fn without(mut self, name: &str) -> Self {
        assert!(self.0.remove(name).is_some(), "{name} was there");
        self
    }
}

impl TensorSource for Shapes {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).cloned()
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.shape(name);
        let shape = shape.ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        Ok(vec![1.0; shape.iter().product()])
    }

    fn stored(&self, name: &str) -> Option<StoredTensor> {
        let shape = self.shape(name)?;
        let file =
            FileBytes::owned(vec![0; 4 * shape.iter().product::<usize>()], Path::new("shapes"));
        StoredTensor::new((name, GgmlType::F32), &shape, &Arc::new(file), 0)
    }
}

const HIDDEN: usize = 64;

fn embeddings() -> Shapes {
    Shapes::default()
        .with("model.embed_tokens.weight", &[10, HIDDEN])
        .with("lm_head.weight", &[10, HIDDEN])
        .with("token_embd.weight", &[10, HIDDEN])
}

/// A config.json of 4 layers, 4 query and 2 KV heads of 16 channels, with fields replaced or (by
/// `"absent"`) taken out.
fn config_json(model_type: &str, changes: Json) -> Json {
    let mut config = json!({
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "sliding_window": 100,
    });
    let fields = config.as_object_mut().unwrap();
    let Json::Object(changes) = changes else { panic!("changes are an object") };
    for (field, value) in changes {
        if value == "absent" {
            fields.remove(&field);
        } else {
            fields.insert(field, value);
        }
    }
    config
}

fn hf_spec(model_type: &str, changes: Json) -> Result<DecoderSpec> {
    hf_spec_of(&config_json(model_type, changes), &embeddings())
}

fn hf_spec_of(json: &Json, tensors: &Shapes) -> Result<DecoderSpec> {
    spec(&Config::Hf { json, tensors })
}

/// The same model in GGUF. Keys of `changes` come without the architecture; `None` takes a key out.
fn gguf_spec(architecture: &str, changes: &[(&str, Option<Value>)]) -> Result<DecoderSpec> {
    gguf_spec_of(architecture, changes, &embeddings())
}

fn gguf_spec_of(
    architecture: &str,
    changes: &[(&str, Option<Value>)],
    tensors: &Shapes,
) -> Result<DecoderSpec> {
    let mut values = vec![
        ("block_count", Some(Value::Uint(4))),
        ("context_length", Some(Value::Uint(1024))),
        ("embedding_length", Some(Value::Uint(HIDDEN as u64))),
        ("feed_forward_length", Some(Value::Uint(96))),
        ("attention.head_count", Some(Value::Uint(4))),
        ("attention.head_count_kv", Some(Value::Uint(2))),
        ("attention.layer_norm_rms_epsilon", Some(Value::Float(1e-5))),
    ];
    values.extend(changes.iter().cloned());
    let mut by_key = HashMap::new();
    by_key.extend(values);
    let mut metadata = Metadata::default();
    metadata.insert("general.architecture", Value::String(architecture.to_owned()));
    for (key, value) in by_key {
        if let Some(value) = value {
            metadata.insert(format!("{architecture}.{key}"), value);
        }
    }
    spec(&Config::Gguf { metadata: &metadata, tensors })
}

fn text(value: &str) -> Option<Value> {
    Some(Value::String(value.to_owned()))
}

fn float(value: f64) -> Option<Value> {
    Some(Value::Float(value))
}

fn uint(value: u64) -> Option<Value> {
    Some(Value::Uint(value))
}

fn windows(spec: &DecoderSpec) -> Vec<Option<usize>> {
    spec.layers.iter().map(|layer| layer.window).collect()
}

/// Checks that a message says all of `parts`.
#[track_caller]
fn assert_message<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
    assert!(!message.contains('\n'), "one line: {message:?}");
}
