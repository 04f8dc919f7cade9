//! Metrics under vLLM's names, so that its dashboards and routers work unchanged, plus the
//! cache's own under `kvasir_`.
//!
//! As in vLLM, a request with `n` sequences is observed `n` times, except in
//! `request_params_n` and `request_max_num_generation_tokens`. Counters and gauges of the engine
//! are taken from its snapshot when somebody asks.

mod engine;
mod guard;
mod text;

use kvasir_engine::EngineStats;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use engine::EngineMetrics;
use guard::GuardMetrics;
pub(crate) use text::{CLASSIC_TYPE, OPENMETRICS_TYPE, to_classic};

type HttpFamily = Family<[(&'static str, String); 3], Counter>;
type HttpTimeFamily = Family<[(&'static str, String); 2], Histogram, fn() -> Histogram>;
type LabelledCounter = Family<[(&'static str, &'static str); 1], Counter>;

/// Seconds to the first token.
const TTFT: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between tokens.
const ITL: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Seconds of a request or a phase of it.
const LATENCY: [f64; 20] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0,
];
/// vLLM's last bucket of [`LATENCY`].
const LATENCY_MAX: f64 = 7680.0;
/// Tokens of a request: 1, 2, 5, 10 … up to the longest contexts in use.
const TOKENS: [f64; 17] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5];
/// Tokens of a step.
const STEP_TOKENS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// Small counts.
const FEW: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];
/// Seconds of an HTTP request.
const HTTP_TIME: [f64; 9] = [0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0];

/// Names of `finish_reason` in `vllm:request_success`.
const FINISH_REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

/// All metrics of one server. Not a global: several servers can live in a process.
pub(crate) struct Metrics {
    registry: Registry,
    http_requests: HttpFamily,
    http_seconds: HttpTimeFamily,
    engine: EngineMetrics,
    guard: GuardMetrics,
    pub(crate) requests: RequestMetrics,
    cache_config: Family<Vec<(String, String)>, Gauge>,
    machine: Family<Vec<(String, String)>, Gauge>,
}

/// What is observed while requests run. Times in seconds.
pub(crate) struct RequestMetrics {
    success: LabelledCounter,
    pub(crate) admission_rejections: Counter,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token_latency: Histogram,
    pub(crate) time_per_output_token: Histogram,
    pub(crate) e2e_latency: Histogram,
    pub(crate) queue_time: Histogram,
    pub(crate) prefill_time: Histogram,
    pub(crate) decode_time: Histogram,
    pub(crate) inference_time: Histogram,
    pub(crate) prompt_tokens: Histogram,
    pub(crate) generation_tokens: Histogram,
    pub(crate) max_generation_tokens: Histogram,
    pub(crate) params_n: Histogram,
    pub(crate) params_max_tokens: Histogram,
    pub(crate) num_preemptions: Histogram,
    pub(crate) prefill_computed_tokens: Histogram,
    pub(crate) iteration_tokens: Histogram,
}

impl RequestMetrics {
    /// Counts a finished sequence.
    pub(crate) fn count(&self, reason: &'static str) {
        self.success.get_or_create(&[("finished_reason", reason)]).inc();
    }
}

fn histogram(registry: &mut Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let histogram = Histogram::new(buckets.iter().copied());
    registry.register(name, help, histogram.clone());
    histogram
}

impl Metrics {
    pub(crate) fn new(model_name: &str) -> Self {
        let mut registry = Registry::default();
        let http_requests = HttpFamily::default();
        registry.register("http_requests", "HTTP requests", http_requests.clone());
        let http_seconds = HttpTimeFamily::new_with_constructor(|| Histogram::new(HTTP_TIME));
        registry.register(
            "http_request_duration_seconds",
            "Seconds until the headers of the answer",
            http_seconds.clone(),
        );
        let labels = [("model_name", model_name.to_owned()), ("engine", "0".to_owned())];
        let labels = labels.into_iter().map(|(name, value)| (name.into(), value.into()));
        let of_model = registry.sub_registry_with_labels(labels);
        let engine = EngineMetrics::register(of_model);
        let guard = GuardMetrics::register(of_model);
        let requests = RequestMetrics::register(of_model);
        let cache_config = Family::default();
        of_model.register("vllm:cache_config_info", "Settings of the cache", cache_config.clone());
        let machine = Family::default();
        of_model.register(
            "kvasir_machine_info",
            "Processor, instruction sets, form of weights, threads",
            machine.clone(),
        );
        Self {
            registry,
            http_requests,
            http_seconds,
            engine,
            guard,
            requests,
            cache_config,
            machine,
        }
    }

    /// Publishes the labels of `vllm:cache_config_info` and of `kvasir_machine_info`.
    pub(crate) fn set_info(&self, cache_config: &[(String, String)], machine: &[(String, String)]) {
        self.cache_config.get_or_create(&cache_config.to_vec()).set(1);
        self.machine.get_or_create(&machine.to_vec()).set(1);
    }

    /// Counts an HTTP request; `handler` must come from the route table, not from the client.
    pub(crate) fn observe_http(&self, handler: &str, method: &str, status: u16, seconds: f64) {
        let class = format!("{}xx", status / 100);
        let (handler, method) = (handler.to_owned(), method.to_owned());
        let labels = [("handler", handler.clone()), ("method", method.clone()), ("status", class)];
        self.http_requests.get_or_create(&labels).inc();
        let labels = [("handler", handler), ("method", method)];
        self.http_seconds.get_or_create(&labels).observe(seconds);
    }

    /// The OpenMetrics text, with the engine's numbers as of `stats`.
    pub(crate) fn encode(&self, stats: &EngineStats) -> Result<String, std::fmt::Error> {
        self.engine.update(stats);
        self.guard.update(stats);
        let mut text = String::with_capacity(32 << 10);
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl RequestMetrics {
    fn register(r: &mut Registry) -> Self {
        let success = LabelledCounter::default();
        for reason in FINISH_REASONS {
            // Series that start at zero, so that rates are right from the first request.
            success.get_or_create_owned(&[("finished_reason", reason)]);
        }
        r.register("vllm:request_success", "Sequences finished, by reason", success.clone());
        let admission_rejections = Counter::default();
        let help = "Requests refused because the queue was full";
        r.register("vllm:admission_rejections", help, admission_rejections.clone());
        let latency: Vec<f64> = LATENCY.iter().copied().chain([LATENCY_MAX]).collect();
        let latency = latency.as_slice();
        Self {
            success,
            admission_rejections,
            time_to_first_token: histogram(
                r,
                "vllm:time_to_first_token_seconds",
                "Seconds from receipt to the first token",
                &TTFT,
            ),
            inter_token_latency: histogram(
                r,
                "vllm:inter_token_latency_seconds",
                "Seconds between outputs of a sequence",
                &ITL,
            ),
            time_per_output_token: histogram(
                r,
                "vllm:request_time_per_output_token_seconds",
                "Mean seconds per token after the first",
                &ITL,
            ),
            e2e_latency: histogram(
                r,
                "vllm:e2e_request_latency_seconds",
                "Seconds from receipt to the last token",
                latency,
            ),
            queue_time: histogram(
                r,
                "vllm:request_queue_time_seconds",
                "Seconds from receipt to the first step",
                latency,
            ),
            prefill_time: histogram(
                r,
                "vllm:request_prefill_time_seconds",
                "Seconds from the first step to the first token",
                latency,
            ),
            decode_time: histogram(
                r,
                "vllm:request_decode_time_seconds",
                "Seconds from the first token to the last",
                latency,
            ),
            inference_time: histogram(
                r,
                "vllm:request_inference_time_seconds",
                "Seconds from the first step to the last token",
                latency,
            ),
            prompt_tokens: histogram(r, "vllm:request_prompt_tokens", "Prompt tokens", &TOKENS),
            generation_tokens: histogram(
                r,
                "vllm:request_generation_tokens",
                "Tokens generated",
                &TOKENS,
            ),
            max_generation_tokens: histogram(
                r,
                "vllm:request_max_num_generation_tokens",
                "Tokens of the longest sequence of a request",
                &TOKENS,
            ),
            params_n: histogram(r, "vllm:request_params_n", "The parameter n", &FEW),
            params_max_tokens: histogram(
                r,
                "vllm:request_params_max_tokens",
                "The parameter max_tokens",
                &TOKENS,
            ),
            num_preemptions: histogram(
                r,
                "vllm:request_num_preemptions",
                "Preemptions of a sequence",
                &FEW,
            ),
            prefill_computed_tokens: histogram(
                r,
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens computed, without those from the prefix cache",
                &TOKENS,
            ),
            iteration_tokens: histogram(
                r,
                "vllm:iteration_tokens_total",
                "Tokens computed in a step",
                &STEP_TOKENS,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_engine::Recipe;

    fn value<'a>(text: &'a str, series: &str) -> &'a str {
        text.lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no {series} in\n{text}"))
    }

    #[test]
    fn usage_is_pressure_and_ratio_counts_every_byte() {
        let metrics = Metrics::new("m");
        let stats = EngineStats {
            kv_logical_bytes: 600,
            kv_physical_bytes: 500,
            kv_evictable_bytes: 300,
            kv_budget_bytes: 1000,
            prompt_tokens: 10,
            cached_prompt_tokens: 4,
            kv_statistics_bytes: 70,
            kv_sharing_index_bytes: 71,
            kv_spilled_bytes: 72,
            sequences_by_recipe: vec![(Recipe::F16, 2), (Recipe::JOINT3, 3)],
            guarded_by_recipe: vec![(Recipe::JOINT2, 6)],
            guard_no_room: 1,
            guard_risks: 0.25,
            guard_seconds: 0.5,
            ..EngineStats::default()
        };
        let text = metrics.encode(&stats).unwrap();
        let labels = r#"{model_name="m",engine="0"}"#;
        assert_eq!(value(&text, &format!("vllm:kv_cache_usage_perc{labels}")), "0.2");
        assert_eq!(value(&text, &format!("kvasir_kv_compression_ratio{labels}")), "1.2");
        assert_eq!(value(&text, &format!("vllm:prompt_tokens_total{labels}")), "10");
        let compute = r#"vllm:prompt_tokens_by_source_total{model_name="m",engine="0",source="local_compute"}"#;
        assert_eq!(value(&text, compute), "6");
        assert_eq!(value(&text, &format!("kvasir_kv_statistics_bytes{labels}")), "70");
        assert_eq!(value(&text, &format!("kvasir_kv_sharing_index_bytes{labels}")), "71");
        assert_eq!(value(&text, &format!("kvasir_kv_spilled_bytes{labels}")), "72");
        let joint =
            r#"kvasir_sequences_by_recipe_total{model_name="m",engine="0",recipe="joint3"}"#;
        assert_eq!(value(&text, joint), "3");
        let decided =
            r#"kvasir_kv_guard_decisions_total{model_name="m",engine="0",recipe="joint2"}"#;
        assert_eq!(value(&text, decided), "6");
        for (name, expected) in [("risk", "0.25"), ("no_room", "1"), ("seconds", "0.5")] {
            assert_eq!(value(&text, &format!("kvasir_kv_guard_{name}_total{labels}")), expected);
        }
    }

    #[test]
    fn counters_never_fall() {
        let metrics = Metrics::new("m");
        let stats = |steps| EngineStats { steps, ..EngineStats::default() };
        metrics.encode(&stats(5)).unwrap();
        let text = metrics.encode(&stats(3)).unwrap();
        assert_eq!(value(&text, r#"kvasir_steps_total{model_name="m",engine="0"}"#), "5");
    }

    #[test]
    fn http_and_cache_config_have_their_labels() {
        let metrics = Metrics::new("m");
        metrics.observe_http("/x", "GET", 404, 0.1);
        metrics.set_info(&[("block_size".into(), "32".into())], &[("isa".into(), "avx2".into())]);
        metrics.requests.count("stop");
        let text = metrics.encode(&EngineStats::default()).unwrap();
        assert_eq!(
            value(&text, r#"http_requests_total{handler="/x",method="GET",status="4xx"}"#),
            "1"
        );
        let info = r#"vllm:cache_config_info{model_name="m",engine="0",block_size="32"}"#;
        assert_eq!(value(&text, info), "1");
        let stop =
            r#"vllm:request_success_total{model_name="m",engine="0",finished_reason="stop"}"#;
        assert_eq!(value(&text, stop), "1");
    }
}
