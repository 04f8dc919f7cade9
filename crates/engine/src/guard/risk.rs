//! The chance that a recipe spoils an answer, from what is known when its prompt is computed; trained elsewhere (`kvasir eval
//! risk`), kept in a file.

use std::str::FromStr;

use kvasir_cache::Recipe;
use serde::{Deserialize, Serialize};

use super::features::PromptFeatures;
use super::linear::Linear;
use crate::error::{EngineError, Result};

/// Of the file's form, and of what the features mean.
const VERSION: u32 = 1;

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RiskModel {
    version: u32,
    /// The model whose answers it was trained on.
    pub model: String,
    /// What counts as spoiled: a score of at most 1 − θ times that of the uncompressed cache.
    pub theta: f64,
    /// Answers it was trained on, one of every recipe to a sample.
    pub samples: usize,
    /// Of those, spoiled ones.
    pub negatives: usize,
    /// Of the features that [`Self::row`] makes.
    pub linear: Linear,
    /// What may be chosen.
    pub recipes: Vec<RatedRecipe>,
}

/// A recipe that a [`RiskModel`] knows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RatedRecipe {
    /// As `--kv-cache` takes it.
    pub recipe: String,
    /// Bytes that sequences took, by those of f16.
    pub bytes_share: f64,
    /// How much it changes predictions at large: mean KL divergence in nats.
    pub loss: f64,
}

/// Of offers, `(risk, share of the bytes)`, the one that is worth it; none if nothing is worth a risk.
///
/// `most` is the risk that all bytes of a request are worth: a recipe that saves a half of them may risk half of it, and a step from
/// one recipe to a cheaper one may add as much as it saves. What is taken is therefore below `most` always. To take the cheapest
/// recipe up to a limit instead was worse at equal bytes: it risks all that it may for a tenth of the bytes, and keeps in f16
/// what four bits would nearly save (docs/measurements.md).
pub fn choose(offers: impl Iterator<Item = (f64, f64)>, most: f64) -> Option<usize> {
    if most.is_nan() || most <= 0.0 {
        return None;
    }
    let cost = |(risk, share): (f64, f64)| risk / most + share;
    let costs = offers.map(cost).enumerate();
    let best = costs.filter(|(_, cost)| *cost < 1.0).min_by(|a, b| a.1.total_cmp(&b.1));
    best.map(|(number, _)| number)
}

impl RiskModel {
    /// Names of what [`Self::row`] makes beside [`PromptFeatures::NAMES`].
    pub const OF_RECIPES: [&'static str; 3] = ["log_loss", "log_loss_at_tie", "log_coding_error"];

    /// A model that was trained, less its recipes' order.
    pub fn new(
        model: String,
        theta: f64,
        (samples, negatives): (usize, usize),
        mut linear: Linear,
        mut recipes: Vec<RatedRecipe>,
    ) -> Self {
        let names = PromptFeatures::NAMES.iter().chain(&Self::OF_RECIPES);
        for (feature, name) in linear.features.iter_mut().zip(names) {
            feature.name = (*name).to_owned();
        }
        recipes.sort_by(|a, b| a.bytes_share.total_cmp(&b.bytes_share));
        Self { version: VERSION, model, theta, samples, negatives, linear, recipes }
    }

    /// What the chance is computed from, for a recipe by its name; `loss` as in [`RatedRecipe`]. An error of coding that nobody
    /// measured is no number.
    pub fn row(features: &PromptFeatures, recipe: &str, loss: f64) -> Vec<f64> {
        let loss = (loss + 1e-4).ln();
        let error =
            features.coding_errors.get(recipe).map_or(f64::NAN, |error| (error + 1e-6).ln());
        let mut row = features.numbers().to_vec();
        // A near tie matters the more the worse the recipe is.
        row.extend([loss, loss * (-features.first_margin).exp(), error]);
        row
    }

    /// The chance that a recipe spoils the answer, if f16 would have done well.
    pub fn risk(&self, features: &PromptFeatures, recipe: &RatedRecipe) -> f64 {
        self.linear.chance(&Self::row(features, &recipe.recipe, recipe.loss))
    }

    /// What [`choose`] takes of its recipes, and the risk of that; none for f16.
    pub fn choose(&self, features: &PromptFeatures, most: f64) -> Option<(&RatedRecipe, f64)> {
        let offers = self.recipes.iter().map(|r| (self.risk(features, r), r.bytes_share));
        let offers: Vec<(f64, f64)> = offers.collect();
        let chosen = choose(offers.iter().copied(), most)?;
        Some((self.recipes.get(chosen)?, offers.get(chosen)?.0))
    }

    /// Its recipes, as the cache knows them.
    ///
    /// # Errors
    /// [`EngineError::RiskModel`]: a name that is none, or a recipe that blocks of f16 cannot be stored anew by.
    pub fn parsed_recipes(&self) -> Result<Vec<Recipe>> {
        let parse = |rated: &RatedRecipe| {
            let name = &rated.recipe;
            let recipe = Recipe::from_str(name).map_err(|error| error.to_string());
            let recipe = recipe.and_then(|recipe| match recipe {
                recipe if !recipe.follows_f16() => {
                    Err(format!("blocks of f16 cannot be stored anew by '{name}'"))
                }
                // Pressure would change what was decided; f16 is what is left when nothing is chosen.
                Recipe::AUTO | Recipe::F16 => Err(format!("'{name}' is nothing to choose")),
                recipe => Ok(recipe),
            });
            recipe.map_err(|what| EngineError::RiskModel { what })
        };
        self.recipes.iter().map(parse).collect()
    }

    /// Reads what [`Self::to_json`] wrote.
    ///
    /// # Errors
    /// [`EngineError::RiskModel`]: not of this form or version, other features, numbers that are none.
    pub fn from_json(text: &str) -> Result<Self> {
        let wrong = |what: String| EngineError::RiskModel { what };
        /// What says whether the rest can be read.
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        if head.version != VERSION {
            let found = head.version;
            return Err(wrong(format!("version {found}, where this program knows {VERSION}")));
        }
        let model: Self = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        let names = PromptFeatures::NAMES.iter().chain(&Self::OF_RECIPES).copied();
        if !model.linear.features.iter().map(|f| &*f.name).eq(names) {
            return Err(wrong("features that this program does not know, or not all".to_owned()));
        }
        if model.recipes.is_empty() {
            return Err(wrong("no recipes to choose from".to_owned()));
        }
        let of_features =
            model.linear.features.iter().flat_map(|f| [f.mean, f.scale, f.weight, f.low, f.high]);
        let of_recipes = model.recipes.iter().flat_map(|r| [r.bytes_share, r.loss]);
        let mut all = of_features.chain(of_recipes).chain([model.linear.constant, model.theta]);
        if let Some(odd) = all.find(|x| !x.is_finite()) {
            return Err(wrong(format!("{odd} where a number is needed")));
        }
        if let Some(odd) = model.recipes.iter().find(|r| r.loss < 0.0 || r.bytes_share <= 0.0) {
            let RatedRecipe { recipe, bytes_share, loss } = odd;
            return Err(wrong(format!(
                "'{recipe}' with {bytes_share} of the bytes and a loss of {loss}"
            )));
        }
        if !model.recipes.is_sorted_by(|a, b| a.bytes_share <= b.bytes_share) {
            return Err(wrong("recipes that are not in the order of their bytes".to_owned()));
        }
        model.parsed_recipes()?;
        Ok(model)
    }

    /// As a file has it.
    pub fn to_json(&self) -> String {
        // Strings and finite numbers: nothing that JSON cannot say.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::linear::Weight;
    use super::*;

    /// Looks at the tie and at the loss.
    fn model() -> RiskModel {
        let mut linear = Linear { features: vec![Weight::default(); 10], constant: -1.0 };
        for at in [4, 7] {
            linear.features[at] =
                Weight { scale: 1.0, weight: 1.0, low: -1e9, high: 1e9, ..Weight::default() };
        }
        let rated = |recipe: &str, bytes_share: f64, loss: f64| RatedRecipe {
            recipe: recipe.to_owned(),
            bytes_share,
            loss,
        };
        let recipes = vec![rated("joint4", 0.3, 0.001), rated("joint2", 0.2, 0.1)];
        RiskModel::new("m".to_owned(), 0.1, (100, 7), linear, recipes)
    }

    #[test]
    fn risks_by_hand() {
        let model = model();
        let sure = PromptFeatures { first_margin: 9.0, ..PromptFeatures::default() };
        let [joint2, joint4] = [0, 1].map(|i| model.risk(&sure, &model.recipes[i]));
        // −1 + e⁻⁹ + ln(loss + 10⁻⁴)
        let by_hand = |loss: f64| {
            let sum = -1.0 + (-9f64).exp() + (loss + 1e-4).ln();
            1.0 / (1.0 + (-sum).exp())
        };
        assert!((joint2 - by_hand(0.1)).abs() < 1e-12 && (joint4 - by_hand(0.001)).abs() < 1e-12);
        let tie = PromptFeatures::default();
        assert!(model.risk(&tie, &model.recipes[0]) > joint2);
        let chosen = |most: f64| model.choose(&sure, most).map(|(r, _)| r.recipe.as_str());
        // Joint4 saves .7 of the bytes, joint2 a tenth more.
        assert_eq!(chosen(joint4 / 0.69), Some("joint4"));
        assert_eq!(chosen(joint4 / 0.71), None);
        assert_eq!(chosen((joint2 - joint4) / 0.09), Some("joint2"));
        assert_eq!(chosen((joint2 - joint4) / 0.11), Some("joint4"));
    }

    #[test]
    fn what_is_worth_a_risk() {
        let offers = [(0.3, 0.1), (0.1, 0.2), (0.02, 0.5)];
        let chosen = |most: f64| choose(offers.into_iter(), most);
        assert_eq!((chosen(0.0), chosen(0.03)), (None, None));
        assert_eq!((chosen(-0.0), chosen(-1.0), chosen(f64::NAN)), (None, None, None));
        assert_eq!((chosen(0.05), chosen(0.3)), (Some(2), Some(1)));
        assert_eq!((chosen(3.0), chosen(f64::INFINITY)), (Some(0), Some(0)));
        for most in [0.05, 0.1, 0.2, 0.5, 1.0] {
            assert!(chosen(most).is_some_and(|i| offers[i].0 < most));
        }
        assert_eq!(choose(std::iter::empty(), 1.0), None);
        assert_eq!(choose([(0.0, 1.5)].into_iter(), 1.0), None, "more bytes than f16");
        assert_eq!(choose([(f64::NAN, 0.1)].into_iter(), 1.0), None);
    }

    #[test]
    fn files_are_read_back_and_damage_is_named() {
        let model = model();
        let text = model.to_json();
        assert_eq!(RiskModel::from_json(&text).unwrap(), model);
        let damaged = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            RiskModel::from_json(&text.replace(from, to)).unwrap_err().to_string()
        };
        for (from, to, what) in [
            ("\"version\": 1", "\"version\": 9", "version 9"),
            ("\"theta\": 0.1,", "", "theta"),
            ("first_tie", "second_tie", "features"),
            ("\"joint2\"", "\"joint99\"", "joint99"),
            ("\"joint2\"", "\"auto\"", "'auto' is nothing to choose"),
            ("\"joint2\"", "\"kivi4\"", "cannot be stored anew by 'kivi4'"),
            ("\"loss\": 0.1", "\"loss\": -1.0", "loss of -1"),
            ("\"bytes_share\": 0.2", "\"bytes_share\": 0.9", "order"),
            ("\"version\": 1", "\"version\" 1", "line 2"),
        ] {
            let error = damaged(from, to);
            assert!(error.contains(what), "{from} → {to}: {error}");
        }
    }
}
