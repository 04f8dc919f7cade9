//! `kvasir inspect`: what is in a GGUF file.

mod kv_size;
mod memory;
mod report;
mod text;

use anyhow::Result;
use clap::Args;
use kvasir_model::gguf::GgufFile;

use crate::options::LoadArgs;
use crate::output::{print_json, print_text};
use crate::pull::resolve_model;
use crate::units::parse_bytes;
use memory::Memory;
use report::Report;

/// Show what is in a GGUF file: metadata, tensors, KV cache bytes per token, and what serving it takes
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir inspect model.gguf
  kvasir inspect smollm2 --tensors
  kvasir inspect smollm2 --kv-cache-memory 4GiB
  kvasir inspect smollm2 --json | jq .kv_cache.bytes_per_token_f16")]
pub(crate) struct InspectCommand {
    /// A .gguf file, or the name of a model as `kvasir pull` takes it
    file: String,
    /// KV cache that the model is to be served with
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = parse_bytes)]
    kv_cache_memory: usize,
    #[command(flatten)]
    load: LoadArgs,
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
    let memory = Memory::of(&file, &command.load.options(0), command.kv_cache_memory);
    let report = Report::of(&file, memory, command.tensors)?;
    if command.json { print_json(&report) } else { print_text(&text::render(&report)) }
}
