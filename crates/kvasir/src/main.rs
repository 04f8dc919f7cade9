//! The `kvasir` command: glue between the command line and the crates that do the work.
//!
//! Each command is a module with its arguments and an `execute` function. Results go to stdout,
//! everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.

mod bench;
mod calibrate;
mod chat;
mod cli;
mod client;
mod eval;
mod failure;
mod generate;
mod inspect;
mod interrupt;
mod options;
mod output;
mod plan;
mod profile;
mod pull;
mod risk;
mod run;
mod serve;
mod session;
mod statistics;
mod tables;
mod units;
mod version;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    // Before anything is computed: a set that this processor lacks is wrong usage.
    if let Err(error) = kvasir_model::Isa::from_environment() {
        return failure::wrong_usage(&error.to_string());
    }
    match cli.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
