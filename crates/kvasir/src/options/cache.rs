//! The KV cache, the batch, the threads.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args};
use kvasir_cache::{Recipe, Sharing};
use kvasir_engine::EngineConfig;

use crate::units::{parse_bytes, parse_tokens};

/// How the engine caches and batches.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cache and batch")]
pub(crate) struct CacheArgs {
    /// How the KV cache is encoded
    #[arg(long, value_name = "RECIPE", default_value = "f16")]
    kv_cache: Recipe,
    /// Which blocks are shared beside equal prefixes: off, tokens, sketch or tree, with a limit as in
    /// tokens:0.05
    #[arg(long, value_name = "SHARING", default_value = "off")]
    kv_sharing: Sharing,
    /// File of the statistics that joint recipes need (see `kvasir calibrate --help`) [default: the
    /// one beside the model; measured where a recipe needs it and it is not there]
    #[arg(long, value_name = "FILE")]
    kv_statistics: Option<PathBuf>,
    /// File of a table that a method needs, such as lorc's (see `kvasir calibrate --help`); may be given several times
    /// [default: those beside the model; made where a recipe needs one and it is not there]
    #[arg(long, value_name = "FILE")]
    kv_table: Vec<PathBuf>,
    /// With --kv-cache auto: decide for each request how it is stored, when its prompt is computed, by the risk that this spoils its
    /// answer. No request risks more than CHANCE, and only as much of it as it saves of its bytes; where nothing is worth its
    /// risk it stays as f16 (see `kvasir eval risk --help`)
    #[arg(long, value_name = "CHANCE", value_parser = parse_chance)]
    kv_risk: Option<f64>,
    /// File that says what recipes risk [default: the one beside the model]
    #[arg(long, value_name = "FILE")]
    kv_risk_model: Option<PathBuf>,
    /// Memory of the KV cache, such as 256MiB or 1GiB
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = parse_bytes)]
    kv_cache_memory: usize,
    /// Tokens per block: 16, 32 or 64
    #[arg(long, value_name = "TOKENS", default_value = "32", value_parser = parse_block_size)]
    block_size: usize,
    /// Most sequences in the running batch
    #[arg(long, value_name = "N", default_value = "128")]
    max_num_seqs: NonZeroUsize,
    /// Most tokens computed in a step
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = parse_tokens)]
    max_num_batched_tokens: usize,
    /// Longest prompt and output together, such as 4096 or 8k [default: the model's own limit]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    max_model_len: Option<usize>,
    /// Reuse the cached blocks of equal prefixes (the default)
    #[arg(long, action = ArgAction::SetTrue, overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: bool,
    /// Compute every prompt from its first token
    #[arg(long, action = ArgAction::SetTrue, overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

impl CacheArgs {
    /// What the engine is to be built with, without statistics.
    pub(crate) fn engine_config(&self) -> EngineConfig {
        EngineConfig {
            kv_cache: self.kv_cache,
            kv_sharing: self.kv_sharing,
            kv_cache_memory: self.kv_cache_memory,
            block_size: self.block_size,
            max_num_seqs: self.max_num_seqs.get(),
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.max_model_len,
            enable_prefix_caching: !self.no_enable_prefix_caching,
            threads: self.threads(),
            ..EngineConfig::default()
        }
    }

    /// `--kv-risk`.
    pub(crate) fn kv_risk(&self) -> Option<f64> {
        self.kv_risk
    }

    /// `--kv-risk-model`.
    pub(crate) fn risk_file(&self) -> Option<&Path> {
        self.kv_risk_model.as_deref()
    }

    /// `--kv-table`.
    pub(crate) fn table_files(&self) -> &[PathBuf] {
        &self.kv_table
    }

    /// `--kv-statistics`.
    pub(crate) fn statistics_file(&self) -> Option<&Path> {
        self.kv_statistics.as_deref()
    }

    /// `--threads`; 0 is one per processor.
    pub(crate) fn threads(&self) -> usize {
        self.threads.map_or(0, NonZeroUsize::get)
    }
}

/// Reads a chance.
pub(crate) fn parse_chance(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(chance) if (0.0..=1.0).contains(&chance) => Ok(chance),
        _ => Err("must be a chance, 0 to 1".to_owned()),
    }
}

/// Reads `--block-size`.
pub(crate) fn parse_block_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size @ (16 | 32 | 64)) => Ok(size),
        _ => Err("must be 16, 32 or 64".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        cache: CacheArgs,
    }

    fn parse(args: &[&str]) -> Result<CacheArgs, clap::Error> {
        Line::try_parse_from([&["x"], args].concat()).map(|line| line.cache)
    }

    #[test]
    fn defaults_are_the_engines() {
        let cache = parse(&[]).unwrap();
        assert_eq!(cache.engine_config(), EngineConfig::default());
    }

    #[test]
    fn every_option_arrives() {
        let args = "--kv-cache f16 --kv-cache-memory 1GiB --block-size 16 --max-num-seqs 3 \
                    --kv-sharing tokens:0.1 --max-num-batched-tokens 2k --max-model-len 8K --no-enable-prefix-caching \
                    --threads 2 --kv-statistics a.kvstats";
        let cache = parse(&args.split_whitespace().collect::<Vec<_>>()).unwrap();
        let expected = EngineConfig {
            kv_cache: Recipe::F16,
            kv_sharing: "tokens:0.1".parse().unwrap(),
            kv_cache_memory: 1 << 30,
            block_size: 16,
            max_num_seqs: 3,
            max_num_batched_tokens: 2000,
            max_model_len: Some(8192),
            enable_prefix_caching: false,
            threads: 2,
            ..EngineConfig::default()
        };
        assert_eq!(cache.engine_config(), expected);
        assert_eq!(cache.statistics_file(), Some(Path::new("a.kvstats")));
    }

    #[test]
    fn the_last_of_the_prefix_caching_flags_counts() {
        let on = "--enable-prefix-caching";
        let off = "--no-enable-prefix-caching";
        for (args, caching) in [(vec![on, off], false), (vec![off, on], true), (vec![on], true)] {
            let config = parse(&args).unwrap().engine_config();
            assert_eq!(config.enable_prefix_caching, caching, "{args:?}");
        }
    }

    #[test]
    fn values_out_of_range() {
        for args in [
            ["--block-size", "17"],
            ["--block-size", "0"],
            ["--kv-cache", "f12"],
            ["--kv-sharing", "tokens:2"],
            ["--kv-cache-memory", "lots"],
            ["--max-num-seqs", "0"],
            ["--max-model-len", "0"],
            ["--threads", "0"],
            ["--kv-risk", "2"],
            ["--kv-risk", "NaN"],
        ] {
            let error = parse(&args).unwrap_err().to_string();
            assert!(error.contains(args[0]), "{error}");
        }
    }
}
