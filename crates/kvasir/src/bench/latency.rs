//! `kvasir bench latency`: prompts, one sequence, and batches in decode.

use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::{Result, bail};
use clap::Args;
use kvasir_engine::Engine;
use kvasir_eval::latency::{self, Kind, Test};
use serde::Serialize;

use crate::options::{CacheArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::{Progress, resolve_model};
use crate::session::{load_model, with_statistics};

/// Prompt and generation speed: one sequence, and batches in decode
#[derive(Debug, Args)]
#[command(after_help = "\
Tests: ppN computes a prompt of N random tokens; tgN generates N tokens after one; tgN@CxS generates N
tokens of each of S sequences that have C tokens of context (whole blocks), speed being that of all
together. For these the prompts are computed before, and limits of cache and batch are raised to what they
need. Each test is run once to warm up, then --repetitions times, interleaved; the median counts.

Examples:
  kvasir bench latency
  kvasir bench latency --test pp512,pp2048,tg128,tg48@512x32 --repetitions 5 --json
  kvasir bench latency --num-seqs 1,32,64 --context 512,1024 --decode-len 48
  kvasir bench latency --model gemma3-270m --threads 1")]
pub(super) struct LatencyCommand {
    /// What to measure: ppN, tgN or tgN@CxS, comma separated [default, without --num-seqs:
    /// pp512,pp2048,tg128]
    #[arg(long, value_name = "TESTS", value_delimiter = ',', value_parser = parse_kind)]
    test: Vec<Kind>,
    /// Also measure decode of this many sequences together, comma separated
    #[arg(long, value_name = "SEQS", value_delimiter = ',')]
    num_seqs: Vec<NonZeroUsize>,
    /// Tokens of context of these sequences, comma separated
    #[arg(
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "512",
        requires = "num_seqs"
    )]
    context: Vec<NonZeroUsize>,
    /// Tokens generated for each of these sequences
    #[arg(long, value_name = "TOKENS", default_value = "48", requires = "num_seqs")]
    decode_len: NonZeroUsize,
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
    let decode = |text: &str| {
        let (tokens, rest) = text.split_once('@')?;
        let (context, num_seqs) = rest.split_once('x')?;
        let (tokens, context) = (number(tokens)?, number(context)?);
        Some(Kind::Decode { num_seqs: number(num_seqs)?, context, tokens })
    };
    let kind = match text.split_at_checked(2) {
        Some(("pp", n)) => number(n).map(Kind::Prompt),
        Some(("tg", n)) => number(n).map(Kind::Generation).or_else(|| decode(n)),
        _ => None,
    };
    let form = "must be ppN, tgN or tgN@CxS with numbers above 0, such as pp512 or tg48@512x32";
    kind.ok_or_else(|| form.to_owned())
}

impl LatencyCommand {
    /// What to measure, in order.
    fn kinds(&self) -> Vec<Kind> {
        if self.test.is_empty() && self.num_seqs.is_empty() {
            return vec![Kind::Prompt(512), Kind::Prompt(2048), Kind::Generation(128)];
        }
        let tokens = self.decode_len.get();
        let at = |context: &NonZeroUsize| {
            let context = context.get();
            let decode =
                move |n: &NonZeroUsize| Kind::Decode { num_seqs: n.get(), context, tokens };
            self.num_seqs.iter().map(decode)
        };
        self.test.iter().copied().chain(self.context.iter().flat_map(at)).collect()
    }

    /// An engine with room for `kinds`.
    fn engine(&self, kinds: &[Kind], progress: Progress) -> Result<Engine> {
        let path = resolve_model(&self.model.model)?;
        let model = load_model(&path, self.model.load.options(self.cache.threads()), progress)?;
        let mut config = self.cache.engine_config();
        latency::make_room(&mut config, kinds, model.spec());
        let config = with_statistics(config, &model, &path, &self.cache, progress)?;
        Ok(Engine::new(Arc::clone(&model), config)?)
    }
}

/// Runs the command.
pub(super) fn execute(command: &LatencyCommand) -> Result<()> {
    if command.repetitions == 0 {
        bail!("--repetitions must be at least 1");
    }
    let kinds = command.kinds();
    let progress = Progress::stderr();
    let mut engine = command.engine(&kinds, progress)?;
    let bar = progress.steps("measuring");
    let tests = latency::measure(
        &mut engine,
        &kinds,
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
            "{:>12}  {speed:8.1} tokens/s  (median of {}, {low:.1} to {high:.1})",
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
        let decode = Kind::Decode { num_seqs: 32, context: 512, tokens: 48 };
        assert_eq!(parse_kind("tg48@512x32"), Ok(decode));
        assert_eq!(parse_kind(&decode.to_string()), Ok(decode));
        for wrong in
            ["", "pp", "pp0", "xx5", "tg-1", "é12", "tg4@5", "tg4@0x2", "pp4@5x6", "tg4@5x6x7"]
        {
            assert!(parse_kind(wrong).is_err(), "{wrong}");
        }
    }

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        latency: LatencyCommand,
    }

    #[test]
    fn batches_come_after_the_tests_named() {
        let kinds = |args: &str| {
            let args = std::iter::once("x").chain(args.split_whitespace());
            let line = <Line as clap::Parser>::try_parse_from(args).unwrap();
            line.latency.kinds().iter().map(Kind::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(kinds(""), "pp512 pp2048 tg128");
        assert_eq!(kinds("--test tg8"), "tg8");
        assert_eq!(kinds("--num-seqs 4"), "tg48@512x4");
        assert_eq!(
            kinds("--test pp9 --num-seqs 1,4 --context 64,128 --decode-len 7"),
            "pp9 tg7@64x1 tg7@64x4 tg7@128x1 tg7@128x4"
        );
    }
}
