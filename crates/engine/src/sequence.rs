//! One sampled stream of a request, as the engine holds it.

use std::sync::Arc;

use kvasir_cache::{Recipe, SequenceId};
use kvasir_model::Tokenizer;

use crate::guard::Watched;
use crate::request::{FinishReason, RequestId, StopReason, TokenId, TokenLogprobs};
use crate::sampling_params::SamplingParams;
use crate::text::TextStream;

/// Names a sequence inside the engine; in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SeqKey(pub(crate) u64);

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) request_id: RequestId,
    pub(crate) index: usize,
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) cache_salt: Option<Arc<str>>,
    /// How its keys and values are stored.
    pub(crate) recipe: Recipe,
    /// Prompt and output.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) prompt_len: usize,
    /// Most tokens of prompt and output.
    pub(crate) max_len: usize,
    pub(crate) seed: u64,
    /// Tokens that end the sequence.
    pub(crate) end_tokens: Arc<[TokenId]>,
    pub(crate) text: TextStream,
    /// Whether and why its prompt is looked at when it is computed.
    pub(crate) watched: Option<Watched>,
    /// What a guard thinks its recipe risks.
    pub(crate) risk: Option<f64>,
    /// Set while running.
    pub(crate) cache: Option<SequenceId>,
    /// Tokens whose keys and values are in the cache.
    pub(crate) num_computed: usize,
    /// Prompt tokens found in the prefix cache when first scheduled.
    pub(crate) num_cached: Option<usize>,
    pub(crate) num_preemptions: usize,
    /// Filled while the prompt is computed, handed out with the first token.
    pub(crate) prompt_logprobs: Vec<Option<TokenLogprobs>>,
}

impl Sequence {
    pub(crate) fn num_output(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Tokens still to compute before the next one can be sampled; 1 in decode.
    pub(crate) fn num_remaining(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// Whether the prompt's own log probabilities are still to be computed: then its tokens must go
    /// through the model, whatever the prefix cache holds.
    pub(crate) fn wants_prompt_logprobs(&self) -> bool {
        self.params.prompt_logprobs.is_some() && self.index == 0 && self.num_output() == 0
    }

    /// Adds a sampled token. Returns the text that became certain, and why the sequence ended, if so.
    pub(crate) fn append(
        &mut self,
        token: TokenId,
        tokenizer: &Tokenizer,
    ) -> (String, Option<(FinishReason, Option<StopReason>)>) {
        self.tokens.push(token);
        // `min_tokens` tokens must stand before anything may end the sequence.
        let may_stop = self.num_output() > self.params.min_tokens;
        if may_stop && self.end_tokens.contains(&token) {
            let mut text = String::new();
            if self.params.include_stop_str_in_output {
                text = self.text.push(tokenizer, token, false).text;
            }
            text.push_str(&self.text.flush());
            let is_eos = !self.params.ignore_eos && tokenizer.eos_ids().contains(&token);
            let stop = (!is_eos).then_some(StopReason::Token(token));
            return (text, Some((FinishReason::Stop, stop)));
        }
        let shown = self.text.push(tokenizer, token, may_stop);
        let mut text = shown.text;
        if let Some(stop) = shown.stopped_by {
            return (text, Some((FinishReason::Stop, Some(StopReason::String(stop)))));
        }
        if self.tokens.len() >= self.max_len {
            text.push_str(&self.text.flush());
            return (text, Some((FinishReason::Length, None)));
        }
        (text, None)
    }
}
