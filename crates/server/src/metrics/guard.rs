//! What the guard of `--kv-risk` did.

use std::sync::atomic::{AtomicU64, Ordering};

use kvasir_engine::EngineStats;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// Mirrors of [`EngineStats`]; without a guard they stay at 0.
#[derive(Default)]
pub(super) struct GuardMetrics {
    decisions: Family<[(&'static str, String); 1], Counter>,
    risks: Counter<f64, AtomicU64>,
    no_room: Counter,
    seconds: Counter<f64, AtomicU64>,
}

impl GuardMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        let r = registry;
        r.register(
            "kvasir_kv_guard_decisions",
            "Sequences that --kv-risk decided on, by recipe; f16 where all others were too risky",
            m.decisions.clone(),
        );
        r.register(
            "kvasir_kv_guard_risk",
            "Sum of the risks that were taken: answers expected to be spoiled, of those that f16 would do well",
            m.risks.clone(),
        );
        r.register(
            "kvasir_kv_guard_no_room",
            "Sequences that found no room to be coded whole",
            m.no_room.clone(),
        );
        r.register(
            "kvasir_kv_guard_seconds",
            "Seconds spent on looking at prompts and on coding them late",
            m.seconds.clone(),
        );
        m
    }

    pub(super) fn update(&self, stats: &EngineStats) {
        for (recipe, total) in &stats.guarded_by_recipe {
            let labels = [("recipe", recipe.to_string())];
            let counter = self.decisions.get_or_create_owned(&labels);
            counter.inner().fetch_max(*total, Ordering::Relaxed);
        }
        self.no_room.inner().fetch_max(stats.guard_no_room, Ordering::Relaxed);
        for (counter, total) in
            [(&self.risks, stats.guard_risks), (&self.seconds, stats.guard_seconds)]
        {
            counter.inc_by((total - counter.get()).max(0.0));
        }
    }
}
