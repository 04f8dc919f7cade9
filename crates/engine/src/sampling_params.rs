//! What a request may ask of the sampler. Names and meanings are vLLM's.

use crate::error::{EngineError, Result};

/// How tokens are chosen and when a sequence ends.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of every token already generated.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from the logit of every token already generated.
    pub frequency_penalty: f32,
    /// Divides (positive) or multiplies (negative) the logit of every token of prompt and output.
    pub repetition_penalty: f32,
    /// Seed of this request's own random stream; `None` draws one from the engine's seed.
    pub seed: Option<u64>,
    /// Added to logits, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Most tokens to generate; `None` is up to the model's length.
    pub max_tokens: Option<usize>,
    /// End-of-sequence, stop tokens and stop strings do not count before this many tokens.
    pub min_tokens: usize,
    /// Texts that end the sequence.
    pub stop: Vec<String>,
    /// Tokens that end the sequence.
    pub stop_token_ids: Vec<u32>,
    /// Keep the stop string in the text.
    pub include_stop_str_in_output: bool,
    /// Go on after the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Number of sequences to sample from the prompt.
    pub n: usize,
    /// Report the chosen token's log probability and this many alternatives.
    pub logprobs: Option<usize>,
    /// The same for every prompt token but the first.
    pub prompt_logprobs: Option<usize>,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: None,
            logit_bias: Vec::new(),
            max_tokens: None,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            n: 1,
            logprobs: None,
            prompt_logprobs: None,
            skip_special_tokens: true,
        }
    }
}

/// Most alternatives a request may ask for per token.
pub const MAX_LOGPROBS: usize = 64;
/// Most sequences a request may ask for.
pub const MAX_N: usize = 128;
/// Most stop strings, and most bytes in one: every one is searched after every token.
pub const MAX_STOP_STRINGS: usize = 64;
/// Most bytes in a stop string.
pub const MAX_STOP_BYTES: usize = 1024;
/// Most stop tokens.
pub const MAX_STOP_TOKENS: usize = 1024;

impl SamplingParams {
    /// Greedy decoding of at most `max_tokens` tokens.
    pub fn greedy(max_tokens: usize) -> Self {
        Self { temperature: 0.0, max_tokens: Some(max_tokens), ..Self::default() }
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`EngineError::BadParam`] naming the first parameter out of range.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
        ];
        for (param, value, low, high) in ranges {
            // Written so that NaN fails.
            if !(low..=high).contains(&value) {
                return Err(bad(param, format!("between {low} and {high}"), value));
            }
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(bad("top_p", "above 0 and at most 1".to_owned(), self.top_p));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(bad("repetition_penalty", "above 0".to_owned(), self.repetition_penalty));
        }
        if self.max_tokens == Some(0) {
            return Err(bad("max_tokens", "at least 1".to_owned(), 0));
        }
        if let Some(max) = self.max_tokens.filter(|max| self.min_tokens > *max) {
            return Err(bad("min_tokens", format!("at most max_tokens ({max})"), self.min_tokens));
        }
        if self.n == 0 || self.n > MAX_N {
            return Err(bad("n", format!("between 1 and {MAX_N}"), self.n));
        }
        if self.n > 1 && self.temperature == 0.0 {
            return Err(bad("n", "1 when temperature is 0".to_owned(), self.n));
        }
        for (param, value) in
            [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)]
        {
            if let Some(value) = value.filter(|v| *v > MAX_LOGPROBS) {
                return Err(bad(param, format!("at most {MAX_LOGPROBS}"), value));
            }
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(bad("stop", "strings that are not empty".to_owned(), "\"\""));
        }
        if self.stop.len() > MAX_STOP_STRINGS {
            return Err(bad(
                "stop",
                format!("at most {MAX_STOP_STRINGS} strings"),
                self.stop.len(),
            ));
        }
        if let Some(long) = self.stop.iter().map(String::len).find(|len| *len > MAX_STOP_BYTES) {
            return Err(bad("stop", format!("strings of at most {MAX_STOP_BYTES} bytes"), long));
        }
        if self.stop_token_ids.len() > MAX_STOP_TOKENS {
            let expected = format!("at most {MAX_STOP_TOKENS} tokens");
            return Err(bad("stop_token_ids", expected, self.stop_token_ids.len()));
        }
        let biased = self.logit_bias.iter().map(|(token, _)| ("logit_bias", *token));
        let stops = self.stop_token_ids.iter().map(|token| ("stop_token_ids", *token));
        for (param, token) in biased.chain(stops) {
            if token as usize >= vocab_size {
                return Err(bad(param, format!("token ids below {vocab_size}"), token));
            }
        }
        if let Some((_, bias)) = self.logit_bias.iter().find(|(_, b)| !(-100.0..=100.0).contains(b))
        {
            return Err(bad("logit_bias", "between -100 and 100".to_owned(), bias));
        }
        Ok(())
    }
}

fn bad(param: &'static str, expected: String, found: impl std::fmt::Display) -> EngineError {
    EngineError::BadParam { param, expected, found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_is_checked_and_named() {
        type Change = fn(&mut SamplingParams);
        let wrong: [(&str, Change); 17] = [
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::NAN),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = 1.1),
            ("min_p", |p| p.min_p = 2.0),
            ("presence_penalty", |p| p.presence_penalty = 3.0),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("max_tokens", |p| p.max_tokens = Some(0)),
            ("min_tokens", |p| (p.min_tokens, p.max_tokens) = (3, Some(2))),
            ("n", |p| p.n = 0),
            ("n", |p| (p.n, p.temperature) = (2, 0.0)),
            ("logprobs", |p| p.logprobs = Some(65)),
            ("stop", |p| p.stop = vec![String::new()]),
            ("stop", |p| p.stop = vec!["x".repeat(1025)]),
            ("stop", |p| p.stop = vec!["x".to_owned(); 65]),
            ("stop_token_ids", |p| p.stop_token_ids = vec![1; 1025]),
            ("logit_bias", |p| p.logit_bias = vec![(10, 0.0)]),
        ];
        assert!(SamplingParams::default().validate(10).is_ok());
        for (name, change) in wrong {
            let mut params = SamplingParams::default();
            change(&mut params);
            match params.validate(10) {
                Err(EngineError::BadParam { param, .. }) => assert_eq!(param, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}
