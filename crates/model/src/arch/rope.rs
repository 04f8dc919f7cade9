//! RoPE parameters from metadata.
//!
//! transformers 4 writes `rope_theta` and `rope_scaling` into config.json, transformers 5
//! `rope_parameters`, which holds both (for Gemma 3 once for each layer type). llama.cpp's converter
//! writes `rope.freq_base` and `rope.scaling.*`, and Llama 3's rule as a tensor.

use kvasir_kernels::RopeScaling;

use super::{Config, RopeSpec};
use crate::error::{ModelError, Result};

/// θ where a file is silent, in transformers and llama.cpp alike.
const BASE: f32 = 10_000.0;
/// θ of Gemma 3's global layers where a file is silent.
const GEMMA_GLOBAL_BASE: f32 = 1_000_000.0;
const FACTORS: &str = "rope_freqs.weight";

/// The RoPE of a model that has one.
pub(super) fn main(config: &Config<'_>) -> Result<RopeSpec> {
    if config.is_gguf() {
        return gguf(config, BASE);
    }
    if config.has_hf("rope_parameters.full_attention") {
        return Err(ModelError::Unsupported {
            what: "RoPE parameters by layer type (rope_parameters)".to_owned(),
        });
    }
    // Where both are there, the old name counts.
    let prefix = if config.has_hf("rope_scaling") { "rope_scaling" } else { "rope_parameters" };
    hf(config, &[prefix], "rope_theta", BASE)
}

/// Gemma 3's RoPEs: of its global layers, and of those with a sliding window.
pub(super) fn global_and_local(config: &Config<'_>) -> Result<[RopeSpec; 2]> {
    if config.is_gguf() {
        // `rope.scaling.*` is about global layers.
        let base = config.f32("rope.freq_base_swa", "")?.unwrap_or(BASE);
        let local = RopeSpec { base, scaling: RopeScaling::None };
        return Ok([gguf(config, GEMMA_GLOBAL_BASE)?, local]);
    }
    let global = ["rope_scaling", "rope_parameters.full_attention"];
    Ok([
        hf(config, &global, "rope_theta", GEMMA_GLOBAL_BASE)?,
        hf(config, &["rope_parameters.sliding_attention"], "rope_local_base_freq", BASE)?,
    ])
}

/// From config.json's objects `prefixes` (the first that has a value counts); θ may also be the field
/// `base_field`.
fn hf(
    config: &Config<'_>,
    prefixes: &[&str],
    base_field: &str,
    default_base: f32,
) -> Result<RopeSpec> {
    let text = |name: &str| -> Result<Option<String>> {
        prefixes
            .iter()
            .find_map(|p| config.string("", &format!("{p}.{name}")).transpose())
            .transpose()
    };
    let number = |name: &str| -> Result<Option<f32>> {
        prefixes.iter().find_map(|p| config.f32("", &format!("{p}.{name}")).transpose()).transpose()
    };
    let name_of = |name: &str| {
        let prefix = prefixes.iter().find(|p| config.has_hf(p)).unwrap_or(&"rope_parameters");
        config.name_of("", &format!("{prefix}.{name}"))
    };
    let need =
        |name: &str| number(name)?.ok_or_else(|| ModelError::MissingKey { key: name_of(name) });
    let original_context = || -> Result<f32> {
        let name = "original_max_position_embeddings";
        let given = match config.f32("", name)? {
            Some(context) => Some(context),
            None => number(name)?,
        };
        given.map_or_else(|| config.need_f32("", "max_position_embeddings"), Ok)
    };

    let partial = match number("partial_rotary_factor")? {
        Some(partial) => Some(partial),
        None => config.f32("", "partial_rotary_factor")?,
    };
    if let Some(partial) = partial.filter(|p| *p != 1.0) {
        return Err(ModelError::Unsupported {
            what: format!("RoPE over {partial} of a head (partial_rotary_factor)"),
        });
    }
    let base = match number("rope_theta")? {
        Some(base) => base,
        None => config.f32("", base_field)?.unwrap_or(default_base),
    };
    let kind = match text("rope_type")? {
        Some(kind) => Some(kind),
        None => text("type")?,
    };
    let scaling = match kind.as_deref().unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_context: original_context()?,
        },
        "yarn" => {
            let truncate = prefixes
                .iter()
                .find_map(|p| config.hf_bool(&format!("{p}.truncate")).transpose())
                .transpose()?;
            if truncate == Some(false) {
                return Err(ModelError::Unsupported {
                    what: format!("YaRN without rounded borders ({} false)", name_of("truncate")),
                });
            }
            let original_context = original_context()?;
            let factor = match number("factor")? {
                Some(factor) => factor,
                None => config.need_f32("", "max_position_embeddings")? / original_context,
            };
            // As transformers has it, 0 is not given.
            let given = |name: &str| number(name).map(|n| n.filter(|n| *n != 0.0));
            let from_scales = match (given("mscale")?, given("mscale_all_dim")?) {
                (Some(some), Some(all)) => Some(yarn_scale(factor, some) / yarn_scale(factor, all)),
                _ => None,
            };
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast: given("beta_fast")?.unwrap_or(32.0),
                beta_slow: given("beta_slow")?.unwrap_or(1.0),
                attention_factor: number("attention_factor")?.or(from_scales),
            }
        }
        other => return Err(unsupported(other)),
    };
    checked(config, RopeSpec { base, scaling }, &name_of("factor"))
}

fn gguf(config: &Config<'_>, default_base: f32) -> Result<RopeSpec> {
    let base = config.f32("rope.freq_base", "")?.unwrap_or(default_base);
    let kind = config.string("rope.scaling.type", "")?;
    let factor = match config.f32("rope.scaling.factor", "")? {
        Some(factor) => Some(factor),
        None => config.f32("rope.scale_linear", "")?,
    };
    // As llama.cpp has it, 0 is not given.
    let factor = factor.filter(|f| *f != 0.0);
    // Of keys and of queries, on top of what YaRN does.
    let extra = config.f32("rope.scaling.attn_factor", "")?;
    let scaling = match (kind.as_deref(), factor) {
        (Some("none"), _) => RopeScaling::None,
        (None | Some("linear"), None) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor },
        (Some("yarn"), Some(factor)) => yarn(config, factor, extra)?,
        (Some("yarn"), None) => return Err(config.missing("rope.scaling.factor", "")),
        (Some(other), _) => return Err(unsupported(other)),
    };
    let is_yarn = matches!(scaling, RopeScaling::Yarn { .. });
    if let Some(extra) = extra.filter(|extra| *extra != 1.0 && !is_yarn) {
        return Err(ModelError::Unsupported {
            what: format!("rope.scaling.attn_factor {extra} without YaRN"),
        });
    }
    // Llama 3's rule comes as a tensor of divisors.
    let scaling = match (config.tensors().shape(FACTORS), scaling) {
        (None, scaling) => scaling,
        (Some(_), RopeScaling::Yarn { .. }) => {
            return Err(ModelError::Unsupported { what: format!("{FACTORS} together with YaRN") });
        }
        (Some(_), scaling) => {
            let mut factors = config.tensors().read_f32(FACTORS)?;
            if let RopeScaling::Linear { factor } = scaling {
                factors.iter_mut().for_each(|f| *f *= factor);
            }
            RopeScaling::Factors(factors)
        }
    };
    checked(config, RopeSpec { base, scaling }, &config.name_of("rope.scaling.factor", ""))
}

fn yarn(config: &Config<'_>, factor: f32, extra: Option<f32>) -> Result<RopeScaling> {
    for (key, usual) in
        [("rope.scaling.yarn_ext_factor", 1.0), ("rope.scaling.yarn_log_multiplier", 0.0)]
    {
        if let Some(value) = config.f32(key, "")?.filter(|v| *v != usual) {
            return Err(ModelError::Unsupported { what: format!("{key} {value}") });
        }
    }
    // The converter stores config.json's `attention_factor` here (and its betas below). llama.cpp itself
    // reads these keys for few architectures and takes defaults for others; transformers' meaning counts.
    let stored = config.f32("rope.scaling.yarn_attn_factor", "")?;
    let attention_factor = match (stored, extra) {
        (None, None) => None,
        (stored, extra) => {
            Some(stored.unwrap_or_else(|| yarn_scale(factor, 1.0)) * extra.unwrap_or(1.0))
        }
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_context: match config.f32("rope.scaling.original_context_length", "")? {
            Some(context) => context,
            None => config.need_f32("context_length", "")?,
        },
        beta_fast: config.f32("rope.scaling.yarn_beta_fast", "")?.unwrap_or(32.0),
        beta_slow: config.f32("rope.scaling.yarn_beta_slow", "")?.unwrap_or(1.0),
        attention_factor,
    })
}

/// YaRN's factor of keys and of queries.
fn yarn_scale(factor: f32, weight: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// Fails for numbers that would give frequencies which are none.
fn checked(config: &Config<'_>, spec: RopeSpec, name: &str) -> Result<RopeSpec> {
    let bad = |key: String, expected: &str, found: String| {
        Err(ModelError::BadKey { key, expected: expected.to_owned(), found })
    };
    let positive = |n: &f32| n.is_finite() && *n > 0.0;
    let ordered = |small: f32, large: f32| small > 0.0 && small < large && large.is_finite();
    if !positive(&spec.base) || spec.base == 1.0 {
        let key = config.name_of("rope.freq_base", "rope_theta");
        return bad(key, "a positive number other than 1", spec.base.to_string());
    }
    let (fine, expected) = match &spec.scaling {
        RopeScaling::None => (true, ""),
        RopeScaling::Linear { factor } => (positive(factor), "a positive number"),
        RopeScaling::Factors(factors) => {
            if let Some(factor) = factors.iter().find(|f| !positive(f)) {
                return bad(FACTORS.to_owned(), "positive numbers", factor.to_string());
            }
            (true, "")
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => (
            positive(factor)
                && positive(original_context)
                && ordered(*low_freq_factor, *high_freq_factor),
            "positive numbers, low_freq_factor below high_freq_factor",
        ),
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => (
            positive(factor)
                && positive(original_context)
                && ordered(*beta_slow, *beta_fast)
                && attention_factor.as_ref().is_none_or(positive),
            "positive numbers, beta_slow below beta_fast",
        ),
    };
    if fine { Ok(spec) } else { bad(name.to_owned(), expected, format!("{:?}", spec.scaling)) }
}

fn unsupported(kind: &str) -> ModelError {
    ModelError::Unsupported { what: format!("RoPE scaling '{kind}' (known: linear, llama3, yarn)") }
}
