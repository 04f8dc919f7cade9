//! What a request may ask of the sampler. Names and meanings are vLLM's.

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
