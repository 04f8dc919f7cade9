//! Qwen3 (dense): Qwen2 without biases, with normalised queries and keys.

use super::{Config, DecoderSpec, qwen2};
use crate::error::Result;

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    Ok(DecoderSpec {
        architecture: "qwen3",
        qkv_bias: config.hf_bool("attention_bias")?.unwrap_or(false),
        qk_norm: true,
        ..qwen2::spec(config)?
    })
}
