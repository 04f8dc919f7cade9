//! The engine's own numbers, taken from its snapshot when somebody asks.
//!
//! A new number is a field of [`EngineStats`] and here a field, a `register` and an `update`.

use std::sync::atomic::{AtomicU64, Ordering};

use kvasir_engine::EngineStats;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::LabelledCounter;

type FloatGauge = Gauge<f64, AtomicU64>;

/// Mirrors of [`EngineStats`].
#[derive(Default)]
pub(super) struct EngineMetrics {
    running: Gauge,
    waiting: Gauge,
    waiting_by_reason: Family<[(&'static str, &'static str); 1], Gauge>,
    usage: FloatGauge,
    prefix_queries: Counter,
    prefix_hits: Counter,
    preemptions: Counter,
    prompt_tokens: Counter,
    prompt_tokens_by_source: LabelledCounter,
    prompt_tokens_cached: Counter,
    generation_tokens: Counter,
    steps: Counter,
    logical_bytes: Gauge,
    physical_bytes: Gauge,
    evictable_bytes: Gauge,
    budget_bytes: Gauge,
    peak_physical_bytes: Gauge,
    reserved_bytes: Gauge,
    statistics_bytes: Gauge,
    sharing_index_bytes: Gauge,
    spilled_bytes: Gauge,
    clamped_values: Counter,
    sharing_sealed: Counter,
    sharing_shared: Counter,
    evicted: Counter,
    lowered: Counter,
    kept_share: KeptShare,
    seal_seconds: Counter<f64, AtomicU64>,
    attention_seconds: Counter<f64, AtomicU64>,
    decode_seconds: Counter<f64, AtomicU64>,
    layer_ratio: Family<[(&'static str, String); 1], FloatGauge>,
    sequences_by_recipe: Family<[(&'static str, String); 1], Counter>,
    compression_ratio: FloatGauge,
}

impl EngineMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        let r = registry;
        r.register("vllm:num_requests_running", "Sequences running", m.running.clone());
        r.register("vllm:num_requests_waiting", "Sequences waiting", m.waiting.clone());
        r.register(
            "vllm:num_requests_waiting_by_reason",
            "Sequences waiting, by reason",
            m.waiting_by_reason.clone(),
        );
        r.register(
            "vllm:kv_cache_usage_perc",
            "Bytes of the cache in use that cannot be freed on demand, by budget (0 to 1)",
            m.usage.clone(),
        );
        r.register(
            "vllm:prefix_cache_queries",
            "Tokens looked up in the prefix cache",
            m.prefix_queries.clone(),
        );
        r.register("vllm:prefix_cache_hits", "Tokens found there", m.prefix_hits.clone());
        r.register("vllm:num_preemptions", "Sequences preempted", m.preemptions.clone());
        r.register("vllm:prompt_tokens", "Prompt tokens", m.prompt_tokens.clone());
        r.register(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens, by where they came from",
            m.prompt_tokens_by_source.clone(),
        );
        r.register(
            "vllm:prompt_tokens_cached",
            "Prompt tokens from the prefix cache",
            m.prompt_tokens_cached.clone(),
        );
        r.register("vllm:generation_tokens", "Tokens generated", m.generation_tokens.clone());
        r.register("kvasir_steps", "Steps of the engine", m.steps.clone());
        r.register(
            "kvasir_kv_logical_bytes",
            "Bytes that all cached tokens would take in f16, shared blocks once per reader",
            m.logical_bytes.clone(),
        );
        r.register(
            "kvasir_kv_physical_bytes",
            "Bytes the block pool has handed out",
            m.physical_bytes.clone(),
        );
        r.register(
            "kvasir_kv_evictable_bytes",
            "Of those, bytes of cached prefixes that no sequence uses",
            m.evictable_bytes.clone(),
        );
        r.register("kvasir_kv_budget_bytes", "Budget of the block pool", m.budget_bytes.clone());
        r.register(
            "kvasir_kv_peak_physical_bytes",
            "Most bytes ever handed out",
            m.peak_physical_bytes.clone(),
        );
        r.register(
            "kvasir_kv_reserved_bytes",
            "Bytes taken from the budget: whole slabs and metadata",
            m.reserved_bytes.clone(),
        );
        r.register(
            "kvasir_kv_statistics_bytes",
            "Bytes of the statistics that joint recipes code against",
            m.statistics_bytes.clone(),
        );
        r.register(
            "kvasir_kv_sharing_index_bytes",
            "Bytes of the index that finds blocks to share, in the physical bytes",
            m.sharing_index_bytes.clone(),
        );
        r.register(
            "kvasir_kv_spilled_bytes",
            "Bytes of rows that are in files, not in the physical bytes (clusterkv)",
            m.spilled_bytes.clone(),
        );
        r.register(
            "kvasir_kv_clamped_values",
            "Keys and values that were NaN, infinite or too large to store",
            m.clamped_values.clone(),
        );
        r.register(
            "kvasir_kv_sharing_sealed_blocks",
            "Key or value blocks sealed while sharing was on",
            m.sharing_sealed.clone(),
        );
        r.register(
            "kvasir_kv_shared_blocks",
            "Of those, blocks that share one that was there",
            m.sharing_shared.clone(),
        );
        r.register(
            "kvasir_kv_evicted_prefix_blocks",
            "Blocks of unused prefixes that were given up for room, or on demand",
            m.evicted.clone(),
        );
        r.register(
            "kvasir_kv_lowered_blocks",
            "Key or value blocks that pressure coded again with fewer bits",
            m.lowered.clone(),
        );
        r.register(
            "kvasir_kv_kept_share",
            "Share of a prompt that a policy kept (a prompt counts as the middle of its tenth in the sum)",
            m.kept_share.histogram.clone(),
        );
        r.register(
            "kvasir_kv_seal_seconds",
            "Seconds spent on sealing blocks: candidates, checks, encoding",
            m.seal_seconds.clone(),
        );
        r.register(
            "kvasir_kv_attention_seconds",
            "Seconds spent in attention, decoding of blocks included",
            m.attention_seconds.clone(),
        );
        r.register(
            "kvasir_kv_decode_seconds",
            "Seconds, of all threads together, spent on decoding blocks for attention",
            m.decode_seconds.clone(),
        );
        r.register(
            "kvasir_kv_layer_compression_ratio",
            "Logical by physical bytes of the running sequences, by layer",
            m.layer_ratio.clone(),
        );
        r.register(
            "kvasir_kv_compression_ratio",
            "Logical bytes by physical bytes (0 when nothing is cached)",
            m.compression_ratio.clone(),
        );
        r.register(
            "kvasir_sequences_by_recipe",
            "Sequences admitted, by how their keys and values are stored",
            m.sequences_by_recipe.clone(),
        );
        m
    }

    pub(super) fn update(&self, stats: &EngineStats) {
        let gauge = |gauge: &Gauge, value: usize| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        // The engine's counters are totals already.
        let counter = |counter: &Counter, total: u64| {
            counter.inner().fetch_max(total, Ordering::Relaxed);
        };
        gauge(&self.running, stats.num_running);
        gauge(&self.waiting, stats.num_waiting);
        let reason = |reason, value| {
            gauge(&self.waiting_by_reason.get_or_create_owned(&[("reason", reason)]), value);
        };
        reason("capacity", stats.num_waiting);
        reason("deferred", 0);
        let in_use = stats.kv_physical_bytes.saturating_sub(stats.kv_evictable_bytes);
        self.usage.set(ratio(in_use, stats.kv_budget_bytes));
        // Unused prefixes count on both sides.
        self.compression_ratio.set(ratio(stats.kv_logical_bytes, stats.kv_physical_bytes));
        counter(&self.prefix_queries, stats.prefix_queries);
        counter(&self.prefix_hits, stats.prefix_hits);
        counter(&self.preemptions, stats.preemptions);
        counter(&self.prompt_tokens, stats.prompt_tokens);
        counter(&self.prompt_tokens_cached, stats.cached_prompt_tokens);
        let source = |source, total| {
            let labels = [("source", source)];
            counter(&self.prompt_tokens_by_source.get_or_create_owned(&labels), total);
        };
        source("local_cache_hit", stats.cached_prompt_tokens);
        source("local_compute", stats.prompt_tokens.saturating_sub(stats.cached_prompt_tokens));
        counter(&self.generation_tokens, stats.generation_tokens);
        counter(&self.steps, stats.steps);
        gauge(&self.logical_bytes, stats.kv_logical_bytes);
        gauge(&self.physical_bytes, stats.kv_physical_bytes);
        gauge(&self.evictable_bytes, stats.kv_evictable_bytes);
        gauge(&self.budget_bytes, stats.kv_budget_bytes);
        gauge(&self.peak_physical_bytes, stats.kv_peak_physical_bytes);
        gauge(&self.reserved_bytes, stats.kv_reserved_bytes);
        gauge(&self.statistics_bytes, stats.kv_statistics_bytes);
        gauge(&self.sharing_index_bytes, stats.kv_sharing_index_bytes);
        gauge(&self.spilled_bytes, stats.kv_spilled_bytes);
        counter(&self.clamped_values, stats.kv_clamped_values);
        counter(&self.sharing_sealed, stats.kv_sharing_sealed);
        counter(&self.sharing_shared, stats.kv_sharing_shared);
        counter(&self.evicted, stats.kv_evicted);
        counter(&self.lowered, stats.kv_lowered);
        self.kept_share.update(&stats.kv_kept_shares);
        let seconds = |counter: &Counter<f64, AtomicU64>, total: f64| {
            counter.inc_by((total - counter.get()).max(0.0));
        };
        seconds(&self.seal_seconds, stats.kv_seal_seconds);
        seconds(&self.attention_seconds, stats.kv_attention_seconds);
        seconds(&self.decode_seconds, stats.kv_decode_seconds);
        for (layer, (logical, physical)) in stats.kv_layer_bytes.iter().enumerate() {
            let labels = [("layer", layer.to_string())];
            let gauge = self.layer_ratio.get_or_create_owned(&labels);
            gauge.set(ratio(*logical, *physical));
        }
        for (recipe, total) in &stats.sequences_by_recipe {
            let labels = [("recipe", recipe.to_string())];
            counter(&self.sequences_by_recipe.get_or_create_owned(&labels), *total);
        }
    }
}

/// A histogram of the engine's counts by tenths.
struct KeptShare {
    histogram: Histogram,
    /// What was observed of every tenth.
    seen: [AtomicU64; 10],
}

impl Default for KeptShare {
    fn default() -> Self {
        let bounds = (1..=10).map(|tenths| f64::from(tenths) / 10.0);
        Self { histogram: Histogram::new(bounds), seen: Default::default() }
    }
}

impl KeptShare {
    fn update(&self, totals: &[u64; 10]) {
        for (tenth, (total, seen)) in totals.iter().zip(&self.seen).enumerate() {
            let before = seen.fetch_max(*total, Ordering::Relaxed);
            for _ in before..*total {
                self.histogram.observe((tenth as f64 + 0.5) / 10.0);
            }
        }
    }
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
