//! What contexts are worth to the text after them, and how much of that Compactor keeps at some shares: what its budgets are
//! calibrated on.

use kvasir_cache::offline::{CompactorTable, ContextWorth, Method, Table};
use kvasir_cache::{BatchSlice, CacheError, KvCache, Recipe};

use crate::calibrate::Calibration;
use crate::decoder::{ForwardBatch, Runner};
use crate::error::Result;
use crate::model::{CacheOptions, Model};

/// Shares that are tried.
const SHARES: [f64; 6] = [0.05, 0.1, 0.2, 0.35, 0.5, 0.75];

/// Texts with fewer tokens are not used.
const LEAST_TOKENS: usize = 96;

/// A text is cut after so many parts of four.
const CONTEXT_QUARTERS: usize = 3;

impl Model {
    /// Measures and fits; `progress` is told (texts done, texts).
    ///
    /// # Errors
    /// [`CacheError::Table`] if no text is long enough.
    pub(crate) fn weigh_contexts(
        &self,
        calibration: &Calibration<'_>,
        runner: &mut Runner,
        progress: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Table> {
        let block_size = calibration.block_size;
        let (geometry, _) = self.cache_shapes(block_size)?;
        let tokens = calibration.tokens_per_text.next_multiple_of(block_size) + block_size;
        let budget_bytes = 8 * geometry.logical_bytes_per_token() * tokens + (64 << 20);
        let options = CacheOptions { block_size, budget_bytes, ..CacheOptions::of(Recipe::F16) };
        let mut cache = self.new_cache(options)?;
        let mut contexts = Vec::new();
        for (done, text) in calibration.texts.iter().enumerate() {
            progress(done, calibration.texts.len());
            let mut tokens = self.tokenizer().encode(text, true)?;
            tokens.truncate(calibration.tokens_per_text);
            if tokens.len() >= LEAST_TOKENS {
                contexts.push(self.weigh(&tokens, &mut cache, runner)?);
            }
        }
        if contexts.is_empty() {
            let what = format!("no text of the corpus has {LEAST_TOKENS} tokens");
            return Err(CacheError::Table { method: Method::Compactor.name(), what }.into());
        }
        progress(calibration.texts.len(), calibration.texts.len());
        Ok(Table::Compactor(CompactorTable::fit(&contexts)))
    }

    /// Weighs the context that a text begins with.
    fn weigh(
        &self,
        text: &[u32],
        cache: &mut KvCache,
        runner: &mut Runner,
    ) -> Result<ContextWorth> {
        let (context, after) = text.split_at(text.len() * CONTEXT_QUARTERS / 4);
        // The first token may be one that begins every text.
        let (alone, _) = self.nll_after(&context[..1], after, Recipe::F16, cache, runner)?;
        let (whole, own) = self.nll_after(context, after, Recipe::F16, cache, runner)?;
        let mut kept = Vec::with_capacity(SHARES.len());
        for share in SHARES {
            let recipe = format!("{}:{share}", Method::Compactor).parse()?;
            let (nll, _) = self.nll_after(context, after, recipe, cache, runner)?;
            kept.push((share, alone - nll));
        }
        Ok(ContextWorth { nll: own, worth: alone - whole, kept })
    }

    /// Mean negative log likelihoods of the text after a context that is stored by a recipe, and of the context itself.
    fn nll_after(
        &self,
        context: &[u32],
        after: &[u32],
        recipe: Recipe,
        cache: &mut KvCache,
        runner: &mut Runner,
    ) -> Result<(f64, f64)> {
        let sequence = cache.add_sequence_with(recipe, None)?;
        cache.expect_prompt(sequence, context.len())?;
        let mut means = [0.0; 2];
        for ((mean, tokens), start) in
            means.iter_mut().zip([context, after]).zip([0, context.len()])
        {
            cache.reserve(sequence, tokens.len())?;
            let slices = [BatchSlice { sequence, row: 0, start, len: tokens.len() }];
            self.forward(ForwardBatch { tokens, slices: &slices }, cache, runner)?;
            let next: Vec<(usize, u32)> = tokens[1..].iter().copied().enumerate().collect();
            *mean = self.nll(&next, runner) / next.len().max(1) as f64;
            runner.threads().install(|| cache.commit(sequence, tokens))?;
        }
        cache.remove_sequence(sequence)?;
        Ok((means[1], means[0]))
    }
}
