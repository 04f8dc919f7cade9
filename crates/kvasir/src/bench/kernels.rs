//! `kvasir bench kernels`: parts of a step against the machine's peak.

use std::num::NonZeroUsize;

use anyhow::Result;
use clap::Args;
use kvasir_eval::kernels::{self, Report, Sizes};
use kvasir_model::{Isa, Machine, Threads};
use serde::Serialize;

use crate::output::{print_json, print_line};
use crate::pull::Progress;

/// Speed of single kernels, on every instruction set, against what this machine can do at most
#[derive(Debug, Args)]
#[command(after_help = "\
The peak is measured first, in the same run. Weights are synthetic; sizes are SmolLM2's unless given.

Examples:
  kvasir bench kernels
  kvasir bench kernels --set avx2 --set avx512-vnni
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
    /// Instruction set to measure, or several together with commas; may be repeated [default: all together, and each of
    /// this processor's]
    #[arg(long, value_name = "SET")]
    set: Vec<String>,
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

/// What is printed.
#[derive(Debug, Serialize)]
struct Output {
    processor: String,
    #[serde(flatten)]
    report: Report,
}

/// Runs the command.
pub(super) fn execute(command: &KernelsCommand) -> Result<()> {
    let threads = Threads::new(command.threads.map_or(0, NonZeroUsize::get))?;
    let sizes = Sizes { hidden: command.hidden, ffn: command.ffn, vocab: command.vocab };
    let sets = match &command.set[..] {
        [] => Isa::available(),
        names => names.iter().map(|name| Isa::from_names(name)).collect::<Result<_, _>>()?,
    };
    let bar = Progress::stderr().steps("kernels");
    let report =
        kernels::measure(&threads, &sets, sizes, command.repetitions.get(), &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        });
    bar.finish_and_clear();
    let output = Output { processor: Machine::this().processor, report };
    if command.json { print_json(&output) } else { print_table(&output) }
}

fn print_table(Output { processor, report }: &Output) -> Result<()> {
    print_line(&format!(
        "{processor}, {} threads; {:.1} GB/s read from memory",
        report.threads, report.read_gb
    ))?;
    let or_none = |x: f64| if x > 0.0 { format!("{x:.0}") } else { "no".to_owned() };
    for set in &report.sets {
        print_line(&format!(
            "\n{}: at most {} GFLOP/s in f32, {} in bf16, {} Gop/s with codes of 4 bits, {} with bytes, {} GFLOP/s with tiles of bf16",
            set.isa,
            or_none(set.peak.f32),
            or_none(set.peak.bf16),
            or_none(set.peak.codes),
            or_none(set.peak.bytes),
            or_none(set.peak.tiles)
        ))?;
        print_line(&format!(
            "{:64}  {:>5}  {:>7}  {:>9}  {:>8}  {:>7}  {:>6}",
            "kernel", "rows", "threads", "µs", "GFLOP/s", "of peak", "GB/s"
        ))?;
        for k in &set.kernels {
            let (gflops, share) = if k.gflops > 0.0 && k.share_of_peak > 0.0 {
                (format!("{:.1}", k.gflops), format!("{:.0}%", 100.0 * k.share_of_peak))
            } else {
                (String::new(), String::new())
            };
            print_line(&format!(
                "{:64}  {:5}  {:7}  {:9.1}  {gflops:>8}  {share:>7}  {:6.1}",
                k.name, k.rows, k.threads, k.microseconds, k.gb
            ))?;
        }
    }
    Ok(())
}
