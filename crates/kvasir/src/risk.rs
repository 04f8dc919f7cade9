//! The risk model of `--kv-risk`: loaded from beside the model, or from where somebody says.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use kvasir_engine::Recipe;
use kvasir_engine::guard::{Guard, RiskModel};

use crate::options::CacheArgs;

/// Where the risk model of a model is looked for: `FILE.bN.kvrisk` beside a file, `bN.kvrisk` in a folder, N the block
/// size.
pub(crate) fn file_of(model_path: &Path, block_size: usize) -> PathBuf {
    let name = format!("b{block_size}.kvrisk");
    if model_path.is_dir() {
        return model_path.join(name);
    }
    let mut path = OsString::from(model_path);
    path.push(".");
    path.push(name);
    path.into()
}

/// Reads one.
pub(crate) fn load(path: &Path) -> Result<RiskModel> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    RiskModel::from_json(&text).with_context(|| path.display().to_string())
}

/// What `--kv-risk` asks for, of the model at `model_path`.
pub(crate) fn guard(cache: &CacheArgs, model_path: &Path) -> Result<Option<Guard>> {
    let Some(most_risk) = cache.kv_risk() else {
        if cache.risk_file().is_some() {
            bail!("--kv-risk-model is nothing without --kv-risk, the largest risk that is taken");
        }
        return Ok(None);
    };
    let config = cache.engine_config();
    if config.kv_cache != Recipe::AUTO {
        let recipe = config.kv_cache;
        bail!("--kv-risk chooses among recipes: it needs --kv-cache auto, not '{recipe}'");
    }
    let beside = file_of(model_path, config.block_size);
    let path = cache.risk_file().unwrap_or(&beside);
    if cache.risk_file().is_none() && !path.exists() {
        let path = path.display();
        bail!(
            "--kv-risk needs a risk model, and {path} is not there: answer samples with `kvasir eval suite --recipes \
             f16,joint4,joint3,joint2 --out RUN`, then make one of them with `kvasir eval risk RUN`"
        );
    }
    Ok(Some(Guard { model: Arc::new(load(path)?), most_risk }))
}
