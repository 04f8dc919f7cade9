//! What a recipe does to a model's predictions, beside what it does to its bytes.
//!
//! Every context of a [`Workload`] is prefilled through the recipe, then tokens of its text are forced one
//! at a time, as in decoding. After each, the prediction is compared with the one over the f16 cache in the
//! same run.

mod draw;
mod lane;
#[cfg(test)]
mod tests;
mod workload;

pub use workload::{Encode, Workload};

use std::sync::Arc;

use kvasir_cache::offline::Tables;
use kvasir_cache::stats::Statistics;
use kvasir_cache::{Recipe, Sharing};
use kvasir_model::{CacheOptions, Model, Runner};
use serde::Serialize;

use crate::error::{EvalError, Result};
use lane::Lane;

/// What to measure, and how it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Where contexts come from.
    pub workload: Workload,
    /// Tokens forced after each context.
    pub continuation: usize,
    /// Tokens per block of the cache.
    pub block_size: usize,
    /// Most context tokens computed at once: within such a chunk attention sees blocks not yet encoded.
    pub chunk: usize,
}

impl Settings {
    /// Finds what no corpus and no model could make right. [`measure`] does this first; a caller may do it
    /// before loading a model.
    ///
    /// # Errors
    /// [`EvalError::Settings`].
    pub fn check(&self) -> Result<()> {
        if self.continuation == 0 {
            let what = "a continuation needs at least one token".to_owned();
            return Err(EvalError::Settings { what });
        }
        self.workload.check(self.block_size)
    }
}

/// The caches to measure.
#[derive(Debug, Clone, Default)]
pub struct Caches<'a> {
    /// One cache each.
    pub recipes: &'a [Recipe],
    /// What joint recipes code against.
    pub statistics: Option<Arc<Statistics>>,
    /// What methods need that say so.
    pub tables: Tables,
    /// Which blocks they share.
    pub sharing: Sharing,
    /// The model of the control, if it is another one: the same weights in another form.
    pub control: Option<&'a Model>,
}

/// The context a recipe is worst at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Worst {
    /// Which context, from 0.
    pub context: usize,
    /// Its mean KL divergence.
    pub kl_mean: f64,
}

/// One recipe's row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecipeQuality {
    /// The recipe.
    pub recipe: String,
    /// How blocks were shared.
    pub sharing: String,
    /// [`Workload::name`].
    pub workload: &'static str,
    /// Contexts measured.
    pub contexts: usize,
    /// f16 bytes ÷ bytes of the sealed blocks other than each sequence's first, table entries included.
    pub ratio_sealed: f64,
    /// f16 bytes ÷ bytes of everything the sequences hold: tails, first blocks, tables.
    pub ratio_total: f64,
    /// Mean KL divergence of the recipe's prediction from the f16 cache's, in nats.
    pub kl_mean: f64,
    /// 95th percentile of the same.
    pub kl_p95: f64,
    /// Share of predictions with the same most likely token.
    pub top1: f64,
    /// Mean change of the negative log likelihood of the text's next token, in nats.
    pub nll_delta: f64,
    /// The context with the largest mean KL divergence.
    pub worst: Worst,
    /// What the paper's tree did, where [`kvasir_cache::SharingMode::Tree`] is on.
    pub tree: Option<TreeRatios>,
}

/// Ratios of the paper's tree, which fuses all contexts once, after their prefill.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TreeRatios {
    /// Blocks ÷ representatives over the layers that take part, as the theory predicts it from random pairs
    /// of the same blocks.
    pub ratio_predicted: f64,
    /// The same, as the tree counts it.
    pub ratio_counted: f64,
    /// Bytes of the whole cache before ÷ after: all layers, tails and tables.
    pub ratio_realised: f64,
    /// Blocks of a layer that the final check sent back, all layers.
    pub rejected: usize,
}

/// Measures every recipe on the same contexts. Rows come in the order of `caches.recipes`. Contexts of a recipe
/// are prefilled one after another in one cache and stay there, so that a later one can find blocks of an
/// earlier one. `progress` is told (done, of).
///
/// # Errors
/// [`EvalError::Settings`] as [`Settings::check`]; [`EvalError::TooShort`] if too few texts are long
/// enough.
pub fn measure(
    model: &Model,
    runner: &mut Runner,
    texts: &[String],
    caches: &Caches<'_>,
    settings: &Settings,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<RecipeQuality>> {
    settings.check()?;
    let Settings { workload, continuation, block_size, chunk } = *settings;
    let mut encode =
        |text: &str, add_special: bool| Ok(model.tokenizer().encode(text, add_special)?);
    let contexts = workload.contexts(&mut encode, texts, continuation)?;
    let context_len = workload.context_len();
    let control_model = caches.control.unwrap_or(model);
    let lane = |model: &Model, recipe: Recipe, sharing: Sharing| {
        let statistics = caches.statistics.clone();
        let tables = caches.tables.clone();
        let cache =
            CacheOptions { block_size, statistics, tables, sharing, ..CacheOptions::of(recipe) };
        Lane::new(model, &cache, contexts.len(), context_len + continuation)
    };
    let mut control = lane(control_model, Recipe::F16, Sharing::OFF)?;
    let lanes = caches.recipes.iter().map(|recipe| lane(model, *recipe, caches.sharing));
    let mut lanes = lanes.collect::<Result<Vec<Lane>>>()?;
    let prefills = (lanes.len() + 1) * contexts.len();
    let total = prefills + continuation;
    let mut done = 0;
    let all = std::iter::once((control_model, &mut control));
    for (model, lane) in all.chain(lanes.iter_mut().map(|lane| (model, lane))) {
        for (context, tokens) in contexts.iter().enumerate() {
            lane.prefill(model, runner, context, &tokens[..context_len], chunk)?;
            done += 1;
            progress(done, total);
        }
        lane.fuse(runner)?;
    }
    let vocab_size = model.spec().vocab_size;
    // [contexts, vocab_size]
    let (mut exact, mut coded) = (Vec::new(), Vec::new());
    for step in 0..continuation {
        let at = context_len + step;
        let inputs: Vec<&[u32]> = contexts.iter().map(|tokens| &tokens[at..=at]).collect();
        control.decode(control_model, runner, &inputs, &mut exact)?;
        for lane in &mut lanes {
            lane.decode(model, runner, &inputs, &mut coded)?;
            let pairs = exact.chunks_exact(vocab_size).zip(coded.chunks_exact(vocab_size));
            for (context, (exact, coded)) in pairs.enumerate() {
                lane.compare(context, exact, coded, contexts[context].get(at + 1).copied());
            }
        }
        progress(prefills + step + 1, total);
    }
    lanes.iter().map(|lane| lane.row(workload.name())).collect()
}
