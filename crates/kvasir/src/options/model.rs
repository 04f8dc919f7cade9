//! Which model.

use clap::{Args, ValueEnum};
use kvasir_model::{Access, Dtype, LoadOptions};

use crate::pull::DEFAULT_MODEL;

/// The model to run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// A known name (see `kvasir pull --help`), hf:OWNER/REPO/FILE, or a path to a .gguf file or
    /// a safetensors folder; fetched if it is not there yet
    #[arg(long, value_name = "MODEL", default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// How a model is loaded.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct LoadArgs {
    /// Form of weights and inputs: auto (what this processor multiplies fastest: codes as the file has them with inputs in
    /// bytes; with AMX all in bf16; `kvasir version` says which), bfloat16 (all inputs in bf16) or float32 (slow, exact)
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub(crate) dtype: DtypeArg,
    /// Quantise matrices that are floats in the file, a few rows at a time as they are read: q8_0, or q4_1 (embedding and head
    /// q8_0), as llama-quantize does it
    #[arg(long, value_name = "TYPE", value_parser = ["q8_0", "q4_1"])]
    pub(crate) quantize: Option<String>,
    /// Read the file instead of mapping it: an embedding table that is only looked up is then held in memory too
    #[arg(long)]
    pub(crate) no_mmap: bool,
    /// Keep the weights in memory, so that they are never swapped out (needs `ulimit -l` of their size)
    #[arg(long)]
    pub(crate) mlock: bool,
}

impl LoadArgs {
    /// How the model is loaded.
    pub(crate) fn options(&self, threads: usize) -> LoadOptions<'static> {
        LoadOptions {
            threads,
            dtype: self.dtype.into(),
            quantize: self.quantize.as_deref().and_then(|name| name.parse().ok()),
            access: if self.no_mmap { Access::Read } else { Access::Mapped },
            resident: self.mlock,
            progress: None,
        }
    }
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
