//! What a recipe does to a model's predictions, beside what it does to its bytes.
//!
//! Every context is prefilled through the recipe, then tokens of its text are forced one at a time, as in
//! decoding. After each, the prediction is compared with the one over the f16 cache in the same run.

use kvasir_cache::{BatchSlice, KvCache, Recipe, SequenceId};
use kvasir_model::{ForwardBatch, Model, Runner, log_sum_exp};
use serde::Serialize;

use crate::error::{EvalError, Result};

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continuation {
    /// Most contexts: the first texts of the corpus that are long enough.
    pub contexts: usize,
    /// Tokens of context.
    pub context_len: usize,
    /// Tokens forced after it.
    pub continuation: usize,
    /// Tokens per block of the cache.
    pub block_size: usize,
    /// Most context tokens computed at once: within such a chunk attention sees blocks not yet encoded.
    pub chunk: usize,
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
    pub sharing: &'static str,
    /// `continuation`.
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
}

/// One recipe's cache with all contexts in it.
struct Lane {
    recipe: Recipe,
    cache: KvCache,
    ids: Vec<SequenceId>,
    kl: Vec<Vec<f64>>, // [contexts][continuation]
    same_top: usize,
    nll_delta: Vec<f64>,
}

/// Measures every recipe on the same contexts. Rows come in the order of `recipes`. `progress` is told
/// (done, of).
///
/// # Errors
/// [`EvalError::TooShort`] if no text has `context_len + continuation` tokens.
pub fn continuation(
    model: &Model,
    runner: &mut Runner,
    texts: &[String],
    recipes: &[Recipe],
    settings: Continuation,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<RecipeQuality>> {
    let contexts = contexts(model, texts, settings)?;
    let mut lanes = std::iter::once(&Recipe::F16)
        .chain(recipes)
        .map(|recipe| Lane::new(model, *recipe, contexts.len(), settings))
        .collect::<Result<Vec<Lane>>>()?;
    let total = lanes.len() * contexts.len() + settings.continuation;
    let mut done = 0;
    for lane in &mut lanes {
        for (id, tokens) in lane.ids.iter().zip(&contexts) {
            for chunk in tokens[..settings.context_len].chunks(settings.chunk.max(1)) {
                forward(model, &mut lane.cache, runner, &[*id], &[chunk])?;
            }
            done += 1;
            progress(done, total);
        }
    }
    let vocab_size = model.spec().vocab_size;
    let rows: Vec<usize> = (0..contexts.len()).collect();
    let (mut exact, mut coded) = (Vec::new(), Vec::new());
    for step in 0..settings.continuation {
        let at = settings.context_len + step;
        let inputs: Vec<&[u32]> = contexts.iter().map(|tokens| &tokens[at..=at]).collect();
        for (i, lane) in lanes.iter_mut().enumerate() {
            forward(model, &mut lane.cache, runner, &lane.ids, &inputs)?;
            let logits = if i == 0 { &mut exact } else { &mut coded };
            model.logits(&rows, runner, logits);
            if i == 0 {
                continue;
            }
            let pairs = exact.chunks_exact(vocab_size).zip(coded.chunks_exact(vocab_size));
            for (context, (exact, coded)) in pairs.enumerate() {
                lane.compare(context, exact, coded, contexts[context].get(at + 1).copied());
            }
        }
        progress(lanes.len() * contexts.len() + step + 1, total);
    }
    lanes.iter().skip(1).map(Lane::row).collect()
}

/// Token ids of the texts that are long enough, cut to what is needed and one token more as the last
/// target.
fn contexts(model: &Model, texts: &[String], settings: Continuation) -> Result<Vec<Vec<u32>>> {
    let needed = settings.context_len + settings.continuation;
    if settings.context_len == 0 || settings.continuation == 0 {
        return Err(EvalError::TooShort {
            what: "a context and a continuation need at least one token each".to_owned(),
        });
    }
    let mut found = Vec::new();
    for text in texts {
        let mut tokens = model.tokenizer().encode(text, true)?;
        if tokens.len() >= needed && found.len() < settings.contexts {
            tokens.truncate(needed + 1);
            found.push(tokens);
        }
    }
    if found.is_empty() {
        let what = format!("no text of the corpus has {needed} tokens");
        return Err(EvalError::TooShort { what });
    }
    Ok(found)
}

/// Runs a batch of sequences forward and commits it.
fn forward(
    model: &Model,
    cache: &mut KvCache,
    runner: &mut Runner,
    ids: &[SequenceId],
    inputs: &[&[u32]],
) -> Result<()> {
    let tokens = inputs.concat();
    let mut slices = Vec::with_capacity(ids.len());
    let mut row = 0;
    for (sequence, input) in ids.iter().zip(inputs) {
        cache.reserve(*sequence, input.len())?;
        let start = cache.num_tokens(*sequence)?;
        slices.push(BatchSlice { sequence: *sequence, row, start, len: input.len() });
        row += input.len();
    }
    model.forward(ForwardBatch { tokens: &tokens, slices: &slices }, cache, runner)?;
    for (sequence, input) in ids.iter().zip(inputs) {
        cache.commit(*sequence, input)?;
    }
    Ok(())
}

impl Lane {
    fn new(model: &Model, recipe: Recipe, contexts: usize, settings: Continuation) -> Result<Self> {
        // Room for every context uncompressed, twice: the budget is not what is measured here.
        let probe = model.new_cache(recipe, settings.block_size, usize::MAX >> 8, false)?;
        let tokens = settings.context_len + settings.continuation + settings.block_size;
        let budget =
            4 * contexts * tokens * probe.geometry().logical_bytes_per_token() + (64 << 20);
        let mut cache = model.new_cache(recipe, settings.block_size, budget, false)?;
        let ids = (0..contexts).map(|_| cache.add_sequence(None)).collect();
        Ok(Self {
            recipe,
            cache,
            ids,
            kl: vec![Vec::new(); contexts],
            same_top: 0,
            nll_delta: Vec::new(),
        })
    }

    fn compare(&mut self, context: usize, exact: &[f32], coded: &[f32], target: Option<u32>) {
        let (lse_exact, lse_coded) = (log_sum_exp(exact), log_sum_exp(coded));
        let mut kl = 0.0;
        let (mut top_exact, mut top_coded) = (0, 0);
        for (i, (e, c)) in exact.iter().zip(coded).enumerate() {
            let log_p = f64::from(*e) - lse_exact;
            // Terms below e^-30 are beyond the digits of the logits.
            if log_p > -30.0 {
                kl += log_p.exp() * (log_p - (f64::from(*c) - lse_coded));
            }
            if *e > exact[top_exact] {
                top_exact = i;
            }
            if *c > coded[top_coded] {
                top_coded = i;
            }
        }
        self.kl[context].push(kl.max(0.0));
        self.same_top += usize::from(top_exact == top_coded);
        if let Some(target) = target.map(|t| t as usize) {
            let nll = |logits: &[f32], lse: f64| lse - f64::from(logits[target]);
            self.nll_delta.push(nll(coded, lse_coded) - nll(exact, lse_exact));
        }
    }

    fn row(&self) -> Result<RecipeQuality> {
        let (mut sealed, mut all) = ((0, 0), (0, 0));
        for id in &self.ids {
            let (logical, physical) = self.cache.sealed_bytes(*id)?;
            sealed = (sealed.0 + logical, sealed.1 + physical);
            let (logical, physical) = self.cache.sequence_bytes(*id)?;
            all = (all.0 + logical, all.1 + physical);
        }
        let ratio = |(logical, physical): (usize, usize)| logical as f64 / physical.max(1) as f64;
        let mut every: Vec<f64> = self.kl.iter().flatten().copied().collect();
        every.sort_by(f64::total_cmp);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let means = self.kl.iter().map(|kl| mean(kl)).enumerate();
        let worst = means.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0));
        let p95 = (every.len() * 95).div_ceil(100).saturating_sub(1);
        Ok(RecipeQuality {
            recipe: self.recipe.to_string(),
            sharing: "off",
            workload: "continuation",
            contexts: self.ids.len(),
            ratio_sealed: ratio(sealed),
            ratio_total: ratio(all),
            kl_mean: mean(&every),
            kl_p95: every.get(p95).copied().unwrap_or(0.0),
            top1: self.same_top as f64 / every.len().max(1) as f64,
            nll_delta: mean(&self.nll_delta),
            worst: Worst { context: worst.0, kl_mean: worst.1 },
        })
    }
}

#[cfg(test)]
mod tests {
    use kvasir_model::Threads;
    use kvasir_model::testkit::tiny_model;

    use super::*;

    const SETTINGS: Continuation =
        Continuation { contexts: 3, context_len: 100, continuation: 20, block_size: 16, chunk: 64 };

    fn texts() -> Vec<String> {
        let text = |seed: usize| -> String {
            (0..130).map(|i| char::from(b'a' + ((i * seed + i * i) % 26) as u8)).collect()
        };
        vec![text(3), "short".to_owned(), text(5), text(7), text(11)]
    }

    fn measure(recipes: &[Recipe]) -> Vec<RecipeQuality> {
        let mut runner = Runner::new(Threads::new(1).unwrap());
        let model = tiny_model(1);
        continuation(&model, &mut runner, &texts(), recipes, SETTINGS, &mut |_, _| {}).unwrap()
    }

    #[test]
    fn the_control_against_itself_is_zero() {
        let rows = measure(&[Recipe::F16]);
        let row = &rows[0];
        assert_eq!((row.kl_mean, row.top1, row.nll_delta), (0.0, 1.0, 0.0));
        assert_eq!((row.contexts, row.recipe.as_str()), (3, "f16"));
        assert!(row.ratio_sealed < 1.0 && row.ratio_sealed > 0.9, "{}", row.ratio_sealed);
        assert!(row.ratio_total < row.ratio_sealed);
    }

    #[test]
    fn fewer_bits_lose_more_and_hold_more() {
        let rows = measure(&[Recipe::F32, Recipe::INT8, Recipe::KIVI4, Recipe::KIVI2]);
        for pair in rows.windows(2) {
            assert!(pair[0].kl_mean < pair[1].kl_mean, "{pair:?}");
            assert!(pair[0].ratio_sealed < pair[1].ratio_sealed, "{pair:?}");
        }
        for row in &rows {
            assert!(row.kl_p95 >= row.kl_mean * 0.5 && row.worst.kl_mean >= row.kl_mean);
            assert!((0.0..=1.0).contains(&row.top1));
        }
    }

    #[test]
    fn too_short_a_corpus_is_an_error() {
        let mut runner = Runner::new(Threads::new(1).unwrap());
        let texts = ["short".to_owned()];
        let got = continuation(
            &tiny_model(1),
            &mut runner,
            &texts,
            &[Recipe::INT8],
            SETTINGS,
            &mut |_, _| {},
        );
        assert_eq!(got.unwrap_err().to_string(), "no text of the corpus has 120 tokens");
    }
}
