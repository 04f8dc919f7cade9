//! `kvasir eval`: quality.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use kvasir_cache::Recipe;
use kvasir_eval::{corpus, quality};
use kvasir_model::{Runner, Threads};

use crate::options::{CacheArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::{Progress, resolve_model};
use crate::session::{load_engine, load_model};

/// Measure quality
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir eval quality --corpus articles.jsonl --recipe int8,kivi4,kivi2
  kvasir eval perplexity --corpus book.txt --window 1024 --windows 8 --json")]
pub(crate) struct EvalCommand {
    #[command(subcommand)]
    what: Measure,
}

#[derive(Debug, Subcommand)]
enum Measure {
    Quality(Box<QualityCommand>),
    Perplexity(Box<PerplexityCommand>),
}

/// What recipes do to predictions and to bytes, against the f16 cache in the same run
#[derive(Debug, Args)]
#[command(after_help = "\
Contexts are the first texts of the corpus that are long enough. Each is prefilled through the recipe,
then its next tokens are forced one at a time.

Columns: ratio of f16 bytes to bytes, of sealed blocks and of everything; mean and 95th percentile of the
KL divergence in nats; share of equal most likely tokens; change of the next token's NLL.

Examples:
  kvasir eval quality --corpus articles.jsonl --recipe int8,kivi4,kivi2
  kvasir eval quality --corpus articles.jsonl --recipe kivi2 --contexts 4 --json")]
struct QualityCommand {
    /// The corpus: a .txt or .jsonl file
    #[arg(long, value_name = "FILE")]
    corpus: PathBuf,
    /// Recipes to measure, comma separated
    #[arg(long, value_name = "RECIPES", required = true, value_delimiter = ',')]
    recipe: Vec<Recipe>,
    /// Most contexts
    #[arg(long, value_name = "N", default_value_t = 16)]
    contexts: usize,
    /// Tokens of context
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    context_len: usize,
    /// Tokens forced after the context
    #[arg(long, value_name = "TOKENS", default_value_t = 48)]
    continuation: usize,
    /// Tokens per block
    #[arg(long, value_name = "TOKENS", default_value_t = 32)]
    block_size: usize,
    /// Most tokens computed in a step
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    max_num_batched_tokens: usize,
    /// Threads that compute, 0 for all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
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
    match command.what {
        Measure::Quality(command) => quality(&command),
        Measure::Perplexity(command) => perplexity(&command),
    }
}

fn quality(command: &QualityCommand) -> Result<()> {
    let texts = corpus::read(&command.corpus)?;
    let progress = Progress::stderr();
    let path = resolve_model(&command.model.model)?;
    let model = load_model(&path, command.threads, progress)?;
    let mut runner = Runner::new(Threads::new(command.threads)?);
    let settings = quality::Continuation {
        contexts: command.contexts,
        context_len: command.context_len,
        continuation: command.continuation,
        block_size: command.block_size,
        chunk: command.max_num_batched_tokens,
    };
    let bar = progress.steps("measuring");
    let rows = quality::continuation(
        &model,
        &mut runner,
        &texts,
        &command.recipe,
        settings,
        &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        },
    );
    bar.finish_and_clear();
    let rows = rows?;
    if command.json {
        return print_json(&rows);
    }
    print_line(
        "recipe    ratio sealed  total     KL mean      p95   top-1  NLL change  worst context",
    )?;
    for r in &rows {
        print_line(&format!(
            "{:8}  {:12.2}  {:5.2}  {:10.5} {:8.4}  {:.4}  {:+10.4}  {} at {:.4}",
            r.recipe,
            r.ratio_sealed,
            r.ratio_total,
            r.kl_mean,
            r.kl_p95,
            r.top1,
            r.nll_delta,
            r.worst.context,
            r.worst.kl_mean
        ))?;
    }
    Ok(())
}

fn perplexity(command: &PerplexityCommand) -> Result<()> {
    let texts = corpus::read(&command.corpus)?;
    let progress = Progress::stderr();
    let (_, mut engine) = load_engine(&command.model, &command.cache, progress)?;
    let bar = progress.steps("measuring");
    let result = kvasir_eval::perplexity::measure(
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
