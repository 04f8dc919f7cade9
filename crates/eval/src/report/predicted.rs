//! What could have been known of a run's answers when their prompts were computed: risks, lengths, and what a guard makes of them.

use super::RunSummary;
use super::html::{figure, table};
use super::svg::{Axis, Series, chart};
use crate::predict::{GuardPoint, GuardSummary};

/// What was to be known when the prompt was computed.
pub(super) fn predicted(page: &mut String, run: &RunSummary) {
    let area = |area: Option<f64>| area.map_or_else(|| "–".to_owned(), |area| format!("{area:.2}"));
    if !run.risks.is_empty() {
        let rows = run.risks.iter().map(|(name, risk)| {
            vec![
                name.clone(),
                format!("{} of {}", risk.negatives, risk.benign),
                area(risk.auc),
                area(risk.auc_constant),
                format!("{:.3}", risk.log_loss),
                format!("{:.3}", risk.log_loss_constant),
            ]
        });
        let head =
            ["recipe", "negatives", "AUC", "AUC, constant", "log loss", "log loss, constant"];
        let note = "Chance of a negative, from the prompt's length and repetitions, the margin and entropy of the first token, the entropy of the last token's attention, the answer's limit, the \
                    recipe's KL divergence and what it does to the prompt's own blocks; predicted for samples that the model has not seen. AUC: the chance that a negative has the larger risk of two; \
                    the constant is the recipe's rate.";
        figure(page, "Risks, predicted", note, &table(&head, rows));
    }
    if let Some(guards) = &run.guards {
        let note = "What a guard (--kv-cache auto --kv-risk) would have made of the benign samples, each decided by a model that has not seen it. The limit is \
                    the risk that all bytes of a request are worth: nothing above it is taken, and a step to a cheaper recipe may add as much of it as it saves of the \
                    bytes; f16 where nothing is worth its risk. Expected: the sum of the risks taken. Below, each fixed recipe beside the guard of the smallest limit \
                    that takes no more bytes.";
        let body = format!("{}{}{}", guard_chart(guards), limits(guards), at_bytes(guards));
        figure(page, "Guards", note, &body);
    }
    if !run.answer_lengths.is_empty() {
        let rows = run.answer_lengths.iter().map(|(name, length)| {
            let percent = |error: f64| format!("{:.0}", 100.0 * error);
            vec![
                name.clone(),
                length.answers.to_string(),
                percent(length.error),
                percent(length.error_constant),
            ]
        });
        let head = ["recipe", "answers", "error, %", "error of the constant, %"];
        let note = "Lengths of answers from the same features: the larger of the predicted and the true one by the smaller, less one. Answers that were cut are not \
                    in it.";
        figure(page, "Lengths, predicted", note, &table(&head, rows));
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

fn chosen(point: &GuardPoint) -> String {
    let each = point.chosen.iter().map(|(recipe, n)| format!("{n} {recipe}"));
    each.collect::<Vec<_>>().join(", ")
}

fn limits(guards: &GuardSummary) -> String {
    let rows = guards.points.iter().map(|point| {
        vec![
            point.most_risk.to_string(),
            percent(point.bytes_share),
            format!("{} of {}", point.negatives, point.benign),
            format!("{:.1}", point.expected),
            chosen(point),
        ]
    });
    table(&["limit", "bytes, % of f16", "negatives", "expected", "samples by recipe"], rows)
}

fn at_bytes(guards: &GuardSummary) -> String {
    let rows = guards.at_bytes.iter().map(|at| {
        vec![
            at.recipe.clone(),
            percent(at.bytes_share),
            at.negatives.to_string(),
            percent(at.guard.bytes_share),
            at.guard.negatives.to_string(),
            format!("{:.3}", at.guard.most_risk),
            chosen(&at.guard),
        ]
    });
    let head = [
        "fixed recipe",
        "bytes, % of f16",
        "negatives",
        "guard's bytes, %",
        "guard's negatives",
        "limit",
        "samples by recipe",
    ];
    table(&head, rows)
}

fn guard_chart(guards: &GuardSummary) -> String {
    let share = |negatives: usize, benign: usize| 100.0 * negatives as f64 / benign.max(1) as f64;
    let guard = Series {
        name: "guard".to_owned(),
        points: guards
            .points
            .iter()
            .map(|point| (100.0 * point.bytes_share, share(point.negatives, point.benign)))
            .collect(),
        labels: guards.points.iter().map(|point| point.most_risk.to_string()).collect(),
        line: true,
    };
    let fixed = Series {
        name: "fixed recipe".to_owned(),
        points: guards
            .at_bytes
            .iter()
            .map(|at| (100.0 * at.bytes_share, share(at.negatives, at.guard.benign)))
            .collect(),
        labels: guards.at_bytes.iter().map(|at| at.recipe.clone()).collect(),
        line: true,
    };
    let x = Axis { label: "bytes, per cent of f16", log: true, from_zero: false };
    let y = Axis { label: "negatives, per cent", log: false, from_zero: true };
    chart("Negatives over bytes", x, y, &[fixed, guard])
}
