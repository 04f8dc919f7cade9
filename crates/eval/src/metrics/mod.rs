//! How right an answer is: from 0 to 1.
//!
//! Those of LongBench (arXiv 2308.14508) are what its published scorers compute; where they follow the accidents of a library,
//! the file says which. The others are of tasks made here ([`crate::tasks`]).

mod classes;
mod edit;
mod f1;
mod found;
mod json;
mod numbers;
mod order;
mod rouge;

use serde::{Deserialize, Serialize};

/// A measure of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Words in common (LongBench's questions).
    F1,
    /// Longest common subsequences of words (LongBench's summaries).
    RougeL,
    /// The right class named, and how few others (LongBench's trec).
    Classes,
    /// Edit similarity of the first line of code (LongBench's code).
    Edit,
    /// Share of the numbers that are the right paragraph's.
    Paragraph,
    /// Share of the numbers that are right.
    Count,
    /// Whether an answer is there.
    Found,
    /// Whether the first number is right.
    FirstNumber,
    /// Share of the lines that are there in their order.
    InOrder,
    /// Share of the fields of a JSON object that are right.
    Json,
}

/// What an answer is compared with.
#[derive(Debug, Clone, Copy)]
pub struct Reference<'a> {
    /// Right answers: the best match counts, unless the metric wants all of them.
    pub answers: &'a [String],
    /// Every class, where there are classes.
    pub classes: &'a [String],
    /// Only the first line of a prediction is read.
    pub first_line: bool,
}

impl Metric {
    /// The score of a prediction: 0 to 1, 0 if there is no answer to compare it with.
    pub fn score(self, prediction: &str, reference: Reference<'_>) -> f64 {
        let Reference { answers, classes, first_line } = reference;
        let prediction = match first_line {
            true => prediction.trim_start_matches('\n').split('\n').next().unwrap_or_default(),
            false => prediction,
        };
        let best = |one: &dyn Fn(&str) -> f64| answers.iter().map(|a| one(a)).fold(0.0, f64::max);
        match self {
            Self::F1 => best(&|answer| f1::f1(prediction, answer)),
            Self::RougeL => best(&|answer| rouge::rouge_l(prediction, answer)),
            Self::Classes => best(&|answer| classes::score(prediction, answer, classes)),
            Self::Edit => best(&|answer| edit::code_similarity(prediction, answer)),
            Self::Paragraph => best(&|answer| numbers::paragraph(prediction, answer)),
            Self::Count => best(&|answer| numbers::count(prediction, answer)),
            Self::Found => best(&|answer| f64::from(u8::from(found::found(prediction, answer)))),
            Self::FirstNumber => best(&|answer| numbers::first(prediction, answer)),
            Self::InOrder => order::score(prediction, answers),
            Self::Json => best(&|answer| json::score(prediction, answer)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_answer_counts_and_none_is_nothing() {
        let answers = ["Paris".to_owned(), "the city of Paris".to_owned()];
        let of = |answers: &[String], first_line, prediction: &str| {
            let reference = Reference { answers, classes: &[], first_line };
            Metric::F1.score(prediction, reference)
        };
        assert_eq!(of(&answers, false, "paris!"), 1.0);
        assert_eq!(of(&answers, false, "A city of Paris"), 1.0);
        assert_eq!(of(&[], false, "Paris"), 0.0);
        // "of" and "paris" are two of its five words, and two of three of the second answer's.
        assert_eq!(of(&answers, false, "Paris\nand more of it"), 0.5);
        assert_eq!(of(&answers, true, "\n\nParis\nand more of it"), 1.0);
    }
}
