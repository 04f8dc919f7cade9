//! `kvasir bench throughput`: many requests at once, offline.

use anyhow::Result;
use clap::Args;
use kvasir_eval::dataset::LoadRequest;
use kvasir_eval::throughput::{self, Job, Throughput};
use serde::Serialize;

use super::dataset::{DatasetArgs, LoadReport, dataset_help};
use crate::options::{CacheArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::Progress;
use crate::session::load_engine;
use crate::units::format_bytes;

/// Speed of many requests at once, without a server
#[derive(Debug, Args)]
#[command(after_help = concat!("\
All requests are there from the beginning, and end tokens are ignored, so that every recipe does the same
work. Compare recipes at one --kv-cache-memory.

", dataset_help!(), "

Examples:
  kvasir bench throughput
  kvasir bench throughput --num-prompts 64 --input-len 512 --output-len 256 \\
      --kv-cache joint3 --kv-cache-memory 180MiB --json
  kvasir bench throughput --dataset retrieval --kv-cache joint3 --kv-sharing tokens"))]
pub(super) struct ThroughputCommand {
    #[command(flatten)]
    dataset: DatasetArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

#[derive(Debug, Serialize)]
struct ThroughputReport<'a> {
    model: &'a str,
    recipe: String,
    sharing: String,
    threads: usize,
    #[serde(flatten)]
    load: LoadReport,
    input_tokens: usize,
    output_tokens: usize,
    #[serde(flatten)]
    measured: Throughput,
}

/// Runs the command.
pub(super) fn execute(command: &ThroughputCommand) -> Result<()> {
    let dataset = command.dataset.dataset()?;
    let progress = Progress::stderr();
    let (model, mut engine) = load_engine(&command.model, &command.cache, progress)?;
    let mut encode =
        |text: &str, add_special: bool| Ok(model.tokenizer().encode(text, add_special)?);
    let vocab_size = model.spec().vocab_size;
    let requests = dataset.requests(command.dataset.size(), vocab_size, &mut encode)?;
    let mut job = |request: &LoadRequest| -> Result<Job> {
        Ok(Job { prompt: request.tokens(&mut encode)?, output_len: request.output_len })
    };
    let jobs = requests.iter().map(&mut job).collect::<Result<Vec<Job>>>()?;
    let input_tokens = jobs.iter().map(|job| job.prompt.len()).sum();
    let output_tokens = jobs.iter().map(|job| job.output_len).sum();
    let bar = progress.steps("tokens");
    let measured = throughput::measure(&mut engine, jobs, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let report = ThroughputReport {
        model: &command.model.model,
        recipe: engine.config().kv_cache.to_string(),
        sharing: engine.config().kv_sharing.to_string(),
        threads: engine.num_threads(),
        load: command.dataset.report(&dataset),
        input_tokens,
        output_tokens,
        measured: measured?,
    };
    if command.json {
        return print_json(&report);
    }
    let ThroughputReport { model, recipe, sharing, threads, measured: m, .. } = &report;
    print_line(&format!(
        "{model}, {recipe} cache, sharing {sharing}, {threads} threads, {} requests of {} tokens, {} generated",
        report.load.num_prompts, input_tokens, output_tokens
    ))?;
    print_line(&format!(
        "  {:.1} output tokens/s, {:.1} in all, {:.1} s",
        m.output_tokens_per_second, m.total_tokens_per_second, m.seconds
    ))?;
    print_line(&format!(
        "  {} running at once at most, {} preemptions, {} of cache at most",
        m.max_running,
        m.preemptions,
        format_bytes(m.peak_kv_physical_bytes as u64)
    ))
}
