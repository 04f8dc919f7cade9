//! RoPE parameters from metadata.

use kvasir_kernels::RopeScaling;

use super::{Config, RopeSpec};
use crate::error::{ModelError, Result};

/// Names both kinds of files use for "rope_scaling" in config.json; newer ones say "rope_parameters".
const FIELDS: [&str; 2] = ["rope_scaling", "rope_parameters"];

/// The model's main RoPE.
pub(super) fn main(config: &Config<'_>, default_base: f32) -> Result<RopeSpec> {
    let base = match config.f32("rope.freq_base", "rope_theta")? {
        Some(base) => base,
        None => config.f32("", "rope_parameters.rope_theta")?.unwrap_or(default_base),
    };
    Ok(RopeSpec { base, scaling: scaling(config)? })
}

fn scaling(config: &Config<'_>) -> Result<RopeScaling> {
    if config.is_gguf() {
        return gguf_scaling(config);
    }
    for prefix in FIELDS {
        let text = |name: &str| config.string("", &format!("{prefix}.{name}"));
        let number = |name: &str| config.f32("", &format!("{prefix}.{name}"));
        let need = |name: &str| {
            number(name)?.ok_or_else(|| ModelError::MissingKey {
                key: format!("{prefix}.{name} (config.json)"),
            })
        };
        let Some(kind) = text("rope_type")?.map_or_else(|| text("type"), |k| Ok(Some(k)))? else {
            continue;
        };
        return Ok(match kind.as_str() {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: need("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: need("original_max_position_embeddings")?,
            },
            "yarn" => RopeScaling::Yarn {
                factor: need("factor")?,
                original_context: match number("original_max_position_embeddings")? {
                    Some(context) => context,
                    None => config.need_usize("", "max_position_embeddings")? as f32,
                },
                beta_fast: number("beta_fast")?.unwrap_or(32.0),
                beta_slow: number("beta_slow")?.unwrap_or(1.0),
                attention_factor: number("attention_factor")?,
            },
            other => return Err(unsupported(other)),
        });
    }
    Ok(RopeScaling::None)
}

fn gguf_scaling(config: &Config<'_>) -> Result<RopeScaling> {
    // Llama 3's rule comes as a tensor of divisors.
    const FACTORS: &str = "rope_freqs.weight";
    if config.tensors().shape(FACTORS).is_some() {
        return Ok(RopeScaling::Factors(config.tensors().read_f32(FACTORS)?));
    }
    let factor = config.f32("rope.scaling.factor", "")?;
    let kind = config.string("rope.scaling.type", "")?;
    Ok(match (kind.as_deref(), factor) {
        (None | Some("none"), None) | (_, Some(1.0)) | (Some("none"), _) => RopeScaling::None,
        (Some("linear") | None, Some(factor)) => RopeScaling::Linear { factor },
        (Some("yarn"), Some(factor)) => RopeScaling::Yarn {
            factor,
            original_context: match config.f32("rope.scaling.original_context_length", "")? {
                Some(context) => context,
                None => config.need_usize("context_length", "")? as f32,
            },
            beta_fast: config.f32("rope.scaling.yarn_beta_fast", "")?.unwrap_or(32.0),
            beta_slow: config.f32("rope.scaling.yarn_beta_slow", "")?.unwrap_or(1.0),
            attention_factor: config.f32("rope.scaling.attn_factor", "")?,
        },
        (Some("linear" | "yarn"), None) => {
            return Err(ModelError::MissingKey { key: "rope.scaling.factor".to_owned() });
        }
        (Some(other), _) => return Err(unsupported(other)),
    })
}

fn unsupported(kind: &str) -> ModelError {
    ModelError::Unsupported { what: format!("RoPE scaling '{kind}' (known: linear, llama3, yarn)") }
}
