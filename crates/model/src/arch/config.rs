//! One view of two kinds of metadata: GGUF keys and config.json fields.

use serde_json::Value as Json;

use crate::error::{ModelError, Result};
use crate::gguf::Metadata;
use crate::source::TensorSource;

/// Layers above this are a damaged file, not a model.
const MAX_LAYERS: usize = 4096;

/// Where an architecture reads its numbers. Each accessor takes the GGUF key without its architecture
/// prefix and the config.json field (dots descend), so that an architecture is written once.
pub(crate) enum Config<'a> {
    /// Metadata and tensors of a GGUF file.
    Gguf { metadata: &'a Metadata, tensors: &'a dyn TensorSource },
    /// config.json and tensors of a safetensors folder.
    Hf { json: &'a Json, tensors: &'a dyn TensorSource },
}

impl Config<'_> {
    pub(crate) fn is_gguf(&self) -> bool {
        matches!(self, Self::Gguf { .. })
    }

    pub(crate) fn tensors(&self) -> &dyn TensorSource {
        match self {
            Self::Gguf { tensors, .. } | Self::Hf { tensors, .. } => *tensors,
        }
    }

    /// The architecture's name as the file gives it.
    pub(crate) fn architecture(&self) -> Result<String> {
        match self {
            Self::Gguf { metadata, .. } => {
                metadata.require("general.architecture", Metadata::str).map(str::to_owned)
            }
            Self::Hf { .. } => self
                .string("", "model_type")?
                .ok_or_else(|| ModelError::MissingKey { key: "model_type".to_owned() }),
        }
    }

    fn gguf_key(metadata: &Metadata, key: &str) -> Result<String> {
        Ok(format!("{}.{key}", metadata.require("general.architecture", Metadata::str)?))
    }

    fn field<'j>(json: &'j Json, path: &str) -> Option<&'j Json> {
        // Multi-modal models nest the decoder's part.
        let look = |root: &'j Json| path.split('.').try_fold(root, |at, name| at.get(name));
        look(json).or_else(|| json.get("text_config").and_then(look)).filter(|v| !v.is_null())
    }

    /// A non-negative integer.
    pub(crate) fn usize(&self, key: &str, field: &str) -> Result<Option<usize>> {
        match self {
            Self::Gguf { metadata, .. } => metadata.usize(&Self::gguf_key(metadata, key)?),
            Self::Hf { json, .. } => Self::field(json, field)
                .map(|v| {
                    let n = v.as_u64().and_then(|n| usize::try_from(n).ok());
                    n.ok_or_else(|| bad(field, "a non-negative integer", v))
                })
                .transpose(),
        }
    }

    /// A non-negative integer that must be there.
    pub(crate) fn need_usize(&self, key: &str, field: &str) -> Result<usize> {
        self.usize(key, field)?.ok_or_else(|| self.missing(key, field))
    }

    /// A number.
    pub(crate) fn f32(&self, key: &str, field: &str) -> Result<Option<f32>> {
        match self {
            Self::Gguf { metadata, .. } => metadata.f32(&Self::gguf_key(metadata, key)?),
            Self::Hf { json, .. } => Self::field(json, field)
                .map(|v| v.as_f64().map(|n| n as f32).ok_or_else(|| bad(field, "a number", v)))
                .transpose(),
        }
    }

    /// A number that must be there.
    pub(crate) fn need_f32(&self, key: &str, field: &str) -> Result<f32> {
        self.f32(key, field)?.ok_or_else(|| self.missing(key, field))
    }

    /// A string.
    pub(crate) fn string(&self, key: &str, field: &str) -> Result<Option<String>> {
        match self {
            Self::Gguf { metadata, .. } => {
                Ok(metadata.str(&Self::gguf_key(metadata, key)?)?.map(str::to_owned))
            }
            Self::Hf { json, .. } => Self::field(json, field)
                .map(|v| v.as_str().map(str::to_owned).ok_or_else(|| bad(field, "a string", v)))
                .transpose(),
        }
    }

    /// A list of strings of config.json; GGUF has none that architectures read.
    pub(crate) fn hf_strings(&self, field: &str) -> Result<Option<Vec<String>>> {
        let Self::Hf { json, .. } = self else { return Ok(None) };
        let Some(value) = Self::field(json, field) else { return Ok(None) };
        let strings = value
            .as_array()
            .and_then(|a| a.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<_>>());
        strings.map(Some).ok_or_else(|| bad(field, "a list of strings", value))
    }

    /// A boolean of config.json.
    pub(crate) fn hf_bool(&self, field: &str) -> Result<Option<bool>> {
        let Self::Hf { json, .. } = self else { return Ok(None) };
        Self::field(json, field)
            .map(|v| v.as_bool().ok_or_else(|| bad(field, "true or false", v)))
            .transpose()
    }

    /// Number of layers.
    pub(crate) fn num_layers(&self) -> Result<usize> {
        let layers = self.need_usize("block_count", "num_hidden_layers")?;
        if layers > MAX_LAYERS {
            return Err(ModelError::BadKey {
                key: "block_count".to_owned(),
                expected: format!("at most {MAX_LAYERS} layers"),
                found: layers.to_string(),
            });
        }
        Ok(layers)
    }

    /// Tokens in the embedding table: the table itself says it best.
    pub(crate) fn vocab_size(&self) -> Result<usize> {
        let name = crate::weights::names(self.is_gguf()).embedding;
        let shape = self.tensors().shape(name);
        let shape = shape.ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        Ok(shape.first().copied().unwrap_or(0))
    }

    /// (query heads, KV heads, head size), with the usual defaults.
    pub(crate) fn heads(&self, hidden_size: usize) -> Result<(usize, usize, usize)> {
        let query_heads = self.need_usize("attention.head_count", "num_attention_heads")?;
        let kv_heads =
            self.usize("attention.head_count_kv", "num_key_value_heads")?.unwrap_or(query_heads);
        let head_dim = match self.usize("attention.key_length", "head_dim")? {
            Some(dim) => dim,
            None => hidden_size.checked_div(query_heads).unwrap_or(0),
        };
        if let Some(value_length) = self.usize("attention.value_length", "v_head_dim")?
            && value_length != head_dim
        {
            return Err(ModelError::Unsupported {
                what: format!("values of {value_length} channels beside keys of {head_dim}"),
            });
        }
        if let Some(rotary) = self.usize("rope.dimension_count", "rotary_dim")?
            && rotary != head_dim
        {
            return Err(ModelError::Unsupported {
                what: format!("RoPE over {rotary} of {head_dim} channels"),
            });
        }
        if let Some(partial) = self.f32("rope.partial", "partial_rotary_factor")?
            && partial != 1.0
        {
            return Err(ModelError::Unsupported { what: format!("RoPE over {partial} of a head") });
        }
        Ok((query_heads, kv_heads, head_dim))
    }

    fn missing(&self, key: &str, field: &str) -> ModelError {
        let key = match self {
            Self::Gguf { metadata, .. } => {
                Self::gguf_key(metadata, key).unwrap_or_else(|_| key.to_owned())
            }
            Self::Hf { .. } => format!("{field} (config.json)"),
        };
        ModelError::MissingKey { key }
    }
}

fn bad(field: &str, expected: &str, found: &Json) -> ModelError {
    ModelError::BadKey {
        key: format!("{field} (config.json)"),
        expected: expected.to_owned(),
        found: found.to_string().chars().take(80).collect(),
    }
}
