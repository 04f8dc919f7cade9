//! What a guard makes of samples that its model has not seen, and the model that is trained on all of them.

use std::collections::BTreeMap;

use kvasir_cache::Recipe;
use kvasir_engine::guard::{RatedRecipe, RiskModel, choose};
use serde::{Deserialize, Serialize};

use super::logistic::{Target, fit};
use super::risk::{Prediction, cross_validate, known_negatives, row};
use crate::analysis::THETA;
use crate::error::{EvalError, Result};

/// Limits that are tried.
const LIMITS: [f64; 9] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0];

/// Steps between limits when one of given bytes is looked for.
const STEP: f64 = 1.01;

/// A guard with one limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardPoint {
    /// The risk that all bytes of a request are worth ([`choose`]).
    pub most_risk: f64,
    /// Bytes of benign samples by those of f16.
    pub bytes_share: f64,
    /// Benign samples.
    pub benign: usize,
    /// Of those, negatives.
    pub negatives: usize,
    /// Negatives that were expected: the sum of the risks taken.
    pub expected: f64,
    /// Samples by recipe.
    pub chosen: BTreeMap<String, usize>,
}

/// A fixed recipe beside a guard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AtBytes {
    /// The recipe.
    pub recipe: String,
    /// Bytes of benign samples by those of f16.
    pub bytes_share: f64,
    /// Negatives.
    pub negatives: usize,
    /// The guard of the smallest limit that takes no more bytes.
    pub guard: GuardPoint,
}

/// Guards, as far as a run's answers tell: every sample is decided by models that have not seen it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct GuardSummary {
    /// By limit.
    pub points: Vec<GuardPoint>,
    /// Recipes beside a guard of their bytes.
    pub at_bytes: Vec<AtBytes>,
}

/// A sample under a recipe.
#[derive(Debug, Clone, Copy)]
struct Offer<'a> {
    one: &'a Prediction,
    risk: f64,
    /// Bytes of its recipe by those of f16, on average.
    share: f64,
    negative: bool,
}

/// Rows of recipes that a guard may choose.
fn of_followers(all: &[Prediction]) -> Vec<&Prediction> {
    let follows = |one: &&Prediction| {
        let recipe: Option<Recipe> = one.name.parse().ok();
        let fixed = |r: Recipe| r.follows_f16() && ![Recipe::F16, Recipe::AUTO].contains(&r);
        one.bytes.is_some() && recipe.is_some_and(fixed)
    };
    all.iter().filter(follows).collect()
}

/// Recipes by name with their bytes by those of f16 and their losses, cheapest first.
fn rated(rows: &[&Prediction]) -> Vec<RatedRecipe> {
    let mut sums: BTreeMap<&str, (f64, f64, f64)> = BTreeMap::new();
    for one in rows {
        let (logical, physical) = one.bytes.unwrap_or_default();
        let sum = sums.entry(&one.name).or_default();
        *sum = (sum.0 + logical as f64, sum.1 + physical as f64, one.recipe_loss);
    }
    let of = |(name, (logical, physical, loss)): (&str, (f64, f64, f64))| RatedRecipe {
        recipe: name.to_owned(),
        bytes_share: physical / logical.max(1.0),
        loss,
    };
    let mut rated: Vec<RatedRecipe> = sums.into_iter().map(of).collect();
    rated.sort_by(|a, b| a.bytes_share.total_cmp(&b.bytes_share));
    rated
}

/// What a guard of one limit makes of samples, whose offers are in the order of bytes.
fn at_limit(samples: &[Vec<Offer<'_>>], most_risk: f64) -> GuardPoint {
    let (mut logical, mut physical) = (0.0, 0.0);
    let mut point = GuardPoint {
        most_risk,
        bytes_share: 0.0,
        benign: samples.len(),
        negatives: 0,
        expected: 0.0,
        chosen: BTreeMap::new(),
    };
    for offers in samples {
        let whole = offers.first().map_or(0, |offer| offer.one.whole) as f64;
        logical += whole;
        let costs = offers.iter().map(|offer| (offer.risk, offer.share));
        let chosen = choose(costs, most_risk).map(|chosen| &offers[chosen]);
        let name = chosen.map_or_else(|| Recipe::F16.to_string(), |offer| offer.one.name.clone());
        *point.chosen.entry(name).or_default() += 1;
        // Answers are of different lengths: what counts is the share.
        let bytes = chosen.and_then(|offer| offer.one.bytes);
        physical += bytes.map_or(whole, |(all, held)| whole * held as f64 / all.max(1) as f64);
        point.negatives += usize::from(chosen.is_some_and(|offer| offer.negative));
        point.expected += chosen.map_or(0.0, |offer| offer.risk);
    }
    point.bytes_share = physical / f64::max(logical, 1.0);
    point
}

/// What guards would have made of a run. None if nothing can be told. O(folds · rows · features²).
pub(crate) fn guards(all: &[Prediction]) -> Option<GuardSummary> {
    let rows = of_followers(all);
    let order = rated(&rows);
    let known = known_negatives(rows.iter().copied());
    let mut by_sample: BTreeMap<usize, Vec<Offer<'_>>> = BTreeMap::new();
    for judged in cross_validate(&known, Target::Chance, 1.0) {
        let (one, value) = known[judged.row];
        let Some(rated) = order.iter().find(|rated| rated.recipe == one.name) else { continue };
        let (risk, share) = (judged.predicted, rated.bytes_share);
        let offer = Offer { one, risk, share, negative: value > 0.5 };
        by_sample.entry(one.sample).or_default().push(offer);
    }
    let place = |name: &str| order.iter().position(|rated| rated.recipe == name);
    let mut samples: Vec<Vec<Offer<'_>>> = by_sample.into_values().collect();
    samples.iter_mut().for_each(|offers| offers.sort_by_key(|offer| place(&offer.one.name)));
    samples.retain(|offers| offers.len() == order.len());
    if samples.is_empty() || order.is_empty() {
        return None;
    }
    let limits = std::iter::successors(Some(1e-3), |limit| Some(limit * STEP));
    let mut limits: Vec<f64> = limits.take_while(|limit| *limit < 100.0).collect();
    limits.push(f64::INFINITY);
    let at_bytes = |(place, recipe): (usize, &RatedRecipe)| {
        // The only offer, whatever it risks.
        let fixed: Vec<Vec<Offer<'_>>> = samples.iter().map(|offers| vec![offers[place]]).collect();
        let fixed = at_limit(&fixed, f64::INFINITY);
        // The more is risked, the fewer the bytes.
        let enough = limits
            .partition_point(|most| at_limit(&samples, *most).bytes_share > fixed.bytes_share);
        let most = limits.get(enough).copied().unwrap_or(f64::INFINITY);
        AtBytes {
            recipe: recipe.recipe.clone(),
            bytes_share: fixed.bytes_share,
            negatives: fixed.negatives,
            guard: at_limit(&samples, most),
        }
    };
    Some(GuardSummary {
        points: LIMITS.iter().map(|most| at_limit(&samples, *most)).collect(),
        at_bytes: order.iter().enumerate().map(at_bytes).collect(),
    })
}

/// A model for the guard of a server, of all runs' samples.
///
/// # Errors
/// [`EvalError::TooShort`] without benign samples, negatives, or recipes that a guard may choose.
pub(crate) fn train(all: &[Prediction], model: &str) -> Result<RiskModel> {
    let rows = of_followers(all);
    let known = known_negatives(rows.iter().copied());
    let negatives = known.iter().filter(|(_, value)| *value > 0.5).count();
    let too_short = |what: &str| Err(EvalError::TooShort { what: what.to_owned() });
    if rows.is_empty() {
        return too_short(
            "no answers by recipes that a guard may choose (joint:R, int8, …), beside what was known of their prompts",
        );
    }
    if negatives == 0 || negatives == known.len() {
        let what = format!("{negatives} negatives of {} answers: nothing to learn", known.len());
        return too_short(&what);
    }
    let features: Vec<Vec<f64>> = known.iter().map(|(one, _)| row(one)).collect();
    let values: Vec<f64> = known.iter().map(|(_, value)| *value).collect();
    let linear = fit(&features, &values, Target::Chance);
    let counts = (known.len(), negatives);
    Ok(RiskModel::new(model.to_owned(), THETA, counts, linear, rated(&rows)))
}

#[cfg(test)]
mod tests {
    use super::super::risk::tests::made;
    use super::*;

    /// Bytes of two recipes, and their names.
    fn runs() -> Vec<Prediction> {
        let mut all = made(true);
        for one in &mut all {
            let (name, bytes, loss) = [("joint2", 20, 0.03), ("joint4", 30, 0.001)][one.recipe];
            (one.name, one.bytes, one.recipe_loss) = (name.to_owned(), Some((100, bytes)), loss);
            // Four bits spoil what two spoil, where that is certain.
            let sure = one.features.first_margin < 0.4;
            one.negative = one.negative.map(|negative| negative && (one.recipe == 0 || sure));
        }
        all
    }

    #[test]
    fn guards_take_no_more_bytes_and_spoil_less() {
        let found = guards(&runs()).unwrap();
        let names: Vec<&str> = found.at_bytes.iter().map(|at| &*at.recipe).collect();
        assert_eq!(names, ["joint2", "joint4"]);
        for at in &found.at_bytes {
            assert!(at.guard.bytes_share <= at.bytes_share + 1e-12, "{at:?}");
            assert!(at.guard.negatives <= at.negatives, "{at:?}");
        }
        let [two, four] = &found.at_bytes[..] else { panic!("{found:?}") };
        assert_eq!((two.bytes_share, four.bytes_share), (0.2, 0.3));
        assert!(four.guard.negatives < four.negatives, "{four:?}");
        assert!(two.negatives > four.negatives);
        let shares: Vec<f64> = found.points.iter().map(|point| point.bytes_share).collect();
        assert!(shares.is_sorted_by(|a, b| a >= b), "{shares:?}");
        for point in &found.points {
            assert_eq!(point.chosen.values().sum::<usize>(), point.benign);
            assert!(point.expected <= point.most_risk * point.benign as f64);
        }
        let last = found.points.last().unwrap();
        assert!((last.expected - last.negatives as f64).abs() < 0.4 * last.expected, "{last:?}");
        // What is worth anything is the cheapest.
        assert_eq!(two.guard.chosen, BTreeMap::from([("joint2".to_owned(), 257)]));
        assert!(guards(&[]).is_none());
    }

    #[test]
    fn what_is_trained_is_what_a_server_reads() {
        let all = runs();
        let model = train(&all, "tiny").unwrap();
        assert_eq!(RiskModel::from_json(&model.to_json()).unwrap(), model);
        assert_eq!((model.samples, &*model.model), (2 * 257, "tiny"));
        assert_eq!(model.recipes[0].recipe, "joint2");
        let tie = &all.iter().min_by(by_margin).unwrap().features;
        let sure = &all.iter().max_by(by_margin).unwrap().features;
        let risk = |features| model.risk(features, &model.recipes[0]);
        assert!(risk(tie) > 0.5 && risk(sure) < 0.1, "{} {}", risk(tie), risk(sure));
        let error = train(&[], "tiny").unwrap_err().to_string();
        assert!(error.starts_with("no answers by recipes"), "{error}");
        let never: Vec<Prediction> = all
            .iter()
            .cloned()
            .map(|one| Prediction { negative: one.negative.map(|_| false), ..one })
            .collect();
        let error = train(&never, "tiny").unwrap_err().to_string();
        assert_eq!(error, "0 negatives of 514 answers: nothing to learn");
    }

    fn by_margin(a: &&Prediction, b: &&Prediction) -> std::cmp::Ordering {
        a.features.first_margin.total_cmp(&b.features.first_margin)
    }
}
