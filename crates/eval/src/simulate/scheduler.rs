//! The rules of `engine/scheduler.rs`, on counts.

use std::collections::VecDeque;

use kvasir_engine::StepWork;

use super::ServerConfig;
use super::pool::{BlockId, Pool};
use super::trace::TraceRequest;
use crate::profile::BytesModel;

/// Tokens by which tails grow.
const TAIL_STEP: usize = 8;

/// A token that a step made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) request: usize,
    pub(super) first: bool,
    pub(super) last: bool,
}

#[derive(Debug)]
struct Sequence {
    request: usize,
    /// Names of the prompt's full blocks.
    names: Vec<BlockId>,
    prompt: usize,
    /// Tokens of prompt and answer so far.
    tokens: usize,
    end: usize,
    computed: usize,
    /// Full blocks it holds, in order.
    held: Vec<BlockId>,
    /// Tokens that it has room for in blocks that are not full, or not coded yet.
    tail: usize,
    /// Tokens of it in this step.
    scheduled: usize,
    started: bool,
}

impl Sequence {
    fn remaining(&self) -> usize {
        self.tokens - self.computed
    }

    /// The name of a block: the prompt's own, or one that nobody else has.
    fn name(&self, block: usize) -> BlockId {
        let own = || ((self.request as u64 + 1) << 24 | block as u64) ^ 0x9E37_79B9_7F4A_7C15;
        self.names.get(block).copied().unwrap_or_else(own)
    }
}

#[derive(Debug)]
pub(super) struct Scheduler {
    config: ServerConfig,
    bytes: BytesModel,
    waiting: VecDeque<Sequence>,
    /// In order of admission.
    running: Vec<Sequence>,
    pool: Pool,
    /// Of all running sequences.
    tail: usize,
    preemptions: usize,
    cached_tokens: usize,
    peak_bytes: usize,
}

impl Scheduler {
    pub(super) fn new(config: ServerConfig, bytes: BytesModel) -> Self {
        Self {
            config,
            bytes,
            waiting: VecDeque::new(),
            running: Vec::new(),
            pool: Pool::default(),
            tail: 0,
            preemptions: 0,
            cached_tokens: 0,
            peak_bytes: 0,
        }
    }

    pub(super) fn add(&mut self, number: usize, request: &TraceRequest) {
        self.waiting.push_back(Sequence {
            request: number,
            names: request.names(self.config.block_size),
            prompt: request.prompt_tokens,
            tokens: request.prompt_tokens,
            end: request.prompt_tokens + request.output_tokens.max(1),
            computed: 0,
            held: Vec::new(),
            tail: 0,
            scheduled: 0,
            started: false,
        });
    }

    pub(super) fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    pub(super) fn num_running(&self) -> usize {
        self.running.len()
    }

    pub(super) fn preemptions(&self) -> usize {
        self.preemptions
    }

    pub(super) fn peak_bytes(&self) -> usize {
        self.peak_bytes
    }

    pub(super) fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    pub(super) fn longest_waiting(&self) -> usize {
        self.waiting.iter().chain(&self.running).map(|s| s.tokens).max().unwrap_or(0)
    }

    /// Bytes of some sequences, full blocks and tokens in tails.
    fn bytes_of(&self, sequences: usize, blocks: usize, tail: usize) -> f64 {
        self.bytes.bytes(sequences, blocks * self.config.block_size, tail)
    }

    /// Bytes that can be used.
    fn budget(&self) -> f64 {
        self.config.kv_cache_memory as f64 - self.bytes.slack
    }

    /// Makes room for as many more blocks and tokens in tails, at the expense of what is only kept.
    fn make_room(&mut self, blocks: usize, tail: usize) -> bool {
        while self.bytes_of(self.running.len(), self.pool.len() + blocks, tail) > self.budget() {
            if !self.pool.evict() {
                return false;
            }
        }
        true
    }

    /// Holds what a sequence needs for `len` more tokens, if there is room.
    fn reserve(&mut self, at: usize, len: usize) -> bool {
        let block_size = self.config.block_size;
        let sequence = &self.running[at];
        let (end, from) = (sequence.computed + len, sequence.held.len());
        let more = (end / block_size).saturating_sub(from);
        // Uncompressed blocks are full where they are.
        let open = if self.bytes.is_coded() { end - from * block_size } else { end % block_size };
        let open = open.next_multiple_of(TAIL_STEP);
        let tail = self.tail - sequence.tail + open;
        if !self.make_room(more, tail) {
            return false;
        }
        let sequence = &mut self.running[at];
        for block in from..from + more {
            // A block that another one also computes is its own until both are full: what it costs is the same.
            let id = sequence.name(block);
            self.pool.hold(id);
            sequence.held.push(id);
        }
        (sequence.scheduled, sequence.tail, self.tail) = (len, open, tail);
        let now = self.bytes_of(self.running.len(), self.pool.len(), self.tail);
        self.peak_bytes = self.peak_bytes.max(now as usize);
        true
    }

    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        self.tail -= std::mem::take(&mut sequence.tail);
        let full = sequence.computed / self.config.block_size;
        let (kept, rest) = sequence.held.split_at(full.min(sequence.held.len()));
        self.pool.release(rest, false);
        self.pool.release(kept, self.config.enable_prefix_caching);
        (sequence.held, sequence.computed, sequence.scheduled) = (Vec::new(), 0, 0);
        self.waiting.push_front(sequence);
        self.preemptions += 1;
    }

    /// Plans a step; its work, which is none if nothing can be computed.
    pub(super) fn schedule(&mut self) -> StepWork {
        let mut budget = self.config.max_num_batched_tokens;
        let preemptions = self.preemptions;
        let (decodes, prefills): (Vec<usize>, Vec<usize>) = self
            .running
            .iter()
            .map(|sequence| (sequence.request, sequence.remaining() == 1))
            .fold((Vec::new(), Vec::new()), |(mut decodes, mut prefills), (request, decode)| {
                if decode { &mut decodes } else { &mut prefills }.push(request);
                (decodes, prefills)
            });
        for request in decodes.into_iter().chain(prefills) {
            // Preempted, in favour of an older one, if it is not there.
            while let Some(at) = self.running.iter().position(|s| s.request == request) {
                let len = self.running[at].remaining().min(budget);
                if len == 0 || self.reserve(at, len) {
                    budget -= len;
                    break;
                }
                let youngest = self.running.len() - 1;
                budget += self.running[youngest].scheduled;
                self.preempt_youngest();
            }
        }
        if self.preemptions == preemptions {
            self.admit(&mut budget);
        }
        let mut work = StepWork::default();
        for sequence in self.running.iter().filter(|sequence| sequence.scheduled > 0) {
            let Sequence { computed, scheduled, prompt, tokens, .. } = *sequence;
            work.add(computed, scheduled, prompt, self.config.block_size);
            work.logit_rows += usize::from(computed + scheduled == tokens);
        }
        work
    }

    fn admit(&mut self, budget: &mut usize) {
        let block_size = self.config.block_size;
        while self.running.len() < self.config.max_num_seqs && *budget > 0 {
            let Some(sequence) = self.waiting.front() else { return };
            // The last token is always computed.
            let full = (sequence.tokens - 1) / block_size;
            let names: Vec<BlockId> = (0..full).map(|block| sequence.name(block)).collect();
            let (found, free) = match self.config.enable_prefix_caching {
                true => self.pool.matching(&names),
                false => (0, 0),
            };
            let more = sequence.tokens / block_size - found;
            // With a block to grow into.
            let tail = self.tail + 2 * block_size;
            // What nobody holds makes room, but for what this one wants itself.
            let kept = self.pool.len() - (self.pool.num_free() - free);
            let alone = self.running.is_empty();
            if !alone && self.bytes_of(self.running.len() + 1, kept + more, tail) > self.budget() {
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            for name in &names[..found] {
                self.pool.hold(*name);
            }
            sequence.held = names[..found].to_vec();
            sequence.computed = found * block_size;
            if !sequence.started {
                sequence.started = true;
                self.cached_tokens += sequence.computed;
            }
            let len = sequence.remaining().min(*budget);
            self.running.push(sequence);
            let at = self.running.len() - 1;
            if !self.reserve(at, len) {
                self.preempt_youngest();
                self.preemptions -= 1;
                return;
            }
            *budget -= len;
        }
    }

    /// Carries the plan out: the tokens that come of it.
    pub(super) fn finish_step(&mut self) -> Vec<Token> {
        let mut tokens = Vec::new();
        for sequence in &mut self.running {
            sequence.computed += std::mem::take(&mut sequence.scheduled);
            let open = (sequence.computed % self.config.block_size).next_multiple_of(TAIL_STEP);
            self.tail = self.tail - std::mem::replace(&mut sequence.tail, open) + open;
            if sequence.computed == sequence.tokens {
                sequence.tokens += 1;
                tokens.push(Token {
                    request: sequence.request,
                    first: sequence.tokens == sequence.prompt + 1,
                    last: sequence.tokens == sequence.end,
                });
            }
        }
        let (mut at, block_size) = (0, self.config.block_size);
        while at < self.running.len() {
            if self.running[at].tokens < self.running[at].end {
                at += 1;
                continue;
            }
            let sequence = self.running.remove(at);
            self.tail -= sequence.tail;
            let full = (sequence.computed / block_size).min(sequence.held.len());
            let (kept, rest) = sequence.held.split_at(full);
            self.pool.release(rest, false);
            self.pool.release(kept, self.config.enable_prefix_caching);
        }
        tokens
    }
}
