//! When things happened to a request, and the metrics that follow from it.

use std::time::{Duration, Instant};

use kvasir_engine::{SamplingParams, SequenceOutput};

use crate::api::response::reason_name;
use crate::metrics::RequestMetrics;

/// Times of one request of the engine.
#[derive(Debug)]
pub(crate) struct Timing {
    received: Instant,
    scheduled: Option<Instant>,
    max_tokens: Option<usize>,
    sequences: Vec<Sequence>,
}

#[derive(Debug, Clone, Default)]
struct Sequence {
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    num_tokens: usize,
    finished: bool,
}

impl Timing {
    pub(crate) fn new(received: Instant, params: &SamplingParams) -> Self {
        Self {
            received,
            scheduled: None,
            max_tokens: params.max_tokens,
            sequences: vec![Sequence::default(); params.n],
        }
    }

    /// The request left the queue.
    pub(crate) fn schedule(&mut self, now: Instant) {
        self.scheduled.get_or_insert(now);
    }

    /// Observes what a step made. Returns whether all sequences have ended.
    pub(crate) fn observe(
        &mut self,
        output: &SequenceOutput,
        now: Instant,
        metrics: &RequestMetrics,
    ) -> bool {
        let Some(sequence) = self.sequences.get_mut(output.index) else { return false };
        if !output.token_ids.is_empty() {
            match sequence.last_token {
                None => {
                    metrics.time_to_first_token.observe(seconds(self.received, now));
                    sequence.first_token = Some(now);
                }
                Some(last) => metrics.inter_token_latency.observe(seconds(last, now)),
            }
            sequence.last_token = Some(now);
        }
        sequence.num_tokens = output.num_output_tokens;
        let Some(finish) = &output.finish else { return false };
        sequence.finished = true;
        metrics.count(reason_name(finish.reason));
        metrics.num_preemptions.observe(finish.num_preemptions as f64);
        metrics.prompt_tokens.observe(output.num_prompt_tokens as f64);
        metrics.generation_tokens.observe(output.num_output_tokens as f64);
        let computed = output.num_prompt_tokens.saturating_sub(output.num_cached_tokens);
        metrics.prefill_computed_tokens.observe(computed as f64);
        if let Some(max_tokens) = self.max_tokens {
            metrics.params_max_tokens.observe(max_tokens as f64);
        }
        metrics.e2e_latency.observe(seconds(self.received, now));
        if let Some(scheduled) = self.scheduled {
            metrics.queue_time.observe(seconds(self.received, scheduled));
            metrics.inference_time.observe(seconds(scheduled, now));
            if let Some(first) = sequence.first_token {
                metrics.prefill_time.observe(seconds(scheduled, first));
            }
        }
        if let Some(first) = sequence.first_token {
            let decode = seconds(first, now);
            metrics.decode_time.observe(decode);
            if sequence.num_tokens > 1 {
                metrics.time_per_output_token.observe(decode / (sequence.num_tokens - 1) as f64);
            }
        }
        let all = self.sequences.iter().all(|sequence| sequence.finished);
        if all {
            metrics.params_n.observe(self.sequences.len() as f64);
            let longest = self.sequences.iter().map(|sequence| sequence.num_tokens).max();
            metrics.max_generation_tokens.observe(longest.unwrap_or(0) as f64);
        }
        all
    }

    /// Counts the sequences that were cut off.
    pub(crate) fn cut(&self, reason: &'static str, metrics: &RequestMetrics) {
        for _ in self.sequences.iter().filter(|sequence| !sequence.finished) {
            metrics.count(reason);
        }
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.checked_duration_since(from).unwrap_or(Duration::ZERO).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::job::tests::output;
    use crate::metrics::Metrics;
    use kvasir_engine::{EngineStats, FinishReason};

    fn sum(metrics: &Metrics, name: &str) -> f64 {
        let text = metrics.encode(&EngineStats::default()).unwrap();
        let prefix = format!("{name}_sum{{");
        let line = text.lines().find(|line| line.starts_with(&prefix)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    #[test]
    fn phases_add_up() {
        let all = Metrics::new("m");
        let metrics = &all.requests;
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let params = SamplingParams { n: 2, max_tokens: Some(9), ..SamplingParams::default() };
        let mut timing = Timing::new(start, &params);
        timing.schedule(at(100));
        timing.schedule(at(999));
        assert!(!timing.observe(&output(0, "a", 1, None), at(300), metrics));
        assert!(!timing.observe(&output(0, "b", 2, None), at(400), metrics));
        assert!(!timing.observe(&output(0, "c", 3, Some(FinishReason::Stop)), at(700), metrics));
        assert_eq!(sum(&all, "vllm:request_params_n"), 0.0);
        assert!(timing.observe(&output(1, "x", 1, Some(FinishReason::Stop)), at(700), metrics));
        let expected = [
            ("vllm:time_to_first_token_seconds", 0.3 + 0.7),
            ("vllm:inter_token_latency_seconds", 0.1 + 0.3),
            ("vllm:request_time_per_output_token_seconds", 0.2),
            ("vllm:request_queue_time_seconds", 2.0 * 0.1),
            ("vllm:request_prefill_time_seconds", 0.2 + 0.6),
            ("vllm:request_decode_time_seconds", 0.4),
            ("vllm:request_inference_time_seconds", 2.0 * 0.6),
            ("vllm:e2e_request_latency_seconds", 2.0 * 0.7),
            ("vllm:request_prefill_kv_computed_tokens", 2.0),
            ("vllm:request_max_num_generation_tokens", 3.0),
            ("vllm:request_params_n", 2.0),
        ];
        for (name, expected) in expected {
            let sum = sum(&all, name);
            assert!((sum - expected).abs() < 1e-9, "{name}: {sum} is not {expected}");
        }
    }
}
