//! `kvasir eval perplexity`.

use anyhow::Result;
use clap::Args;
use kvasir_eval::corpus::Corpus;

use crate::options::{CacheArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::Progress;
use crate::session::load_engine;

/// Perplexity of a corpus
#[derive(Debug, Args)]
#[command(after_help = "\
A .txt file is one text; a .jsonl file has an object a line with its text in `context` or `text`.

Examples:
  kvasir eval perplexity
  kvasir eval perplexity --corpus articles.jsonl
  kvasir eval perplexity --corpus book.txt --window 1024 --windows 8 --json")]
pub(super) struct PerplexityCommand {
    /// The corpus: `embedded`, or a .txt or .jsonl file
    #[arg(long, value_name = "CORPUS", default_value_t = Corpus::Embedded)]
    corpus: Corpus,
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
pub(super) fn execute(command: &PerplexityCommand) -> Result<()> {
    let texts = command.corpus.texts()?;
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
