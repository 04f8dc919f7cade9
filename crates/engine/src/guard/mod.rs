//! Deciding per request how it is stored, when its prompt is computed (`--kv-risk`).
//!
//! A request of [`Recipe::AUTO`] that is guarded is computed over an uncompressed cache. With its first token what is known of
//! it becomes features ([`PromptFeatures`]), a model that was trained on a run's answers says what each recipe risks
//! ([`RiskModel`]), and the cheapest that is worth its risk ([`choose`]) stores it from then on ([`KvCache::recode`]); if none
//! is it stays as it is.
//!
//! [`KvCache::recode`]: kvasir_cache::KvCache::recode

mod features;
mod linear;
mod risk;

use std::sync::Arc;

use kvasir_cache::Recipe;

pub(crate) use features::FirstToken;
pub use features::PromptFeatures;
pub use linear::{Linear, Weight, chance};
pub use risk::{RatedRecipe, RiskModel, choose};

/// Whether and how requests of [`Recipe::AUTO`] are guarded.
#[derive(Debug, Clone, PartialEq)]
pub struct Guard {
    /// What says the risks.
    pub model: Arc<RiskModel>,
    /// What all bytes of a request are worth; nothing above it is taken ([`choose`]).
    pub most_risk: f64,
}

/// What prompts are looked at with.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Whose coding errors are wanted.
    pub(crate) recipes: Vec<Recipe>,
    pub(crate) guard: Option<Guard>,
}

/// Why a prompt is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watched {
    /// To hand out what is known of it.
    Observed,
    /// To decide how it is stored.
    Guarded,
}
