//! The engine: requests in, steps, outputs out.

mod admit;
mod choose;
mod decide;

use std::sync::{Arc, Mutex};

use kvasir_cache::{BatchSlice, KvCache, Recipe, SharingMode};
use kvasir_model::{CacheOptions, ForwardBatch, Model, Runner, Threads, Tokenizer, parallel_zip};
use rustc_hash::FxHashMap;

use self::admit::longest_fitting;
use self::choose::{Chosen, LogitRow};
use crate::config::EngineConfig;
use crate::error::{EngineError, Result};
use crate::guard::{Watch, Watched};
use crate::request::{Finish, RequestId, SequenceOutput, StepOutput, TokenId};
use crate::sampler::Sampler;
use crate::scheduler::{Plan, Scheduled, Scheduler};
use crate::sequence::SeqKey;
use crate::stats::EngineStats;
use crate::work::StepWork;

/// Rows of logits computed at a time: a whole prompt's would not fit in memory.
const LOGIT_ROWS: usize = 64;

/// See the crate's documentation.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
    config: EngineConfig,
    has_statistics: bool,
    /// How sequences are stored at first that ask for nothing; `max_model_len` of them fit.
    stored: Recipe,
    max_model_len: usize,
    cache: KvCache,
    runner: Runner,
    scheduler: Scheduler,
    /// One for each thread.
    samplers: Vec<Mutex<Sampler>>,
    requests: FxHashMap<RequestId, Vec<SeqKey>>,
    next_key: u64,
    num_unseeded: u64,
    stats: EngineStats,
    /// If prompts are looked at.
    watch: Option<Watch>,
    // Buffers of a step.
    tokens: Vec<TokenId>,
    slices: Vec<BatchSlice>,
    wanted: Vec<usize>,
    logits: Vec<f32>,
    chosen: Vec<Chosen>,
}

/// Counting bytes by layer goes through all tables: rarely enough to cost nothing.
const STEPS_BETWEEN_LAYER_BYTES: u64 = 64;

impl Engine {
    /// Validates `config` against `model` and takes the cache's budget (memory itself is taken as
    /// blocks are needed).
    ///
    /// # Errors
    /// A flag out of range; a budget that cannot hold one sequence of `--max-model-len` tokens, or, if
    /// that was not given, of one block.
    pub fn new(model: Arc<Model>, mut config: EngineConfig) -> Result<Self> {
        config.validate()?;
        // The cache keeps what it needs of them.
        let statistics = config.statistics.take();
        let has_statistics = statistics.is_some();
        let stored = config.stored();
        let mut cache = model.new_cache(CacheOptions {
            recipe: stored,
            block_size: config.block_size,
            budget_bytes: config.kv_cache_memory,
            prefix_caching: config.enable_prefix_caching,
            statistics,
            tables: std::mem::take(&mut config.tables),
            sharing: config.kv_sharing,
        })?;
        cache.set_max_chunk(config.max_num_batched_tokens);
        let context = model.spec().context_length;
        if let Some(asked) = config.max_model_len.filter(|asked| *asked > context) {
            return Err(EngineError::BadConfig {
                option: "--max-model-len",
                expected: format!("at most the model's context of {context} tokens"),
                found: asked.to_string(),
            });
        }
        let needed = config.max_model_len.unwrap_or(config.block_size.min(context));
        if cache.bytes_alone(stored, needed) > config.kv_cache_memory {
            return Err(EngineError::BudgetTooSmall {
                budget_bytes: config.kv_cache_memory,
                tokens: needed,
                needed_bytes: cache.bytes_alone(stored, needed),
            });
        }
        let max_model_len = config.max_model_len.unwrap_or_else(|| {
            longest_fitting(context, |tokens| {
                cache.bytes_alone(stored, tokens) <= config.kv_cache_memory
            })
        });
        let runner = Runner::new(Threads::new(config.threads)?);
        let watch = config.watch();
        let samplers =
            std::iter::repeat_with(Mutex::default).take(runner.threads().count()).collect();
        let scheduler = Scheduler::new(config.max_num_seqs, config.max_num_batched_tokens);
        let mut engine = Self {
            model,
            config,
            has_statistics,
            stored,
            max_model_len,
            cache,
            runner,
            scheduler,
            samplers,
            requests: FxHashMap::default(),
            next_key: 0,
            num_unseeded: 0,
            stats: EngineStats::default(),
            watch,
            tokens: Vec::new(),
            slices: Vec::new(),
            wanted: Vec::new(),
            logits: Vec::new(),
            chosen: Vec::new(),
        };
        engine.prepare_guard()?;
        Ok(engine)
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        self.model.tokenizer()
    }

    /// The configuration as given, less the statistics.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Compute threads.
    pub fn num_threads(&self) -> usize {
        self.runner.threads().count()
    }

    /// Longest prompt + output in tokens. A request of this length fits the budget when it is alone.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Bytes that one token takes uncompressed, over all layers.
    pub fn kv_bytes_per_token(&self) -> usize {
        self.cache.geometry().logical_bytes_per_token()
    }

    /// Ends a request and frees all it holds at once. Returns whether it was there. No output follows.
    ///
    /// # Errors
    /// [`EngineError::Cache`] if the books are wrong.
    pub fn abort(&mut self, id: &RequestId) -> Result<bool> {
        let Some(keys) = self.requests.remove(id) else { return Ok(false) };
        self.scheduler.remove(&keys, &mut self.cache)?;
        Ok(true)
    }

    /// Runs one step: schedules, computes, samples. Does nothing if there is nothing to do.
    ///
    /// # Errors
    /// Only bugs: what clients can get wrong is refused by [`Self::add_request`].
    pub fn step(&mut self) -> Result<StepOutput> {
        let plan = self.scheduler.schedule(&mut self.cache)?;
        let mut output = StepOutput { num_preempted: plan.num_preempted, ..StepOutput::default() };
        self.stats.preemptions += plan.num_preempted as u64;
        self.note_admitted(&plan, &mut output);
        if plan.scheduled.is_empty() {
            if plan.num_preempted == 0 && self.has_unfinished() {
                let what = "requests wait, and none can be scheduled".to_owned();
                return Err(EngineError::Integrity { what });
            }
            return Ok(output);
        }
        self.stats.steps += 1;
        if self.stats.steps.is_multiple_of(STEPS_BETWEEN_LAYER_BYTES) {
            self.stats.kv_layer_bytes = self.cache.layer_bytes();
        }
        let rows = self.build_batch(&plan.scheduled, &mut output);
        let batch = ForwardBatch { tokens: &self.tokens, slices: &self.slices };
        let all = self.needs_prompt_nll(&plan.scheduled);
        if all {
            self.model.forward(batch, &mut self.cache, &mut self.runner)?;
        } else {
            self.wanted.clear();
            self.wanted.extend(rows.iter().map(|row| row.row));
            self.wanted.sort_unstable();
            self.wanted.dedup();
            self.model.forward_for(&self.wanted, batch, &mut self.cache, &mut self.runner)?;
        }
        self.note_prompt_nll(&plan.scheduled)?;
        let Self { cache, runner, slices, tokens, .. } = self;
        // Blocks that are full now are encoded on all threads.
        runner.threads().install(|| {
            slices.iter().try_for_each(|slice| {
                cache.commit(slice.sequence, &tokens[slice.row..slice.row + slice.len])
            })
        })?;
        for scheduled in &plan.scheduled {
            if let Some(sequence) = self.scheduler.sequences.get_mut(&scheduled.key) {
                sequence.num_computed += scheduled.len;
            }
        }
        let tree = self.config.kv_sharing.mode == SharingMode::Tree;
        let fuses = tree && self.scheduler.completes_prompt(&plan);
        for rows in rows.chunks(LOGIT_ROWS) {
            let indices: Vec<usize> = rows.iter().map(|r| r.row).collect();
            let mut logits = std::mem::take(&mut self.logits);
            self.model.logits(&indices, &mut self.runner, &mut logits);
            self.choose(rows, &mut logits);
            self.logits = logits;
            for (at, row) in rows.iter().enumerate() {
                self.append(*row, at, &mut output)?;
            }
        }
        if fuses {
            self.fuse()?;
        }
        Ok(output)
    }

    /// Whether the cache asks how likely a prompt of this step is.
    fn needs_prompt_nll(&self, scheduled: &[Scheduled]) -> bool {
        let sequences = &self.scheduler.sequences;
        let mut all = scheduled.iter().filter_map(|scheduled| sequences.get(&scheduled.key));
        all.any(|sequence| sequence.recipe.needs_prompt_nll())
    }

    /// Tells the cache how likely the prompts of this step are, where it asks.
    fn note_prompt_nll(&mut self, scheduled: &[Scheduled]) -> Result<()> {
        for (Scheduled { key, start, len }, slice) in scheduled.iter().zip(&self.slices) {
            let Some(sequence) = self.scheduler.sequences.get(key) else { continue };
            if !sequence.recipe.needs_prompt_nll() {
                continue;
            }
            let known = (start + 1)..(start + len + 1).min(sequence.prompt_len);
            let next = |p: usize| (slice.row + p - 1 - start, sequence.tokens[p]);
            let next: Vec<(usize, TokenId)> = known.map(next).collect();
            let sum = self.model.nll(&next, &mut self.runner);
            self.cache.note_prompt_nll(slice.sequence, next.len(), sum)?;
        }
        Ok(())
    }

    /// Fuses the running sequences with complete prompts, if there are several.
    fn fuse(&mut self) -> Result<()> {
        let ids = self.scheduler.decoding();
        if ids.len() > 1 {
            let cache = &mut self.cache;
            self.runner.threads().install(|| cache.fuse(&ids, 0))?;
        }
        Ok(())
    }

    fn note_admitted(&mut self, plan: &Plan, output: &mut StepOutput) {
        for key in &plan.admitted {
            let Some(sequence) = self.scheduler.sequences.get(key) else { continue };
            let cached = sequence.num_cached.unwrap_or(0) as u64;
            self.stats.prefix_queries += sequence.prompt_len as u64;
            self.stats.prefix_hits += cached;
            self.stats.prompt_tokens += sequence.prompt_len as u64;
            self.stats.cached_prompt_tokens += cached;
            // Of a guarded one it is not known yet.
            if sequence.watched != Some(Watched::Guarded) {
                self.stats.count_sequence(sequence.recipe);
            }
            if sequence.index == 0 {
                output.scheduled.push(sequence.request_id.clone());
            }
        }
    }

    /// Fills the flat batch; returns the rows whose logits are wanted.
    fn build_batch(&mut self, scheduled: &[Scheduled], output: &mut StepOutput) -> Vec<LogitRow> {
        self.tokens.clear();
        self.slices.clear();
        let mut rows = Vec::new();
        let mut work = StepWork::default();
        for Scheduled { key, start, len } in scheduled.iter().copied() {
            let Some(sequence) = self.scheduler.sequences.get(&key) else { continue };
            let Some(id) = sequence.cache else { continue };
            let row = self.tokens.len();
            self.tokens.extend_from_slice(&sequence.tokens[start..start + len]);
            self.slices.push(BatchSlice { sequence: id, row, start, len });
            work.add(start, len, sequence.prompt_len, self.config.block_size);
            // After a preemption, output is computed again like a prompt.
            if len == 1 && start + 1 == sequence.tokens.len() && sequence.num_output() > 0 {
                output.num_decode_tokens += 1;
            } else {
                output.num_prefill_tokens += len;
            }
            if sequence.wants_prompt_logprobs() {
                rows.extend(
                    (0..len).map(|i| start + i + 1).filter(|p| *p < sequence.prompt_len).map(|p| {
                        LogitRow { key, row: row + p - 1 - start, prompt_position: Some(p) }
                    }),
                );
            }
            if start + len == sequence.tokens.len() {
                rows.push(LogitRow { key, row: row + len - 1, prompt_position: None });
            }
        }
        work.logit_rows = rows.len();
        output.work = work;
        rows
    }

    /// Chooses the rows' tokens, or looks at the prompt's, on all threads. `logits`: `[rows, vocab]`,
    /// changed in place.
    fn choose(&mut self, rows: &[LogitRow], logits: &mut [f32]) {
        let vocab_size = self.model.spec().vocab_size;
        self.chosen.clear();
        self.chosen.resize_with(rows.len(), Chosen::default);
        let (sequences, samplers) = (&self.scheduler.sequences, &self.samplers);
        let body = |at: usize, thread: usize, logits: &mut [f32], chosen: &mut [Chosen]| {
            let row = &rows[at];
            if let (Some(sequence), [chosen]) = (sequences.get(&row.key), chosen) {
                *chosen = row.choose(sequence, logits, &samplers[thread % samplers.len()]);
            }
        };
        self.runner.threads().run(|| {
            parallel_zip((logits, vocab_size), (&mut self.chosen, 1), body);
        });
    }

    /// Takes in what was chosen for a row.
    fn append(&mut self, row: LogitRow, at: usize, output: &mut StepOutput) -> Result<()> {
        let mut features = None;
        if let Some(first) = self.chosen[at].first.take() {
            features = self.look_at(row, first)?;
        }
        let Some(sequence) = self.scheduler.sequences.get_mut(&row.key) else { return Ok(()) };
        let Chosen { token, logprobs, .. } = std::mem::take(&mut self.chosen[at]);
        if row.prompt_position.is_some() {
            if sequence.prompt_logprobs.is_empty() {
                sequence.prompt_logprobs.push(None);
            }
            sequence.prompt_logprobs.push(logprobs);
            return Ok(());
        }
        let logprobs = logprobs.into_iter().collect();
        let first = sequence.num_output() == 0;
        self.stats.generation_tokens += 1;

        let (text, finish) = sequence.append(token, self.model.tokenizer());
        let prompt_logprobs = (first
            && sequence.params.prompt_logprobs.is_some()
            && sequence.index == 0)
            .then(|| {
                let mut found = std::mem::take(&mut sequence.prompt_logprobs);
                if found.is_empty() {
                    found.push(None);
                }
                found
            });
        let mut produced = SequenceOutput {
            request_id: sequence.request_id.clone(),
            index: sequence.index,
            token_ids: vec![token],
            text,
            logprobs,
            prompt_logprobs,
            num_prompt_tokens: sequence.prompt_len,
            num_cached_tokens: sequence.num_cached.unwrap_or(0),
            num_output_tokens: sequence.num_output(),
            features,
            finish: None,
        };
        if let Some((reason, stop)) = finish {
            let (logical, physical) = match sequence.cache {
                Some(id) => self.cache.sequence_bytes(id)?,
                None => (0, 0),
            };
            produced.finish = Some(Finish {
                reason,
                stop,
                recipe: sequence.recipe,
                risk: sequence.risk,
                kv_logical_bytes: logical,
                kv_physical_bytes: physical,
                num_preemptions: sequence.num_preemptions,
            });
            self.finish(row.key)?;
        }
        output.outputs.push(produced);
        Ok(())
    }

    fn finish(&mut self, key: SeqKey) -> Result<()> {
        let removed = self.scheduler.remove(&[key], &mut self.cache)?;
        let Some(sequence) = removed.first() else { return Ok(()) };
        if let Some(keys) = self.requests.get_mut(&sequence.request_id) {
            keys.retain(|k| *k != key);
            if keys.is_empty() {
                self.requests.remove(&sequence.request_id);
            }
        }
        Ok(())
    }

    /// Sequences in the batch, those that the next step admits not included.
    pub fn num_running(&self) -> usize {
        self.scheduler.num_running()
    }

    /// Whether any request is waiting or running.
    pub fn has_unfinished(&self) -> bool {
        !self.requests.is_empty()
    }

    /// A snapshot of counters and gauges.
    pub fn stats(&self) -> EngineStats {
        let cache = self.cache.stats();
        EngineStats {
            num_running: self.scheduler.num_running(),
            num_waiting: self.scheduler.num_waiting(),
            kv_logical_bytes: cache.logical_bytes,
            kv_physical_bytes: cache.physical_bytes,
            kv_evictable_bytes: cache.evictable_bytes,
            kv_budget_bytes: cache.budget_bytes,
            kv_peak_physical_bytes: cache.peak_physical_bytes,
            kv_reserved_bytes: cache.reserved_bytes,
            kv_statistics_bytes: cache.statistics_bytes,
            kv_sharing_index_bytes: cache.sharing_index_bytes,
            kv_spilled_bytes: cache.spilled_bytes,
            kv_clamped_values: cache.num_clamped,
            kv_sharing_sealed: cache.sharing.sealed,
            kv_sharing_shared: cache.sharing.shared,
            kv_evicted: cache.num_evicted,
            kv_lowered: cache.num_lowered,
            kv_kept_shares: cache.kept_shares,
            kv_seal_seconds: cache.seal_nanos as f64 * 1e-9,
            guard_seconds: cache.recode_nanos as f64 * 1e-9,
            kv_attention_seconds: cache.attention_nanos as f64 * 1e-9,
            kv_decode_seconds: cache.decode_nanos as f64 * 1e-9,
            ..self.stats.clone()
        }
    }

    /// Drops every cached prefix that no sequence uses; returns the bytes freed.
    ///
    /// # Errors
    /// [`EngineError::Cache`] if the books are wrong.
    pub fn reset_prefix_cache(&mut self) -> Result<usize> {
        Ok(self.cache.reset_prefix_cache()?)
    }

    /// Recounts references and bytes of everything; an error is a bug. O(everything): for idle moments
    /// and tests.
    ///
    /// # Errors
    /// The first numbers that disagree.
    pub fn check_integrity(&self) -> Result<()> {
        self.cache.check_integrity()?;
        let sequences = self.requests.values().map(Vec::len).sum::<usize>();
        let held = self.scheduler.sequences.len();
        if sequences != held {
            let what = format!("requests name {sequences} sequences, {held} are held");
            return Err(EngineError::Integrity { what });
        }
        if self.cache.stats().num_sequences != self.scheduler.num_running() {
            let what = format!(
                "{} sequences in the cache, {} running",
                self.cache.stats().num_sequences,
                self.scheduler.num_running()
            );
            return Err(EngineError::Integrity { what });
        }
        self.scheduler.check().map_err(|what| EngineError::Integrity { what })
    }
}
