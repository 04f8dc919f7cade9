//! What a request must be to be queued, and how long it may get.

use std::sync::Arc;

use kvasir_cache::Recipe;

use super::Engine;
use crate::error::{EngineError, Result};
use crate::random;
use crate::request::{Request, TokenId};
use crate::sequence::{SeqKey, Sequence};
use crate::text::TextStream;

impl Engine {
    /// Puts a request in the waiting queue.
    ///
    /// # Errors
    /// The client's: an empty or too long prompt, a token outside the vocabulary, a parameter out of
    /// range, a recipe of its own that cannot be used, an id in use; or [`EngineError::QueueFull`].
    /// No request is held then.
    pub fn add_request(&mut self, request: Request) -> Result<()> {
        let Request { id, prompt, params, cache_salt, kv_cache } = request;
        let vocab_size = self.model.spec().vocab_size;
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if prompt.len() >= self.max_model_len {
            return Err(EngineError::PromptTooLong {
                prompt_tokens: prompt.len(),
                max_model_len: self.max_model_len,
            });
        }
        if let Some(token_id) = prompt.iter().copied().find(|t| *t as usize >= vocab_size) {
            return Err(EngineError::UnknownToken { token_id, vocab_size });
        }
        params.validate(vocab_size)?;
        if self.requests.contains_key(&id) {
            return Err(EngineError::DuplicateRequest { id: id.to_string() });
        }
        self.check_queue()?;
        let asked = kv_cache.unwrap_or(self.config.kv_cache);
        let (recipe, watched) = self.stored_at_first(asked);
        let max_len = self.max_len(recipe, prompt.len(), params.max_tokens)?;
        let seed = params.seed.unwrap_or_else(|| {
            self.num_unseeded += 1;
            random::derive(self.config.seed, self.num_unseeded)
        });
        let cache_salt: Option<Arc<str>> = cache_salt.map(Into::into);
        let eos_ids = self.model.tokenizer().eos_ids();
        let end_tokens = end_tokens(eos_ids, &params.stop_token_ids, params.ignore_eos);
        let keys = (0..params.n).map(|index| {
            let key = SeqKey(self.next_key);
            self.next_key += 1;
            let sequence = Sequence {
                request_id: id.clone(),
                index,
                params: Arc::clone(&params),
                cache_salt: cache_salt.clone(),
                recipe,
                tokens: prompt.clone(),
                prompt_len: prompt.len(),
                max_len,
                seed,
                end_tokens: Arc::clone(&end_tokens),
                watched,
                risk: None,
                text: TextStream::new(Arc::clone(&params)),
                cache: None,
                num_computed: 0,
                num_cached: None,
                num_preemptions: 0,
                prompt_logprobs: Vec::new(),
            };
            self.scheduler.add(key, sequence);
            key
        });
        let keys = keys.collect();
        self.requests.insert(id, keys);
        Ok(())
    }

    /// Most tokens of a sequence. By a recipe other than the engine's own fewer may fit the budget: a
    /// limit that was asked for must fit then, one that was not is cut to what does.
    fn max_len(
        &mut self,
        recipe: Recipe,
        prompt: usize,
        max_tokens: Option<usize>,
    ) -> Result<usize> {
        let asked = max_tokens.map_or(usize::MAX, |max| prompt.saturating_add(max));
        let max_len = asked.min(self.max_model_len);
        if recipe == self.stored {
            return Ok(max_len);
        }
        if recipe.needs_statistics() && !self.has_statistics {
            return Err(EngineError::NoStatistics { recipe });
        }
        self.cache.prepare(recipe).map_err(|source| EngineError::Recipe { recipe, source })?;
        let budget_bytes = self.config.kv_cache_memory;
        let bytes = |tokens| self.cache.bytes_alone(recipe, tokens);
        let least = if max_tokens.is_some() { max_len } else { prompt + 1 };
        if bytes(least) > budget_bytes {
            let needed_bytes = bytes(least);
            return Err(EngineError::RecipeTooLarge {
                recipe,
                tokens: least,
                needed_bytes,
                budget_bytes,
            });
        }
        Ok(longest_fitting(max_len, |tokens| bytes(tokens) <= budget_bytes))
    }

    /// Refuses a request when too many wait. On an idle engine requests pass through the queue on their
    /// way to the first batch, so a batch more may come.
    fn check_queue(&self) -> Result<()> {
        let Some(limit) = self.config.max_num_queued_reqs else { return Ok(()) };
        let waiting = self.scheduler.num_unscheduled_requests();
        let idle = self.scheduler.num_running() == 0;
        let most = limit + if idle { self.config.max_num_seqs } else { 0 };
        if waiting < most { Ok(()) } else { Err(EngineError::QueueFull { waiting, limit }) }
    }
}

/// Tokens that end a sequence.
fn end_tokens(eos_ids: &[TokenId], stop_token_ids: &[TokenId], ignore_eos: bool) -> Arc<[TokenId]> {
    let eos = if ignore_eos { &[] } else { eos_ids };
    eos.iter().chain(stop_token_ids).copied().collect()
}

/// The largest number up to `limit` that fits; `fits` is monotonic and true for 1.
pub(super) fn longest_fitting(limit: usize, fits: impl Fn(usize) -> bool) -> usize {
    if fits(limit) {
        return limit;
    }
    let (mut low, mut high) = (1, limit);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}
