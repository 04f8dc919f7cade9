//! What recipes code against, for commands that measure several of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use kvasir_cache::Recipe;
use kvasir_cache::offline::Tables;
use kvasir_cache::stats::Statistics;
use kvasir_model::Model;

use super::parse_block_size;
use crate::pull::Progress;
use crate::statistics::{self, Wanted};
use crate::tables;

/// Blocks, files, threads.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cache")]
pub(crate) struct EncodingArgs {
    /// Tokens per block: 16, 32 or 64
    #[arg(long, value_name = "TOKENS", default_value = "32", value_parser = parse_block_size)]
    pub(crate) block_size: usize,
    /// File of the statistics that joint recipes need [default: the one beside the model]
    #[arg(long, value_name = "FILE")]
    kv_statistics: Option<PathBuf>,
    /// File of a table that a method needs; may be given several times [default: those beside the model]
    #[arg(long, value_name = "FILE")]
    kv_table: Vec<PathBuf>,
    /// Threads that compute, 0 for all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

impl EncodingArgs {
    /// Statistics and tables of the model at `path`: what the recipes need, or what there is.
    pub(crate) fn load(
        &self,
        model: &Model,
        path: &Path,
        recipes: &[Recipe],
        progress: Progress,
    ) -> Result<(Option<Arc<Statistics>>, Tables)> {
        let wanted = Wanted {
            recipes,
            block_size: self.block_size,
            file: self.kv_statistics.as_deref(),
            tables: &self.kv_table,
            threads: self.threads,
        };
        let statistics = statistics::load_or_calibrate(model, path, &wanted, progress)?;
        Ok((statistics, tables::load_or_make(model, path, &wanted, progress)?))
    }
}
