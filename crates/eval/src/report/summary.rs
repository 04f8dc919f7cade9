//! The numbers of a report.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::analysis::{LengthShift, Lengths, Negatives, Scored, Share, THETAS};
use crate::error::Result;
use crate::predict::{LengthAccuracy, Prediction, RiskAccuracy, lengths as length_accuracy, risks};
use crate::profile::{Cell, Predicted, Profile};
use crate::suite::{Answer, Environment, Lane, RunDir};
use crate::tasks::{Question, Sample};
use crate::throughput::AtMemory;

/// The loss that tables show.
pub(super) const THETA: f64 = 0.10;

/// Samples that are shown of each recipe.
const WORST: usize = 4;

/// Shapes of a profile from which others are predicted.
const PREDICTING: usize = 9;

/// A run in numbers.
#[derive(Debug, Clone, Serialize)]
pub struct RunSummary {
    /// Where it is.
    pub path: String,
    /// The model.
    pub model: String,
    /// What it was made on.
    pub environment: Environment,
    /// Samples there are.
    pub samples: usize,
    /// Samples that every lane has answered: only these are compared.
    pub complete: usize,
    /// Losses of [`LaneSummary::negatives`].
    pub thetas: Vec<f64>,
    /// By lane; the first is what the others are compared with.
    pub lanes: Vec<LaneSummary>,
    /// Mean scores.
    pub datasets: Vec<DatasetScores>,
    /// Names of [`LaneSummary::families`].
    pub families: Vec<String>,
    /// Negatives of two lanes at once, by number of lane, at a tenth.
    pub pairs: Vec<Vec<Share>>,
    /// Negatives of all recipes at once, by loss.
    pub of_all: Vec<Share>,
    /// The largest losses.
    pub worst: Vec<WorstSample>,
    /// What recipes do to predictions, where that was measured.
    pub quality: Vec<QualityPoint>,
    /// Speeds of batches, where they were measured.
    pub speed: Vec<Cell>,
    /// Times of steps beside what models say that have not seen them.
    pub predicted: Vec<Predicted>,
    /// How well negatives are predicted when the prompt is computed, by recipe, and of all together.
    pub risks: Vec<(String, RiskAccuracy)>,
    /// How well lengths of answers are.
    pub answer_lengths: Vec<(String, LengthAccuracy)>,
    /// Speeds at equal memory, where they were measured.
    pub equal_memory: Vec<AtMemory>,
}

/// Files of a run's directory beside its answers.
pub mod extras {
    /// Rows of `kvasir eval quality --json`.
    pub const QUALITY: &str = "quality.json";
    /// A [`crate::profile::Profile`].
    pub const PROFILE: &str = "profile.json";
    /// [`crate::throughput::AtMemory`], a list.
    pub const EQUAL_MEMORY: &str = "equal_memory.json";
}

/// One lane.
#[derive(Debug, Clone, Serialize)]
pub struct LaneSummary {
    /// Its name.
    pub name: String,
    /// Whether it draws, as a control of lengths.
    pub drawn: bool,
    /// Answers there are.
    pub answered: usize,
    /// f16 bytes by bytes, over all answers; where the server tells.
    pub ratio: Option<f64>,
    /// Mean over datasets of mean scores.
    pub score: f64,
    /// By loss.
    pub negatives: Vec<Share>,
    /// By family, at a tenth.
    pub families: Vec<Share>,
    /// What it does to lengths.
    pub lengths: LengthShift,
    /// Time that an answer takes in decode, by the first lane's: length ratio times the ratio of times per token, on average over
    /// the cells measured; none where one of both was not.
    pub latency: Option<f64>,
}

/// Mean scores of a dataset.
#[derive(Debug, Clone, Serialize)]
pub struct DatasetScores {
    /// Its name.
    pub name: String,
    /// Samples.
    pub samples: usize,
    /// By lane.
    pub scores: Vec<f64>,
}

/// A negative.
#[derive(Debug, Clone, Serialize)]
pub struct WorstSample {
    /// The lane's name.
    pub lane: String,
    /// The sample's name.
    pub sample: String,
    /// The end of what was asked.
    pub question: String,
    /// A right answer.
    pub answer: String,
    /// What f16 answered, and its score.
    pub baseline: (String, f64),
    /// What the lane answered, and its score.
    pub found: (String, f64),
}

/// A row of `kvasir eval quality --json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QualityPoint {
    /// The recipe.
    pub recipe: String,
    /// f16 bytes by bytes, of everything.
    pub ratio_total: f64,
    /// Mean KL divergence.
    pub kl_mean: f64,
    /// Share of equal most likely tokens.
    pub top1: f64,
    /// Change of the next token's negative log likelihood.
    pub nll_delta: f64,
}

impl RunSummary {
    /// Of a run, as far as it is. O(samples · lanes²).
    ///
    /// # Errors
    /// [`crate::EvalError::RunDir`] for files beside the answers that are damaged.
    pub fn of(run: &RunDir) -> Result<Self> {
        let profile: Option<Profile> = run.extra(extras::PROFILE)?;
        let lanes = &run.config().lanes;
        let answers: HashMap<(&str, &str), &Answer> =
            run.answers().iter().map(|a| ((&*a.lane, &*a.sample), a)).collect();
        let answer =
            |lane: &Lane, sample: &Sample| answers.get(&(&*lane.name, &*sample.id)).copied();
        // By sample: one of every lane.
        let complete: Vec<Answered<'_>> = run
            .samples()
            .iter()
            .filter_map(|sample| {
                let all: Option<Vec<&Answer>> = lanes.iter().map(|l| answer(l, sample)).collect();
                all.map(|all| (sample, all))
            })
            .collect();
        let scored: Vec<WithScores<'_>> = complete
            .iter()
            .filter_map(|(sample, answers)| {
                let scores: Option<Vec<f64>> = answers.iter().map(|a| a.score).collect();
                scores.map(|scores| (*sample, scores, answers))
            })
            .collect();
        let table: Vec<Scored> = scored
            .iter()
            .map(|(sample, scores, _)| Scored {
                dataset: sample.dataset.clone(),
                family: sample.family.clone(),
                baseline: scores[0],
                scores: scores.clone(),
            })
            .collect();
        let negatives = Negatives::new(&table);
        let datasets = datasets(&table);
        let families = unique(table.iter().map(|s| &s.family));
        let summary = |(number, lane): (usize, &Lane)| {
            let mine = || run.answers().iter().filter(|a| a.lane == lane.name);
            let bytes = mine().filter_map(|a| a.logical_bytes.zip(a.physical_bytes));
            let (logical, physical) = bytes.fold((0, 0), |(l, p), (a, b)| (l + a, p + b));
            let means = datasets.iter().map(|d| d.scores[number]);
            let family = |name: &String| negatives.share(&[number], THETA, Some(name));
            let lengths = LengthShift::of(&lengths(&complete, number));
            let slower = profile.as_ref().and_then(|p| time_per_token(p, &lanes[0], lane));
            LaneSummary {
                name: lane.name.clone(),
                drawn: lane.is_drawn(),
                answered: mine().count(),
                ratio: (physical > 0).then(|| logical as f64 / physical as f64),
                score: means.sum::<f64>() / datasets.len().max(1) as f64,
                negatives: THETAS.map(|t| negatives.share(&[number], t, None)).to_vec(),
                families: families.iter().map(family).collect(),
                latency: slower.filter(|_| lengths.known > 0).map(|r| r * lengths.length_ratio),
                lengths,
            }
        };
        let recipes: Vec<usize> = (1..lanes.len()).filter(|i| !lanes[*i].is_drawn()).collect();
        let pair = |a: usize, b: usize| negatives.share(&[a, b], THETA, None);
        let worst = recipes.iter().flat_map(|recipe| {
            let list = negatives.list(&[*recipe], THETA).into_iter().take(WORST);
            let scored = &scored;
            list.map(move |i| worst(&lanes[*recipe], *recipe, &scored[i]))
        });
        let quality: Vec<QualityPoint> = run.extra(extras::QUALITY)?.unwrap_or_default();
        let predictions = predictions(&complete, &scored, &negatives, lanes, &quality);
        let names = |recipe: Option<usize>| match recipe {
            Some(recipe) => lanes[recipe].name.clone(),
            None => "all".to_owned(),
        };
        // The last is of all.
        let mut risks: Vec<_> = risks(&predictions).into_iter().collect();
        let mut answer_lengths: Vec<_> = length_accuracy(&predictions).into_iter().collect();
        risks.sort_by_key(|(recipe, _)| recipe.unwrap_or(usize::MAX));
        answer_lengths.sort_by_key(|(recipe, _)| recipe.unwrap_or(usize::MAX));
        // From a few shapes nothing can be said of others.
        let enough = |profile: &&Profile| profile.shapes.len() >= PREDICTING;
        Ok(Self {
            path: run.path().display().to_string(),
            model: run.config().model.clone(),
            environment: run.environment().clone(),
            samples: run.samples().len(),
            complete: complete.len(),
            thetas: THETAS.to_vec(),
            lanes: lanes.iter().enumerate().map(summary).collect(),
            pairs: (0..lanes.len())
                .map(|a| (0..lanes.len()).map(|b| pair(a, b)).collect())
                .collect(),
            of_all: THETAS.map(|t| negatives.share(&recipes, t, None)).to_vec(),
            worst: worst.collect(),
            datasets,
            families,
            risks: risks.into_iter().map(|(recipe, of)| (names(recipe), of)).collect(),
            answer_lengths: answer_lengths.into_iter().map(|(r, of)| (names(r), of)).collect(),
            quality,
            predicted: profile.as_ref().filter(enough).map(Profile::held_out).unwrap_or_default(),
            speed: profile.map(|profile| profile.cells).unwrap_or_default(),
            equal_memory: run.extra(extras::EQUAL_MEMORY)?.unwrap_or_default(),
        })
    }

    /// The lanes that are not controls of lengths, less the first.
    pub(super) fn recipes(&self) -> impl Iterator<Item = &LaneSummary> {
        self.lanes.iter().skip(1).filter(|lane| !lane.drawn)
    }
}

/// A sample and its answers, one of every lane.
type Answered<'a> = (&'a Sample, Vec<&'a Answer>);

/// The same with the answers' scores.
type WithScores<'a> = (&'a Sample, Vec<f64>, &'a Vec<&'a Answer>);

/// Every sample under every recipe, with what was known of it beforehand. `scored` are those of `complete` that have scores, in their order.
fn predictions(
    complete: &[Answered<'_>],
    scored: &[WithScores<'_>],
    negatives: &Negatives<'_>,
    lanes: &[Lane],
    quality: &[QualityPoint],
) -> Vec<Prediction> {
    let benign: HashSet<&str> = negatives.benign().iter().map(|i| &*scored[*i].0.id).collect();
    let mut all = Vec::new();
    for (recipe, lane) in lanes.iter().enumerate().skip(1).filter(|(_, lane)| !lane.is_drawn()) {
        let failed = negatives.list(&[recipe], THETA);
        let failed: HashSet<&str> = failed.into_iter().map(|i| &*scored[i].0.id).collect();
        let point = quality.iter().find(|point| Some(&point.recipe) == lane.recipe.as_ref());
        for (number, (sample, answers)) in complete.iter().enumerate() {
            let Some(features) = answers[0].features else { continue };
            let id = &*sample.id;
            all.push(Prediction {
                sample: number,
                recipe,
                features,
                // Without a measurement all recipes are alike.
                recipe_loss: point.map_or(0.0, |point| point.kl_mean),
                negative: benign.contains(id).then(|| failed.contains(id)),
                length: (!answers[recipe].capped).then_some(answers[recipe].output_tokens),
            });
        }
    }
    all
}

/// How much longer a token takes under a lane than under the first: mean over the cells of both.
fn time_per_token(profile: &Profile, first: &Lane, lane: &Lane) -> Option<f64> {
    let cells = |lane: &Lane| {
        let recipe = lane.recipe.clone().unwrap_or_default();
        profile.cells.iter().filter(move |cell| cell.recipe == recipe)
    };
    let ratios: Vec<f64> = cells(first)
        .filter_map(|a| {
            let same = |b: &&Cell| (b.num_seqs, b.context) == (a.num_seqs, a.context);
            cells(lane).find(same).map(|b| a.decode / b.decode)
        })
        .collect();
    (!ratios.is_empty()).then(|| ratios.iter().sum::<f64>() / ratios.len() as f64)
}

/// In order of first appearance.
fn unique<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for name in names {
        if !all.contains(name) {
            all.push(name.clone());
        }
    }
    all
}

fn datasets(table: &[Scored]) -> Vec<DatasetScores> {
    let of = |name: String| {
        let rows: Vec<&Scored> = table.iter().filter(|s| s.dataset == name).collect();
        let lanes = rows.first().map_or(0, |row| row.scores.len());
        let mean =
            |lane: usize| rows.iter().map(|r| r.scores[lane]).sum::<f64>() / rows.len() as f64;
        DatasetScores { samples: rows.len(), scores: (0..lanes).map(mean).collect(), name }
    };
    unique(table.iter().map(|s| &s.dataset)).into_iter().map(of).collect()
}

/// Of the samples whose answers may be of any length: those that no text ends.
fn lengths(complete: &[Answered<'_>], lane: usize) -> Vec<Lengths> {
    let free = complete.iter().filter(|(sample, _)| sample.stop.is_empty());
    free.map(|(_, answers)| Lengths {
        baseline: answers[0].output_tokens,
        recipe: answers[lane].output_tokens,
        capped: (answers[0].capped, answers[lane].capped),
    })
    .collect()
}

fn worst(lane: &Lane, number: usize, (sample, scores, answers): &WithScores<'_>) -> WorstSample {
    /// Characters of a question.
    const END: usize = 240;
    let text = match &sample.question {
        Question::Text(text) | Question::Message(text) => text,
    };
    let skipped = text.chars().count().saturating_sub(END);
    let end: String = text.chars().skip(skipped).collect();
    let of = |i: usize| (answers[i].text.clone(), scores[i]);
    WorstSample {
        lane: lane.name.clone(),
        sample: sample.id.clone(),
        question: if skipped > 0 { format!("…{end}") } else { end },
        answer: sample.answers.join("\n"),
        baseline: of(0),
        found: of(number),
    }
}
