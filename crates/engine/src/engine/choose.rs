//! What a row of logits leads to: the next token, or how likely the prompt's was.

use std::sync::{Mutex, PoisonError};

use crate::guard::FirstToken;
use crate::request::{TokenId, TokenLogprobs};
use crate::sampler::{Context, Sampler, logprobs};
use crate::sequence::{SeqKey, Sequence};

/// A row of the step's batch whose logits are wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogitRow {
    pub(super) key: SeqKey,
    pub(super) row: usize,
    /// The prompt position this row predicts, or the next token if `None`.
    pub(super) prompt_position: Option<usize>,
}

/// What a row of logits led to.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    pub(super) token: TokenId,
    pub(super) logprobs: Option<TokenLogprobs>,
    /// Of a prompt that is watched.
    pub(super) first: Option<FirstToken>,
}

impl LogitRow {
    /// `logits`: `[vocab]`, changed in place.
    pub(super) fn choose(
        &self,
        sequence: &Sequence,
        logits: &mut [f32],
        sampler: &Mutex<Sampler>,
    ) -> Chosen {
        let params = &sequence.params;
        if let Some(position) = self.prompt_position {
            let (token, top) = (sequence.tokens[position], params.prompt_logprobs.unwrap_or(0));
            let logprobs = Some(logprobs(logits, token, top));
            return Chosen { token, logprobs, first: None };
        }
        let first = sequence.watched.map(|_| FirstToken::new(logits));
        // Log probabilities are of the raw logits; the sampler changes them.
        let raw = params.logprobs.map(|top| (top, logits.to_vec()));
        let context = Context {
            tokens: &sequence.tokens,
            prompt_len: sequence.prompt_len,
            end_tokens: &sequence.end_tokens,
            seed: sequence.seed,
            index: sequence.index,
        };
        // Only scratch: what a panic left in it is written before it is read.
        let mut sampler = sampler.lock().unwrap_or_else(PoisonError::into_inner);
        let token = sampler.sample(logits, params, context);
        Chosen { token, logprobs: raw.map(|(top, raw)| logprobs(&raw, token, top)), first }
    }
}
