//! Llama 2 and 3, Mistral, SmolLM: pre-norm, SiLU gate, grouped-query attention.

use kvasir_kernels::Activation;

use super::config::HeadDefaults;
use super::{Config, DecoderSpec, LayerSpec, rope};
use crate::error::{ModelError, Result};

/// transformers' defaults for Mistral where config.json is silent.
const MISTRAL_WINDOW: usize = 4096;
const MISTRAL_HEADS: HeadDefaults =
    HeadDefaults { query_heads: None, kv_heads: Some(8), head_dim: None };

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    if config.is_gguf() {
        let window = config.usize("attention.sliding_window", "")?;
        // llama.cpp's converter reorders the rows of Llama's query and key weights.
        let base = base(config, HeadDefaults::default())?;
        return Ok(DecoderSpec { adjacent_pairs: true, ..windowed(base, window) });
    }
    if config.architecture()? != "mistral" {
        // Llama itself has no window, whatever its config.json says.
        return base(config, HeadDefaults::default());
    }
    let window = config.usize_or("", "sliding_window", Some(MISTRAL_WINDOW))?;
    Ok(windowed(base(config, MISTRAL_HEADS)?, window))
}

/// The same sliding window for all layers; 0 is none.
fn windowed(base: DecoderSpec, window: Option<usize>) -> DecoderSpec {
    let layer = LayerSpec { window: window.filter(|w| *w > 0), rope: Some(0) };
    DecoderSpec { layers: vec![layer; base.layers.len()], ..base }
}

/// What Llama, Qwen2 and Qwen3 share: no windows, split pairs.
pub(super) fn base(config: &Config<'_>, heads: HeadDefaults) -> Result<DecoderSpec> {
    if config.usize("expert_count", "num_local_experts")?.is_some_and(|n| n > 0) {
        return Err(ModelError::Unsupported { what: "mixture of experts".to_owned() });
    }
    config.expect_activation("hidden_act", &["silu", "swish"])?;
    let hidden_size = config.need_usize("embedding_length", "hidden_size")?;
    let (query_heads, kv_heads, head_dim) = config.heads(hidden_size, heads)?;
    Ok(DecoderSpec {
        architecture: "llama",
        vocab_size: config.vocab_size()?,
        hidden_size,
        ffn_size: config.need_usize("feed_forward_length", "intermediate_size")?,
        query_heads,
        kv_heads,
        head_dim,
        context_length: config.need_usize("context_length", "max_position_embeddings")?,
        norm_eps: config.need_f32("attention.layer_norm_rms_epsilon", "rms_norm_eps")?,
        norm_offset: 0.0,
        activation: Activation::Silu,
        embedding_scale: 1.0,
        score_scale: 1.0 / (head_dim as f32).sqrt(),
        score_cap: None,
        logit_cap: None,
        qk_norm: false,
        qkv_bias: config.hf_bool("attention_bias")?.unwrap_or(false),
        post_norms: false,
        adjacent_pairs: false,
        layers: vec![LayerSpec { window: None, rope: Some(0) }; config.num_layers()?],
        ropes: vec![rope::main(config)?],
    })
}
