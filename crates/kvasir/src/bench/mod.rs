//! `kvasir bench`: speed.

use anyhow::Result;
use clap::{Args, Subcommand};

mod dataset;
mod kernels;
mod latency;
mod serve;
mod throughput;

pub(crate) use dataset::DatasetArgs;
pub(crate) use serve::parse_rate;

/// Measure speed
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir bench latency --test pp512,pp2048,tg128 --repetitions 5 --json
  kvasir bench latency --num-seqs 1,32,64 --context 512,1024
  kvasir bench throughput --kv-cache joint3 --kv-cache-memory 180MiB
  kvasir bench serve --base-url http://127.0.0.1:8000 --num-prompts 64 --ignore-eos
  kvasir bench kernels")]
pub(crate) struct BenchCommand {
    #[command(subcommand)]
    what: Benchmark,
}

#[derive(Debug, Subcommand)]
enum Benchmark {
    Kernels(kernels::KernelsCommand),
    Latency(Box<latency::LatencyCommand>),
    Throughput(Box<throughput::ThroughputCommand>),
    Serve(Box<serve::ServeCommand>),
}

/// Runs the command.
pub(crate) fn execute(command: BenchCommand) -> Result<()> {
    match command.what {
        Benchmark::Kernels(command) => kernels::execute(&command),
        Benchmark::Latency(command) => latency::execute(&command),
        Benchmark::Throughput(command) => throughput::execute(&command),
        Benchmark::Serve(command) => serve::execute(&command),
    }
}
