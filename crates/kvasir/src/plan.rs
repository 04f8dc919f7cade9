//! `kvasir plan`: what a load will be like, before it is run.

use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use kvasir_cache::Recipe;
use kvasir_cache::sharing::theory::Workload;
use kvasir_eval::arrivals;
use kvasir_eval::profile::Profile;
use kvasir_eval::simulate::{
    ServerConfig, Simulated, TraceRequest, block_sharing, of_requests, read_trace, simulate,
};
use serde::Serialize;

use crate::bench::{DatasetArgs, parse_rate};
use crate::options::ModelArgs;
use crate::output::{print_json, print_line};
use crate::pull::{Progress, resolve_model};
use crate::session::load_model;
use crate::units::{format_bytes, parse_bytes, parse_tokens};

/// Predict what a load will be like under recipes: latency, throughput, bytes
#[derive(Debug, Args)]
#[command(after_help = "\
Simulates the scheduler on a profile of this machine (`kvasir profile`): nothing is computed. The load is one of
`kvasir bench serve`'s, with the same options and the same requests, or a trace.

A trace is a .jsonl file as Mooncake publishes them: timestamp in milliseconds, input_length, output_length, and
hash_ids, a name for each 512 tokens of the prompt that are found in the prefix cache where the same name was there
before. Of policies that choose among a prompt's tokens the bytes are those after the choice, and prefixes are not
found again.

Examples:
  kvasir plan --profile profile.json --recipe f16,joint3 --num-prompts 64 --request-rate 4
  kvasir plan --recipe joint3 --kv-cache-memory 64MiB --dataset prefix-repetition --max-concurrency 16
  kvasir plan --recipe f16,joint3 --trace conversations.jsonl --json")]
pub(crate) struct PlanCommand {
    /// What this machine was found to do
    #[arg(long, value_name = "FILE", default_value = "profile.json")]
    profile: PathBuf,
    /// Recipes of the profile, comma separated [default: all of them]
    #[arg(long, alias = "recipes", value_name = "RECIPES", value_delimiter = ',')]
    recipe: Vec<Recipe>,
    /// Requests in a file, in place of a dataset
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Requests a second, at random times (Poisson); inf is all at once
    #[arg(long, value_name = "RATE", default_value = "inf", value_parser = parse_rate)]
    request_rate: f64,
    /// Most requests in flight; further ones wait until one has ended [default: no limit]
    #[arg(long, value_name = "N")]
    max_concurrency: Option<NonZeroUsize>,
    /// Memory of the KV cache
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = parse_bytes)]
    kv_cache_memory: usize,
    /// Most sequences in the running batch
    #[arg(long, value_name = "N", default_value = "128")]
    max_num_seqs: NonZeroUsize,
    /// Most tokens computed in a step [default: the profile's]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    max_num_batched_tokens: Option<usize>,
    /// Compute every prompt from its first token
    #[arg(long)]
    no_enable_prefix_caching: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    dataset: DatasetArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// A recipe's row.
#[derive(Debug, Serialize)]
struct Row {
    recipe: String,
    #[serde(flatten)]
    simulated: Simulated,
}

#[derive(Debug, Serialize)]
struct Plan {
    requests: usize,
    /// Blocks of all prompts, by blocks of different contents: what `--kv-sharing tokens` could save at most.
    blocks_by_distinct: f64,
    /// The same, of blocks that differ in what precedes them: what the prefix cache saves.
    blocks_by_distinct_prefix: f64,
    /// The first of both, foretold from some of the requests.
    sharing_foretold: Foretold,
    rows: Vec<Row>,
}

/// What a sample of the requests says of all of them.
#[derive(Debug, Serialize)]
struct Foretold {
    /// Requests that were looked at.
    sampled: usize,
    /// Blocks by blocks of different contents among those.
    blocks_by_distinct_of_sample: f64,
    /// Of all requests, expected.
    blocks_by_distinct: f64,
}

/// From every fourth request, more of few: what a trace that goes on is like at four times its length.
fn foretell(contents: &[Vec<u64>]) -> Foretold {
    let step = (contents.len() / 16).clamp(1, 4);
    let sample: Vec<Vec<u64>> = contents.iter().step_by(step).cloned().collect();
    Foretold {
        sampled: sample.len(),
        blocks_by_distinct_of_sample: block_sharing(&sample),
        blocks_by_distinct: Workload::of_sample(contents.len(), &sample).copies_ratio(),
    }
}

/// Runs the command.
pub(crate) fn execute(command: &PlanCommand) -> Result<()> {
    let path = &command.profile;
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read {}: `kvasir profile` makes it", path.display()))?;
    let profile = Profile::parse(&text).with_context(|| path.display().to_string())?;
    let recipes = command.recipes(&profile)?;
    let (requests, contents) = command.requests(&profile)?;
    let distinct = |blocks: &[Vec<u64>]| block_sharing(blocks);
    let names: Vec<Vec<u64>> = requests.iter().map(|request| request.blocks.clone()).collect();
    let mut rows = Vec::new();
    for recipe in recipes {
        let missing = || format!("{} has no steps of {recipe}", path.display());
        let steps = profile.step_model(&recipe.to_string()).with_context(missing)?;
        let bytes = profile.bytes_model(&recipe.to_string()).with_context(missing)?;
        let config = ServerConfig {
            max_num_seqs: command.max_num_seqs.get(),
            max_num_batched_tokens: command
                .max_num_batched_tokens
                .unwrap_or(profile.max_num_batched_tokens),
            block_size: profile.block_size,
            kv_cache_memory: command.kv_cache_memory,
            enable_prefix_caching: !command.no_enable_prefix_caching && !recipe.waits_for_prompt(),
            max_concurrency: command.max_concurrency.map_or(usize::MAX, NonZeroUsize::get),
        };
        let simulated = simulate(&config, bytes, &|work| steps.seconds(work), &requests)
            .with_context(|| recipe.to_string())?;
        rows.push(Row { recipe: recipe.to_string(), simulated });
    }
    let plan = Plan {
        requests: requests.len(),
        blocks_by_distinct: distinct(&contents),
        blocks_by_distinct_prefix: distinct(&names),
        sharing_foretold: foretell(&contents),
        rows,
    };
    if command.json { print_json(&plan) } else { print(&plan) }
}

fn print(plan: &Plan) -> Result<()> {
    let width = plan.rows.iter().map(|row| row.recipe.len()).max().unwrap_or(0).max(8);
    print_line(&format!(
        "{:width$}  output tokens/s  TTFT p50, p99 ms   TPOT p50 ms  running  preempted  cached    bytes",
        "recipe"
    ))?;
    for Row { recipe, simulated: s } in &plan.rows {
        let ttft = s.ttft.unwrap_or_default();
        print_line(&format!(
            "{recipe:width$}  {:15.1}  {:7.0}, {:7.0}   {:11.1}  {:7}  {:9}  {:4.0} %  {}",
            s.output_tokens_per_second,
            1e3 * ttft.p50,
            1e3 * ttft.p99,
            1e3 * s.tpot.unwrap_or_default().p50,
            s.max_running,
            s.preemptions,
            100.0 * s.cached_share,
            format_bytes(s.peak_kv_physical_bytes as u64)
        ))?;
    }
    print_line(&format!(
        "{} requests; blocks by distinct blocks {:.2}, by distinct prefixes {:.2}",
        plan.requests, plan.blocks_by_distinct, plan.blocks_by_distinct_prefix
    ))?;
    let told = &plan.sharing_foretold;
    print_line(&format!(
        "foretold from {} of them, which have {:.2}: {:.2}",
        told.sampled, told.blocks_by_distinct_of_sample, told.blocks_by_distinct
    ))
}

impl PlanCommand {
    fn recipes(&self, profile: &Profile) -> Result<Vec<Recipe>> {
        if !self.recipe.is_empty() {
            return Ok(self.recipe.clone());
        }
        let recipes = profile.recipes().into_iter().map(|recipe| Ok(recipe.parse()?));
        recipes.collect()
    }

    /// The requests, and the contents of their blocks as far as they are known.
    fn requests(&self, profile: &Profile) -> Result<(Vec<TraceRequest>, Vec<Vec<u64>>)> {
        if let Some(trace) = &self.trace {
            let requests = read_trace(trace)?;
            let names = requests.iter().map(|request| request.blocks.clone()).collect();
            return Ok((requests, names));
        }
        let dataset = self.dataset.dataset()?;
        let size = self.dataset.size();
        let progress = Progress::stderr();
        let path = resolve_model(&self.model.model)?;
        if profile.model != self.model.model {
            bail!(
                "{} is of {}, not of {}: give --model",
                self.profile.display(),
                profile.model,
                self.model.model
            );
        }
        let model = load_model(&path, self.model.load.options(0), progress)?;
        let mut encode = |text: &str, special: bool| Ok(model.tokenizer().encode(text, special)?);
        let requests = dataset.requests(size, model.spec().vocab_size, &mut encode)?;
        let prompts = requests.iter().map(|r| Ok((r.tokens(&mut encode)?, r.output_len)));
        let prompts = prompts.collect::<Result<Vec<(Vec<u32>, usize)>>>()?;
        let due: Vec<Duration> = arrivals::poisson(size.num_prompts, self.request_rate, size.seed);
        let contents = |(tokens, _): &(Vec<u32>, usize)| {
            let block =
                |block: &[u32]| of_requests(&[(block.to_vec(), 1)], &[Duration::ZERO], block.len());
            let blocks = tokens.chunks_exact(profile.block_size).flat_map(block);
            blocks.flat_map(|request| request.blocks).collect()
        };
        let all = prompts.iter().map(contents).collect();
        Ok((of_requests(&prompts, &due, profile.block_size), all))
    }
}
