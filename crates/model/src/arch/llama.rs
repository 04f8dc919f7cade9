//! Llama 2 and 3, Mistral, SmolLM: pre-norm, SiLU gate, grouped-query attention.

use kvasir_kernels::Activation;

use super::{Config, DecoderSpec, LayerSpec, rope};
use crate::error::{ModelError, Result};

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let hidden_size = config.need_usize("embedding_length", "hidden_size")?;
    let (query_heads, kv_heads, head_dim) = config.heads(hidden_size)?;
    if config.usize("expert_count", "num_local_experts")?.is_some_and(|n| n > 0) {
        return Err(ModelError::Unsupported { what: "mixture of experts".to_owned() });
    }
    let window = config.usize("attention.sliding_window", "sliding_window")?.filter(|w| *w > 0);
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
        // llama.cpp's converter reorders the rows of Llama's query and key weights.
        adjacent_pairs: config.is_gguf(),
        layers: vec![LayerSpec { window, rope: Some(0) }; config.num_layers()?],
        ropes: vec![rope::main(config, 10_000.0)?],
    })
}
