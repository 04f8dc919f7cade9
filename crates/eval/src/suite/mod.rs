//! Samples answered under several recipes, kept in a directory as they come, so that a run that was cut short goes on.

mod complete;
mod config;
mod engine;
pub mod extras;
mod run_dir;

pub use complete::{Answered, scored};
pub use config::{Environment, FileConfig, Lane, SuiteConfig, TaskConfig};
pub use engine::EngineBackend;
pub use run_dir::{Answer, RunDir};

use crate::error::Result;
use crate::tasks::Sample;

/// Who answers.
pub trait Backend {
    /// Answers samples under a lane, in any order; `answered` is told each as it comes, and its error ends the work.
    ///
    /// # Errors
    /// What keeps it from answering: those that were answered stay so.
    fn answer(
        &mut self,
        lane: &Lane,
        samples: &[&Sample],
        answered: &mut dyn FnMut(Answer) -> Result<()>,
    ) -> Result<()>;
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The lane that is answered.
    pub lane: &'a str,
    /// Answers there are, over all lanes.
    pub done: usize,
    /// Answers there will be.
    pub all: usize,
}

/// Has everything answered that is not yet, lane by lane.
///
/// # Errors
/// What the backend says; [`crate::EvalError::Write`] for a directory that cannot be written. Finished answers are kept.
pub fn run(
    dir: &mut RunDir,
    backend: &mut dyn Backend,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<()> {
    let lanes = dir.config().lanes.clone();
    let samples = dir.samples().to_vec();
    let all = lanes.len() * samples.len();
    for lane in &lanes {
        let left: Vec<&Sample> =
            samples.iter().filter(|sample| !dir.has(&lane.name, &sample.id)).collect();
        progress(Progress { lane: &lane.name, done: dir.answers().len(), all });
        if left.is_empty() {
            continue;
        }
        backend.answer(lane, &left, &mut |answer| {
            dir.append(answer)?;
            progress(Progress { lane: &lane.name, done: dir.answers().len(), all });
            Ok(())
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
