//! A scripted engine and a byte-level text model, for tests.
//!
//! The engine generates letters that depend on the prompt, the sequence and (above temperature
//! 0) the seed. A prompt that holds `say:TEXT` up to a line's end is answered with `TEXT` and an
//! end token; `PANIC` and `FAIL` break the engine in its first step.
#![allow(clippy::panic, reason = "tests are allowed to panic")]

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvasir_engine::{
    EngineError, EngineStats, Finish, FinishReason, Request, RequestId, SequenceOutput, StepOutput,
    StopReason, TokenId, TokenLogprobs,
};
use kvasir_model::ModelError;

use crate::{ChatPrompt, StepEngine, TextModel};

/// End of sequence in [`MockText`].
pub const EOS: TokenId = 256;
/// Begin of sequence in [`MockText`].
pub const BOS: TokenId = 257;
const VOCAB_SIZE: usize = 258;
const BYTES_PER_TOKEN: usize = 1024;

/// A token per byte, and two special tokens.
#[derive(Debug, Clone)]
pub struct MockText {
    /// Longest prompt + output.
    pub max_model_len: usize,
}

impl Default for MockText {
    fn default() -> Self {
        Self { max_model_len: 4096 }
    }
}

impl TextModel for MockText {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, ModelError> {
        let bos = add_special.then_some(BOS);
        Ok(bos.into_iter().chain(text.bytes().map(TokenId::from)).collect())
    }

    fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for token in tokens.iter().filter(|token| !skip_special || **token < EOS) {
            bytes.extend_from_slice(&self.token_bytes(*token).unwrap_or_default());
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn token_bytes(&self, token: TokenId) -> Option<Cow<'_, [u8]>> {
        match token {
            EOS => Some(Cow::Borrowed(b"<eos>")),
            BOS => Some(Cow::Borrowed(b"<bos>")),
            _ => Some(Cow::Owned(vec![u8::try_from(token).ok()?])),
        }
    }

    fn token_piece(&self, token: TokenId) -> Option<Cow<'_, str>> {
        Some(String::from_utf8_lossy(&self.token_bytes(token)?).into_owned().into())
    }

    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    fn render_chat(&self, chat: &ChatPrompt<'_>) -> Result<String, ModelError> {
        let mut text = String::new();
        for message in chat.messages {
            let role = message["role"].as_str().unwrap_or_default();
            if !["system", "user", "assistant", "tool", "developer"].contains(&role) {
                return Err(ModelError::Template { what: format!("unknown role '{role}'") });
            }
            let content = message["content"].as_str().unwrap_or_default();
            text.push_str(&format!("{role}: {content}\n"));
        }
        for tool in chat.tools.into_iter().flatten() {
            text.push_str(&format!("tool: {tool}\n"));
        }
        if chat.add_generation_prompt {
            text.push_str("assistant: ");
        }
        if chat.continue_final_message {
            text.pop();
        }
        Ok(text)
    }
}

/// Limits of a [`MockEngine`].
#[derive(Debug, Clone)]
pub struct MockConfig {
    /// Longest prompt + output.
    pub max_model_len: usize,
    /// Most requests that run at once.
    pub max_running: usize,
    /// Most requests that wait.
    pub max_waiting: Option<usize>,
    /// Make no step until [`MockControl::permit`] is called.
    pub gated: bool,
}

impl Default for MockConfig {
    fn default() -> Self {
        Self { max_model_len: 4096, max_running: 64, max_waiting: None, gated: false }
    }
}

/// What a test sees of the engine, and how it holds it back.
#[derive(Debug, Default)]
pub struct MockControl {
    state: Mutex<MockState>,
    changed: Condvar,
}

/// What happened to a [`MockEngine`].
#[derive(Debug, Default)]
pub struct MockState {
    /// Steps that may be made; `None` is no limit.
    pub permits: Option<u64>,
    /// Requests accepted.
    pub added: Vec<Request>,
    /// Requests ended from outside while unfinished.
    pub aborted: Vec<RequestId>,
    /// Requests unfinished.
    pub unfinished: usize,
    /// Of those, requests in the batch.
    pub running: usize,
    /// Integrity checks made.
    pub integrity_checks: usize,
}

impl MockControl {
    fn lock(&self) -> MutexGuard<'_, MockState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut MockState)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Allows this many more steps.
    pub fn permit(&self, steps: u64) {
        self.change(|state| state.permits = state.permits.map(|permits| permits + steps));
    }

    /// Lifts the gate.
    pub fn open_gate(&self) {
        self.change(|state| state.permits = None);
    }

    /// Waits until `condition` holds and returns what `read` sees then. Panics after 20 s.
    pub fn wait<T>(
        &self,
        condition: impl Fn(&MockState) -> bool,
        read: impl FnOnce(&MockState) -> T,
    ) -> T {
        let limit = Duration::from_secs(20);
        let (state, timeout) = self
            .changed
            .wait_timeout_while(self.lock(), limit, |state| !condition(state))
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "the engine never got there: {state:?}");
        read(&state)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct MockEngine {
    config: MockConfig,
    control: Arc<MockControl>,
    waiting: VecDeque<Request>,
    running: Vec<MockRequest>,
    /// Prompts seen, for the prefix cache.
    seen: Vec<(Option<String>, Vec<TokenId>)>,
    stats: EngineStats,
}

#[derive(Debug)]
struct MockRequest {
    request: Request,
    cached: usize,
    /// The rest of `say:`.
    script: Option<Vec<TokenId>>,
    sequences: Vec<MockSequence>,
    prefilled: bool,
}

#[derive(Debug, Clone, Default)]
struct MockSequence {
    tokens: Vec<TokenId>,
    text: Vec<u8>,
    /// Bytes of `text` handed out.
    shown: usize,
    finished: bool,
}

impl MockEngine {
    /// An engine and the handle a test keeps.
    pub fn new(config: MockConfig) -> (Self, Arc<MockControl>) {
        let control = Arc::new(MockControl::default());
        control.change(|state| state.permits = config.gated.then_some(0));
        let stats = EngineStats { kv_budget_bytes: 64 << 20, ..EngineStats::default() };
        let engine = Self {
            config,
            control: control.clone(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            seen: Vec::new(),
            stats,
        };
        (engine, control)
    }

    /// Longest prefix of an earlier prompt, in whole blocks of four, short of the whole prompt.
    fn cached_tokens(&self, request: &Request) -> usize {
        let same = |(salt, prompt): &(Option<String>, Vec<TokenId>)| {
            if *salt != request.cache_salt {
                return 0;
            }
            prompt.iter().zip(&request.prompt).take_while(|(a, b)| a == b).count()
        };
        let longest = self.seen.iter().map(same).max().unwrap_or(0);
        longest.min(request.prompt.len().saturating_sub(1)) / 4 * 4
    }

    /// Takes a permit, or waits a moment for one.
    fn may_step(&self) -> bool {
        let mut state = self.control.lock();
        if state.permits == Some(0) {
            let wait = self.control.changed.wait_timeout(state, Duration::from_millis(1));
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        match &mut state.permits {
            None => true,
            Some(0) => false,
            Some(permits) => {
                *permits -= 1;
                true
            }
        }
    }

    /// Notes an event together with the counts after it: a test sees both or neither.
    fn report(&self, event: impl FnOnce(&mut MockState)) {
        let running = self.running.len();
        let unfinished = self.waiting.len() + running;
        self.control.change(|state| {
            event(state);
            state.unfinished = unfinished;
            state.running = running;
        });
    }

    fn schedule(&mut self, step: &mut StepOutput) -> Result<(), EngineError> {
        while self.running.len() < self.config.max_running {
            let Some(request) = self.waiting.pop_front() else { break };
            let cached = self.cached_tokens(&request);
            let bytes: Vec<u8> =
                request.prompt.iter().filter_map(|token| u8::try_from(*token).ok()).collect();
            let prompt = String::from_utf8_lossy(&bytes).into_owned();
            assert!(!prompt.contains("PANIC"), "asked to panic");
            if prompt.contains("FAIL") {
                return Err(EngineError::Integrity { what: "asked to fail".into() });
            }
            let script = prompt.split("say:").nth(1).map(|rest| {
                let line = rest.lines().next().unwrap_or_default();
                line.bytes().map(TokenId::from).chain([EOS]).collect()
            });
            self.stats.prompt_tokens += request.prompt.len() as u64;
            self.stats.cached_prompt_tokens += cached as u64;
            self.stats.prefix_queries += request.prompt.len() as u64;
            self.stats.prefix_hits += cached as u64;
            self.seen.push((request.cache_salt.clone(), request.prompt.clone()));
            step.scheduled.push(request.id.clone());
            step.num_prefill_tokens += request.prompt.len() - cached;
            let sequences = vec![MockSequence::default(); request.params.n];
            let prefilled = false;
            self.running.push(MockRequest { request, cached, script, sequences, prefilled });
        }
        Ok(())
    }
}

impl StepEngine for MockEngine {
    fn add_request(&mut self, request: Request) -> Result<(), EngineError> {
        let (prompt_tokens, max_model_len) = (request.prompt.len(), self.config.max_model_len);
        if prompt_tokens == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if prompt_tokens >= max_model_len {
            return Err(EngineError::PromptTooLong { prompt_tokens, max_model_len });
        }
        if let Some(limit) = self.config.max_waiting {
            let waiting = self.waiting.len();
            if waiting >= limit && self.running.len() >= self.config.max_running {
                return Err(EngineError::QueueFull { waiting, limit });
            }
        }
        self.waiting.push_back(request.clone());
        self.report(|state| state.added.push(request));
        Ok(())
    }

    fn abort(&mut self, id: &RequestId) -> bool {
        let before = self.waiting.len() + self.running.len();
        self.waiting.retain(|request| request.id != *id);
        self.running.retain(|running| running.request.id != *id);
        let found = self.waiting.len() + self.running.len() < before;
        self.report(|state| state.aborted.extend(found.then(|| id.clone())));
        found
    }

    fn step(&mut self) -> Result<StepOutput, EngineError> {
        let mut step = StepOutput::default();
        if !self.may_step() {
            return Ok(step);
        }
        self.schedule(&mut step)?;
        for running in &mut self.running {
            let outputs = running.step(self.config.max_model_len);
            step.num_decode_tokens += outputs.len();
            step.outputs.extend(outputs);
        }
        self.running.retain(|running| running.sequences.iter().any(|seq| !seq.finished));
        self.stats.generation_tokens += step.num_decode_tokens as u64;
        self.stats.steps += 1;
        self.report(|_| ());
        Ok(step)
    }

    fn has_unfinished(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    fn stats(&self) -> EngineStats {
        let tokens = |running: &MockRequest| {
            let generated: usize = running.sequences.iter().map(|seq| seq.tokens.len()).sum();
            (generated + running.request.prompt.len()) * BYTES_PER_TOKEN
        };
        let bytes: usize = self.running.iter().map(tokens).sum();
        EngineStats {
            num_running: self.running.iter().map(|running| running.sequences.len()).sum(),
            num_waiting: self.waiting.len(),
            kv_logical_bytes: bytes,
            kv_physical_bytes: bytes,
            ..self.stats.clone()
        }
    }

    fn reset_prefix_cache(&mut self) -> usize {
        std::mem::take(&mut self.seen).len() * BYTES_PER_TOKEN
    }

    fn check_integrity(&self) -> Result<(), EngineError> {
        self.control.change(|state| state.integrity_checks += 1);
        Ok(())
    }
}

impl MockRequest {
    fn step(&mut self, max_model_len: usize) -> Vec<SequenceOutput> {
        let first = !std::mem::replace(&mut self.prefilled, true);
        let mut outputs = Vec::new();
        for index in 0..self.sequences.len() {
            if self.sequences[index].finished {
                continue;
            }
            let token = self.next_token(index);
            let finish = self.push(index, token, max_model_len);
            let params = &self.request.params;
            let prompt_logprobs = params.prompt_logprobs.filter(|_| first && index == 0);
            let sequence = &mut self.sequences[index];
            let shown = match &finish {
                Some(_) => sequence.text.len(),
                None => certain(&sequence.text, &params.stop),
            };
            let text = String::from_utf8_lossy(&sequence.text[sequence.shown..shown]).into_owned();
            sequence.shown = shown;
            sequence.finished = finish.is_some();
            outputs.push(SequenceOutput {
                request_id: self.request.id.clone(),
                index,
                token_ids: vec![token],
                text,
                logprobs: params.logprobs.map(|top| logprobs(token, top)).into_iter().collect(),
                prompt_logprobs: prompt_logprobs.map(|top| {
                    let known = self.request.prompt.iter().map(|token| Some(logprobs(*token, top)));
                    [None].into_iter().chain(known.skip(1)).collect()
                }),
                num_prompt_tokens: self.request.prompt.len(),
                num_cached_tokens: self.cached,
                num_output_tokens: sequence.tokens.len(),
                features: None,
                finish,
            });
        }
        outputs
    }

    fn next_token(&self, index: usize) -> TokenId {
        let position = self.sequences[index].tokens.len();
        if let Some(script) = &self.script {
            return script.get(position).copied().unwrap_or(EOS);
        }
        // FNV-1a over what the token may depend on.
        let params = &self.request.params;
        let seed = if params.temperature == 0.0 { 0 } else { params.seed.unwrap_or(1) };
        let own = if params.temperature == 0.0 { 0 } else { index as u64 };
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let prompt = self.request.prompt.iter().map(|token| u64::from(*token));
        for word in prompt.chain([seed, own, position as u64]) {
            hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
        }
        TokenId::from(b'a') + ((hash >> 32) % 26) as TokenId
    }

    fn push(&mut self, index: usize, token: TokenId, max_model_len: usize) -> Option<Finish> {
        let prompt = self.request.prompt.len();
        let params = &self.request.params;
        let sequence = &mut self.sequences[index];
        sequence.tokens.push(token);
        if let Ok(byte) = u8::try_from(token) {
            sequence.text.push(byte);
        }
        let finish = |reason, stop| {
            Some(Finish {
                reason,
                stop,
                recipe: self.request.kv_cache.unwrap_or_default(),
                risk: None,
                kv_logical_bytes: (prompt + sequence.tokens.len()) * BYTES_PER_TOKEN,
                kv_physical_bytes: (prompt + sequence.tokens.len()) * BYTES_PER_TOKEN,
                num_preemptions: 0,
            })
        };
        if sequence.tokens.len() >= params.min_tokens {
            if params.stop_token_ids.contains(&token) {
                return finish(FinishReason::Stop, Some(StopReason::Token(token)));
            }
            if token == EOS && !params.ignore_eos {
                return finish(FinishReason::Stop, None);
            }
            for stop in &params.stop {
                let found =
                    sequence.text.windows(stop.len()).position(|part| part == stop.as_bytes());
                if let Some(at) = found {
                    let kept = if params.include_stop_str_in_output { stop.len() } else { 0 };
                    sequence.text.truncate(at + kept);
                    let stop = StopReason::String(stop.clone());
                    return finish(FinishReason::Stop, Some(stop));
                }
            }
        }
        let full = params.max_tokens.is_some_and(|most| sequence.tokens.len() >= most)
            || prompt + sequence.tokens.len() >= max_model_len;
        if full { finish(FinishReason::Length, None) } else { None }
    }
}

/// Bytes that can no longer become part of a stop string.
fn certain(text: &[u8], stop: &[String]) -> usize {
    let longest = stop.iter().map(String::len).max().unwrap_or(0).min(text.len());
    let held = (1..=longest).rev().find(|held| {
        let tail = &text[text.len() - held..];
        stop.iter().any(|stop| stop.as_bytes().starts_with(tail))
    });
    text.len() - held.unwrap_or(0)
}

fn logprobs(token: TokenId, top: usize) -> TokenLogprobs {
    let top = (0..top)
        .map(|rank| ((token + rank as TokenId) % VOCAB_SIZE as TokenId, -0.5 - rank as f32));
    TokenLogprobs { token_id: token, logprob: -0.5, rank: 1, top: top.collect() }
}
