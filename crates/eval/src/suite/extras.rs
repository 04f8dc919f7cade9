//! What a run's directory may have beside answers.

use serde::{Deserialize, Serialize};

/// [`QualityPoint`], a list.
pub const QUALITY: &str = "quality.json";
/// A [`crate::profile::Profile`].
pub const PROFILE: &str = "profile.json";
/// [`crate::throughput::AtMemory`], a list.
pub const EQUAL_MEMORY: &str = "equal_memory.json";

/// A row of `kvasir eval quality --json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QualityPoint {
    /// The recipe.
    pub recipe: String,
    /// f16 bytes by bytes, of everything.
    pub ratio_total: f64,
    /// Mean KL divergence.
    pub kl_mean: f64,
    /// Share of equal most likely tokens.
    pub top1: f64,
    /// Change of the next token's negative log likelihood.
    pub nll_delta: f64,
}
