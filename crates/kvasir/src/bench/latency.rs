//! `kvasir bench latency`: one sequence.

use anyhow::{Result, bail};
use clap::Args;
use kvasir_eval::latency::{self, Kind, Test};
use serde::Serialize;

use crate::options::{CacheArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::Progress;
use crate::session::load_engine;

/// Prompt and generation speed of one sequence
#[derive(Debug, Args)]
#[command(after_help = "\
Tests: ppN computes a prompt of N random tokens; tgN generates N tokens after one.
Each is run once to warm up, then --repetitions times, interleaved; the median counts.

Examples:
  kvasir bench latency
  kvasir bench latency --test pp512,pp2048,tg128 --repetitions 5 --json
  kvasir bench latency --model gemma3-270m --threads 1")]
pub(super) struct LatencyCommand {
    /// What to measure: ppN or tgN, comma separated
    #[arg(long, value_name = "TESTS", default_value = "pp512,tg128", value_delimiter = ',', value_parser = parse_kind)]
    test: Vec<Kind>,
    /// Counted runs of each test
    #[arg(long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Seed of the random prompts
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

#[derive(Debug, Serialize)]
struct LatencyReport<'a> {
    model: &'a str,
    recipe: String,
    threads: usize,
    tests: Vec<Test>,
}

fn parse_kind(text: &str) -> Result<Kind, String> {
    let number = |digits: &str| digits.parse().ok().filter(|n| *n > 0);
    let kind = match text.split_at_checked(2) {
        Some(("pp", n)) => number(n).map(Kind::Prompt),
        Some(("tg", n)) => number(n).map(Kind::Generation),
        _ => None,
    };
    kind.ok_or_else(|| "must be ppN or tgN with N above 0, such as pp512".to_owned())
}

/// Runs the command.
pub(super) fn execute(command: &LatencyCommand) -> Result<()> {
    if command.repetitions == 0 {
        bail!("--repetitions must be at least 1");
    }
    let progress = Progress::stderr();
    let (_, mut engine) = load_engine(&command.model, &command.cache, progress)?;
    let bar = progress.steps("measuring");
    let tests = latency::measure(
        &mut engine,
        &command.test,
        command.repetitions,
        command.seed,
        &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        },
    );
    bar.finish_and_clear();
    let report = LatencyReport {
        model: &command.model.model,
        recipe: engine.config().kv_cache.to_string(),
        threads: engine.num_threads(),
        tests: tests?,
    };
    if command.json {
        return print_json(&report);
    }
    print_line(&format!("{}, {} cache, {} threads", report.model, report.recipe, report.threads))?;
    for test in &report.tests {
        let (low, high) =
            test.runs.iter().fold((f64::MAX, 0.0f64), |(l, h), r| (l.min(*r), h.max(*r)));
        let speed = test.tokens_per_second;
        print_line(&format!(
            "{:>8}  {speed:8.1} tokens/s  (median of {}, {low:.1} to {high:.1})",
            test.name,
            test.runs.len()
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_named_as_llama_bench_names_them() {
        assert_eq!(parse_kind("pp512"), Ok(Kind::Prompt(512)));
        assert_eq!(parse_kind("tg128"), Ok(Kind::Generation(128)));
        for wrong in ["", "pp", "pp0", "xx5", "tg-1", "é12"] {
            assert!(parse_kind(wrong).is_err(), "{wrong}");
        }
    }
}
