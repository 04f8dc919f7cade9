//! What `inspect` says, as data.

use std::collections::BTreeMap;

use anyhow::Result;
use kvasir_model::gguf::{GgufFile, Value};
use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use super::kv_size::KvSize;
use super::memory::{Memory, Resident};

/// The contents of a GGUF file.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) path: String,
    pub(crate) file_bytes: u64,
    pub(crate) gguf_version: u32,
    pub(crate) architecture: Option<String>,
    pub(crate) name: Option<String>,
    /// Elements of all tensors.
    pub(crate) parameters: u64,
    pub(crate) tensor_count: usize,
    pub(crate) tensor_bytes: u64,
    /// By storage type.
    pub(crate) tensor_types: BTreeMap<String, TypeTotal>,
    pub(crate) kv_cache: Option<KvSize>,
    pub(crate) memory: Memory,
    /// Arrays are shown as their length and element type.
    pub(crate) metadata: Map<String, Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tensors: Option<Vec<TensorLine>>,
}

/// All tensors of a storage type.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct TypeTotal {
    pub(crate) count: usize,
    pub(crate) parameters: u64,
    pub(crate) bytes: u64,
}

/// One tensor.
#[derive(Debug, Serialize)]
pub(crate) struct TensorLine {
    pub(crate) name: String,
    /// Row-major, outermost first.
    pub(crate) shape: Vec<usize>,
    #[serde(rename = "type")]
    pub(crate) ty: String,
    pub(crate) bytes: u64,
    /// What it takes in memory, and as what; absent where the model cannot be loaded.
    #[serde(flatten)]
    pub(crate) resident: Option<Resident>,
}

impl Report {
    /// Reads the header of `file`.
    pub(crate) fn of(file: &GgufFile, memory: Memory, list_tensors: bool) -> Result<Self> {
        let metadata = file.metadata();
        let mut tensor_types: BTreeMap<String, TypeTotal> = BTreeMap::new();
        for tensor in file.tensors() {
            let total = tensor_types.entry(tensor.ty.to_string()).or_default();
            total.count += 1;
            total.parameters += tensor.num_elements() as u64;
            total.bytes += tensor.num_bytes;
        }
        let tensors = list_tensors.then(|| {
            file.tensors()
                .iter()
                .enumerate()
                .map(|(at, tensor)| TensorLine {
                    name: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    ty: tensor.ty.to_string(),
                    bytes: tensor.num_bytes,
                    resident: memory.tensor(at),
                })
                .collect()
        });
        Ok(Self {
            path: file.path().display().to_string(),
            file_bytes: file.file_bytes(),
            gguf_version: file.version(),
            architecture: metadata.str("general.architecture")?.map(str::to_owned),
            name: metadata.str("general.name")?.map(str::to_owned),
            parameters: tensor_types.values().map(|total| total.parameters).sum(),
            tensor_count: file.tensors().len(),
            tensor_bytes: tensor_types.values().map(|total| total.bytes).sum(),
            tensor_types,
            kv_cache: KvSize::of(metadata)?,
            memory,
            metadata: metadata
                .iter()
                .map(|(key, value)| (key.to_owned(), summary(value)))
                .collect(),
            tensors,
        })
    }
}

/// Scalars as they are, arrays as `{"array": TYPE, "length": N}`.
fn summary(value: &Value) -> Json {
    let array = |ty: &str, length: usize| json!({ "array": ty, "length": length });
    match value {
        Value::Uint(v) => json!(v),
        Value::Int(v) => json!(v),
        Value::Float(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::UintArray(v) => array("unsigned", v.len()),
        Value::IntArray(v) => array("signed", v.len()),
        Value::FloatArray(v) => array("float", v.len()),
        Value::BoolArray(v) => array("bool", v.len()),
        Value::StringArray(v) => array("string", v.len()),
        Value::NestedArray(v) => array("array", v.len()),
        _ => json!("(of a kind that inspect does not know)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_summarised() {
        let vocabulary = Value::StringArray(["a"; 3].iter().collect());
        assert_eq!(summary(&vocabulary), json!({ "array": "string", "length": 3 }));
        assert_eq!(summary(&Value::Uint(u64::MAX)), json!(u64::MAX));
        assert_eq!(summary(&Value::Float(1e-5)), json!(1e-5));
        assert_eq!(summary(&Value::Float(f64::NAN)), Json::Null);
    }
}
