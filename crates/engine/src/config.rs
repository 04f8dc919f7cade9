//! Engine configuration, validated once by [`crate::Engine::new`].

use std::sync::Arc;

use kvasir_cache::offline::Tables;
use kvasir_cache::stats::Statistics;
use kvasir_cache::{Recipe, Sharing};

use crate::error::{EngineError, Result};
use crate::guard::Guard;

/// What an operator sets.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// How the cache is encoded (`--kv-cache`).
    pub kv_cache: Recipe,
    /// Which blocks are shared beside equal prefixes (`--kv-sharing`).
    pub kv_sharing: Sharing,
    /// What joint recipes code against; without them they are refused.
    pub statistics: Option<Arc<Statistics>>,
    /// What methods need that say so; recipes whose method has none are refused.
    pub tables: Tables,
    /// Budget of the block pool in bytes (`--kv-cache-memory`).
    pub kv_cache_memory: usize,
    /// Tokens per block: 16, 32 or 64 (`--block-size`).
    pub block_size: usize,
    /// Most sequences in the running batch (`--max-num-seqs`).
    pub max_num_seqs: usize,
    /// Most tokens computed in a step (`--max-num-batched-tokens`).
    pub max_num_batched_tokens: usize,
    /// Longest prompt + output. `None` is the model's own limit, or what the budget holds if that is
    /// less (`--max-model-len`).
    pub max_model_len: Option<usize>,
    /// Reuse the blocks of equal prefixes (`--enable-prefix-caching`).
    pub enable_prefix_caching: bool,
    /// Most requests waiting for their first step while others run; more are refused
    /// (`--max-num-queued-reqs`).
    pub max_num_queued_reqs: Option<usize>,
    /// Compute threads; 0 is one per processor (`--threads`).
    pub threads: usize,
    /// Seed of requests that bring none.
    pub seed: u64,
    /// Whether and how requests of [`Recipe::AUTO`] are guarded (`--kv-risk`).
    pub guard: Option<Guard>,
    /// Hand out what is known of prompts that are stored uncompressed, with their first tokens; what coding by these
    /// recipes would do to them is part of it.
    pub observe_prompts: Option<Vec<Recipe>>,
}

impl EngineConfig {
    /// # Errors
    /// [`EngineError::BadConfig`] naming the flag. The block size is checked by the cache.
    pub(crate) fn validate(&self) -> Result<()> {
        let positive = [
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--max-model-len", self.max_model_len.unwrap_or(1)),
        ];
        match positive.into_iter().find(|(_, value)| *value == 0) {
            Some((option, _)) => Err(EngineError::BadConfig {
                option,
                expected: "at least 1".to_owned(),
                found: "0".to_owned(),
            }),
            None => Ok(()),
        }
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            kv_cache: Recipe::F16,
            kv_sharing: Sharing::OFF,
            statistics: None,
            tables: Tables::default(),
            kv_cache_memory: 256 << 20,
            block_size: 32,
            max_num_seqs: 128,
            max_num_batched_tokens: 512,
            max_model_len: None,
            enable_prefix_caching: true,
            max_num_queued_reqs: None,
            threads: 0,
            seed: 0,
            guard: None,
            observe_prompts: None,
        }
    }
}
