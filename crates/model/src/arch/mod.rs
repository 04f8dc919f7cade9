//! Architectures: one file each, turning a model's metadata into a [`DecoderSpec`]. The forward pass
//! (`decoder.rs`) is one for all: what differs is in the spec.
//!
//! To add an architecture: a file here with `fn spec(&Config) -> Result<DecoderSpec>`, a line in
//! `ARCHITECTURES`, and tiny golden models (`scripts/make_arch_goldens.py`).

mod config;
mod gemma3;
mod llama;
mod qwen2;
mod qwen3;
mod rope;

use kvasir_kernels::{Activation, RopeScaling};

pub(crate) use config::Config;

use crate::error::{ModelError, Result};

/// One row of RoPE parameters; layers refer to it by index.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// θ.
    pub base: f32,
    /// Context extension.
    pub scaling: RopeScaling,
}

/// What one layer does differently from its neighbours.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Sliding window in tokens, or all.
    pub window: Option<usize>,
    /// Index into [`DecoderSpec::ropes`].
    pub rope: Option<usize>,
}

/// A decoder-only transformer, as far as the forward pass needs to know it.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Architecture name.
    pub architecture: &'static str,
    /// Tokens in the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub ffn_size: usize,
    /// Query heads.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Longest context of training.
    pub context_length: usize,
    /// ε of the RMS norms.
    pub norm_eps: f32,
    /// Added to every norm weight (Gemma's safetensors store weight − 1).
    pub norm_offset: f32,
    /// Feed-forward gate.
    pub activation: Activation,
    /// Factor of embeddings (Gemma: √hidden).
    pub embedding_scale: f32,
    /// Factor of query · key.
    pub score_scale: f32,
    /// Soft cap of attention scores.
    pub score_cap: Option<f32>,
    /// Soft cap of logits.
    pub logit_cap: Option<f32>,
    /// Whether queries and keys are normalised per head.
    pub qk_norm: bool,
    /// Whether q, k, v must have biases. Any linear layer's bias is used where the file has one.
    pub qkv_bias: bool,
    /// Whether attention and feed-forward outputs are normalised before they are added (Gemma).
    pub post_norms: bool,
    /// Whether query and key weights pair adjacent rows for RoPE (GGUF's Llama) and must be reordered.
    pub adjacent_pairs: bool,
    /// All layers.
    pub layers: Vec<LayerSpec>,
    /// RoPE parameters.
    pub ropes: Vec<RopeSpec>,
}

type SpecFn = fn(&Config<'_>) -> Result<DecoderSpec>;

/// GGUF name, config.json `model_type`s, constructor.
const ARCHITECTURES: &[(&str, &[&str], SpecFn)] = &[
    ("llama", &["llama", "mistral"], llama::spec),
    ("qwen2", &["qwen2"], qwen2::spec),
    ("qwen3", &["qwen3"], qwen3::spec),
    ("gemma3", &["gemma3_text", "gemma3"], gemma3::spec),
];

/// Reads the spec of a model.
///
/// # Errors
/// [`ModelError::UnknownArchitecture`] with the list of known ones; missing or impossible values by
/// name.
pub(crate) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let name = config.architecture()?;
    let found = ARCHITECTURES.iter().find(|(gguf, hf, _)| match config {
        Config::Gguf { .. } => *gguf == name,
        Config::Hf { .. } => hf.contains(&name.as_str()),
    });
    let Some((_, _, build)) = found else {
        let known: Vec<&str> = ARCHITECTURES
            .iter()
            .flat_map(
                |(gguf, hf, _)| if config.is_gguf() { std::slice::from_ref(gguf) } else { hf },
            )
            .copied()
            .collect();
        return Err(ModelError::UnknownArchitecture { name, known: known.join(", ") });
    };
    check_checkpoint(config)?;
    let spec = build(config)?;
    validate(&spec)?;
    Ok(spec)
}

/// What config.json says about its weights.
fn check_checkpoint(config: &Config<'_>) -> Result<()> {
    if config.has_hf("quantization_config") {
        let method = config.string("", "quantization_config.quant_method")?;
        return Err(ModelError::Unsupported {
            what: format!(
                "safetensors quantised with '{}'; use the original weights or a GGUF file",
                method.as_deref().unwrap_or("?")
            ),
        });
    }
    let head = crate::tensor_names::names(config.is_gguf(), config.tensors()).output;
    // A head that is there is used even if the embeddings are said to be tied, as transformers 5 does.
    if config.hf_bool("tie_word_embeddings")? == Some(false)
        && config.tensors().shape(head).is_none()
    {
        return Err(ModelError::MissingTensor { name: head.to_owned() });
    }
    Ok(())
}

/// Sizes that later code divides by or allocates from.
fn validate(spec: &DecoderSpec) -> Result<()> {
    /// Far above any model, far below any overflow.
    const LIMIT: usize = 1 << 24;
    let sizes = [
        ("vocabulary", spec.vocab_size),
        ("hidden size", spec.hidden_size),
        ("feed-forward size", spec.ffn_size),
        ("query heads", spec.query_heads),
        ("KV heads", spec.kv_heads),
        ("head size", spec.head_dim),
        ("layers", spec.layers.len()),
        ("context length", spec.context_length),
    ];
    for (what, size) in sizes {
        if size == 0 || size > LIMIT {
            return Err(ModelError::BadKey {
                key: what.to_owned(),
                expected: format!("between 1 and {LIMIT}"),
                found: size.to_string(),
            });
        }
    }
    if !spec.query_heads.is_multiple_of(spec.kv_heads) || !spec.head_dim.is_multiple_of(2) {
        return Err(ModelError::BadKey {
            key: "heads".to_owned(),
            expected: "query heads that divide among the KV heads, of an even size".to_owned(),
            found: format!(
                "{} query heads, {} KV heads, size {}",
                spec.query_heads, spec.kv_heads, spec.head_dim
            ),
        });
    }
    let numbers = [
        ("norm epsilon", Some(spec.norm_eps)),
        ("score scale", Some(spec.score_scale)),
        ("soft cap of logits", spec.logit_cap),
    ];
    for (what, number) in numbers {
        if let Some(number) = number.filter(|n| !(n.is_finite() && *n > 0.0)) {
            return Err(ModelError::BadKey {
                key: what.to_owned(),
                expected: "a positive number".to_owned(),
                found: number.to_string(),
            });
        }
    }
    for rope in &spec.ropes {
        if let RopeScaling::Factors(factors) = &rope.scaling
            && factors.len() != spec.head_dim / 2
        {
            return Err(ModelError::TensorShape {
                name: "rope_freqs.weight".to_owned(),
                expected: vec![spec.head_dim / 2],
                found: vec![factors.len()],
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
