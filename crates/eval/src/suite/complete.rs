//! Samples that every lane has answered: only these are compared.

use std::collections::HashMap;

use super::run_dir::{Answer, RunDir};
use crate::analysis::Scored;
use crate::tasks::Sample;

/// A sample and its answers, one of every lane in the order of lanes.
pub type Answered<'a> = (&'a Sample, Vec<&'a Answer>);

impl RunDir {
    /// Those samples, in their order. O(answers).
    pub fn complete(&self) -> Vec<Answered<'_>> {
        let answers: HashMap<(&str, &str), &Answer> =
            self.answers().iter().map(|a| ((&*a.lane, &*a.sample), a)).collect();
        let of = |sample| {
            let lanes = self.config().lanes.iter();
            let answer = |lane: &str, sample: &Sample| answers.get(&(lane, &*sample.id)).copied();
            let all: Option<Vec<&Answer>> = lanes.map(|lane| answer(&lane.name, sample)).collect();
            all.map(|all| (sample, all))
        };
        self.samples().iter().filter_map(of).collect()
    }
}

/// Those of them whose answers have scores, and the scores.
pub fn scored<'a, 'b>(complete: &'b [Answered<'a>]) -> (Vec<&'b Answered<'a>>, Vec<Scored>) {
    let with_scores = |one: &'b Answered<'a>| {
        let (sample, answers) = one;
        let scores: Option<Vec<f64>> = answers.iter().map(|a| a.score).collect();
        let scores = scores?;
        let scored = Scored {
            dataset: sample.dataset.clone(),
            family: sample.family.clone(),
            baseline: *scores.first()?,
            scores,
        };
        Some((one, scored))
    };
    complete.iter().filter_map(with_scores).unzip()
}
