//! Which tokens the next step computes. No model, no clock: requests and a cache in, a plan out.
//!
//! Every step: one token for each sequence in decode, then chunks of unfinished prompts in order of
//! admission, then new sequences, until the token budget, the sequence limit or the cache is full. When
//! the cache has no room for a running sequence, the youngest one is preempted: its blocks are freed
//! (sealed ones stay in the prefix cache while there is room) and it goes back to the head of the queue,
//! to be recomputed. The oldest sequence therefore always advances.

use std::collections::VecDeque;

use kvasir_cache::{CacheError, KvCache, SequenceId};
use rustc_hash::FxHashMap;

use crate::error::Result;
use crate::sequence::{SeqKey, Sequence};

/// Tokens of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scheduled {
    pub(crate) key: SeqKey,
    /// Position of the first token.
    pub(crate) start: usize,
    pub(crate) len: usize,
}

/// The plan of one step.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) scheduled: Vec<Scheduled>,
    /// Sequences that left the queue in this step for the first time.
    pub(crate) admitted: Vec<SeqKey>,
    pub(crate) num_preempted: usize,
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    pub(crate) sequences: FxHashMap<SeqKey, Sequence>,
    waiting: VecDeque<SeqKey>,
    /// In order of admission: the last is the youngest.
    running: Vec<SeqKey>,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
}

impl Scheduler {
    pub(crate) fn new(max_num_seqs: usize, max_num_batched_tokens: usize) -> Self {
        Self {
            sequences: FxHashMap::default(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            max_num_seqs,
            max_num_batched_tokens,
        }
    }

    pub(crate) fn add(&mut self, key: SeqKey, sequence: Sequence) {
        self.sequences.insert(key, sequence);
        self.waiting.push_back(key);
    }

    pub(crate) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Whether a plan that was carried out completes somebody's prompt.
    pub(crate) fn completes_prompt(&self, plan: &Plan) -> bool {
        plan.scheduled.iter().any(|Scheduled { key, start, len }| {
            let sequence = self.sequences.get(key);
            sequence.is_some_and(|s| *start < s.prompt_len && s.prompt_len <= start + len)
        })
    }

    /// Running sequences whose prompts are complete, in order of admission.
    pub(crate) fn decoding(&self) -> Vec<SequenceId> {
        let running = self.running.iter().filter_map(|key| self.sequences.get(key));
        running.filter(|s| s.num_computed >= s.prompt_len).filter_map(|s| s.cache).collect()
    }

    /// Requests of which no token has been computed yet.
    pub(crate) fn num_unscheduled_requests(&self) -> usize {
        let waiting = self.waiting.iter().filter_map(|key| self.sequences.get(key));
        waiting.filter(|s| s.index == 0 && s.num_cached.is_none()).count()
    }

    /// Forgets sequences and frees their blocks. One pass over each list, however many there are.
    pub(crate) fn remove(&mut self, keys: &[SeqKey], cache: &mut KvCache) -> Result<Vec<Sequence>> {
        let mut removed: Vec<Sequence> =
            keys.iter().filter_map(|key| self.sequences.remove(key)).collect();
        let held = &self.sequences;
        if removed.iter().any(|s| s.cache.is_some()) {
            self.running.retain(|key| held.contains_key(key));
        }
        if removed.iter().any(|s| s.cache.is_none()) {
            self.waiting.retain(|key| held.contains_key(key));
        }
        for id in removed.iter_mut().filter_map(|s| s.cache.take()) {
            cache.remove_sequence(id)?;
        }
        Ok(removed)
    }

    /// Plans a step and reserves its tokens in the cache.
    pub(crate) fn schedule(&mut self, cache: &mut KvCache) -> Result<Plan> {
        let mut plan = Plan::default();
        let mut budget = self.max_num_batched_tokens;
        // Decodes first: a long prompt must not make every other stream stutter.
        let (decodes, prefills): (Vec<SeqKey>, Vec<SeqKey>) = self
            .running
            .iter()
            .partition(|key| self.sequences.get(key).is_some_and(|s| s.num_remaining() == 1));
        for key in decodes.into_iter().chain(prefills) {
            if budget == 0 {
                break;
            }
            self.schedule_running(key, &mut budget, &mut plan, cache)?;
        }
        // After a preemption there is no room; admitting now would only preempt again.
        if plan.num_preempted == 0 {
            self.admit(&mut budget, &mut plan, cache)?;
        }
        Ok(plan)
    }

    fn schedule_running(
        &mut self,
        key: SeqKey,
        budget: &mut usize,
        plan: &mut Plan,
        cache: &mut KvCache,
    ) -> Result<()> {
        loop {
            // Preempted a moment ago, in favour of an older one.
            let Some(sequence) = self.sequences.get(&key) else { return Ok(()) };
            let Some(id) = sequence.cache else { return Ok(()) };
            let most = (*budget).min(cache.most_next(id)?);
            let (start, len) = (sequence.num_computed, sequence.num_remaining().min(most));
            if len == 0 {
                return Ok(());
            }
            match cache.reserve(id, len) {
                Ok(()) => {
                    plan.scheduled.push(Scheduled { key, start, len });
                    *budget -= len;
                    return Ok(());
                }
                Err(CacheError::Exhausted { .. }) => {
                    let Some(youngest) = self.running.last().copied() else { return Ok(()) };
                    self.preempt(youngest, budget, plan, cache)?;
                }
                Err(other) => return Err(other.into()),
            }
        }
    }

    fn preempt(
        &mut self,
        key: SeqKey,
        budget: &mut usize,
        plan: &mut Plan,
        cache: &mut KvCache,
    ) -> Result<()> {
        self.running.retain(|k| *k != key);
        if let Some(at) = plan.scheduled.iter().position(|s| s.key == key) {
            *budget += plan.scheduled.remove(at).len;
        }
        if let Some(sequence) = self.sequences.get_mut(&key) {
            if let Some(id) = sequence.cache.take() {
                cache.remove_sequence(id)?;
            }
            sequence.num_computed = 0;
            sequence.num_preemptions += 1;
            sequence.prompt_logprobs.clear();
            self.waiting.push_front(key);
            plan.num_preempted += 1;
        }
        Ok(())
    }

    fn admit(&mut self, budget: &mut usize, plan: &mut Plan, cache: &mut KvCache) -> Result<()> {
        let mut at = 0;
        while at < self.waiting.len() && self.running.len() < self.max_num_seqs && *budget > 0 {
            let key = self.waiting[at];
            if cache.prefix_caching() && self.waits_for_sibling(key) {
                at += 1;
                continue;
            }
            let alone = self.running.is_empty();
            let Some(sequence) = self.sequences.get_mut(&key) else {
                self.waiting.remove(at);
                continue;
            };
            let (salt, reuse) = (sequence.cache_salt.as_deref(), !sequence.wants_prompt_logprobs());
            // All that is left of the prompt must fit, and a block to grow into: half a prompt in a full
            // cache would only wait there.
            let headroom = cache.geometry().block_size();
            if !alone && !cache.fits_new(sequence.recipe, salt, &sequence.tokens, reuse, headroom) {
                return Ok(());
            }
            let id = add_sequence(sequence, cache)?;
            let cached = if reuse { cache.match_prefix(id, &sequence.tokens)? } else { 0 };
            let mut admitted = (id, cached);
            let len = (sequence.tokens.len() - cached).min(*budget).min(cache.most_next(id)?);
            match cache.reserve(id, len) {
                Ok(()) => {}
                Err(CacheError::Exhausted { .. }) if !alone => {
                    cache.remove_sequence(id)?;
                    return Ok(());
                }
                // Alone, what was accepted fits an empty pool, so empty it: slots that the prefix cache
                // keeps may hold the room in pieces.
                Err(CacheError::Exhausted { .. }) => {
                    cache.remove_sequence(id)?;
                    cache.reset_prefix_cache()?;
                    let id = add_sequence(sequence, cache)?;
                    admitted = (id, 0);
                    let most = (*budget).min(cache.most_next(id)?);
                    cache.reserve(id, sequence.tokens.len().min(most))?;
                }
                Err(other) => return Err(other.into()),
            }
            let (id, cached) = admitted;
            let len = (sequence.tokens.len() - cached).min(*budget).min(cache.most_next(id)?);
            sequence.cache = Some(id);
            sequence.num_computed = cached;
            if sequence.num_cached.is_none() {
                sequence.num_cached = Some(cached);
                plan.admitted.push(key);
            }
            self.waiting.remove(at);
            self.running.push(key);
            plan.scheduled.push(Scheduled { key, start: cached, len });
            *budget -= len;
        }
        Ok(())
    }

    /// The later sequences of a request wait until the first has computed the prompt they share: then
    /// they find it in the prefix cache.
    fn waits_for_sibling(&self, key: SeqKey) -> bool {
        let Some(sequence) = self.sequences.get(&key).filter(|s| s.index > 0) else { return false };
        let first = SeqKey(key.0 - sequence.index as u64);
        self.sequences.get(&first).is_some_and(|s| s.num_computed < s.prompt_len)
    }

    /// Every sequence is either waiting without blocks or running with them.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        for (keys, running) in [
            (self.waiting.iter().collect::<Vec<_>>(), false),
            (self.running.iter().collect(), true),
        ] {
            for key in keys {
                match self.sequences.get(key) {
                    Some(s) if s.cache.is_some() == running => {}
                    other => return Err(format!("{key:?}: running {running}, {other:?}")),
                }
            }
        }
        let listed = self.waiting.len() + self.running.len();
        if listed != self.sequences.len() {
            return Err(format!("{listed} sequences listed, {} held", self.sequences.len()));
        }
        Ok(())
    }
}

/// A place in the cache for a sequence that is admitted, for the first time or again.
fn add_sequence(sequence: &Sequence, cache: &mut KvCache) -> Result<SequenceId> {
    let id = cache.add_sequence_with(sequence.recipe, sequence.cache_salt.as_deref())?;
    cache.expect_prompt(id, sequence.prompt_len)?;
    if sequence.watched.is_some() {
        cache.watch_prompt(id, sequence.prompt_len)?;
    }
    if sequence.num_preemptions > 0 {
        // It must fit now: alone, nobody else can be asked to make room.
        cache.code_odd_blocks(id)?;
    }
    Ok(id)
}
