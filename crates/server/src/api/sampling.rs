//! What chat and text completions have in common: sampling, streaming, tenancy.

use kvasir_engine::{Recipe, SamplingParams};

use super::fields::{Body, Field, Kind, field};
use crate::ApiError;
use crate::error::shorten;

/// Most alternatives per token.
pub(crate) const MAX_LOGPROBS: i64 = 20;
/// Most sequences per prompt.
const MAX_N: i64 = 128;
const MAX_TOKENS: i64 = u32::MAX as i64;
const FLOAT_MAX: f64 = f32::MAX as f64;

const STREAM_OPTIONS: &[Field] = &[
    field("include_usage", Kind::Bool, "Send a last chunk with the usage and no choices."),
    field("continuous_usage_stats", Kind::Bool, "Send the usage so far with every chunk."),
];

/// Fields of both request types.
pub(crate) const COMMON: &[Field] = &[
    field("model", Kind::Text, "Name of the model; the served one if absent."),
    field("temperature", Kind::Float { min: 0.0, max: FLOAT_MAX }, "0 is greedy. Default 1."),
    field("top_p", Kind::FloatAbove { min: 0.0, max: 1.0 }, "Nucleus sampling. Default 1."),
    field(
        "top_k",
        Kind::Int { min: -1, max: MAX_TOKENS },
        "Most likely tokens kept; 0 or -1: all.",
    ),
    field(
        "min_p",
        Kind::Float { min: 0.0, max: 1.0 },
        "Least share of the best token's probability.",
    ),
    field("presence_penalty", Kind::Float { min: -2.0, max: 2.0 }, "Against tokens already there."),
    field("frequency_penalty", Kind::Float { min: -2.0, max: 2.0 }, "The same, per occurrence."),
    field(
        "repetition_penalty",
        Kind::FloatAbove { min: 0.0, max: FLOAT_MAX },
        "Divides the logits of tokens in prompt and output. Default 1.",
    ),
    field("seed", Kind::Int { min: i64::MIN, max: i64::MAX }, "Seed of this request."),
    field(
        "logit_bias",
        Kind::TokenMap { min: -100.0, max: 100.0 },
        "Added to logits, by token id.",
    ),
    field("n", Kind::Int { min: 1, max: MAX_N }, "Sequences per prompt. Default 1."),
    field("min_tokens", Kind::Int { min: 0, max: MAX_TOKENS }, "No end before this many tokens."),
    field("stop", Kind::TextOrTexts { most: 64 }, "Texts that end the output."),
    field("stop_token_ids", Kind::Tokens, "Tokens that end the output."),
    field("include_stop_str_in_output", Kind::Bool, "Keep the stop text. Default false."),
    field("ignore_eos", Kind::Bool, "Go on after the model's end token. Default false."),
    field("skip_special_tokens", Kind::Bool, "Leave special tokens out. Default true."),
    field(
        "prompt_logprobs",
        Kind::Int { min: 0, max: MAX_LOGPROBS },
        "Report the prompt's log probabilities and this many alternatives. Not when streaming.",
    ),
    field("stream", Kind::Bool, "Answer with server-sent events."),
    field("stream_options", Kind::Object(STREAM_OPTIONS), "Only with stream."),
    field("return_token_ids", Kind::Bool, "Add token_ids and prompt_token_ids."),
    field(
        "return_tokens_as_token_ids",
        Kind::Bool,
        "Show tokens in logprobs as 'token_id:N', which no two tokens share.",
    ),
    field("cache_salt", Kind::Text, "Share cached prefixes only with requests of the same salt."),
    field(
        "kv_cache",
        Kind::Text,
        "How this request's keys and values are stored, as in --kv-cache: f16, int8, joint3, \
         joint:2.5, … The server's own way if absent.",
    ),
    field("add_special_tokens", Kind::Bool, "Add BOS to the text. Default: completions only."),
    field("user", Kind::Any, "Ignored."),
    field("structured_outputs", Kind::Unsupported, "Not supported."),
    field("guided_json", Kind::Unsupported, "Not supported."),
    field("guided_regex", Kind::Unsupported, "Not supported."),
    field("guided_choice", Kind::Unsupported, "Not supported."),
    field("guided_grammar", Kind::Unsupported, "Not supported."),
    field("bad_words", Kind::Unsupported, "Not supported."),
    field("allowed_token_ids", Kind::Unsupported, "Not supported."),
    field("truncate_prompt_tokens", Kind::Unsupported, "Not supported."),
    field("use_beam_search", Kind::Unsupported, "Not supported."),
    field("response_format", Kind::AnyObject, "Only {\"type\": \"text\"}."),
];

/// The common part of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Common {
    pub(crate) model: Option<String>,
    /// `max_tokens` and `logprobs` are still to be set by the caller: the two APIs name and
    /// default them differently.
    pub(crate) params: SamplingParams,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) tokens_as_ids: bool,
    pub(crate) cache_salt: Option<String>,
    pub(crate) kv_cache: Option<Recipe>,
    pub(crate) add_special_tokens: Option<bool>,
    /// The engine may be asked for the prompt's log probabilities for another reason (echo).
    pub(crate) show_prompt_logprobs: bool,
}

impl Common {
    pub(crate) fn read(body: &Body<'_>) -> Result<Self, ApiError> {
        let defaults = SamplingParams::default();
        let stream = body.bool("stream").unwrap_or(false);
        let options = body.object("stream_options");
        if options.is_some() && !stream {
            return Err(ApiError::bad_field("stream_options", "is only allowed with stream: true"));
        }
        let option = |name| options.and_then(|o| o.get(name)?.as_bool()).unwrap_or(false);
        if let Some(format) = body.object("response_format")
            && format.get("type").and_then(|kind| kind.as_str()) != Some("text")
        {
            let what = "is not supported by this server, except {\"type\": \"text\"}";
            return Err(ApiError::bad_field("response_format", what));
        }
        let prompt_logprobs = body.usize("prompt_logprobs");
        if prompt_logprobs.is_some() && stream {
            return Err(ApiError::bad_field("prompt_logprobs", "is not available with stream"));
        }
        let stop = body.texts("stop").unwrap_or_default();
        if stop.iter().any(String::is_empty) {
            return Err(ApiError::bad_field("stop", "must not hold an empty string"));
        }
        let cache_salt = body.text("cache_salt").map(str::to_owned);
        if cache_salt.as_deref() == Some("") {
            return Err(ApiError::bad_field("cache_salt", "must not be empty"));
        }
        let recipe = |name: &str| shorten(name).parse::<Recipe>();
        let kv_cache = body.text("kv_cache").map(recipe).transpose();
        let kv_cache = kv_cache.map_err(|error| ApiError::recipe(&error))?;
        let or = |name, default: f32| body.f32(name).unwrap_or(default);
        let params = SamplingParams {
            temperature: or("temperature", defaults.temperature),
            // -1 is vLLM's other way to say "all".
            top_k: body.int("top_k").map_or(defaults.top_k, |k| u32::try_from(k).unwrap_or(0)),
            top_p: or("top_p", defaults.top_p),
            min_p: or("min_p", defaults.min_p),
            presence_penalty: or("presence_penalty", defaults.presence_penalty),
            frequency_penalty: or("frequency_penalty", defaults.frequency_penalty),
            repetition_penalty: or("repetition_penalty", defaults.repetition_penalty),
            // Negative seeds are seeds too: every i64 has its own u64.
            seed: body.int("seed").map(i64::cast_unsigned),
            logit_bias: body.token_map("logit_bias").unwrap_or_default(),
            max_tokens: None,
            min_tokens: body.usize("min_tokens").unwrap_or(0),
            stop,
            stop_token_ids: body.tokens("stop_token_ids").unwrap_or_default(),
            include_stop_str_in_output: body.bool("include_stop_str_in_output").unwrap_or(false),
            ignore_eos: body.bool("ignore_eos").unwrap_or(false),
            n: body.usize("n").unwrap_or(1),
            logprobs: None,
            prompt_logprobs,
            skip_special_tokens: body.bool("skip_special_tokens").unwrap_or(true),
        };
        Ok(Self {
            model: body.text("model").map(str::to_owned),
            params,
            stream,
            include_usage: option("include_usage"),
            continuous_usage: option("continuous_usage_stats"),
            return_token_ids: body.bool("return_token_ids").unwrap_or(false),
            tokens_as_ids: body.bool("return_tokens_as_token_ids").unwrap_or(false),
            cache_salt,
            kv_cache,
            add_special_tokens: body.bool("add_special_tokens"),
            show_prompt_logprobs: prompt_logprobs.is_some(),
        })
    }
}

/// `min_tokens` beyond `max_tokens` can never be met.
pub(crate) fn check_token_limits(params: &SamplingParams) -> Result<(), ApiError> {
    match params.max_tokens {
        Some(most) if params.min_tokens > most => {
            let what = format!("must be at most max_tokens, {most}, got {}", params.min_tokens);
            Err(ApiError::bad_field("min_tokens", what))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(body: &Value) -> Result<Common, ApiError> {
        let object = body.as_object().unwrap();
        Common::read(&Body::check(object, &[COMMON])?)
    }

    #[test]
    fn nothing_given_is_the_default() {
        let common = read(&json!({"temperature": null, "stop": null})).unwrap();
        assert_eq!(common.params, SamplingParams::default());
        assert!(!common.stream && !common.include_usage);
    }

    #[test]
    fn everything_arrives() {
        let common = read(&json!({
            "model": "m", "temperature": 0.5, "top_p": 0.75, "top_k": -1, "min_p": 0.25,
            "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5,
            "seed": -1, "logit_bias": {"3": -100}, "n": 2, "min_tokens": 1, "stop": "x",
            "stop_token_ids": [9], "include_stop_str_in_output": true, "ignore_eos": true,
            "skip_special_tokens": false, "stream": true, "return_token_ids": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
            "return_tokens_as_token_ids": true, "cache_salt": "s", "add_special_tokens": false,
            "kv_cache": "joint:2.5",
            "response_format": {"type": "text"}, "user": 7, "metadata": {"un": "known"},
        }))
        .unwrap();
        let params = SamplingParams {
            temperature: 0.5,
            top_p: 0.75,
            top_k: 0,
            min_p: 0.25,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            repetition_penalty: 1.5,
            seed: Some(u64::MAX),
            logit_bias: vec![(3, -100.0)],
            n: 2,
            min_tokens: 1,
            stop: vec!["x".into()],
            stop_token_ids: vec![9],
            include_stop_str_in_output: true,
            ignore_eos: true,
            skip_special_tokens: false,
            ..SamplingParams::default()
        };
        let expected = Common {
            model: Some("m".into()),
            params,
            stream: true,
            include_usage: true,
            continuous_usage: true,
            return_token_ids: true,
            tokens_as_ids: true,
            cache_salt: Some("s".into()),
            kv_cache: Some("joint:2.5".parse().unwrap()),
            add_special_tokens: Some(false),
            show_prompt_logprobs: false,
        };
        assert_eq!(common, expected);
    }

    #[test]
    fn refuses_combinations_that_cannot_be_honoured() {
        let cases = [
            (json!({"stream_options": {}}), "stream_options"),
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
            (json!({"response_format": {}}), "response_format"),
            (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
            (json!({"stop": ["a", ""]}), "stop"),
            (json!({"cache_salt": ""}), "cache_salt"),
            (json!({"kv_cache": 4}), "kv_cache"),
            (json!({"kv_cache": ""}), "kv_cache"),
            (json!({"kv_cache": "joint:9"}), "kv_cache"),
            (json!({"guided_json": {"type": "object"}}), "guided_json"),
            (json!({"temperature": 1e39}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"n": 0}), "n"),
        ];
        for (body, param) in cases {
            assert_eq!(read(&body).unwrap_err().field(), Some(param), "{body}");
        }
    }

    #[test]
    fn an_unknown_recipe_is_told_what_exists() {
        let message = read(&json!({"kv_cache": "f15"})).unwrap_err().message().to_owned();
        assert!(message.starts_with("'kv_cache': unknown KV cache recipe 'f15' (known: f16, "));
        // A megabyte of name is not repeated.
        let long = read(&json!({"kv_cache": "x".repeat(1 << 20)})).unwrap_err();
        assert!(long.message().len() < message.len() + 100, "{}", long.message());
        let rate = read(&json!({"kv_cache": "joint:0.5"})).unwrap_err();
        assert!(rate.message().ends_with("take 1 to 6"), "{}", rate.message());
    }

    #[test]
    fn min_tokens_must_fit_max_tokens() {
        let params = SamplingParams { min_tokens: 3, max_tokens: Some(2), ..Default::default() };
        assert_eq!(check_token_limits(&params).unwrap_err().field(), Some("min_tokens"));
        check_token_limits(&SamplingParams { max_tokens: Some(3), ..params }).unwrap();
    }
}
