//! From a model's name to an engine that runs it.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use kvasir_engine::{Engine, EngineConfig};
use kvasir_model::{LoadOptions, Model};

use crate::options::{CacheArgs, ModelArgs};
use crate::pull::{Progress, resolve_model};
use crate::risk;
use crate::statistics::{self, Wanted};
use crate::tables;

/// Fetches the model if need be, loads it and puts an engine on top.
pub(crate) fn load_engine(
    model: &ModelArgs,
    cache: &CacheArgs,
    progress: Progress,
) -> Result<(Arc<Model>, Engine)> {
    let path = resolve_model(&model.model)?;
    let model = load_model(&path, model.load.options(cache.threads()), progress)?;
    let config = with_statistics(cache.engine_config(), &model, &path, cache, progress)?;
    let engine = Engine::new(Arc::clone(&model), config)?;
    Ok((model, engine))
}

/// Adds what is beside the model at `path`: what its recipe needs, or what there is.
pub(crate) fn with_statistics(
    mut config: EngineConfig,
    model: &Model,
    path: &Path,
    cache: &CacheArgs,
    progress: Progress,
) -> Result<EngineConfig> {
    config.guard = risk::guard(cache, path)?;
    let mut recipes = vec![config.kv_cache];
    if let Some(guard) = &config.guard {
        recipes.extend(guard.model.parsed_recipes()?);
    }
    let wanted = Wanted {
        recipes: &recipes,
        block_size: config.block_size,
        file: cache.statistics_file(),
        tables: cache.table_files(),
        threads: config.threads,
    };
    config.statistics = statistics::load_or_calibrate(model, path, &wanted, progress)?;
    config.tables = tables::load_or_make(model, path, &wanted, progress)?;
    Ok(config)
}

/// Loads the model at `path`, with a bar for whoever watches.
pub(crate) fn load_model(
    path: &Path,
    options: LoadOptions<'_>,
    progress: Progress,
) -> Result<Arc<Model>> {
    let bar = progress.steps("loading the model");
    let on_layer = |read: usize, layers: usize| {
        bar.set_length(layers as u64);
        // Layers end in any order; a bar that goes back is worse than one that is late.
        bar.set_position(bar.position().max(read as u64));
    };
    let model = Model::load(path, &LoadOptions { progress: Some(&on_layer), ..options });
    bar.finish_and_clear();
    let model = model?;
    if options.resident
        && let Err(error) = model.lock_weights()
    {
        progress
            .note(&format!("--mlock: the weights can be swapped out: {error} (see `ulimit -l`)"));
    }
    Ok(Arc::new(model))
}
