//! Gemma 3 (text): scaled embeddings, normalised queries and keys, norms before and after each block,
//! GELU gate, five sliding-window layers (with a RoPE of their own) to one global layer.

use kvasir_kernels::Activation;

use super::config::{HeadDefaults, check_layers};
use super::{Config, DecoderSpec, LayerSpec, rope};
use crate::error::{ModelError, Result};

/// Every sixth layer sees everything; files that do not say otherwise mean this.
const PATTERN: usize = 6;
const GLOBAL_ROPE: usize = 0;
const LOCAL_ROPE: usize = 1;
/// transformers' defaults where config.json is silent, as the published ones are on most of these.
const HEADS: HeadDefaults =
    HeadDefaults { query_heads: Some(8), kv_heads: Some(4), head_dim: Some(256) };
const WINDOW: usize = 4096;
const CONTEXT: usize = 131_072;
const NORM_EPS: f32 = 1e-6;
const QUERY_PRE_ATTN_SCALAR: f32 = 256.0;

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    if config.hf_bool("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(ModelError::Unsupported { what: "bidirectional attention".to_owned() });
    }
    config.expect_activation("hidden_activation", &["gelu_pytorch_tanh"])?;
    let hidden_size = config.need_usize("embedding_length", "hidden_size")?;
    let (query_heads, kv_heads, head_dim) = config.heads(hidden_size, HEADS)?;
    let layers = config.num_layers()?;
    let score_scale = match config.f32("", "query_pre_attn_scalar")? {
        Some(scalar) => 1.0 / scalar.sqrt(),
        None if !config.is_gguf() => 1.0 / QUERY_PRE_ATTN_SCALAR.sqrt(),
        // GGUF has no key for it: of all sizes only 27B (62 layers) scales by the width per head.
        None if layers == 62 => 1.0 / (hidden_size as f32 / query_heads as f32).sqrt(),
        None => 1.0 / (head_dim as f32).sqrt(),
    };
    let (key, field) = ("context_length", "max_position_embeddings");
    let context_length = config.usize_or(key, field, Some(CONTEXT))?;
    let (eps_key, eps_field) = ("attention.layer_norm_rms_epsilon", "rms_norm_eps");
    let norm_eps = match config.f32(eps_key, eps_field)? {
        None if config.is_absent_in_hf(eps_field) => Some(NORM_EPS),
        eps => eps,
    };
    Ok(DecoderSpec {
        architecture: "gemma3",
        vocab_size: config.vocab_size()?,
        hidden_size,
        ffn_size: config.need_usize("feed_forward_length", "intermediate_size")?,
        query_heads,
        kv_heads,
        head_dim,
        context_length: context_length.ok_or_else(|| config.missing(key, field))?,
        norm_eps: norm_eps.ok_or_else(|| config.missing(eps_key, eps_field))?,
        // llama.cpp's converter adds the 1; safetensors leave it to the reader.
        norm_offset: if config.is_gguf() { 0.0 } else { 1.0 },
        activation: Activation::GeluTanh,
        embedding_scale: (hidden_size as f32).sqrt(),
        score_scale,
        // Gemma 2's; where a Gemma 3 file names one, neither transformers nor llama.cpp applies it.
        score_cap: None,
        logit_cap: config
            .f32("final_logit_softcapping", "final_logit_softcapping")?
            .filter(|cap| *cap != 0.0),
        qk_norm: true,
        qkv_bias: config.hf_bool("attention_bias")?.unwrap_or(false),
        post_norms: true,
        adjacent_pairs: false,
        layers: layer_types(config, layers)?,
        ropes: rope::global_and_local(config)?.into(),
    })
}

fn layer_types(config: &Config<'_>, layers: usize) -> Result<Vec<LayerSpec>> {
    let (key, field) = ("attention.sliding_window", "sliding_window");
    let Some(window) = config.usize_or(key, field, Some(WINDOW))?.filter(|w| *w > 0) else {
        if !config.is_gguf() {
            return Err(config.missing(key, field));
        }
        // llama.cpp's converter leaves the key out where all layers are global.
        return Ok(vec![LayerSpec { window: None, rope: Some(GLOBAL_ROPE) }; layers]);
    };
    let layer = |sliding: bool| match sliding {
        true => LayerSpec { window: Some(window), rope: Some(LOCAL_ROPE) },
        false => LayerSpec { window: None, rope: Some(GLOBAL_ROPE) },
    };
    Ok(sliding_layers(config, layers)?.into_iter().map(layer).collect())
}

/// Whether each layer has a sliding window.
fn sliding_layers(config: &Config<'_>, layers: usize) -> Result<Vec<bool>> {
    const KEY: &str = "attention.sliding_window_pattern";
    if let Some(sliding) = config.hf_sliding_layers(layers)? {
        return Ok(sliding);
    }
    if let Some(sliding) = config.gguf_flags(KEY)? {
        check_layers(&config.name_of(KEY, ""), sliding.len(), layers)?;
        return Ok(sliding);
    }
    let pattern = config.usize(KEY, "sliding_window_pattern")?.unwrap_or(PATTERN);
    // As llama.cpp has it, 0 is a pattern without global layers.
    Ok((0..layers).map(|i| pattern == 0 || !(i + 1).is_multiple_of(pattern)).collect())
}
