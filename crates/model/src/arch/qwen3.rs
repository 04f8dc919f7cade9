//! Qwen3 (dense): Qwen2 without biases, with normalised queries and keys.

use super::config::HeadDefaults;
use super::{Config, DecoderSpec, llama, qwen2};
use crate::error::Result;

/// transformers' defaults where config.json is silent: the head size does not follow from the width.
const HEADS: HeadDefaults =
    HeadDefaults { query_heads: None, kv_heads: Some(32), head_dim: Some(128) };

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let base = llama::base(config, HEADS)?;
    Ok(DecoderSpec {
        architecture: "qwen3",
        qk_norm: true,
        layers: qwen2::layers(config, base.layers.len())?,
        ..base
    })
}
