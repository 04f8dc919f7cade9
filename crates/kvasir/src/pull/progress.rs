//! What a user sees on stderr while something long runs.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

/// Reports to stderr: notes always, bars only on a terminal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    bars: bool,
    notes: bool,
}

impl Progress {
    /// Reports to this process's stderr.
    pub(crate) fn stderr() -> Self {
        Self { bars: std::io::stderr().is_terminal(), notes: true }
    }

    /// Reports nothing.
    #[cfg(test)]
    pub(crate) fn silent() -> Self {
        Self { bars: false, notes: false }
    }

    /// Whether a person is watching.
    pub(crate) fn has_bars(self) -> bool {
        self.bars
    }

    /// Writes one line.
    pub(crate) fn note(self, line: &str) {
        if self.notes {
            // stderr that is gone is no reason to stop.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }

    /// A bar that counts bytes; without a total it counts up.
    pub(crate) fn bytes(self, total: Option<u64>) -> ProgressBar {
        if !self.bars {
            return ProgressBar::hidden();
        }
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "  {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
            ),
            None => (ProgressBar::no_length(), "  {spinner} {bytes} {bytes_per_sec}"),
        };
        with_style(bar, template)
    }

    /// A bar with a text that counts steps; its length is set later.
    pub(crate) fn steps(self, text: &str) -> ProgressBar {
        if !self.bars {
            return ProgressBar::hidden();
        }
        let bar = with_style(ProgressBar::no_length(), "{msg} {bar:32} {pos}/{len}");
        bar.set_message(text.to_owned());
        bar
    }
}

fn with_style(bar: ProgressBar, template: &str) -> ProgressBar {
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
