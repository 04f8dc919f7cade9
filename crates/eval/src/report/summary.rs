//! The numbers of a report.

use serde::Serialize;

use crate::analysis::{LengthShift, Lengths, Negatives, Scored, Share, THETA, THETAS};
use crate::error::Result;
use crate::predict::{
    GuardSummary, LengthAccuracy, RiskAccuracy, guards, lengths as length_accuracy, of_run, risks,
};
use crate::profile::{Cell, Predicted, Profile};
use crate::suite::extras::{self, QualityPoint};
use crate::suite::{Answered, Environment, Lane, RunDir, scored};
use crate::tasks::Question;
use crate::throughput::AtMemory;

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
    /// What guards would have made of the samples, where that can be told.
    pub guards: Option<GuardSummary>,
    /// Speeds at equal memory, where they were measured.
    pub equal_memory: Vec<AtMemory>,
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

impl RunSummary {
    /// Of a run, as far as it is. O(samples · lanes²).
    ///
    /// # Errors
    /// [`crate::EvalError::RunDir`] for files beside the answers that are damaged.
    pub fn of(run: &RunDir) -> Result<Self> {
        let profile: Option<Profile> = run.extra(extras::PROFILE)?;
        let lanes = &run.config().lanes;
        // By sample: one of every lane.
        let complete = run.complete();
        let (with_scores, table) = scored(&complete);
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
            let (answered, table) = (&with_scores, &table);
            list.map(move |i| worst(&lanes[*recipe], *recipe, answered[i], &table[i].scores))
        });
        let quality: Vec<QualityPoint> = run.extra(extras::QUALITY)?.unwrap_or_default();
        let predictions = of_run(run)?;
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
            guards: guards(&predictions),
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

fn worst(
    lane: &Lane,
    number: usize,
    (sample, answers): &Answered<'_>,
    scores: &[f64],
) -> WorstSample {
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
