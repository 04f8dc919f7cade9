//! `kvasir calibrate`: statistics of a model's keys and values, measured and kept.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use kvasir_cache::CacheError;
use kvasir_cache::offline::Method;
use kvasir_cache::stats::{PartStatistics, Statistics};
use kvasir_eval::corpus::Corpus;
use kvasir_model::{Calibration, CorpusInfo, Model, ModelError};
use serde::Serialize;

use crate::options::{ModelArgs, parse_block_size};
use crate::output::{print_json, print_line};
use crate::pull::{Progress, resolve_model};
use crate::session::load_model;
use crate::statistics;
use crate::tables;
use crate::units::{format_bytes, parse_tokens};

/// Measure what joint recipes, or other methods, need to know of a model, and keep it
#[derive(Debug, Args)]
#[command(after_help = "\
Joint recipes measure what they need at the first start, on texts that come with the program. This
command measures on texts of yours. What it writes is found by every later start with the same model
and block size, or named there with --kv-statistics.

A .txt file is one text; a .jsonl file has an object a line with its text in `context` or `text`. Of
each text the first --tokens-per-text tokens are measured, without its first block.

--method lorc and recalkv make the axes that those recipes project on; --method kvsharer searches layers
that may read another's keys and values; --method less trains networks that remember what a policy gives
up, on texts that are joined where they are short; --method compactor weighs contexts, for budgets that
follow from the prompt (compactor:quality=95). Such a table is found in the same way, or named with
--kv-table.

Examples:
  kvasir calibrate
  kvasir calibrate --method recalkv --corpus articles.jsonl
  kvasir calibrate --model gemma3-270m --corpus articles.jsonl --tokens-per-text 1k
  kvasir calibrate --block-size 16 --out smollm2.kvstats --json")]
pub(crate) struct CalibrateCommand {
    /// What to make: statistics of joint recipes, or the table of a method
    #[arg(long, value_name = "METHOD", default_value = "joint", value_parser = parse_method)]
    method: Target,
    /// The corpus: `embedded`, or a .txt or .jsonl file
    #[arg(long, value_name = "CORPUS", default_value_t = Corpus::Embedded)]
    corpus: Corpus,
    /// Most tokens of each text [default: 384, for less 2176, or the model's context if that is less]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    tokens_per_text: Option<usize>,
    /// Tokens per block of the caches that will use the statistics: 16, 32 or 64
    #[arg(long, value_name = "TOKENS", default_value = "32", value_parser = parse_block_size)]
    block_size: usize,
    /// The file to write [default: beside the model, where it is found again]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Threads that compute, 0 for all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// What is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Joint,
    Table(Method),
}

fn parse_method(name: &str) -> Result<Target, String> {
    let methods = || Method::ALL.map(Method::name).join(", ");
    match Method::by_name(name) {
        Some(method) => Ok(Target::Table(method)),
        None if name == "joint" => Ok(Target::Joint),
        None => Err(format!("take joint, {}", methods())),
    }
}

/// What `--json` prints of a table.
#[derive(Debug, Serialize)]
struct TableReport {
    path: PathBuf,
    bytes: usize,
    method: &'static str,
    corpus: String,
    seconds: f64,
    block_size: usize,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct CalibrateReport {
    path: PathBuf,
    bytes: usize,
    corpus: String,
    tokens: usize,
    seconds: f64,
    block_size: usize,
    layers: usize,
    /// Share of the energy that is in the first quarter of the coefficients, mean over head groups.
    first_quarter_energy: Energy,
}

#[derive(Debug, Serialize)]
struct Energy {
    keys: f64,
    values: f64,
}

/// Runs the command.
pub(crate) fn execute(command: &CalibrateCommand) -> Result<()> {
    let texts = command.corpus.texts()?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    if let Some(out) = &command.out {
        check_folder(out)?;
    }
    let progress = Progress::stderr();
    let model_path = resolve_model(&command.model.model)?;
    let model = load_model(&model_path, command.model.load.options(command.threads), progress)?;
    let context = model.spec().context_length;
    let default = match command.method {
        Target::Joint => statistics::default_tokens_per_text(&model),
        Target::Table(method) => tables::tokens_per_text(&model, method),
    };
    let tokens_per_text = command.tokens_per_text.unwrap_or(default);
    if tokens_per_text > context {
        bail!("--tokens-per-text {tokens_per_text}: the model's context is {context} tokens");
    }
    let calibration =
        Calibration { texts: &texts, tokens_per_text, block_size: command.block_size };
    if let Target::Table(method) = command.method {
        return make_table(command, method, &model, &model_path, &calibration);
    }
    let path =
        command.out.clone().unwrap_or_else(|| statistics::file_of(&model_path, command.block_size));
    let start = Instant::now();
    let statistics = statistics::measure(&model, &calibration, command.threads, progress)
        .map_err(|error| too_short(error, command, &calibration))?;
    let seconds = start.elapsed().as_secs_f64();
    let corpus = CorpusInfo::of(&command.corpus.to_string(), &calibration);
    let bytes = model.save_statistics(&path, &statistics, &corpus)?;
    let report = CalibrateReport {
        path,
        bytes,
        corpus: corpus.name,
        tokens: statistics.tokens,
        seconds,
        block_size: statistics.block_size,
        layers: statistics.layers.len(),
        first_quarter_energy: energy(&statistics),
    };
    if command.json { print_json(&report) } else { print_report(&report) }
}

fn make_table(
    command: &CalibrateCommand,
    method: Method,
    model: &Model,
    model_path: &Path,
    calibration: &Calibration<'_>,
) -> Result<()> {
    let default = || tables::file_of(model_path, command.block_size, method);
    let path = command.out.clone().unwrap_or_else(default);
    let start = Instant::now();
    let table = tables::make(model, method, calibration, command.threads, Progress::stderr())
        .map_err(|error| too_short(error, command, calibration))?;
    let seconds = start.elapsed().as_secs_f64();
    let corpus = CorpusInfo::of(&command.corpus.to_string(), calibration);
    let bytes = model.save_table(&path, &table, command.block_size, &corpus)?;
    let report = TableReport {
        path,
        bytes,
        method: method.name(),
        corpus: corpus.name,
        seconds,
        block_size: command.block_size,
    };
    if command.json {
        return print_json(&report);
    }
    let size = format_bytes(report.bytes as u64);
    print_line(&format!("file    {} ({size})", report.path.display()))?;
    print_line(&format!("table   of {}, in {:.1} s, on {}", method, seconds, report.corpus))
}

/// A place that cannot be written should be told before minutes of work.
fn check_folder(out: &Path) -> Result<()> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    if !folder.is_dir() {
        bail!("--out {}: there is no folder {}", out.display(), folder.display());
    }
    if out.is_dir() {
        bail!("--out {}: this is a folder", out.display());
    }
    Ok(())
}

/// Says how much there was of a corpus that shows too little.
fn too_short(
    error: anyhow::Error,
    command: &CalibrateCommand,
    calibration: &Calibration<'_>,
) -> anyhow::Error {
    match error.downcast_ref() {
        Some(ModelError::Cache(CacheError::Statistics { .. } | CacheError::Table { .. })) => error
            .context(format!(
                "cannot calibrate on corpus {} (texts: {}; tokens measured of each: at most {})",
                command.corpus,
                calibration.texts.len(),
                calibration.tokens_per_text.saturating_sub(calibration.block_size)
            )),
        _ => error,
    }
}

fn energy(statistics: &Statistics) -> Energy {
    let groups: Vec<_> = statistics.layers.iter().flatten().collect();
    let mean = |part: usize| {
        let shares = groups.iter().filter_map(|parts| parts.get(part)).map(first_quarter);
        shares.sum::<f64>() / groups.len().max(1) as f64
    };
    Energy { keys: mean(0), values: mean(1) }
}

/// Share of the energy in the first quarter of the coefficients; within a segment they are alike.
fn first_quarter(part: &PartStatistics) -> f64 {
    let quarter = part.scales.len() as f64 / 4.0;
    let (mut first, mut all) = (0.0, 0.0);
    for (i, scale) in part.scales.iter().enumerate() {
        let energy = f64::from(*scale).powi(2);
        first += energy * (quarter - i as f64).clamp(0.0, 1.0);
        all += energy;
    }
    first / all
}

fn print_report(report: &CalibrateReport) -> Result<()> {
    let Energy { keys, values } = report.first_quarter_energy;
    print_line(&format!(
        "file    {} ({})",
        report.path.display(),
        format_bytes(report.bytes as u64)
    ))?;
    print_line(&format!(
        "corpus  {}: {} tokens in {:.1} s",
        report.corpus, report.tokens, report.seconds
    ))?;
    print_line(&format!(
        "model   {} layers, blocks of {} tokens",
        report.layers, report.block_size
    ))?;
    print_line(&format!(
        "energy  {:.1} % of keys and {:.1} % of values in the first quarter of the coefficients",
        100.0 * keys,
        100.0 * values
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(scales: &[f32]) -> PartStatistics {
        PartStatistics {
            mean: Vec::new(),
            weights: Vec::new(),
            basis: Vec::new(),
            scales: scales.to_vec(),
        }
    }

    #[test]
    fn energy_of_the_first_quarter() {
        let shares: [(&[f32], f64); 4] = [
            (&[1.0; 8], 0.25),
            (&[2.0, 1.0, 1.0, 1.0], 4.0 / 7.0),
            // Half of the first segment of two; a quarter of the only one.
            (&[3.0, 1.0], 0.45),
            (&[5.0], 0.25),
        ];
        for (scales, share) in shares {
            assert!((first_quarter(&part(scales)) - share).abs() < 1e-9, "{scales:?}");
        }
    }

    #[test]
    fn places_that_cannot_be_written_are_found_first() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check_folder(&folder.path().join("a")).is_ok());
        assert!(check_folder(Path::new("a-file-in-the-current-folder")).is_ok());
        for wrong in [folder.path().join("none/a"), folder.path().to_owned()] {
            let error = check_folder(&wrong).unwrap_err().to_string();
            assert!(error.starts_with("--out "), "{error}");
        }
    }
}
