//! `kvasir eval quality`: predictions and bytes.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use kvasir_cache::{Recipe, Sharing};
use kvasir_eval::corpus::Corpus;
use kvasir_eval::quality::{self, RecipeQuality, Settings, Workload};
use kvasir_model::{LoadOptions, Runner, Threads};

use crate::options::{DtypeArg, EncodingArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::{Progress, resolve_model};
use crate::session::load_model;

/// What recipes do to predictions and to bytes, against the f16 cache in the same run
#[derive(Debug, Args)]
#[command(after_help = "\
Each context is prefilled through the recipe, then its next tokens are forced one at a time.

Workloads:
  continuation  the beginnings of the first texts of the corpus that are long enough
  retrieval     prompts of different passages in random order, continued as the text of the
                last one goes on; passages are beginnings of texts, chosen as above

Columns: ratio of f16 bytes to bytes, of sealed blocks and of everything; mean and 95th percentile
of the KL divergence in nats; share of equal most likely tokens; change of the next token's NLL.
With --sharing tree a line for each recipe follows: blocks ÷ representatives over the layers that are
fused, predicted and counted; bytes before ÷ after, of everything; blocks that the last check sent back.

Examples:
  kvasir eval quality --recipe int8,kivi4,kivi2
  kvasir eval quality --corpus articles.jsonl --recipe kivi2 --contexts 4 --json
  kvasir eval quality --recipe f16 --control-dtype float32
  kvasir eval quality --workload retrieval --recipe int8,kivi4
  kvasir eval quality --workload retrieval --passages 6 --passages-total 12 --seed 1 --recipe kivi4")]
pub(super) struct QualityCommand {
    /// The corpus: `embedded`, or a .txt or .jsonl file
    #[arg(long, value_name = "CORPUS", default_value_t = Corpus::Embedded)]
    corpus: Corpus,
    /// Recipes to measure, comma separated
    #[arg(long, value_name = "RECIPES", required = true, value_delimiter = ',')]
    recipe: Vec<Recipe>,
    /// What contexts are made of
    #[arg(long, value_name = "WORKLOAD", default_value = "continuation")]
    workload: WorkloadName,
    /// Which blocks are shared: off, tokens, sketch or tree, with a limit as in tokens:0.05
    #[arg(long, value_name = "SHARING", default_value = "off")]
    sharing: Sharing,
    /// Most contexts [default: 16; with --workload retrieval 8]
    #[arg(long, value_name = "N")]
    contexts: Option<usize>,
    /// Tokens of context [default: 512]
    #[arg(long, value_name = "TOKENS")]
    context_len: Option<usize>,
    /// Tokens forced after the context
    #[arg(long, value_name = "TOKENS", default_value_t = 48)]
    continuation: usize,
    /// Form of the control's weights [default: as --dtype]
    #[arg(long, value_name = "DTYPE")]
    control_dtype: Option<DtypeArg>,
    /// Most tokens computed in a step
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    max_num_batched_tokens: usize,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    retrieval: RetrievalArgs,
    #[command(flatten)]
    encoding: EncodingArgs,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WorkloadName {
    Continuation,
    Retrieval,
}

/// What only the retrieval workload has.
#[derive(Debug, Args)]
#[command(next_help_heading = "Retrieval workload")]
struct RetrievalArgs {
    /// Passages in a prompt [default: 4]
    #[arg(long, value_name = "N")]
    passages: Option<usize>,
    /// Passages to draw from [default: 8]
    #[arg(long, value_name = "N")]
    passages_total: Option<usize>,
    /// Tokens of a passage, a multiple of the block size [default: 128]
    #[arg(long, value_name = "TOKENS")]
    passage_len: Option<usize>,
    /// Seed of the order of passages [default: 0]
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
}

impl QualityCommand {
    fn settings(&self) -> Result<Settings> {
        let settings = Settings {
            workload: self.workload()?,
            continuation: self.continuation,
            block_size: self.encoding.block_size,
            chunk: self.max_num_batched_tokens,
        };
        settings.check()?;
        Ok(settings)
    }

    /// An option of another workload is a mistake, not something to leave out quietly.
    fn workload(&self) -> Result<Workload> {
        let r = &self.retrieval;
        match self.workload {
            WorkloadName::Continuation => {
                let options = [
                    ("--passages", r.passages.is_some()),
                    ("--passages-total", r.passages_total.is_some()),
                    ("--passage-len", r.passage_len.is_some()),
                    ("--seed", r.seed.is_some()),
                ];
                if let Some((option, _)) = options.iter().find(|(_, given)| *given) {
                    bail!("{option} goes with --workload retrieval only");
                }
                Ok(Workload::Continuation {
                    contexts: self.contexts.unwrap_or(16),
                    context_len: self.context_len.unwrap_or(512),
                })
            }
            WorkloadName::Retrieval => {
                if self.context_len.is_some() {
                    bail!(
                        "--context-len goes with --workload continuation only: the contexts of \
                         retrieval are --passages times --passage-len tokens"
                    );
                }
                Ok(Workload::Retrieval {
                    contexts: self.contexts.unwrap_or(8),
                    passages: r.passages.unwrap_or(4),
                    passages_total: r.passages_total.unwrap_or(8),
                    passage_len: r.passage_len.unwrap_or(128),
                    seed: r.seed.unwrap_or(0),
                })
            }
        }
    }
}

/// Runs the command.
pub(super) fn execute(command: &QualityCommand) -> Result<()> {
    let settings = command.settings()?;
    let texts = command.corpus.texts()?;
    let progress = Progress::stderr();
    let path = resolve_model(&command.model.model)?;
    let model = load_model(&path, command.model.load.options(command.encoding.threads), progress)?;
    let (statistics, tables) = command.encoding.load(&model, &path, &command.recipe, progress)?;
    let mut runner = Runner::new(Threads::new(command.encoding.threads)?);
    let bar = progress.steps("measuring");
    let mut on_step = |done: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let control = command.control_dtype.filter(|dtype| *dtype != command.model.load.dtype);
    let control = control
        .map(|dtype| {
            let options = command.model.load.options(command.encoding.threads);
            load_model(&path, LoadOptions { dtype: dtype.into(), ..options }, progress)
        })
        .transpose()?;
    let caches = quality::Caches {
        recipes: &command.recipe,
        statistics,
        tables,
        sharing: command.sharing,
        control: control.as_deref(),
    };
    let rows = quality::measure(&model, &mut runner, &texts, &caches, &settings, &mut on_step);
    bar.finish_and_clear();
    let rows = rows?;
    if command.json { print_json(&rows) } else { print_table(&rows) }
}

fn print_table(rows: &[RecipeQuality]) -> Result<()> {
    let width = rows.iter().map(|r| r.recipe.len()).max().unwrap_or(0).max(8);
    print_line(&format!(
        "{:width$}  ratio sealed  total     KL mean      p95   top-1  NLL change  worst context",
        "recipe"
    ))?;
    for r in rows {
        print_line(&format!(
            "{:width$}  {:12.2}  {:5.2}  {:10.5} {:8.4}  {:.4}  {:+10.4}  {} at {:.4}",
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
    for tree in rows.iter().filter_map(|r| r.tree) {
        print_line(&format!(
            "tree: predicted ratio {:.3}, counted {:.3}, realised {:.3}; {} blocks sent back",
            tree.ratio_predicted, tree.ratio_counted, tree.ratio_realised, tree.rejected
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        quality: QualityCommand,
    }

    fn parse(args: &str) -> QualityCommand {
        let args = ["x", "--recipe", "int8"].into_iter().chain(args.split_whitespace());
        Line::try_parse_from(args).unwrap().quality
    }

    #[test]
    fn defaults_of_the_workloads() {
        let command = parse("");
        assert_eq!(command.corpus, Corpus::Embedded);
        let expected = Settings {
            workload: Workload::Continuation { contexts: 16, context_len: 512 },
            continuation: 48,
            block_size: 32,
            chunk: 512,
        };
        assert_eq!(command.settings().unwrap(), expected);
        let retrieval = Workload::Retrieval {
            contexts: 8,
            passages: 4,
            passages_total: 8,
            passage_len: 128,
            seed: 0,
        };
        let settings = parse("--workload retrieval").settings().unwrap();
        assert_eq!(settings, Settings { workload: retrieval, ..expected });
    }

    #[test]
    fn every_option_arrives() {
        let command = parse(
            "--workload retrieval --corpus a.jsonl --contexts 3 --passages 2 --passages-total 5 \
             --passage-len 64 --seed 7 --continuation 9 --block-size 16 --max-num-batched-tokens 48",
        );
        assert_eq!(command.corpus, Corpus::File("a.jsonl".into()));
        let expected = Settings {
            workload: Workload::Retrieval {
                contexts: 3,
                passages: 2,
                passages_total: 5,
                passage_len: 64,
                seed: 7,
            },
            continuation: 9,
            block_size: 16,
            chunk: 48,
        };
        assert_eq!(command.settings().unwrap(), expected);
        let expected = Workload::Continuation { contexts: 1, context_len: 64 };
        assert_eq!(parse("--contexts 1 --context-len 64").workload().unwrap(), expected);
    }

    #[test]
    fn mistakes_are_found_before_anything_is_read() {
        for (args, message) in [
            ("--contexts 0", "there is nothing to measure in 0 contexts"),
            ("--continuation 0", "a continuation needs at least one token"),
            ("--seed 1", "--seed goes with --workload retrieval only"),
            ("--passages 4", "--passages goes with --workload retrieval only"),
            ("--workload retrieval --contexts 0", "there is nothing to measure in 0 contexts"),
            ("--workload retrieval --passages 9", "9 different passages cannot be drawn from 8"),
            ("--workload retrieval --passage-len 100", "passages of 100 tokens do not end"),
            ("--workload retrieval --context-len 512", "--context-len goes with"),
        ] {
            let error = parse(args).settings().unwrap_err().to_string();
            assert!(error.starts_with(message), "{args}: {error}");
        }
    }
}
