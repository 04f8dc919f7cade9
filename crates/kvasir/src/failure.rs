//! How a command that failed ends: one line on stderr and an exit code.

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

/// Exit code of a command that failed. Wrong usage is clap's business, which exits with 2.
const FAILED: u8 = 1;
/// Exit code of wrong usage.
const WRONG_USAGE: u8 = 2;

/// Reports `error`; a reader that closed our stdout (`kvasir … | head`) is no error.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    // Nobody is left to tell where stderr is gone.
    let _ = writeln!(io::stderr(), "error: {}", one_line(error));
    ExitCode::from(FAILED)
}

/// Reports wrong usage that clap does not see.
pub(crate) fn wrong_usage(what: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "error: {what}");
    ExitCode::from(WRONG_USAGE)
}

/// Whether whoever read our stdout has closed it.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// The chain of causes, joined by ": ". A cause that the line ends with already is left out:
/// many errors print their source themselves.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if line.is_empty() {
            line = text;
        } else if !text.is_empty() && !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn chains_become_one_line() {
        let io = || io::Error::other("disk on fire");
        let error = Err::<(), _>(io()).context("cannot write\n  it").unwrap_err();
        assert_eq!(one_line(&error), "cannot write it: disk on fire");
        let error = anyhow::Error::new(io()).context("cannot write it: disk on fire");
        assert_eq!(one_line(&error), "cannot write it: disk on fire");
    }

    #[test]
    fn only_our_own_stdout_breaks_silently() {
        let broken = || io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(&anyhow::Error::new(broken())));
        assert!(!is_broken_pipe(&anyhow::Error::new(io::Error::from(ErrorKind::NotFound))));
    }
}
