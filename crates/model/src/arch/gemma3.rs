//! Gemma 3 (text): scaled embeddings, normalised queries and keys, norms before and after each block,
//! GELU gate, five sliding-window layers (local RoPE base) to one global layer.

use kvasir_kernels::{Activation, RopeScaling};

use super::{Config, DecoderSpec, LayerSpec, RopeSpec, rope};
use crate::error::{ModelError, Result};

/// Every sixth layer sees everything; files that do not say otherwise mean this.
const PATTERN: usize = 6;
const GLOBAL_ROPE: usize = 0;
const LOCAL_ROPE: usize = 1;

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let hidden_size = config.need_usize("embedding_length", "hidden_size")?;
    let (query_heads, kv_heads, head_dim) = config.heads(hidden_size)?;
    let layers = config.num_layers()?;
    let window = config.need_usize("attention.sliding_window", "sliding_window")?;
    let local_base = config.f32("rope.freq_base_swa", "rope_local_base_freq")?.unwrap_or(10_000.0);
    let score_scale = match config.f32("", "query_pre_attn_scalar")? {
        Some(scalar) => 1.0 / scalar.sqrt(),
        // GGUF has no key for it: of all sizes only 27B (62 layers) scales by the width per head.
        None if layers == 62 => 1.0 / (hidden_size as f32 / query_heads as f32).sqrt(),
        None => 1.0 / (head_dim as f32).sqrt(),
    };
    Ok(DecoderSpec {
        architecture: "gemma3",
        vocab_size: config.vocab_size()?,
        hidden_size,
        ffn_size: config.need_usize("feed_forward_length", "intermediate_size")?,
        query_heads,
        kv_heads,
        head_dim,
        context_length: config.need_usize("context_length", "max_position_embeddings")?,
        norm_eps: config.need_f32("attention.layer_norm_rms_epsilon", "rms_norm_eps")?,
        // llama.cpp's converter adds the 1; safetensors leave it to the reader.
        norm_offset: if config.is_gguf() { 0.0 } else { 1.0 },
        activation: Activation::GeluTanh,
        embedding_scale: (hidden_size as f32).sqrt(),
        score_scale,
        score_cap: config.f32("attn_logit_softcapping", "attn_logit_softcapping")?,
        logit_cap: config.f32("final_logit_softcapping", "final_logit_softcapping")?,
        qk_norm: true,
        qkv_bias: config.hf_bool("attention_bias")?.unwrap_or(false),
        post_norms: true,
        adjacent_pairs: false,
        layers: layer_types(config, layers, window)?,
        ropes: vec![
            rope::main(config, 1_000_000.0)?,
            RopeSpec { base: local_base, scaling: RopeScaling::None },
        ],
    })
}

fn layer_types(config: &Config<'_>, layers: usize, window: usize) -> Result<Vec<LayerSpec>> {
    let local = LayerSpec { window: Some(window), rope: Some(LOCAL_ROPE) };
    let global = LayerSpec { window: None, rope: Some(GLOBAL_ROPE) };
    if let Some(types) = config.hf_strings("layer_types")? {
        if types.len() != layers {
            return Err(ModelError::BadKey {
                key: "layer_types (config.json)".to_owned(),
                expected: format!("{layers} entries"),
                found: types.len().to_string(),
            });
        }
        return types
            .iter()
            .map(|t| match t.as_str() {
                "sliding_attention" => Ok(local.clone()),
                "full_attention" => Ok(global.clone()),
                other => Err(ModelError::Unsupported { what: format!("layer type '{other}'") }),
            })
            .collect();
    }
    let pattern = config
        .usize("attention.sliding_window_pattern", "sliding_window_pattern")?
        .filter(|p| *p > 0)
        .unwrap_or(PATTERN);
    let layer = |i: usize| if (i + 1).is_multiple_of(pattern) { &global } else { &local };
    Ok((0..layers).map(|i| layer(i).clone()).collect())
}
