//! `kvasir version`: the program, and what its kernels run on.

use anyhow::Result;
use clap::Args;
use kvasir_model::{Machine, Threads};
use serde::Serialize;

use crate::output::{print_json, print_line};

/// Show the version, the processor, and the instruction sets that kernels use
#[derive(Debug, Args)]
#[command(after_help = "\
KVASIR_ISA=avx2 (or several, with commas) leaves out instruction sets that this processor has.

Examples:
  kvasir version
  kvasir version --json | jq -r '.sets[]'
  KVASIR_ISA=avx2 kvasir version")]
pub(crate) struct VersionCommand {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    /// All that this processor has, wider ones first.
    detected: Vec<&'static str>,
    /// Those that kernels may use.
    sets: Vec<&'static str>,
    #[serde(flatten)]
    machine: Machine,
    threads: usize,
}

/// Runs the command.
pub(crate) fn execute(command: &VersionCommand) -> Result<()> {
    let names = |isa: kvasir_model::Isa| isa.sets().iter().map(|set| set.name()).collect();
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        detected: names(kvasir_model::Isa::detected()),
        sets: names(kvasir_model::Isa::best()),
        machine: Machine::this(),
        threads: Threads::new(0)?.count(),
    };
    if command.json {
        return print_json(&report);
    }
    let Report { version, detected, machine, threads, .. } = &report;
    print_line(&format!("kvasir {version}"))?;
    print_line(&format!("processor    {}", machine.processor))?;
    print_line(&format!("instructions {} (of {})", machine.isa, detected.join(", ")))?;
    print_line(&format!("weights      --dtype auto: {}", machine.form))?;
    print_line(&format!("threads      {threads}"))
}
