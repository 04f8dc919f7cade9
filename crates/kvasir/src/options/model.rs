//! Which model.

use clap::Args;

use crate::pull::DEFAULT_MODEL;

/// The model to run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// A known name (see `kvasir pull --help`), hf:OWNER/REPO/FILE, or a path to a .gguf file or
    /// a safetensors folder; fetched if it is not there yet
    #[arg(long, value_name = "MODEL", default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
}
