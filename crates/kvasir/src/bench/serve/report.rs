//! What a load showed.

use std::time::Duration;

use anyhow::Result;
use kvasir_eval::Percentiles;
use serde::Serialize;

use super::load::{Outcome, Ready};
use super::watch::Watched;
use crate::bench::dataset::LoadReport;
use crate::failure::one_line;
use crate::output::print_line;
use crate::units::format_bytes;

/// The server as far as it tells.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct ServerReport {
    /// How its cache is encoded: Kvasir only.
    pub(super) recipe: Option<String>,
    /// How its blocks are shared: Kvasir only.
    pub(super) sharing: Option<String>,
}

/// One object of `--json`. Latencies are in milliseconds, over finished requests.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ServeReport {
    pub(super) base_url: String,
    pub(super) model: String,
    #[serde(flatten)]
    pub(super) server: ServerReport,
    #[serde(flatten)]
    pub(super) load: LoadReport,
    /// Requests a second; none is all at once.
    pub(super) request_rate: Option<f64>,
    pub(super) max_concurrency: Option<usize>,
    completed: usize,
    failed: usize,
    /// What went wrong, each message once, the first ones.
    errors: Vec<String>,
    seconds: f64,
    input_tokens: usize,
    output_tokens: usize,
    requests_per_second: f64,
    output_tokens_per_second: f64,
    total_tokens_per_second: f64,
    /// Most sequences in the server's batch; of a server that does not tell, most requests in flight.
    max_running: usize,
    max_running_from: &'static str,
    preemptions: Option<u64>,
    peak_kv_physical_bytes: Option<u64>,
    ttft_ms: Option<Percentiles>,
    tpot_ms: Option<Percentiles>,
    itl_ms: Option<Percentiles>,
    e2e_ms: Option<Percentiles>,
}

/// What was asked of whom.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) base_url: String,
    pub(super) model: String,
    pub(super) server: ServerReport,
    pub(super) load: LoadReport,
    pub(super) request_rate: Option<f64>,
    pub(super) max_concurrency: Option<usize>,
}

impl ServeReport {
    /// Sums up a load.
    pub(super) fn new(asked: Asked, requests: &[Ready], outcome: &Outcome, seen: Watched) -> Self {
        const MAX_ERRORS: usize = 5;
        let (mut ttft, mut tpot, mut itl, mut e2e) = (vec![], vec![], vec![], vec![]);
        let (mut completed, mut input_tokens, mut output_tokens) = (0, 0, 0);
        let mut errors: Vec<String> = Vec::new();
        for (request, result) in requests.iter().zip(&outcome.results) {
            let completion = match result {
                Ok(completion) => completion,
                Err(failure) => {
                    let message = one_line(&failure.error);
                    if errors.len() < MAX_ERRORS && !errors.contains(&message) {
                        errors.push(message);
                    }
                    continue;
                }
            };
            completed += 1;
            input_tokens += completion.input_tokens.unwrap_or(request.input_tokens);
            output_tokens += completion.output_tokens;
            let pieces = &completion.pieces;
            let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { continue };
            ttft.push(milliseconds(*first));
            e2e.push(milliseconds(*last));
            itl.extend(pieces.windows(2).map(|pair| milliseconds(pair[1] - pair[0])));
            if completion.output_tokens > 1 {
                let more = (completion.output_tokens - 1) as f64;
                tpot.push(milliseconds(*last - *first) / more);
            }
        }
        let seconds = outcome.seconds;
        let Asked { base_url, model, server, load, request_rate, max_concurrency } = asked;
        Self {
            base_url,
            model,
            server,
            load,
            request_rate,
            max_concurrency,
            completed,
            failed: outcome.results.len() - completed,
            errors,
            seconds,
            input_tokens,
            output_tokens,
            requests_per_second: completed as f64 / seconds,
            output_tokens_per_second: output_tokens as f64 / seconds,
            total_tokens_per_second: (input_tokens + output_tokens) as f64 / seconds,
            max_running: seen.max_running.unwrap_or(outcome.max_in_flight),
            max_running_from: if seen.max_running.is_some() { "server" } else { "client" },
            preemptions: seen.preemptions,
            peak_kv_physical_bytes: seen.peak_kv_physical_bytes,
            ttft_ms: Percentiles::of(&ttft),
            tpot_ms: Percentiles::of(&tpot),
            itl_ms: Percentiles::of(&itl),
            e2e_ms: Percentiles::of(&e2e),
        }
    }

    /// What to end with if any request failed.
    pub(super) fn failure(&self) -> Option<String> {
        let first = self.errors.first()?;
        let all = self.failed + self.completed;
        Some(format!("{} of {all} requests failed: {first}", self.failed))
    }

    /// For people.
    pub(super) fn print(&self) -> Result<()> {
        let Self { base_url, model, load, completed, failed, seconds, .. } = self;
        print_line(&format!(
            "{model} at {base_url}, {} of {} requests finished, {failed} failed, {seconds:.1} s",
            completed, load.num_prompts
        ))?;
        print_line(&format!(
            "  {:.2} requests/s, {:.1} output tokens/s, {:.1} in all ({} in, {} out)",
            self.requests_per_second,
            self.output_tokens_per_second,
            self.total_tokens_per_second,
            self.input_tokens,
            self.output_tokens
        ))?;
        let mut line = match self.max_running_from {
            "server" => format!("  {} running at once at most", self.max_running),
            _ => format!("  {} in flight at once at most", self.max_running),
        };
        if let Some(preemptions) = self.preemptions {
            line += &format!(", {preemptions} preemptions");
        }
        if let Some(bytes) = self.peak_kv_physical_bytes {
            line += &format!(", {} of cache at most", format_bytes(bytes));
        }
        print_line(&line)?;
        print_line("  ms                                p50        p90        p99")?;
        for (name, found) in [
            ("time to first token (TTFT)", self.ttft_ms),
            ("time per output token (TPOT)", self.tpot_ms),
            ("inter-token latency (ITL)", self.itl_ms),
            ("end to end (E2E)", self.e2e_ms),
        ] {
            if let Some(Percentiles { p50, p90, p99 }) = found {
                print_line(&format!("  {name:28} {p50:10.1} {p90:10.1} {p99:10.1}"))?;
            }
        }
        for error in &self.errors {
            print_line(&format!("  failed: {error}"))?;
        }
        Ok(())
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;
    use serde_json::json;

    use super::*;
    use crate::client::{Completion, Failure};

    fn asked() -> Asked {
        let load = LoadReport { dataset: "random", num_prompts: 4, seed: 0 };
        Asked {
            base_url: "http://a".to_owned(),
            model: "m".to_owned(),
            server: ServerReport::default(),
            load,
            request_rate: None,
            max_concurrency: None,
        }
    }

    #[test]
    fn numbers_of_a_load() {
        let pieces = |ms: &[u64]| ms.iter().map(|ms| Duration::from_millis(*ms)).collect();
        let ready = Ready { body: String::new(), input_tokens: 10 };
        let first = Completion {
            input_tokens: Some(12),
            output_tokens: 3,
            pieces: pieces(&[100, 120, 160]),
        };
        // Two tokens came in one piece.
        let second =
            Completion { input_tokens: None, output_tokens: 4, pieces: pieces(&[200, 230, 290]) };
        let failure = || {
            let error = anyhow!("it\nbroke");
            Err(Failure { error, unreachable: false })
        };
        let outcome = Outcome {
            seconds: 2.0,
            results: vec![Ok(first), failure(), Ok(second), failure()],
            max_in_flight: 3,
        };
        let report = ServeReport::new(asked(), &vec![ready; 4], &outcome, Watched::default());
        assert_eq!(report.failure().unwrap(), "2 of 4 requests failed: it broke");
        let json = serde_json::to_value(&report).unwrap();
        for (name, expected) in [
            ("dataset", json!("random")),
            ("recipe", json!(null)),
            ("completed", json!(2)),
            ("failed", json!(2)),
            ("errors", json!(["it broke"])),
            ("input_tokens", json!(22)),
            ("output_tokens", json!(7)),
            ("output_tokens_per_second", json!(3.5)),
            ("total_tokens_per_second", json!(14.5)),
            ("requests_per_second", json!(1.0)),
            ("max_running", json!(3)),
            ("max_running_from", json!("client")),
            ("preemptions", json!(null)),
            ("seconds", json!(2.0)),
        ] {
            assert_eq!(json[name], expected, "{name}");
        }
        let near = |name: &str, expected: f64| {
            let found = json[name]["p50"].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-9, "{name}: {found}");
        };
        near("ttft_ms", 150.0);
        near("tpot_ms", 30.0);
        near("itl_ms", 35.0);
        near("e2e_ms", 225.0);
        assert!(json["itl_ms"]["p90"].is_f64() && json["itl_ms"]["p99"].is_f64());
    }

    #[test]
    fn nothing_finished_and_nothing_failed() {
        let nothing = Outcome { seconds: 1.0, results: vec![], max_in_flight: 0 };
        let seen = Watched { max_running: Some(5), ..Watched::default() };
        let report = ServeReport::new(asked(), &[], &nothing, seen);
        assert_eq!((report.failure(), report.ttft_ms), (None, None));
        assert_eq!((report.max_running, report.max_running_from), (5, "server"));
    }
}
