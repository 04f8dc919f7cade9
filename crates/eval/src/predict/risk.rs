//! Risks and lengths of a run's samples, predicted from samples that the models have not seen.

use std::collections::BTreeMap;

use kvasir_engine::guard::RiskModel;
use serde::{Deserialize, Serialize};

use kvasir_engine::PromptFeatures;

use super::logistic::{Target, fit, predict};
use crate::analysis::{Interval, interval};
use crate::random::hash;

/// Parts into which samples are cut: each is predicted from the others.
const FOLDS: usize = 10;

/// How often they are cut.
const CUTS: usize = 8;

/// One sample under one recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The sample's number.
    pub sample: usize,
    /// What is asked, whatever the length of what stands before it: all rows of one question are in one fold.
    pub question: u64,
    /// The recipe's number.
    pub recipe: usize,
    /// The recipe's name.
    pub name: String,
    /// What is known beforehand.
    pub features: PromptFeatures,
    /// How much the recipe changes predictions at large: its mean KL divergence, or another number that is larger for worse
    /// recipes.
    pub recipe_loss: f64,
    /// What f16's answer takes, as if nothing but its tokens had to be stored.
    pub whole: usize,
    /// What its own answer would take in f16, and what it took.
    pub bytes: Option<(usize, usize)>,
    /// Whether it is a negative; none if the sample is not benign or has no score.
    pub negative: Option<bool>,
    /// Tokens of the answer; none if it was cut.
    pub length: Option<usize>,
}

/// How well risks of a recipe are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RiskAccuracy {
    /// Benign samples.
    pub benign: usize,
    /// Negatives.
    pub negatives: usize,
    /// Area under the ROC curve: the chance that a negative's risk is above that of another; none without both.
    pub auc: Option<f64>,
    /// The same of the constant, which is the recipe's rate: a half within a recipe.
    pub auc_constant: Option<f64>,
    /// Mean negative logarithm of the chance given to what happened.
    pub log_loss: f64,
    /// The same of the constant in the other folds.
    pub log_loss_constant: f64,
}

/// How well lengths of answers are told.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LengthAccuracy {
    /// Answers that ended by themselves.
    pub answers: usize,
    /// Mean of the larger of predicted and true length by the smaller, less one.
    pub error: f64,
    /// Of the mean.
    pub interval: Option<Interval>,
    /// The same of the constant, which is the geometric mean in the other folds.
    pub error_constant: f64,
}

/// Area under the ROC curve. O(n log n).
fn auc(scored: &[(f64, bool)]) -> Option<f64> {
    let positives = scored.iter().filter(|(_, negative)| *negative).count();
    let others = scored.len() - positives;
    if positives == 0 || others == 0 {
        return None;
    }
    let mut sorted = scored.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    // Ranks from 1, equal ones their mean (Mann and Whitney).
    let (mut at, mut ranks) = (0, 0.0);
    while at < sorted.len() {
        let end = at + sorted[at..].iter().take_while(|(score, _)| *score == sorted[at].0).count();
        let rank = (at + 1 + end) as f64 / 2.0;
        ranks += rank * sorted[at..end].iter().filter(|(_, positive)| *positive).count() as f64;
        at = end;
    }
    let (p, o) = (positives as f64, others as f64);
    Some((ranks - p * (p + 1.0) / 2.0) / (p * o))
}

pub(super) fn row(prediction: &Prediction) -> Vec<f64> {
    RiskModel::row(&prediction.features, &prediction.name, prediction.recipe_loss)
}

/// Rows of which it is known whether they are negatives, and that, as a number.
pub(super) fn known_negatives<'a>(
    all: impl Iterator<Item = &'a Prediction>,
) -> Vec<(&'a Prediction, f64)> {
    let value = |one: &Prediction| one.negative.map(|negative| f64::from(u8::from(negative)));
    all.filter_map(|one| value(one).map(|value| (one, value))).collect()
}

/// What was predicted of a row by models that have not seen its sample, and what came of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Judged {
    /// Number of the row.
    pub(super) row: usize,
    recipe: usize,
    pub(super) predicted: f64,
    /// Mean of the recipe's values in the other folds.
    of_recipe: f64,
    /// Mean of all values in the other folds.
    of_all: f64,
    value: f64,
}

/// Predicts every row from the folds that it is not in; the mean over several cuts into folds, so that the luck of one cut is not
/// taken for knowledge. `smooth`: samples of a half that are added to a recipe's mean.
pub(super) fn cross_validate(
    known: &[(&Prediction, f64)],
    target: Target,
    smooth: f64,
) -> Vec<Judged> {
    let rows: Vec<Vec<f64>> = known.iter().map(|(one, _)| row(one)).collect();
    let mut judged: Vec<Judged> = known
        .iter()
        .enumerate()
        .map(|(row, (one, value))| Judged {
            row,
            recipe: one.recipe,
            predicted: 0.0,
            of_recipe: 0.0,
            of_all: 0.0,
            value: *value,
        })
        .collect();
    for cut in 0..CUTS {
        // Samples come in the order of what they ask: neighbours must not fall into one fold.
        let fold = |one: &Prediction| {
            (hash(cut as u64, one.question.to_le_bytes()) >> 32) as usize % FOLDS
        };
        for held in 0..FOLDS {
            let seen = || known.iter().zip(&rows).filter(|((one, _), _)| fold(one) != held);
            let values: Vec<f64> = seen().map(|((_, value), _)| *value).collect();
            let seen_rows: Vec<Vec<f64>> = seen().map(|(_, row)| row.clone()).collect();
            let model = fit(&seen_rows, &values, target);
            let of_all = values.iter().sum::<f64>() / values.len().max(1) as f64;
            let mut by_recipe: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
            for ((one, value), _) in seen() {
                let (n, sum) = by_recipe.entry(one.recipe).or_default();
                (*n, *sum) = (*n + 1.0, *sum + value);
            }
            for (judged, ((one, _), row)) in judged.iter_mut().zip(known.iter().zip(&rows)) {
                if fold(one) != held {
                    continue;
                }
                let (n, sum) = by_recipe.get(&one.recipe).copied().unwrap_or_default();
                let of_recipe = (sum + 0.5 * smooth) / f64::max(n + smooth, 1.0);
                judged.predicted += predict(&model, row, target) / CUTS as f64;
                judged.of_recipe += of_recipe / CUTS as f64;
                judged.of_all += of_all / CUTS as f64;
            }
        }
    }
    judged
}

/// What `of` says of each recipe's rows, and of all under the name of none.
fn by_recipe<T>(judged: &[Judged], of: impl Fn(&[Judged]) -> T) -> BTreeMap<Option<usize>, T> {
    let mut groups: BTreeMap<Option<usize>, Vec<Judged>> = BTreeMap::new();
    for one in judged {
        groups.entry(Some(one.recipe)).or_default().push(*one);
        groups.entry(None).or_default().push(*one);
    }
    groups.into_iter().map(|(recipe, group)| (recipe, of(&group))).collect()
}

/// How well risks are told, by recipe, and of all under the name of none.
pub(crate) fn risks(all: &[Prediction]) -> BTreeMap<Option<usize>, RiskAccuracy> {
    let known = known_negatives(all.iter());
    // One sample in two halves: nothing is impossible.
    let judged = cross_validate(&known, Target::Chance, 1.0);
    // Of folds the rates differ, and are least where most negatives are held out: as scores they would say the opposite of what is so.
    let rates = by_recipe(&judged, |group| {
        group.iter().map(|one| one.value).sum::<f64>() / group.len() as f64
    });
    by_recipe(&judged, |group| {
        let loss = |risk: f64, value: f64| {
            -(if value > 0.5 { risk } else { 1.0 - risk }).clamp(1e-9, 1.0).ln()
        };
        let n = group.len() as f64;
        let scored = |score: &dyn Fn(&Judged) -> f64| -> Vec<(f64, bool)> {
            group.iter().map(|one| (score(one), one.value > 0.5)).collect()
        };
        RiskAccuracy {
            benign: group.len(),
            negatives: group.iter().filter(|one| one.value > 0.5).count(),
            auc: auc(&scored(&|one| one.predicted)),
            auc_constant: auc(&scored(&|one| rates[&Some(one.recipe)])),
            log_loss: group.iter().map(|one| loss(one.predicted, one.value)).sum::<f64>() / n,
            log_loss_constant: group.iter().map(|one| loss(one.of_recipe, one.value)).sum::<f64>()
                / n,
        }
    })
}

/// The same of lengths.
pub(crate) fn lengths(all: &[Prediction]) -> BTreeMap<Option<usize>, LengthAccuracy> {
    let known: Vec<(&Prediction, f64)> = all
        .iter()
        .filter_map(|one| one.length.map(|length| (one, (length.max(1) as f64).ln())))
        .collect();
    by_recipe(&cross_validate(&known, Target::Number, 0.0), |group| {
        let error = |predicted: f64, value: f64| (predicted - value).abs().exp() - 1.0;
        let errors: Vec<f64> = group.iter().map(|one| error(one.predicted, one.value)).collect();
        let n = group.len() as f64;
        LengthAccuracy {
            answers: group.len(),
            error: errors.iter().sum::<f64>() / n,
            interval: interval(&errors),
            error_constant: group.iter().map(|one| error(one.of_all, one.value)).sum::<f64>() / n,
        }
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::random::SplitMix64;

    /// Negatives where the first token was a near tie; lengths that follow what was allowed.
    pub(in crate::predict) fn made(informative: bool) -> Vec<Prediction> {
        let mut random = SplitMix64::new(9);
        let mut all = Vec::new();
        for sample in 0..300 {
            let margin = 4.0 * random.unit();
            let max_tokens = 10 + (random.next() % 200) as usize;
            let draw = random.unit();
            for recipe in 0..2 {
                let risk = if informative { 0.9 * (-2.0 * margin).exp() } else { 0.2 };
                let features = PromptFeatures {
                    prompt_tokens: 100,
                    distinct_share: 0.5,
                    max_tokens,
                    first_margin: margin,
                    first_entropy: 1.0,
                    ..PromptFeatures::default()
                };
                all.push(Prediction {
                    sample,
                    question: sample as u64,
                    whole: 100,
                    recipe,
                    name: "made".to_owned(),
                    bytes: None,
                    features,
                    recipe_loss: 0.01,
                    negative: (sample % 7 > 0).then_some(draw < risk),
                    length: (sample % 5 > 0).then_some(max_tokens / 2),
                });
            }
        }
        all
    }

    #[test]
    fn areas_by_hand() {
        let of = |scored: &[(f64, bool)]| auc(scored);
        assert_eq!(of(&[(0.1, false), (0.2, true), (0.3, true)]), Some(1.0));
        assert_eq!(of(&[(0.3, false), (0.2, true), (0.1, true)]), Some(0.0));
        assert_eq!(of(&[(0.5, false), (0.5, true)]), Some(0.5));
        // Of four pairs three are right.
        assert_eq!(of(&[(0.1, false), (0.2, true), (0.3, false), (0.4, true)]), Some(0.75));
        assert_eq!(of(&[(0.1, true)]), None);
    }

    #[test]
    fn what_features_say_is_found_and_noise_is_not() {
        let found = risks(&made(true));
        let all = found[&None];
        assert_eq!(all.benign, 2 * 257);
        assert!(all.auc > Some(0.7) && all.log_loss < all.log_loss_constant, "{all:?}");
        let noise = risks(&made(false))[&None];
        assert!(noise.auc < Some(0.6), "{noise:?}");
        assert_eq!(found[&Some(0)].auc_constant, Some(0.5));
        assert!(risks(&[]).is_empty());
    }

    #[test]
    fn lengths_that_follow_are_found() {
        let found = lengths(&made(true))[&Some(1)];
        assert_eq!(found.answers, 240);
        assert!(found.error < 0.2 && found.error_constant > 0.5, "{found:?}");
        assert!(lengths(&[]).is_empty());
    }
}
