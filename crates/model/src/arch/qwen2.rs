//! Qwen2 and Qwen2.5: Llama with biases on q, k, v.

use super::config::HeadDefaults;
use super::{Config, DecoderSpec, LayerSpec, llama};
use crate::error::Result;

/// transformers' defaults where config.json is silent.
const HEADS: HeadDefaults = HeadDefaults { query_heads: None, kv_heads: Some(32), head_dim: None };
const WINDOW: usize = 4096;
const MAX_WINDOW_LAYERS: usize = 28;

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let base = llama::base(config, HEADS)?;
    Ok(DecoderSpec {
        architecture: "qwen2",
        qkv_bias: true,
        layers: layers(config, base.layers.len())?,
        ..base
    })
}

/// `sliding_window` stands in every config.json; `use_sliding_window` says whether it is meant, and then
/// `layer_types` for which layers, or else `max_window_layers`: those from that one on.
pub(super) fn layers(config: &Config<'_>, layers: usize) -> Result<Vec<LayerSpec>> {
    let window = match config.hf_bool("use_sliding_window")? {
        Some(true) => config.usize_or("", "sliding_window", Some(WINDOW))?.filter(|w| *w > 0),
        _ => None,
    };
    let first = config.usize_or("", "max_window_layers", Some(MAX_WINDOW_LAYERS))?;
    let first = first.unwrap_or(MAX_WINDOW_LAYERS);
    let sliding = match config.hf_sliding_layers(layers)? {
        Some(sliding) => sliding,
        None => (0..layers).map(|i| i >= first).collect(),
    };
    let layer = |sliding: bool| LayerSpec { window: window.filter(|_| sliding), rope: Some(0) };
    Ok(sliding.into_iter().map(layer).collect())
}
