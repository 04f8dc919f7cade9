//! A report as Markdown, short enough for a pull request.

use std::fmt::Write;

use super::html::{at_theta, of_benign};
use super::{Report, RunSummary};

/// All runs. O(its length).
pub fn markdown(report: &Report) -> String {
    let mut text = String::new();
    for run in &report.runs {
        run_of(&mut text, run);
    }
    text
}

/// Text that does not end a cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn row(text: &mut String, cells: &[String]) {
    // Writing to a text cannot fail, here and below.
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

fn head(text: &mut String, names: &[String]) {
    row(text, names);
    let _ = writeln!(text, "|{}", "---|".repeat(names.len()));
}

fn run_of(text: &mut String, run: &RunSummary) {
    let environment = &run.environment;
    let _ = writeln!(
        text,
        "### {}: {} of {} samples\n\nkvasir {}, {} threads of {}\n",
        cell(&run.model),
        run.complete,
        run.samples,
        environment.version,
        environment.threads,
        environment.processor
    );
    let names = [
        "recipe",
        "ratio",
        "mean score",
        "negatives at 10 %",
        "mean D of lengths",
        "≥ 50 % longer · shorter",
    ];
    head(text, &names.map(str::to_owned));
    for (number, lane) in run.lanes.iter().enumerate() {
        let negatives = at_theta(run, lane).filter(|_| number > 0 && !lane.drawn);
        let lengths = &lane.lengths;
        let shifted = number > 0 && lengths.known > 0;
        let of = |shown: bool, text: String| if shown { text } else { "–".to_owned() };
        let cells = [
            cell(&lane.name),
            lane.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}")),
            format!("{:.1} %", 100.0 * lane.score),
            negatives.map_or_else(|| "–".to_owned(), of_benign),
            of(shifted, format!("{:+.3} (n = {})", lengths.mean, lengths.known)),
            of(
                shifted,
                format!("{:.1} % · {:.1} %", 100.0 * lengths.longer, 100.0 * lengths.shorter),
            ),
        ];
        row(text, &cells);
    }
    let _ = writeln!(text);
    if let Some((_, risk)) = run.risks.last() {
        let area =
            |area: Option<f64>| area.map_or_else(|| "–".to_owned(), |area| format!("{area:.2}"));
        let _ = writeln!(
            text,
            "Negatives predicted when the prompt is computed: AUC {} (the recipe's rate alone {}), n = {}\n",
            area(risk.auc),
            area(risk.auc_constant),
            risk.benign
        );
    }
    if let Some(guards) = &run.guards {
        let names = ["fixed recipe", "bytes, % of f16", "negatives", "of a guard of no more bytes"];
        head(text, &names.map(str::to_owned));
        for at in &guards.at_bytes {
            let cells = [
                cell(&at.recipe),
                format!("{:.1}", 100.0 * at.bytes_share),
                format!("{} of {}", at.negatives, at.guard.benign),
                at.guard.negatives.to_string(),
            ];
            row(text, &cells);
        }
        let _ = writeln!(text);
    }
    let lanes = run.lanes.iter().map(|lane| cell(&lane.name));
    let names: Vec<String> =
        ["dataset".to_owned(), "n".to_owned()].into_iter().chain(lanes).collect();
    head(text, &names);
    for dataset in &run.datasets {
        let scores = dataset.scores.iter().map(|score| format!("{:.1}", 100.0 * score));
        let first = [cell(&dataset.name), dataset.samples.to_string()];
        row(text, &first.into_iter().chain(scores).collect::<Vec<_>>());
    }
    let _ = writeln!(text);
}
