//! What can be said of a request's answer when its prompt is computed: how long it will be, and whether a recipe will spoil it.
//!
//! Features are of what is known then ([`PromptFeatures`]). Models are linear (logistic for risks), trained on a run's
//! answers, and judged on samples that they have not seen: all recipes' answers to one sample are in one fold. Beside every
//! model stands the constant: what is right for a recipe on average.

mod guard;
mod logistic;
mod of_run;
mod risk;

pub use guard::{AtBytes, GuardPoint, GuardSummary};
pub(crate) use guard::{guards, train};
pub use kvasir_engine::PromptFeatures;
pub(crate) use of_run::of_run;
pub use risk::{LengthAccuracy, Prediction, RiskAccuracy};
pub(crate) use risk::{lengths, risks};

use kvasir_engine::guard::RiskModel;
use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result};
use crate::suite::RunDir;

/// A risk model, and how far it can be trusted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainedRisk {
    /// Trained on all samples.
    pub model: RiskModel,
    /// How well models like it tell risks of samples that they have not seen; of all recipes together under an empty name.
    pub accuracy: Vec<(String, RiskAccuracy)>,
    /// What guards make of such samples.
    pub guards: GuardSummary,
}

/// Trains a risk model on runs of one model.
///
/// # Errors
/// [`EvalError::Settings`] for runs of several models; [`EvalError::RunDir`] for one without predictions; [`EvalError::TooShort`].
pub fn train_risk(runs: &[RunDir]) -> Result<TrainedRisk> {
    let model = runs.first().map_or("", |run| &*run.config().model);
    let mut all: Vec<Prediction> = Vec::new();
    for run in runs {
        let (path, found) = (run.path(), &run.config().model);
        if found != model {
            let what = format!("runs of two models: '{model}', '{found}' in {}", path.display());
            return Err(EvalError::Settings { what });
        }
        let wrong =
            |what: &str| Err(EvalError::RunDir { path: path.to_owned(), what: what.to_owned() });
        if run.extra::<serde_json::Value>(crate::suite::extras::QUALITY)?.is_none() {
            return wrong("has no measured predictions: finish it, without --answers-only");
        }
        let samples = all.iter().map(|one| one.sample + 1).max().unwrap_or(0);
        all.extend(
            of_run(run)?.into_iter().map(|one| Prediction { sample: one.sample + samples, ..one }),
        );
    }
    let trained = train(&all, model)?;
    let chosen = |one: &&Prediction| trained.recipes.iter().any(|rated| rated.recipe == one.name);
    // By name: numbers of lanes differ between runs.
    let place = |name: &str| trained.recipes.iter().position(|rated| rated.recipe == name);
    let rows: Vec<Prediction> = all
        .iter()
        .filter(chosen)
        .map(|one| Prediction { recipe: place(&one.name).unwrap_or(0), ..one.clone() })
        .collect();
    let name =
        |recipe: Option<usize>| recipe.map_or("", |r| &*trained.recipes[r].recipe).to_owned();
    let accuracy = risks(&rows).into_iter().map(|(recipe, of)| (name(recipe), of)).collect();
    let guards = guards(&rows).unwrap_or_default();
    Ok(TrainedRisk { model: trained, accuracy, guards })
}
