//! Which requests a load is made of.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use kvasir_eval::corpus::Corpus;
use kvasir_eval::dataset::{Dataset, LoadSize};
use serde::Serialize;

/// Names are those of `vllm bench`, where it has them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Requests")]
pub(crate) struct DatasetArgs {
    /// Where prompts come from
    #[arg(long, alias = "dataset-name", value_name = "DATASET", default_value = "random")]
    dataset: DatasetName,
    /// Requests
    #[arg(long, value_name = "N", default_value = "64")]
    num_prompts: NonZeroUsize,
    /// Tokens of each prompt (random, prefix-repetition) [default: 512]
    #[arg(long, alias = "random-input-len", value_name = "TOKENS")]
    input_len: Option<NonZeroUsize>,
    /// Tokens generated for each
    #[arg(long, alias = "random-output-len", value_name = "TOKENS", default_value = "128")]
    output_len: NonZeroUsize,
    /// Tokens of a prefix that prompts share, within --input-len (prefix-repetition) [default: 256]
    #[arg(long, alias = "prefix-repetition-prefix-len", value_name = "TOKENS")]
    prefix_len: Option<NonZeroUsize>,
    /// Different prefixes (prefix-repetition) [default: 10]
    #[arg(long, alias = "prefix-repetition-num-prefixes", value_name = "N")]
    num_prefixes: Option<NonZeroUsize>,
    /// Passages in a prompt (retrieval) [default: 4]
    #[arg(long, value_name = "N")]
    passages: Option<NonZeroUsize>,
    /// Passages to draw from (retrieval) [default: 8]
    #[arg(long, value_name = "N")]
    passages_total: Option<NonZeroUsize>,
    /// Tokens of a passage, best a multiple of the block size (retrieval) [default: 128]
    #[arg(long, value_name = "TOKENS")]
    passage_len: Option<NonZeroUsize>,
    /// File of the prompts (jsonl), or of the passages' texts (retrieval) [default: texts that come
    /// with the program]
    #[arg(long, value_name = "FILE")]
    dataset_path: Option<PathBuf>,
    /// Seed of everything random
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
}

/// What `--help` says of datasets.
macro_rules! dataset_help {
    () => {
        "Datasets (the same --seed gives the same requests every time):
  random             random tokens
  prefix-repetition  random tokens, the first of which are one of --num-prefixes prefixes
  retrieval          --passages passages in random order: shared content, hardly a shared prefix
  jsonl              a file of objects, a line each: {\"prompt\": TEXT or [IDS], \"output_tokens\": N}"
    };
}
pub(super) use dataset_help;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DatasetName {
    Random,
    #[value(alias = "prefix_repetition")]
    PrefixRepetition,
    Retrieval,
    #[value(alias = "custom")]
    Jsonl,
}

/// The load as reports name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct LoadReport {
    pub(super) dataset: &'static str,
    pub(super) num_prompts: usize,
    pub(super) seed: u64,
}

impl DatasetArgs {
    /// An option of another dataset is a mistake, not something to leave out quietly.
    pub(crate) fn dataset(&self) -> Result<Dataset> {
        use DatasetName::{Jsonl, PrefixRepetition, Random, Retrieval};
        let name = self.dataset;
        let options: [(&str, bool, &[DatasetName]); 7] = [
            ("--input-len", self.input_len.is_some(), &[Random, PrefixRepetition]),
            ("--prefix-len", self.prefix_len.is_some(), &[PrefixRepetition]),
            ("--num-prefixes", self.num_prefixes.is_some(), &[PrefixRepetition]),
            ("--passages", self.passages.is_some(), &[Retrieval]),
            ("--passages-total", self.passages_total.is_some(), &[Retrieval]),
            ("--passage-len", self.passage_len.is_some(), &[Retrieval]),
            ("--dataset-path", self.dataset_path.is_some(), &[Jsonl, Retrieval]),
        ];
        let stray = options.iter().find(|(_, given, of)| *given && !of.contains(&name));
        if let Some((option, ..)) = stray {
            let name = name.to_possible_value();
            let name = name.as_ref().map_or("", |name| name.get_name());
            bail!("{option} does not go with --dataset {name}");
        }
        let or = |value: Option<NonZeroUsize>, default| value.map_or(default, NonZeroUsize::get);
        let input_len = or(self.input_len, 512);
        Ok(match name {
            Random => Dataset::Random { input_len },
            PrefixRepetition => Dataset::PrefixRepetition {
                input_len,
                prefix_len: or(self.prefix_len, 256),
                num_prefixes: or(self.num_prefixes, 10),
            },
            Retrieval => Dataset::Retrieval {
                passages: or(self.passages, 4),
                passages_total: or(self.passages_total, 8),
                passage_len: or(self.passage_len, 128),
                corpus: self.dataset_path.clone().map_or(Corpus::Embedded, Corpus::File),
            },
            Jsonl => match self.dataset_path.clone() {
                Some(path) => Dataset::Jsonl { path },
                None => bail!("--dataset jsonl needs --dataset-path FILE"),
            },
        })
    }

    /// How many requests of `dataset`.
    pub(crate) fn size(&self) -> LoadSize {
        LoadSize {
            num_prompts: self.num_prompts.get(),
            output_len: self.output_len.get(),
            seed: self.seed,
        }
    }

    /// What reports say of `dataset`.
    pub(super) fn report(&self, dataset: &Dataset) -> LoadReport {
        let LoadSize { num_prompts, seed, .. } = self.size();
        LoadReport { dataset: dataset.name(), num_prompts, seed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        dataset: DatasetArgs,
    }

    fn parse(args: &str) -> DatasetArgs {
        let args = std::iter::once("x").chain(args.split_whitespace());
        Line::try_parse_from(args).unwrap().dataset
    }

    #[test]
    fn defaults_and_options_of_every_dataset() {
        let repetition = |input_len, prefix_len, num_prefixes| Dataset::PrefixRepetition {
            input_len,
            prefix_len,
            num_prefixes,
        };
        let retrieval = |passages, passages_total, passage_len, corpus| Dataset::Retrieval {
            passages,
            passages_total,
            passage_len,
            corpus,
        };
        for (args, expected) in [
            ("", Dataset::Random { input_len: 512 }),
            ("--dataset-name random --random-input-len 7", Dataset::Random { input_len: 7 }),
            ("--dataset prefix-repetition", repetition(512, 256, 10)),
            (
                "--dataset prefix_repetition --input-len 9 --prefix-len 8 --num-prefixes 2",
                repetition(9, 8, 2),
            ),
            ("--dataset retrieval", retrieval(4, 8, 128, Corpus::Embedded)),
            (
                "--dataset retrieval --passages 1 --passages-total 2 --passage-len 3 \
                 --dataset-path a.jsonl",
                retrieval(1, 2, 3, Corpus::File("a.jsonl".into())),
            ),
            ("--dataset jsonl --dataset-path p", Dataset::Jsonl { path: "p".into() }),
        ] {
            assert_eq!(parse(args).dataset().unwrap(), expected, "{args}");
        }
        let size = parse("--num-prompts 3 --output-len 4 --seed 5").size();
        assert_eq!(size, LoadSize { num_prompts: 3, output_len: 4, seed: 5 });
    }

    #[test]
    fn options_of_other_datasets_are_mistakes() {
        for (args, message) in [
            ("--passages 2", "--passages does not go with --dataset random"),
            ("--dataset retrieval --input-len 2", "--input-len does not go with --dataset retrie"),
            ("--dataset-path p", "--dataset-path does not go with --dataset random"),
            ("--dataset jsonl", "--dataset jsonl needs --dataset-path FILE"),
        ] {
            let error = parse(args).dataset().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
