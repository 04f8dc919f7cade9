//! The command line as a whole.

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::{bench, calibrate, chat, eval, inspect, plan, profile, pull, run, serve, version};

/// An LLM inference server with a jointly encoded KV cache
#[derive(Debug, Parser)]
#[command(
    name = "kvasir",
    version,
    after_help = "\
Examples:
  kvasir serve                          serve the default model on http://127.0.0.1:8000
  kvasir chat                           talk to it in the terminal
  kvasir run \"The capital of France is\"
  kvasir pull gemma3-270m

Exit codes: 0 done, 1 failed, 2 wrong usage. `kvasir COMMAND --help` has examples."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeCommand),
    Chat(chat::ChatCommand),
    Run(run::RunCommand),
    Pull(pull::PullCommand),
    Inspect(inspect::InspectCommand),
    Calibrate(calibrate::CalibrateCommand),
    Bench(bench::BenchCommand),
    Eval(eval::EvalCommand),
    Profile(Box<profile::ProfileCommand>),
    Plan(Box<plan::PlanCommand>),
    Version(version::VersionCommand),
}

impl Cli {
    /// Runs the command.
    pub(crate) fn execute(self) -> Result<()> {
        match self.command {
            Command::Serve(command) => serve::execute(command),
            Command::Chat(command) => chat::execute(command),
            Command::Run(command) => run::execute(&command),
            Command::Pull(command) => pull::execute(&command),
            Command::Inspect(command) => inspect::execute(&command),
            Command::Calibrate(command) => calibrate::execute(&command),
            Command::Bench(command) => bench::execute(command),
            Command::Eval(command) => eval::execute(command),
            Command::Profile(command) => profile::execute(&command),
            Command::Plan(command) => plan::execute(&command),
            Command::Version(command) => version::execute(&command),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
