//! `kvasir inspect`: what is in a GGUF file.

mod kv_size;
mod report;
mod text;

use anyhow::Result;
use clap::Args;
use kvasir_model::gguf::GgufFile;

use crate::output::{print_json, print_text};
use crate::pull::resolve_model;
use report::Report;

/// Show what is in a GGUF file: metadata, tensors, KV cache bytes per token
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir inspect model.gguf
  kvasir inspect smollm2 --tensors
  kvasir inspect smollm2 --json | jq .kv_cache.bytes_per_token_f16")]
pub(crate) struct InspectCommand {
    /// A .gguf file, or the name of a model as `kvasir pull` takes it
    file: String,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn execute(command: &InspectCommand) -> Result<()> {
    let file = GgufFile::open(&resolve_model(&command.file)?)?;
    let report = Report::of(&file, command.tensors)?;
    if command.json { print_json(&report) } else { print_text(&text::render(&report)) }
}
