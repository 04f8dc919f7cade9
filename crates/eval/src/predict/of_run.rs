//! What became of a run's samples, beside what was known of them.

use std::collections::HashSet;

use super::risk::Prediction;
use crate::analysis::{Negatives, THETA};
use crate::error::Result;
use crate::random::hash;
use crate::suite::{RunDir, extras, scored};

/// Every sample under every recipe; guards and controls left out. Recipes are numbered as lanes are, samples as they come.
///
/// # Errors
/// [`crate::EvalError::RunDir`] for files beside the answers that are damaged.
pub(crate) fn of_run(run: &RunDir) -> Result<Vec<Prediction>> {
    let quality: Vec<extras::QualityPoint> = run.extra(extras::QUALITY)?.unwrap_or_default();
    let complete = run.complete();
    let (with_scores, table) = scored(&complete);
    let negatives = Negatives::new(&table);
    let benign: HashSet<&str> = negatives.benign().iter().map(|i| &*with_scores[*i].0.id).collect();
    let mut all = Vec::new();
    for (recipe, lane) in run.config().lanes.iter().enumerate().skip(1) {
        let Some(name) = lane.recipe.as_ref().filter(|_| !lane.is_drawn() && lane.risk.is_none())
        else {
            continue;
        };
        let failed = negatives.list(&[recipe], THETA);
        let failed: HashSet<&str> = failed.into_iter().map(|i| &*with_scores[i].0.id).collect();
        let point = quality.iter().find(|point| point.recipe == *name);
        for (sample, (question, answers)) in complete.iter().enumerate() {
            let Some(features) = &answers[0].features else { continue };
            let (id, answer) = (&*question.id, answers[recipe]);
            all.push(Prediction {
                sample,
                question: hash(run.config().seed, asked(id).bytes()),
                whole: answers[0].logical_bytes.unwrap_or(0),
                recipe,
                name: name.clone(),
                features: features.clone(),
                // Without a measurement all recipes are alike.
                recipe_loss: point.map_or(0.0, |point| point.kl_mean),
                bytes: answer.logical_bytes.zip(answer.physical_bytes),
                negative: benign.contains(id).then(|| failed.contains(id)),
                length: (!answer.capped).then_some(answer.output_tokens),
            });
        }
    }
    Ok(all)
}

/// A generated sample's name less its length: `passkey-400-3` and `passkey-1600-3` ask for the same.
fn asked(id: &str) -> String {
    let mut parts = id.rsplitn(3, '-');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(index), Some(length), Some(task)) if length.parse::<usize>().is_ok() => {
            format!("{task}-{index}")
        }
        _ => id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_one_question_are_one() {
        assert_eq!(asked("passkey-400-3"), asked("passkey-1600-3"));
        assert_eq!(asked("json-copy-100-12"), "json-copy-12");
        assert_ne!(asked("passkey-400-3"), asked("passkey-400-4"));
        assert_eq!(
            (&*asked("open-7"), &*asked("qasper"), &*asked("a-b-c")),
            ("open-7", "qasper", "a-b-c")
        );
    }
}
