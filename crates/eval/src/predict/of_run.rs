//! What became of a run's samples, beside what was known of them.

use std::collections::HashSet;

use super::risk::Prediction;
use crate::analysis::{Negatives, THETA};
use crate::error::Result;
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
