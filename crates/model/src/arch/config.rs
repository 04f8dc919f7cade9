//! One view of two kinds of metadata: GGUF keys and config.json fields.

use serde_json::Value as Json;

use crate::error::{ModelError, Result};
use crate::gguf::{Metadata, Value};
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

/// What transformers' config class of a model says where config.json is silent. Published files omit
/// values that equal it (Gemma 3 most of all).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HeadDefaults {
    pub(crate) query_heads: Option<usize>,
    pub(crate) kv_heads: Option<usize>,
    pub(crate) head_dim: Option<usize>,
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

    /// A field that is there and not `null`. Multi-modal models nest the decoder's part.
    fn field<'j>(json: &'j Json, path: &str) -> Option<&'j Json> {
        let look = |root: &'j Json| {
            path.split('.').try_fold(root, |at, name| at.get(name)).filter(|v| !v.is_null())
        };
        look(json).or_else(|| json.get("text_config").and_then(look))
    }

    /// Whether config.json has the field with a value other than `null` and `{}`.
    pub(crate) fn has_hf(&self, field: &str) -> bool {
        let Self::Hf { json, .. } = self else { return false };
        let filled = |v: &Json| v.as_object().is_none_or(|object| !object.is_empty());
        Self::field(json, field).is_some_and(filled)
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

    /// A non-negative integer that config.json may leave to its class: a field that is absent (`null` is
    /// not) is `default`.
    pub(crate) fn usize_or(
        &self,
        key: &str,
        field: &str,
        default: Option<usize>,
    ) -> Result<Option<usize>> {
        if self.is_absent_in_hf(field) {
            return Ok(default);
        }
        self.usize(key, field)
    }

    /// Whether this is a config.json that does not have the field, not even as `null`.
    pub(crate) fn is_absent_in_hf(&self, field: &str) -> bool {
        let Self::Hf { json, .. } = self else { return false };
        json.get(field).or_else(|| json.get("text_config")?.get(field)).is_none()
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

    /// Booleans or 0 and 1 of a GGUF key that may also hold one number; `None` unless it is an array.
    pub(crate) fn gguf_flags(&self, key: &str) -> Result<Option<Vec<bool>>> {
        let Self::Gguf { metadata, .. } = self else { return Ok(None) };
        Ok(match metadata.get(&Self::gguf_key(metadata, key)?) {
            Some(Value::BoolArray(flags)) => Some(flags.clone()),
            Some(Value::UintArray(flags)) => Some(flags.iter().map(|f| *f != 0).collect()),
            Some(Value::IntArray(flags)) => Some(flags.iter().map(|f| *f != 0).collect()),
            _ => None,
        })
    }

    /// Number of layers.
    pub(crate) fn num_layers(&self) -> Result<usize> {
        const NAMES: (&str, &str) = ("block_count", "num_hidden_layers");
        let layers = self.need_usize(NAMES.0, NAMES.1)?;
        if layers > MAX_LAYERS {
            return Err(ModelError::BadKey {
                key: self.name_of(NAMES.0, NAMES.1),
                expected: format!("at most {MAX_LAYERS} layers"),
                found: layers.to_string(),
            });
        }
        Ok(layers)
    }

    /// Layer types of config.json: whether each layer has a sliding window.
    pub(crate) fn hf_sliding_layers(&self, layers: usize) -> Result<Option<Vec<bool>>> {
        let Some(types) = self.hf_strings("layer_types")? else { return Ok(None) };
        check_layers("layer_types (config.json)", types.len(), layers)?;
        let sliding = |ty: &String| match ty.as_str() {
            "sliding_attention" => Ok(true),
            "full_attention" => Ok(false),
            other => Err(ModelError::Unsupported { what: format!("layer type '{other}'") }),
        };
        types.iter().map(sliding).collect::<Result<_>>().map(Some)
    }

    /// Fails unless config.json's activation is the one the architecture computes.
    pub(crate) fn expect_activation(&self, field: &str, known: &[&str]) -> Result<()> {
        match self.string_of_hf(field)? {
            Some(name) if !known.contains(&name.as_str()) => Err(ModelError::Unsupported {
                what: format!("activation '{name}' ({field}; known: {})", known.join(", ")),
            }),
            _ => Ok(()),
        }
    }

    fn string_of_hf(&self, field: &str) -> Result<Option<String>> {
        if self.is_gguf() { Ok(None) } else { self.string("", field) }
    }

    /// Tokens in the embedding table: the table itself says it best.
    pub(crate) fn vocab_size(&self) -> Result<usize> {
        let name = crate::tensor_names::names(self.is_gguf(), self.tensors()).embedding;
        let shape = self.tensors().shape(name);
        let shape = shape.ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        Ok(shape.first().copied().unwrap_or(0))
    }

    /// (query heads, KV heads, head size).
    ///
    /// # Errors
    /// Values of another size than keys; RoPE over a part of a head.
    pub(crate) fn heads(
        &self,
        hidden_size: usize,
        defaults: HeadDefaults,
    ) -> Result<(usize, usize, usize)> {
        let (key, field) = ("attention.head_count", "num_attention_heads");
        let query_heads = self
            .usize_or(key, field, defaults.query_heads)?
            .ok_or_else(|| self.missing(key, field))?;
        let kv_heads = self
            .usize_or("attention.head_count_kv", "num_key_value_heads", defaults.kv_heads)?
            .unwrap_or(query_heads);
        let head_dim = match self.usize_or("attention.key_length", "head_dim", defaults.head_dim)? {
            Some(dim) => dim,
            None => hidden_size.checked_div(query_heads).unwrap_or(0),
        };
        let unsupported = |what| Err(ModelError::Unsupported { what });
        if let Some(value_length) = self.usize("attention.value_length", "v_head_dim")?
            && value_length != head_dim
        {
            return unsupported(format!(
                "values of {value_length} channels beside keys of {head_dim}"
            ));
        }
        if let Some(rotary) = self.usize("rope.dimension_count", "rotary_dim")?
            && rotary != head_dim
        {
            return unsupported(format!("RoPE over {rotary} of {head_dim} channels"));
        }
        Ok((query_heads, kv_heads, head_dim))
    }

    /// What a message calls a value.
    pub(crate) fn name_of(&self, key: &str, field: &str) -> String {
        match self {
            Self::Gguf { metadata, .. } => {
                Self::gguf_key(metadata, key).unwrap_or_else(|_| key.to_owned())
            }
            Self::Hf { .. } => format!("{field} (config.json)"),
        }
    }

    pub(crate) fn missing(&self, key: &str, field: &str) -> ModelError {
        ModelError::MissingKey { key: self.name_of(key, field) }
    }
}

/// Fails unless a list has one entry a layer.
pub(crate) fn check_layers(key: &str, found: usize, layers: usize) -> Result<()> {
    if found == layers {
        return Ok(());
    }
    Err(ModelError::BadKey {
        key: key.to_owned(),
        expected: format!("{layers} entries, one a layer"),
        found: found.to_string(),
    })
}

fn bad(field: &str, expected: &str, found: &Json) -> ModelError {
    ModelError::BadKey {
        key: format!("{field} (config.json)"),
        expected: expected.to_owned(),
        found: found.to_string().chars().take(80).collect(),
    }
}
