//! `kvasir bench kernels`: parts of a step against the machine's peak.

use std::num::NonZeroUsize;

use anyhow::Result;
use clap::Args;
use kvasir_eval::kernels::{self, Report, Sizes};
use kvasir_model::Threads;

use crate::output::{print_json, print_line};
use crate::pull::Progress;

/// Speed of single kernels against what this machine can do at most
#[derive(Debug, Args)]
#[command(after_help = "\
The peak is measured first, in the same run. Weights are synthetic; sizes are SmolLM2's unless given.

Examples:
  kvasir bench kernels
  kvasir bench kernels --hidden 1024 --ffn 4096 --vocab 151936 --threads 1 --json")]
pub(super) struct KernelsCommand {
    /// Width of the residual stream
    #[arg(long, value_name = "N", default_value = "576", value_parser = parse_width)]
    hidden: usize,
    /// Width of the feed-forward layer
    #[arg(long, value_name = "N", default_value = "1536", value_parser = parse_width)]
    ffn: usize,
    /// Tokens of the vocabulary
    #[arg(long, value_name = "N", default_value = "49152", value_parser = parse_width)]
    vocab: usize,
    /// Counted runs of each kernel
    #[arg(long, value_name = "N", default_value = "15")]
    repetitions: NonZeroUsize,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn parse_width(text: &str) -> Result<usize, String> {
    let width: usize = text.parse().map_err(|_| "must be a number".to_owned())?;
    if width == 0 || !width.is_multiple_of(32) || width > 1 << 20 {
        return Err("must be a multiple of 32 up to 1048576".to_owned());
    }
    Ok(width)
}

/// Runs the command.
pub(super) fn execute(command: &KernelsCommand) -> Result<()> {
    let threads = Threads::new(command.threads.map_or(0, NonZeroUsize::get))?;
    let sizes = Sizes { hidden: command.hidden, ffn: command.ffn, vocab: command.vocab };
    let bar = Progress::stderr().steps("kernels");
    let report =
        kernels::measure(&threads, sizes, command.repetitions.get(), &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        });
    bar.finish_and_clear();
    if command.json { print_json(&report) } else { print_table(&report) }
}

fn print_table(report: &Report) -> Result<()> {
    let Report { threads, peak, kernels, .. } = report;
    print_line(&format!(
        "{threads} threads; at most {:.0} GFLOP/s in f32, {:.0} in bf16, {:.0} Gop/s in int8, {:.1} GB/s read",
        peak.f32_gflops, peak.bf16_gflops, peak.int8_gops, peak.read_gb
    ))?;
    print_line(
        "kernel                                     rows         µs  GFLOP/s  of peak   GB/s  of reading",
    )?;
    for k in kernels {
        print_line(&format!(
            "{:40}  {:5}  {:9.1}  {:7.1}  {:6.0}%  {:5.1}  {:9.0}%",
            k.name,
            k.rows,
            k.microseconds,
            k.gflops,
            100.0 * k.share_of_peak,
            k.gb,
            100.0 * k.share_of_read
        ))?;
    }
    Ok(())
}
