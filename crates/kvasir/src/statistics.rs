//! The statistics that joint recipes need: loaded from beside the model, or measured.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use kvasir_cache::Recipe;
use kvasir_cache::stats::Statistics;
use kvasir_model::{Calibration, Model, Runner, corpus};

use crate::pull::Progress;

/// Those of the model at `path`, if one of the recipes needs any.
pub(crate) fn for_recipes(
    model: &Model,
    _path: &Path,
    recipes: &[Recipe],
    block_size: usize,
    runner: &mut Runner,
    progress: Progress,
) -> Result<Option<Arc<Statistics>>> {
    if !recipes.iter().any(|r| r.needs_statistics()) {
        return Ok(None);
    }
    let texts: Vec<&str> = corpus::embedded().iter().map(|t| t.text).collect();
    let calibration =
        Calibration { texts: &texts, tokens_per_text: Calibration::TOKENS_PER_TEXT, block_size };
    let bar = progress.steps("calibrating");
    let statistics = model.calibrate(&calibration, runner, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok(Some(Arc::new(statistics?)))
}
