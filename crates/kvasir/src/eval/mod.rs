//! `kvasir eval`: what recipes do to predictions, answers, lengths and speed.

mod backend;
mod perplexity;
mod quality;
mod report;
mod risk;
mod suite;

pub(crate) use suite::run_profile;

use anyhow::Result;
use clap::{Args, Subcommand};

/// Measure quality
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir eval suite --recipes f16,joint4,joint3,kivi4 --quick --out RUN
  kvasir eval report RUN
  kvasir eval risk RUN
  kvasir eval quality --recipe int8,kivi4,kivi2
  kvasir eval quality --workload retrieval --corpus articles.jsonl --recipe int8,kivi4
  kvasir eval perplexity --corpus book.txt --window 1024 --windows 8 --json")]
pub(crate) struct EvalCommand {
    #[command(subcommand)]
    what: Measure,
}

#[derive(Debug, Subcommand)]
enum Measure {
    Suite(Box<suite::SuiteCommand>),
    Report(report::ReportCommand),
    Risk(risk::RiskCommand),
    Quality(Box<quality::QualityCommand>),
    Perplexity(Box<perplexity::PerplexityCommand>),
}

/// Runs the command.
pub(crate) fn execute(command: EvalCommand) -> Result<()> {
    match command.what {
        Measure::Suite(command) => suite::execute(&command),
        Measure::Report(command) => report::execute(&command),
        Measure::Risk(command) => risk::execute(&command),
        Measure::Quality(command) => quality::execute(&command),
        Measure::Perplexity(command) => perplexity::execute(&command),
    }
}
