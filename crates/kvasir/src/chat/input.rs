//! Lines from the user: edited in a terminal, as they are from a pipe.

use std::io::{BufRead, stdin};

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

const PROMPT: &str = "> ";

/// Where lines come from.
pub(crate) enum Input {
    Terminal(Box<DefaultEditor>),
    Pipe,
}

impl Input {
    /// An editor with history if `interactive`.
    pub(crate) fn open(interactive: bool) -> Result<Self> {
        if !interactive {
            return Ok(Self::Pipe);
        }
        let editor = DefaultEditor::new().context("cannot read from the terminal")?;
        Ok(Self::Terminal(Box::new(editor)))
    }

    pub(crate) fn is_interactive(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line, without its ending; `None` at the end of input.
    pub(crate) fn next_line(&mut self) -> Result<Option<String>> {
        match self {
            Self::Terminal(editor) => loop {
                match editor.readline(PROMPT) {
                    Ok(line) => {
                        // A line that cannot be remembered was still said.
                        let _ = editor.add_history_entry(&line);
                        return Ok(Some(line));
                    }
                    // Ctrl-C clears the line, as in a shell.
                    Err(ReadlineError::Interrupted) => {}
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error).context("cannot read from the terminal"),
                }
            },
            Self::Pipe => {
                let mut line = Vec::new();
                let n = stdin().lock().read_until(b'\n', &mut line).context("cannot read stdin")?;
                if n == 0 {
                    return Ok(None);
                }
                let line = String::from_utf8(line).context("stdin is not UTF-8")?;
                Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned()))
            }
        }
    }
}
