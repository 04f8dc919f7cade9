//! `kvasir eval risk`: what recipes risk, learned from runs, for the guard of a server.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use kvasir_eval::predict::{GuardPoint, TrainedRisk, train_risk};
use kvasir_eval::suite::RunDir;

use crate::options::{ModelArgs, parse_block_size};
use crate::output::{print_json, print_line};
use crate::pull::resolve_model;
use crate::risk;

/// Learn from runs what recipes risk, for --kv-risk
#[derive(Debug, Args)]
#[command(after_help = "\
A run of `kvasir eval suite` has answers by several recipes, and what was known of each prompt when it was computed. From
that a small model learns the chance that a recipe spoils an answer: that it loses a tenth of its score, where f16 does
well. A server with --kv-cache auto --kv-risk 0.1 then decides for each request: 0.1 is what all of its bytes are worth, so
a recipe that saves three quarters of them may risk .075, and one that saves a tenth more .01 more than that. What is
worth nothing stays as f16.

What the model is worth is told on samples that it has not seen: the area under the ROC curve (AUC; the constant has .5
within a recipe), and negatives of a guard beside those of fixed recipes at the same bytes.

Examples:
  kvasir eval risk RUN
  kvasir eval suite --recipes f16,joint4,joint3,joint2 --out RUN && kvasir eval risk RUN
  kvasir eval risk RUN ANOTHER --out risks.kvrisk
  kvasir serve --kv-cache auto --kv-risk 0.1")]
pub(super) struct RiskCommand {
    /// Directories of runs of one model
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// Where it is kept [default: beside the model, where a server looks for it]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Tokens per block of the server: 16, 32 or 64
    #[arg(long, value_name = "TOKENS", default_value = "32", value_parser = parse_block_size)]
    block_size: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Runs the command.
pub(super) fn execute(command: &RiskCommand) -> Result<()> {
    let runs: Vec<RunDir> =
        command.runs.iter().map(|path| RunDir::open(path)).collect::<Result<_, _>>()?;
    let trained = train_risk(&runs)?;
    let out = match &command.out {
        Some(out) => out.clone(),
        None => {
            let (of, named) = (&trained.model.model, &command.model.model);
            // The form of weights follows the name.
            if !of.to_lowercase().starts_with(&format!("{} (", named.to_lowercase())) {
                bail!("the runs are of '{of}', not of --model {named}; or say --out FILE");
            }
            risk::file_of(&resolve_model(named)?, command.block_size)
        }
    };
    fs::write(&out, trained.model.to_json())
        .with_context(|| format!("cannot write {}", out.display()))?;
    if command.json {
        return print_json(&trained);
    }
    print_line(&text(&trained))?;
    print_line(&format!("{} has it", out.display()))
}

fn text(trained: &TrainedRisk) -> String {
    let area = |area: Option<f64>| area.map_or_else(|| "–".to_owned(), |area| format!("{area:.2}"));
    let mut text = format!("{:10}  negatives   AUC  constant", "recipe");
    for (name, of) in &trained.accuracy {
        let name = if name.is_empty() { "all" } else { name };
        let negatives = format!("{} of {}", of.negatives, of.benign);
        let areas = (area(of.auc), area(of.auc_constant));
        text.push_str(&format!("\n{name:10}  {negatives:9}  {:>4}  {:>8}", areas.0, areas.1));
    }
    let of = |point: &GuardPoint| {
        let chosen = point.chosen.iter().map(|(recipe, n)| format!("{n} {recipe}"));
        let chosen = chosen.collect::<Vec<_>>().join(", ");
        let (negatives, benign) = (point.negatives, point.benign);
        let bytes = 100.0 * point.bytes_share;
        format!("{bytes:4.1} % of the bytes, {negatives} of {benign} negatives: {chosen}")
    };
    if trained.guards.points.is_empty() {
        text.push_str("\n\nno sample was answered by every recipe of the model: of guards nothing can be said");
        return text;
    }
    text.push_str("\n\nguard");
    for point in &trained.guards.points {
        text.push_str(&format!("\n  at {:5}  {}", point.most_risk, of(point)));
    }
    text.push_str("\n\nfixed, and a guard of no more bytes");
    for at in &trained.guards.at_bytes {
        let bytes = 100.0 * at.bytes_share;
        text.push_str(&format!(
            "\n  {:8}  {bytes:4.1} % of the bytes, {} negatives\n  at {:.3}  {}",
            at.recipe,
            at.negatives,
            at.guard.most_risk,
            of(&at.guard)
        ));
    }
    text
}
