//! What the engine knows about itself, for metrics and for `/stats`.

use kvasir_cache::Recipe;

/// A snapshot. Counters count from the engine's start.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences in the running batch.
    pub num_running: usize,
    /// Sequences waiting, preempted ones included.
    pub num_waiting: usize,
    /// Bytes that all cached tokens would take in f16: those of running sequences, shared blocks once
    /// per reader, and those of cached prefixes that no sequence uses.
    pub kv_logical_bytes: usize,
    /// Bytes the block pool has handed out: blocks, tails, tables, cached prefixes.
    pub kv_physical_bytes: usize,
    /// Of those, bytes of cached prefixes that no sequence uses: freed on demand.
    pub kv_evictable_bytes: usize,
    /// `--kv-cache-memory`.
    pub kv_budget_bytes: usize,
    /// Most `kv_physical_bytes` ever seen.
    pub kv_peak_physical_bytes: usize,
    /// Bytes the pool has taken from the budget: whole slabs, so at least `kv_physical_bytes`.
    pub kv_reserved_bytes: usize,
    /// Bytes of the statistics that joint recipes code against, beside `kv_physical_bytes`; 0 until one is
    /// used.
    pub kv_statistics_bytes: usize,
    /// Bytes of the index that finds blocks to share, in `kv_physical_bytes`.
    pub kv_sharing_index_bytes: usize,
    /// Bytes of rows that are in files and not in `kv_physical_bytes` (`clusterkv`).
    pub kv_spilled_bytes: usize,
    /// Counter: keys and values that were NaN, infinite or too large to store.
    pub kv_clamped_values: u64,
    /// Counter: keys or values of head groups that were sealed while sharing was on.
    pub kv_sharing_sealed: u64,
    /// Counter: of those, the ones that share a block of another sequence or place.
    pub kv_sharing_shared: u64,
    /// Counter: blocks of unused prefixes that were given up for room, or on demand.
    pub kv_evicted: u64,
    /// Counter: keys or values of head groups that pressure coded again with fewer bits.
    pub kv_lowered: u64,
    /// Counters: prompts that a policy chose from, by the share that stayed: up to a tenth, up to two, …
    pub kv_kept_shares: [u64; 10],
    /// Counter: seconds spent on sealing blocks (candidates, checks, encoding).
    pub kv_seal_seconds: f64,
    /// Counter: seconds spent in attention, decoding of tiles included.
    pub kv_attention_seconds: f64,
    /// Counter: seconds, of all threads together, spent on decoding blocks for attention.
    pub kv_decode_seconds: f64,
    /// Logical and physical bytes of every layer over the running sequences, shared blocks once; refreshed
    /// now and then.
    pub kv_layer_bytes: Vec<(usize, usize)>,
    /// Counter: sequences admitted, by recipe, in the order of their first use.
    pub sequences_by_recipe: Vec<(Recipe, u64)>,
    /// Counter: sequences that a guard decided on, by recipe; those of f16 were thought too risky for all others.
    pub guarded_by_recipe: Vec<(Recipe, u64)>,
    /// Counter: of those, the ones that found no room to be coded whole.
    pub guard_no_room: u64,
    /// Counter: risks that were taken, which is how many answers are expected to be spoiled.
    pub guard_risks: f64,
    /// Counter: seconds spent on what is known of prompts, and on storing them anew.
    pub guard_seconds: f64,
    /// Counter: prompt tokens of admitted requests.
    pub prompt_tokens: u64,
    /// Counter: prompt tokens found in the prefix cache.
    pub cached_prompt_tokens: u64,
    /// Counter: tokens generated.
    pub generation_tokens: u64,
    /// Counter: tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Counter: tokens found there.
    pub prefix_hits: u64,
    /// Counter: preemptions.
    pub preemptions: u64,
    /// Counter: steps.
    pub steps: u64,
}

impl EngineStats {
    pub(crate) fn count_sequence(&mut self, recipe: Recipe) {
        count(&mut self.sequences_by_recipe, recipe);
    }

    pub(crate) fn count_guarded(&mut self, recipe: Recipe) {
        count(&mut self.guarded_by_recipe, recipe);
    }
}

fn count(counts: &mut Vec<(Recipe, u64)>, recipe: Recipe) {
    match counts.iter_mut().find(|(known, _)| *known == recipe) {
        Some((_, count)) => *count += 1,
        None => counts.push((recipe, 1)),
    }
}
