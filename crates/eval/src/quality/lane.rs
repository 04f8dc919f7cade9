//! One recipe's cache with all contexts in it, and what was seen of it.

use kvasir_cache::{BatchSlice, KvCache, Recipe, SequenceId, Sharing, SharingMode};
use kvasir_model::{CacheOptions, ForwardBatch, Model, Runner, log_sum_exp};

use super::{RecipeQuality, TreeRatios, Worst};
use crate::error::Result;

/// Pairs of blocks a layer that predictions are made from.
const PREDICTION_PAIRS: usize = 2000;

/// A cache with one sequence per context, and the comparisons made so far.
pub(super) struct Lane {
    recipe: Recipe,
    sharing: Sharing,
    cache: KvCache,
    ids: Vec<SequenceId>,
    kl: Vec<Vec<f64>>, // [contexts][continuation]
    same_top: usize,
    nll_delta: Vec<f64>,
    tree: Option<TreeRatios>,
}

/// Bytes as f16 would take them, and as they are.
#[derive(Default)]
struct Bytes {
    logical: usize,
    physical: usize,
}

impl Bytes {
    fn add(&mut self, (logical, physical): (usize, usize)) {
        self.logical += logical;
        self.physical += physical;
    }

    fn ratio(&self) -> f64 {
        self.logical as f64 / self.physical.max(1) as f64
    }
}

/// What a lane's sequences hold.
#[derive(Default)]
struct LaneBytes {
    /// Sealed blocks other than each sequence's first.
    sealed: Bytes,
    /// Everything.
    total: Bytes,
}

impl Lane {
    /// An empty sequence for each of `contexts` contexts of at most `tokens` tokens.
    pub(super) fn new(
        model: &Model,
        cache: &CacheOptions,
        contexts: usize,
        tokens: usize,
    ) -> Result<Self> {
        // Room for every context uncompressed, twice: the budget is not what is measured here.
        let options = |budget_bytes| CacheOptions { budget_bytes, ..cache.clone() };
        let probe = model.new_cache(options(usize::MAX >> 8))?;
        let (recipe, sharing_of, tokens) = (cache.recipe, cache.sharing, tokens + cache.block_size);
        let budget =
            4 * contexts * tokens * probe.geometry().logical_bytes_per_token() + (64 << 20);
        let mut cache = model.new_cache(options(budget))?;
        let ids = (0..contexts).map(|_| Ok(cache.add_sequence(None)?)).collect::<Result<_>>()?;
        Ok(Self {
            recipe,
            sharing: sharing_of,
            cache,
            ids,
            kl: vec![Vec::new(); contexts],
            same_top: 0,
            nll_delta: Vec::new(),
            tree: None,
        })
    }

    /// Fuses all contexts, if that is how they share.
    pub(super) fn fuse(&mut self, runner: &Runner) -> Result<()> {
        if self.sharing.mode != SharingMode::Tree {
            return Ok(());
        }
        let (cache, ids) = (&mut self.cache, &self.ids);
        let report = runner.threads().install(|| cache.fuse(ids, PREDICTION_PAIRS))?;
        self.tree = Some(TreeRatios {
            ratio_predicted: report.predicted.map_or(1.0, |p| p.ratio),
            ratio_counted: report.counted_ratio(),
            ratio_realised: report.realised_ratio(),
            rejected: report.rejected(),
        });
        Ok(())
    }

    /// Appends `tokens` to one context, at most `chunk` at a time.
    pub(super) fn prefill(
        &mut self,
        model: &Model,
        runner: &mut Runner,
        context: usize,
        tokens: &[u32],
        chunk: usize,
    ) -> Result<()> {
        self.cache.expect_prompt(self.ids[context], tokens.len())?;
        let (id, mut begin) = (self.ids[context], 0);
        for chunk in tokens.chunks(chunk.max(1)) {
            let inputs = [chunk];
            let batch = Batch::new(&mut self.cache, &[id], &inputs)?;
            batch.forward(model, &mut self.cache, runner)?;
            if self.recipe.needs_prompt_nll() {
                let next = tokens[begin + 1..].iter().copied().enumerate().take(chunk.len());
                let next: Vec<(usize, u32)> = next.collect();
                let sum = model.nll(&next, runner);
                self.cache.note_prompt_nll(id, next.len(), sum)?;
            }
            batch.commit(&mut self.cache, runner)?;
            begin += chunk.len();
        }
        Ok(())
    }

    /// Appends one token to every context. `logits` become those after it: `[contexts, vocab_size]`.
    pub(super) fn decode(
        &mut self,
        model: &Model,
        runner: &mut Runner,
        inputs: &[&[u32]],
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let batch = Batch::new(&mut self.cache, &self.ids, inputs)?;
        batch.forward(model, &mut self.cache, runner)?;
        batch.commit(&mut self.cache, runner)?;
        let rows: Vec<usize> = (0..self.ids.len()).collect();
        model.logits(&rows, runner, logits);
        Ok(())
    }

    /// Counts one prediction of this lane, `coded`, against the control's. `target` is the text's next
    /// token. Both: `[vocab_size]`.
    pub(super) fn compare(
        &mut self,
        context: usize,
        exact: &[f32],
        coded: &[f32],
        target: Option<u32>,
    ) {
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

    /// What the sequences hold, slots that several share once. The total includes the statistics that
    /// codecs read: few sequences bear them whole here, a server spreads them.
    fn bytes(&self) -> Result<LaneBytes> {
        let mut bytes = LaneBytes::default();
        bytes.sealed.add(self.cache.bytes_of(&self.ids, true)?);
        bytes.total.add(self.cache.bytes_of(&self.ids, false)?);
        let stats = self.cache.stats();
        bytes.sealed.add((0, stats.sharing_index_bytes));
        bytes.total.add((0, stats.sharing_index_bytes + stats.statistics_bytes));
        Ok(bytes)
    }

    /// What was seen, as a row.
    pub(super) fn row(&self, workload: &'static str) -> Result<RecipeQuality> {
        let bytes = self.bytes()?;
        let mut every: Vec<f64> = self.kl.iter().flatten().copied().collect();
        every.sort_by(f64::total_cmp);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let means = self.kl.iter().map(|kl| mean(kl)).enumerate();
        let worst = means.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0));
        let p95 = (every.len() * 95).div_ceil(100).saturating_sub(1);
        Ok(RecipeQuality {
            recipe: self.recipe.to_string(),
            sharing: self.sharing.to_string(),
            workload,
            contexts: self.ids.len(),
            ratio_sealed: bytes.sealed.ratio(),
            ratio_total: bytes.total.ratio(),
            kl_mean: mean(&every),
            kl_p95: every.get(p95).copied().unwrap_or(0.0),
            top1: self.same_top as f64 / every.len().max(1) as f64,
            nll_delta: mean(&self.nll_delta),
            worst: Worst { context: worst.0, kl_mean: worst.1 },
            tree: self.tree,
        })
    }
}

/// Further tokens of some sequences.
struct Batch<'a> {
    inputs: &'a [&'a [u32]],
    tokens: Vec<u32>,
    slices: Vec<BatchSlice>,
}

impl<'a> Batch<'a> {
    /// Reserves them.
    fn new(cache: &mut KvCache, ids: &[SequenceId], inputs: &'a [&'a [u32]]) -> Result<Self> {
        let mut slices = Vec::with_capacity(ids.len());
        let mut row = 0;
        for (sequence, input) in ids.iter().zip(inputs) {
            cache.reserve(*sequence, input.len())?;
            let start = cache.num_tokens(*sequence)?;
            slices.push(BatchSlice { sequence: *sequence, row, start, len: input.len() });
            row += input.len();
        }
        Ok(Self { inputs, tokens: inputs.concat(), slices })
    }

    fn forward(&self, model: &Model, cache: &mut KvCache, runner: &mut Runner) -> Result<()> {
        let batch = ForwardBatch { tokens: &self.tokens, slices: &self.slices };
        Ok(model.forward(batch, cache, runner)?)
    }

    fn commit(&self, cache: &mut KvCache, runner: &Runner) -> Result<()> {
        Ok(runner.threads().install(|| {
            let mut pairs = self.slices.iter().zip(self.inputs);
            pairs.try_for_each(|(slice, input)| cache.commit(slice.sequence, input))
        })?)
    }
}
