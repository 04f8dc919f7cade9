//! What a token costs in the KV cache.

use kvasir_model::Result;
use kvasir_model::gguf::{Metadata, Value};
use serde::Serialize;

/// Bytes of an f16 value.
const F16_BYTES: usize = 2;

/// Shape of the KV cache of one token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct KvSize {
    /// Layers.
    pub(crate) layers: usize,
    /// KV heads of all layers together.
    pub(crate) kv_heads: usize,
    /// Values of a key per head.
    pub(crate) key_length: usize,
    /// Values of a value per head.
    pub(crate) value_length: usize,
    /// Keys and values of all layers in f16.
    pub(crate) bytes_per_token_f16: usize,
}

impl KvSize {
    /// From the metadata of a file; `None` where it does not describe attention. Fails on keys of
    /// a wrong type.
    pub(crate) fn of(metadata: &Metadata) -> Result<Option<Self>> {
        let Some(architecture) = metadata.str("general.architecture")? else { return Ok(None) };
        let number = |name: &str| metadata.usize(&format!("{architecture}.{name}"));
        let (Some(layers), Some(heads)) = (
            number("block_count")?,
            per_layer(metadata, &format!("{architecture}.attention.head_count"))?,
        ) else {
            return Ok(None);
        };
        let kv_heads = per_layer(metadata, &format!("{architecture}.attention.head_count_kv"))?
            .unwrap_or_else(|| heads.clone());
        let head_length = match number("embedding_length")? {
            Some(width) => heads.largest().filter(|heads| *heads > 0).map(|heads| width / heads),
            None => None,
        };
        let (Some(key_length), Some(value_length)) = (
            number("attention.key_length")?.or(head_length),
            number("attention.value_length")?.or(head_length),
        ) else {
            return Ok(None);
        };
        // A file may claim anything; a size that no machine has is no size.
        let size = || {
            let kv_heads = kv_heads.total(layers)?;
            let values = kv_heads.checked_mul(key_length.checked_add(value_length)?)?;
            let bytes_per_token_f16 = values.checked_mul(F16_BYTES)?;
            Some(Self { layers, kv_heads, key_length, value_length, bytes_per_token_f16 })
        };
        Ok(size())
    }
}

/// A number that is the same in all layers or given for each.
#[derive(Debug, Clone)]
enum PerLayer {
    Same(usize),
    Each(Vec<usize>),
}

impl PerLayer {
    fn total(&self, layers: usize) -> Option<usize> {
        match self {
            Self::Same(n) => n.checked_mul(layers),
            Self::Each(all) => all.iter().try_fold(0_usize, |sum, n| sum.checked_add(*n)),
        }
    }

    fn largest(&self) -> Option<usize> {
        match self {
            Self::Same(n) => Some(*n),
            Self::Each(all) => all.iter().max().copied(),
        }
    }
}

fn per_layer(metadata: &Metadata, key: &str) -> Result<Option<PerLayer>> {
    let each: Option<Vec<usize>> = match metadata.get(key) {
        Some(Value::UintArray(all)) => all.iter().map(|n| usize::try_from(*n).ok()).collect(),
        Some(Value::IntArray(all)) => all.iter().map(|n| usize::try_from(*n).ok()).collect(),
        _ => None,
    };
    match each {
        Some(all) => Ok(Some(PerLayer::Each(all))),
        None => Ok(metadata.usize(key)?.map(PerLayer::Same)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(pairs: &[(&str, Value)]) -> Metadata {
        let mut metadata = Metadata::default();
        metadata.insert("general.architecture", Value::String("x".into()));
        for (key, value) in pairs {
            metadata.insert(format!("x.{key}"), value.clone());
        }
        metadata
    }

    fn bytes(pairs: &[(&str, Value)]) -> Option<usize> {
        KvSize::of(&metadata(pairs)).unwrap().map(|size| size.bytes_per_token_f16)
    }

    #[test]
    fn grouped_heads_and_derived_head_length() {
        // SmolLM2-135M: 30 layers, 3 KV heads of 576 / 9 = 64.
        let pairs = [
            ("block_count", Value::Uint(30)),
            ("embedding_length", Value::Uint(576)),
            ("attention.head_count", Value::Uint(9)),
            ("attention.head_count_kv", Value::Uint(3)),
        ];
        assert_eq!(bytes(&pairs), Some(30 * 3 * (64 + 64) * 2));
        // Without head_count_kv every head has its own.
        assert_eq!(bytes(&pairs[..3]), Some(30 * 9 * (64 + 64) * 2));
    }

    #[test]
    fn explicit_lengths_and_heads_per_layer() {
        let pairs = [
            ("block_count", Value::Uint(3)),
            ("attention.head_count", Value::Uint(8)),
            ("attention.head_count_kv", Value::IntArray(vec![2, 0, 1])),
            ("attention.key_length", Value::Uint(192)),
            ("attention.value_length", Value::Uint(128)),
        ];
        assert_eq!(bytes(&pairs), Some(3 * (192 + 128) * 2));
    }

    #[test]
    fn files_that_do_not_say() {
        assert_eq!(KvSize::of(&Metadata::default()).unwrap(), None);
        assert_eq!(bytes(&[("block_count", Value::Uint(3))]), None);
        let zero_heads = [
            ("block_count", Value::Uint(3)),
            ("embedding_length", Value::Uint(64)),
            ("attention.head_count", Value::Uint(0)),
        ];
        assert_eq!(bytes(&zero_heads), None);
        let huge = [
            ("block_count", Value::Uint(u64::MAX)),
            ("attention.head_count", Value::Uint(8)),
            ("attention.key_length", Value::Uint(64)),
            ("attention.value_length", Value::Uint(64)),
        ];
        assert_eq!(bytes(&huge), None);
        let wrong = metadata(&[("block_count", Value::String("3".into()))]);
        assert!(KvSize::of(&wrong).is_err());
    }
}
