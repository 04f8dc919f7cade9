//! `kvasir profile`: how long steps take on this machine.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use kvasir_cache::Recipe;
use kvasir_engine::EngineConfig;
use kvasir_eval::profile::{Profile, Shape, mean_errors};
use serde::Serialize;

use crate::eval::run_profile;
use crate::options::{EncodingArgs, ModelArgs};
use crate::output::{print_json, print_line};
use crate::pull::{Progress, resolve_model};
use crate::session::load_model;
use crate::units::parse_tokens;

/// Measure how long steps of recipes take on this machine, for `kvasir plan`
#[derive(Debug, Args)]
#[command(after_help = "\
Runs batches of few and many sequences, short and long, under every recipe, and keeps what each step computed and how
long it took: about a minute a recipe. A model is fitted to each recipe's own steps. Every third batch is kept
from it first, to say how well it predicts what it has not seen.

Examples:
  kvasir profile --recipes f16,joint3 --out profile.json
  kvasir profile --model gemma3-270m --recipes f16,kivi4 --out gemma.json --json")]
pub(crate) struct ProfileCommand {
    /// Recipes, comma separated
    #[arg(long, alias = "recipe", value_name = "RECIPES", required = true, value_delimiter = ',')]
    recipes: Vec<Recipe>,
    /// Where the profile is written
    #[arg(long, value_name = "FILE", default_value = "profile.json")]
    out: PathBuf,
    /// Most tokens of a batch's prompts together
    #[arg(long, value_name = "TOKENS", default_value = "8192", value_parser = parse_tokens)]
    max_tokens: usize,
    /// Most tokens computed in a step
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = parse_tokens)]
    max_num_batched_tokens: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    encoding: EncodingArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// How well a recipe's model predicts.
#[derive(Debug, Serialize)]
struct Accuracy {
    recipe: String,
    /// Mean relative error on the batches kept from it.
    held_out_error: f64,
    /// Bytes of a token, and of a sequence beside its tokens.
    bytes_per_token: f64,
    bytes_per_sequence: f64,
}

/// Runs the command.
pub(crate) fn execute(command: &ProfileCommand) -> Result<()> {
    let progress = Progress::stderr();
    let path = resolve_model(&command.model.model)?;
    let model = load_model(&path, command.model.load.options(command.encoding.threads), progress)?;
    let (statistics, tables) = command.encoding.load(&model, &path, &command.recipes, progress)?;
    let config = EngineConfig {
        block_size: command.encoding.block_size,
        max_num_batched_tokens: command.max_num_batched_tokens,
        threads: command.encoding.threads,
        statistics,
        tables,
        ..EngineConfig::default()
    };
    let shapes = Shape::profile(model.spec().context_length, command.max_tokens);
    let name = &command.model.model;
    let profile = run_profile(&model, &config, &command.recipes, shapes, name, progress)?;
    let write = || format!("cannot write {}", command.out.display());
    fs::write(&command.out, serde_json::to_vec(&profile)?).with_context(write)?;
    let rows = accuracy(&profile);
    if command.json {
        return print_json(&rows);
    }
    let width = rows.iter().map(|row| row.recipe.len()).max().unwrap_or(0).max(8);
    print_line(&format!("{:width$}  error, held out  bytes a token", "recipe"))?;
    for row in &rows {
        let error = 100.0 * row.held_out_error;
        print_line(&format!(
            "{:width$}  {error:12.1} %  {:13.0}",
            row.recipe, row.bytes_per_token
        ))?;
    }
    print_line(&format!("{} steps in {}", profile.steps.len(), command.out.display()))
}

fn accuracy(profile: &Profile) -> Vec<Accuracy> {
    let errors = mean_errors(&profile.held_out());
    let row = |(recipe, held_out_error): (String, f64)| {
        let bytes = profile.bytes_model(&recipe)?;
        let (bytes_per_token, bytes_per_sequence) = (bytes.per_token, bytes.per_sequence);
        Some(Accuracy { recipe, held_out_error, bytes_per_token, bytes_per_sequence })
    };
    errors.into_iter().filter_map(row).collect()
}
