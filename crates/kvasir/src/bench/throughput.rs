//! `kvasir bench throughput`: many requests at once, offline.

use std::num::NonZeroUsize;

use anyhow::Result;
use clap::Args;
use kvasir_eval::throughput::{self, Load, Throughput};
use serde::Serialize;

use crate::options::{CacheArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::Progress;
use crate::session::load_engine;
use crate::units::format_bytes;

/// Speed of many requests at once, without a server
#[derive(Debug, Args)]
#[command(after_help = "\
All requests are there from the beginning; prompts are random tokens, and end tokens are ignored, so
that every recipe does the same work. Compare recipes at one --kv-cache-memory.

Examples:
  kvasir bench throughput
  kvasir bench throughput --num-prompts 64 --input-len 512 --output-len 256 \\
      --kv-cache joint3 --kv-cache-memory 180MiB --json")]
pub(super) struct ThroughputCommand {
    /// Requests
    #[arg(long, value_name = "N", default_value = "64")]
    num_prompts: NonZeroUsize,
    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value = "512")]
    input_len: NonZeroUsize,
    /// Tokens generated for each
    #[arg(long, value_name = "TOKENS", default_value = "128")]
    output_len: NonZeroUsize,
    /// Seed of the prompts
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
struct ThroughputReport<'a> {
    model: &'a str,
    recipe: String,
    sharing: String,
    threads: usize,
    #[serde(flatten)]
    load: Load,
    #[serde(flatten)]
    measured: Throughput,
}

/// Runs the command.
pub(super) fn execute(command: &ThroughputCommand) -> Result<()> {
    let load = Load {
        num_prompts: command.num_prompts.get(),
        input_len: command.input_len.get(),
        output_len: command.output_len.get(),
        seed: command.seed,
    };
    let progress = Progress::stderr();
    let (_, mut engine) = load_engine(&command.model, &command.cache, progress)?;
    let bar = progress.steps("tokens");
    let measured = throughput::measure(&mut engine, load, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let report = ThroughputReport {
        model: &command.model.model,
        recipe: engine.config().kv_cache.to_string(),
        sharing: engine.config().kv_sharing.to_string(),
        threads: engine.num_threads(),
        load,
        measured: measured?,
    };
    if command.json {
        return print_json(&report);
    }
    let ThroughputReport { model, recipe, sharing, threads, load, measured: m } = &report;
    print_line(&format!(
        "{model}, {recipe} cache, sharing {sharing}, {threads} threads, {} requests of {} + {} tokens",
        load.num_prompts, load.input_len, load.output_len
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
