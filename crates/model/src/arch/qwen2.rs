//! Qwen2 and Qwen2.5: Llama with biases on q, k, v.

use super::{Config, DecoderSpec, LayerSpec, llama, rope};
use crate::error::Result;

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let layers = config.num_layers()?;
    // `sliding_window` stands in every config.json; `use_sliding_window` says whether it is meant, and
    // then for the layers after `max_window_layers`.
    let window = match config.hf_bool("use_sliding_window")? {
        Some(true) => config.usize("", "sliding_window")?.filter(|w| *w > 0),
        _ => None,
    };
    let full = config.usize("", "max_window_layers")?.unwrap_or(layers);
    let layer = |i: usize| LayerSpec { window: window.filter(|_| i >= full), rope: Some(0) };
    Ok(DecoderSpec {
        architecture: "qwen2",
        qkv_bias: true,
        adjacent_pairs: false,
        layers: (0..layers).map(layer).collect(),
        ropes: vec![rope::main(config, 1_000_000.0)?],
        ..llama::spec(config)?
    })
}
