//! `kvasir eval`: quality.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use kvasir_eval::{corpus, perplexity};

use crate::options::{CacheArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::Progress;
use crate::session::load_engine;

/// Measure quality
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir eval perplexity --corpus articles.jsonl
  kvasir eval perplexity --corpus book.txt --window 1024 --windows 8 --json")]
pub(crate) struct EvalCommand {
    #[command(subcommand)]
    what: Measure,
}

#[derive(Debug, Subcommand)]
enum Measure {
    Perplexity(Box<PerplexityCommand>),
}

/// Perplexity of a corpus
#[derive(Debug, Args)]
#[command(after_help = "\
A .txt file is one text; a .jsonl file has an object a line with its text in `context` or `text`.

Examples:
  kvasir eval perplexity --corpus articles.jsonl
  kvasir eval perplexity --corpus book.txt --window 1024 --windows 8 --json")]
struct PerplexityCommand {
    /// The corpus: a .txt or .jsonl file
    #[arg(long, value_name = "FILE")]
    corpus: PathBuf,
    /// Tokens in a window
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    window: usize,
    /// Most windows to measure
    #[arg(long, value_name = "N", default_value_t = 16)]
    windows: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Runs the command.
pub(crate) fn execute(command: EvalCommand) -> Result<()> {
    let Measure::Perplexity(command) = command.what;
    let texts = corpus::read(&command.corpus)?;
    let progress = Progress::stderr();
    let (_, mut engine) = load_engine(&command.model, &command.cache, progress)?;
    let bar = progress.steps("measuring");
    let result = perplexity::measure(
        &mut engine,
        &texts,
        command.window,
        command.windows,
        &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        },
    );
    bar.finish_and_clear();
    let result = result?;
    if command.json {
        return print_json(&result);
    }
    print_line(&format!(
        "{}: perplexity {:.3} (NLL {:.4}) over {} tokens in {} windows of {}",
        result.recipe,
        result.perplexity,
        result.nll_mean,
        result.tokens,
        result.windows,
        command.window
    ))
}
