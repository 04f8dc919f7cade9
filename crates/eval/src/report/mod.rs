//! Reports of runs: what every recipe did to scores, single samples, lengths and speed, as one page that needs nothing else, and as Markdown.

mod diff;
mod html;
mod markdown;
mod predicted;
mod summary;
mod svg;

pub use html::page;
pub use markdown::markdown;
pub use summary::{DatasetScores, LaneSummary, RunSummary, WorstSample};

/// What is reported.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// One section each.
    pub runs: Vec<RunSummary>,
}

#[cfg(test)]
mod tests;
