//! `kvasir eval report`: a page and a text of runs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use kvasir_eval::analysis::Share;
use kvasir_eval::report::{Report, RunSummary, markdown, page};
use kvasir_eval::suite::RunDir;

use crate::output::{print_json, print_line};

/// Make the report of runs: one page that needs nothing else, and Markdown
#[derive(Debug, Args)]
#[command(after_help = "\
A run is a directory that `kvasir eval suite` made, finished or not.

Examples:
  kvasir eval report RUN
  kvasir eval report RUN ANOTHER --out DIR
  kvasir eval report RUN --json")]
pub(super) struct ReportCommand {
    /// Directories of runs
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// Where report.html and report.md are written [default: the first run]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn execute(command: &ReportCommand) -> Result<()> {
    let first = command.runs.first().map_or(Path::new("."), PathBuf::as_path);
    let (page, report) = write(&command.runs, command.out.as_deref().unwrap_or(first))?;
    if command.json {
        return print_json(&report);
    }
    for run in &report.runs {
        print_line(&short(run))?;
    }
    print_line(&format!("{} has all of it", page.display()))
}

/// Writes the report of runs into a directory; where its page is, and what it says.
pub(super) fn write(runs: &[PathBuf], out: &Path) -> Result<(PathBuf, Report)> {
    let summary = |path: &PathBuf| Ok(RunSummary::of(&RunDir::open(path)?)?);
    let report = Report { runs: runs.iter().map(summary).collect::<Result<_>>()? };
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let file = |name: &str, text: String| {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok::<PathBuf, anyhow::Error>(path)
    };
    file("report.md", markdown(&report))?;
    Ok((file("report.html", page(&report))?, report))
}

/// A run for a terminal.
pub(super) fn short(run: &RunSummary) -> String {
    let width = run.lanes.iter().map(|lane| lane.name.len()).max().unwrap_or(0).max(8);
    let at = run.thetas.iter().position(|theta| *theta == 0.1);
    let mut text = format!(
        "{}: {} of {} samples\n{:width$}  ratio  score  negatives at 10 %           lengths: mean D, longer, shorter by half",
        run.model, run.complete, run.samples, "recipe"
    );
    for (number, lane) in run.lanes.iter().enumerate() {
        let compared = number > 0 && !lane.drawn;
        let negatives = at.and_then(|at| lane.negatives.get(at)).filter(|_| compared);
        let lengths = &lane.lengths;
        let shift = match number > 0 && lengths.known > 0 {
            true => format!(
                "{:+.3}, {:.1} %, {:.1} % (n = {})",
                lengths.mean,
                100.0 * lengths.longer,
                100.0 * lengths.shorter,
                lengths.known
            ),
            false => String::new(),
        };
        let line = format!(
            "\n{:width$}  {:>5}  {:>5.1}  {:28}  {shift}",
            lane.name,
            lane.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}")),
            100.0 * lane.score,
            negatives.map_or_else(String::new, share)
        );
        text.push_str(line.trim_end());
    }
    text
}

fn share(share: &Share) -> String {
    let interval = share.interval.map_or_else(String::new, |interval| {
        format!(" [{:.1}, {:.1}]", 100.0 * interval.low, 100.0 * interval.high)
    });
    format!("{} of {}, {:.1} %{interval}", share.negatives, share.benign, 100.0 * share.share())
}
