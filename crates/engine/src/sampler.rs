//! From logits to a token. The order is vLLM's: bias and penalties, temperature, min-p, top-k, top-p,
//! draw. Log probabilities are of the raw logits.

use rustc_hash::FxHashMap;

use crate::random::uniform;
use crate::request::{TokenId, TokenLogprobs};
use crate::sampling_params::SamplingParams;

/// What the sampler knows of a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    /// Prompt and output so far.
    pub(crate) tokens: &'a [TokenId],
    /// How many of them are prompt.
    pub(crate) prompt_len: usize,
    /// Tokens that end the sequence.
    pub(crate) end_tokens: &'a [TokenId],
    /// The sequence's seed.
    pub(crate) seed: u64,
    /// Which of the request's sequences.
    pub(crate) index: usize,
}

/// Buffers of one engine, reused from token to token.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    candidates: Vec<(f32, TokenId)>,
    counts: FxHashMap<TokenId, u32>,
}

/// Lower temperatures than this, but for 0, count as this: weights would lose all their digits.
const MIN_TEMPERATURE: f32 = 0.01;
/// Candidates looked at before sorting a whole vocabulary.
const FIRST_LOOK: usize = 512;

impl Sampler {
    /// Chooses a token. `logits`: `[vocab]`, changed in place. O(vocab), but for penalties O(tokens).
    pub(crate) fn sample(
        &mut self,
        logits: &mut [f32],
        params: &SamplingParams,
        context: Context<'_>,
    ) -> TokenId {
        self.adjust(logits, params, context);
        if params.temperature == 0.0 {
            return argmax(logits);
        }
        let position = context.tokens.len() - context.prompt_len;
        let draw = uniform(context.seed, context.index, position);
        self.draw(logits, params, draw)
    }

    fn adjust(&mut self, logits: &mut [f32], params: &SamplingParams, context: Context<'_>) {
        for (token, bias) in &params.logit_bias {
            logits[*token as usize] += bias;
        }
        let output = &context.tokens[context.prompt_len..];
        if output.len() < params.min_tokens {
            for token in context.end_tokens {
                logits[*token as usize] = f32::NEG_INFINITY;
            }
        }
        if params.repetition_penalty != 1.0 {
            self.count(context.tokens);
            for token in self.counts.keys() {
                let logit = &mut logits[*token as usize];
                *logit = if *logit > 0.0 {
                    *logit / params.repetition_penalty
                } else {
                    *logit * params.repetition_penalty
                };
            }
        }
        if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
            self.count(output);
            for (token, count) in &self.counts {
                logits[*token as usize] -=
                    params.presence_penalty + params.frequency_penalty * *count as f32;
            }
        }
    }

    fn count(&mut self, tokens: &[TokenId]) {
        self.counts.clear();
        for token in tokens {
            *self.counts.entry(*token).or_insert(0) += 1;
        }
    }

    /// Draws by `draw` in [0, 1) from the truncated distribution.
    fn draw(&mut self, logits: &[f32], params: &SamplingParams, draw: f64) -> TokenId {
        let max = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        if !max.is_finite() {
            return argmax(logits);
        }
        let temperature = params.temperature.max(MIN_TEMPERATURE);
        let weight = |logit: f32| ((logit - max) / temperature).exp();
        let candidates = &mut self.candidates;
        candidates.clear();
        // min_p is relative to the most likely token, whose weight is 1.
        candidates.extend(
            logits
                .iter()
                .enumerate()
                .map(|(token, logit)| (weight(*logit), token as TokenId))
                .filter(|(w, _)| *w > 0.0 && *w >= params.min_p),
        );
        // By weight, ties by token id: the order must not depend on the sort.
        let by_weight =
            |a: &(f32, TokenId), b: &(f32, TokenId)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let top_k = match params.top_k {
            0 => candidates.len(),
            k => candidates.len().min(k as usize),
        };
        if top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_weight);
            candidates.truncate(top_k);
        }
        let total: f64 = candidates.iter().map(|(w, _)| f64::from(*w)).sum();
        let kept = if params.top_p < 1.0 {
            // A nucleus is usually small: look at the best few before sorting all.
            if candidates.len() > FIRST_LOOK {
                candidates.select_nth_unstable_by(FIRST_LOOK - 1, by_weight);
                candidates[..FIRST_LOOK].sort_unstable_by(by_weight);
                let sum: f64 = candidates[..FIRST_LOOK].iter().map(|(w, _)| f64::from(*w)).sum();
                if sum < f64::from(params.top_p) * total {
                    candidates.sort_unstable_by(by_weight);
                }
            } else {
                candidates.sort_unstable_by(by_weight);
            }
            let mut sum = 0.0;
            let limit = f64::from(params.top_p) * total;
            let reached = candidates.iter().position(|(w, _)| {
                sum += f64::from(*w);
                sum >= limit
            });
            candidates.truncate(reached.map_or(candidates.len(), |i| i + 1));
            sum
        } else {
            // Token order: selection above may have shuffled.
            if top_k < logits.len() {
                candidates.sort_unstable_by_key(|(_, token)| *token);
            }
            total
        };
        let mut left = draw * kept;
        for (w, token) in candidates.iter() {
            left -= f64::from(*w);
            if left < 0.0 {
                return *token;
            }
        }
        candidates.last().map_or_else(|| argmax(logits), |(_, token)| *token)
    }
}

/// The most likely token; of equals the first.
fn argmax(logits: &[f32]) -> TokenId {
    kvasir_model::argmax(logits) as TokenId
}

/// Log probability of `token` and of the `top` most likely tokens. O(vocab).
pub(crate) fn logprobs(logits: &[f32], token: TokenId, top: usize) -> TokenLogprobs {
    let lse = kvasir_model::log_sum_exp(logits);
    let logprob = |logit: f32| (f64::from(logit) - lse) as f32;
    let chosen = logits[token as usize];
    let rank = logits.iter().filter(|l| **l >= chosen).count();
    // Insertion into a short sorted list: `top` is at most a few dozen.
    let mut best: Vec<(TokenId, f32)> = Vec::with_capacity(top + 1);
    for (id, logit) in logits.iter().enumerate() {
        if top > 0 && (best.len() < top || best.last().is_some_and(|(_, l)| logit > l)) {
            let at = best.partition_point(|(_, l)| l >= logit);
            best.insert(at, (id as TokenId, *logit));
            best.truncate(top);
        }
    }
    let top = best.into_iter().map(|(id, l)| (id, logprob(l))).collect();
    TokenLogprobs { token_id: token, logprob: logprob(chosen), rank, top }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(tokens: &[TokenId], prompt_len: usize) -> Context<'_> {
        Context { tokens, prompt_len, end_tokens: &[9], seed: 1, index: 0 }
    }

    fn frequencies(params: &SamplingParams, logits: &[f32], n: usize) -> Vec<f64> {
        let mut sampler = Sampler::default();
        let mut counts = vec![0.0; logits.len()];
        for i in 0..n {
            let draw = uniform(42, 0, i);
            counts[sampler.draw(logits, params, draw) as usize] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let mut logits = [1.0, 3.0, 3.0, 2.0];
        let params = SamplingParams::greedy(1);
        assert_eq!(Sampler::default().sample(&mut logits, &params, context(&[0], 1)), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.2].iter().map(|p| p.ln()).collect();
        let got = frequencies(&SamplingParams::default(), &logits, 20_000);
        for (got, p) in got.iter().zip([0.5, 0.3, 0.2]) {
            assert!((got - p).abs() < 0.015, "{got} {p}");
        }
        let cold = SamplingParams { temperature: 0.5, ..SamplingParams::default() };
        let got = frequencies(&cold, &logits, 20_000);
        let squares = [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38];
        for (got, p) in got.iter().zip(squares) {
            assert!((got - p).abs() < 0.015, "{got} {p}");
        }
    }

    #[test]
    fn truncations_drop_what_they_say() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let kept = |params: SamplingParams| -> Vec<usize> {
            let got = frequencies(&params, &logits, 4000);
            (0..4).filter(|i| got[*i] > 0.0).collect()
        };
        let base = SamplingParams::default;
        assert_eq!(kept(SamplingParams { top_k: 2, ..base() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_p: 0.69, ..base() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_p: 0.71, ..base() }), [0, 1, 2]);
        assert_eq!(kept(SamplingParams { min_p: 0.49, ..base() }), [0, 1, 2]);
        assert_eq!(kept(SamplingParams { top_k: 3, top_p: 0.5, ..base() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_k: 1, ..base() }), [0]);
    }

    #[test]
    fn a_wide_nucleus_beyond_the_first_look_is_complete() {
        let logits = vec![0.0f32; 3000];
        let params = SamplingParams { top_p: 0.9, ..SamplingParams::default() };
        let mut sampler = Sampler::default();
        assert_eq!(sampler.draw(&logits, &params, 0.999_999), 2699);
        assert_eq!(sampler.draw(&logits, &params, 0.0), 0);
    }

    #[test]
    fn penalties_bias_and_minimum() {
        let mut sampler = Sampler::default();
        let tokens = [0, 1, 2, 2];
        let run = |sampler: &mut Sampler, params: SamplingParams| {
            let mut logits = [4.0f32, -4.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0];
            sampler.adjust(&mut logits, &params, context(&tokens, 2));
            logits
        };
        let base = SamplingParams::default;
        let got = run(&mut sampler, SamplingParams { repetition_penalty: 2.0, ..base() });
        assert_eq!(got[..4], [2.0, -8.0, 2.0, 0.0]);
        let penalties = SamplingParams { presence_penalty: 1.0, frequency_penalty: 0.5, ..base() };
        assert_eq!(run(&mut sampler, penalties)[..4], [4.0, -4.0, 2.0, 0.0]);
        let got = run(&mut sampler, SamplingParams { min_tokens: 3, ..base() });
        assert_eq!(got[9], f32::NEG_INFINITY);
        let got = run(&mut sampler, SamplingParams { min_tokens: 2, ..base() });
        assert_eq!(got[9], 9.0);
        let got = run(&mut sampler, SamplingParams { logit_bias: vec![(3, -5.0)], ..base() });
        assert_eq!(got[3], -5.0);
    }

    #[test]
    fn logprobs_are_of_the_raw_distribution() {
        let logits: Vec<f32> = [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln() + 5.0).collect();
        let got = logprobs(&logits, 2, 2);
        assert!((got.logprob - 0.2f32.ln()).abs() < 1e-5);
        assert_eq!(got.rank, 3);
        assert_eq!(got.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3]);
        assert!((got.top[0].1 - 0.4f32.ln()).abs() < 1e-5);
    }
}
