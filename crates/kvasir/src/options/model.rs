//! Which model.

use clap::{Args, ValueEnum};
use kvasir_model::Dtype;

use crate::pull::DEFAULT_MODEL;

/// The model to run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// A known name (see `kvasir pull --help`), hf:OWNER/REPO/FILE, or a path to a .gguf file or
    /// a safetensors folder; fetched if it is not there yet
    #[arg(long, value_name = "MODEL", default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// Form of weights and inputs: auto (what this processor multiplies fastest: codes as the file has them with inputs in
    /// bytes; with AMX all in bf16; `kvasir version` says which), bfloat16 (all inputs in bf16) or float32 (slow, exact)
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub(crate) dtype: DtypeArg,
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// What this processor multiplies fastest: codes with inputs in bytes, or all in bf16.
    Auto,
    /// Codes as the file has them, all else bf16, inputs too.
    #[value(alias = "bf16")]
    Bfloat16,
    /// Everything in f32.
    #[value(alias = "float")]
    Float32,
}

impl From<DtypeArg> for Dtype {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::Auto => Self::Auto,
            DtypeArg::Bfloat16 => Self::Bfloat16,
            DtypeArg::Float32 => Self::Float32,
        }
    }
}
