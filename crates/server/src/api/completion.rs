//! The body of `POST /v1/completions`.

use serde_json::{Map, Value};

use super::fields::{Body, Field, Kind, field};
use super::sampling::{COMMON, Common, MAX_LOGPROBS, check_token_limits};
use crate::ApiError;

/// OpenAI's default for this route.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Fields beyond [`COMMON`].
pub(crate) const COMPLETION: &[Field] = &[
    field("prompt", Kind::Prompt, "Text, texts, token ids or lists of token ids."),
    field(
        "max_tokens",
        Kind::Int { min: 0, max: u32::MAX as i64 },
        "Most tokens to generate. Default 16. 0 only with echo.",
    ),
    field(
        "logprobs",
        Kind::Int { min: 0, max: MAX_LOGPROBS },
        "Report log probabilities and this many alternatives.",
    ),
    field("echo", Kind::Bool, "Start the text with the prompt."),
    field("best_of", Kind::Int { min: 1, max: 128 }, "Only the value of n."),
    field("suffix", Kind::Unsupported, "Not supported."),
];

/// One prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// A checked request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CompletionRequest {
    pub(crate) common: Common,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) echo: bool,
    /// `max_tokens` was 0: the engine makes one token, which is not shown.
    pub(crate) only_prompt: bool,
    /// Whether `max_tokens` was given, and so must fit the context.
    pub(crate) explicit_max_tokens: bool,
}

impl CompletionRequest {
    pub(crate) fn read(object: &Map<String, Value>) -> Result<Self, ApiError> {
        let body = Body::check(object, &[COMMON, COMPLETION])?;
        let mut common = Common::read(&body)?;
        let Some(prompt) = body.value("prompt") else {
            return Err(ApiError::bad_field("prompt", "is missing"));
        };
        let echo = body.bool("echo").unwrap_or(false);
        let max_tokens = body.usize("max_tokens");
        let only_prompt = max_tokens == Some(0);
        if only_prompt && !echo {
            return Err(ApiError::bad_field("max_tokens", "must be at least 1 without echo"));
        }
        if let Some(best_of) = body.usize("best_of").filter(|best| *best != common.params.n) {
            let what = format!("must be n, {}, got {best_of}", common.params.n);
            return Err(ApiError::bad_field("best_of", what));
        }
        common.params.max_tokens = Some(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS).max(1));
        common.params.logprobs = body.usize("logprobs");
        if echo && common.params.logprobs.is_some() {
            if common.stream && common.params.n > 1 {
                let what = "with logprobs, stream and n above 1 is not supported";
                return Err(ApiError::bad_field("echo", what));
            }
            // The echoed prompt is reported with the same detail as the output.
            common.params.prompt_logprobs =
                common.params.prompt_logprobs.max(common.params.logprobs);
        }
        check_token_limits(&common.params)?;
        let explicit_max_tokens = max_tokens.is_some();
        Ok(Self { prompts: prompts(prompt), echo, only_prompt, explicit_max_tokens, common })
    }
}

/// The prompts of a value that [`Kind::Prompt`] has checked.
fn prompts(value: &Value) -> Vec<Prompt> {
    let tokens = |list: &[Value]| {
        let ids = list.iter().filter_map(Value::as_f64).map(|id| id as u32);
        Prompt::Tokens(ids.collect())
    };
    match value {
        Value::String(text) => vec![Prompt::Text(text.clone())],
        Value::Array(list) if list.iter().any(Value::is_number) => vec![tokens(list)],
        Value::Array(list) => {
            let prompt = |item: &Value| match item {
                Value::Array(list) => tokens(list),
                other => Prompt::Text(other.as_str().unwrap_or_default().to_owned()),
            };
            list.iter().map(prompt).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::read(body.as_object().unwrap())
    }

    #[test]
    fn takes_every_kind_of_prompt() {
        let text = |t: &str| Prompt::Text(t.into());
        let cases = [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
            (json!([[1], [2, 3]]), vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]),
        ];
        for (prompt, expected) in cases {
            assert_eq!(read(&json!({"prompt": prompt})).unwrap().prompts, expected);
        }
    }

    #[test]
    fn defaults_are_openais() {
        let request = read(&json!({"prompt": "a"})).unwrap();
        assert_eq!(request.common.params.max_tokens, Some(16));
        assert!(!request.explicit_max_tokens && !request.echo);
    }

    #[test]
    fn echo_asks_for_the_prompts_logprobs() {
        let request =
            read(&json!({"prompt": "a", "echo": true, "logprobs": 3, "max_tokens": 0})).unwrap();
        assert_eq!(request.common.params.prompt_logprobs, Some(3));
        assert_eq!(request.common.params.max_tokens, Some(1));
        assert!(request.only_prompt);
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        let cases = [
            (json!({}), "prompt"),
            (json!({"prompt": null}), "prompt"),
            (json!({"prompt": "a", "suffix": "b"}), "suffix"),
            (json!({"prompt": "a", "best_of": 2}), "best_of"),
            (json!({"prompt": "a", "max_tokens": 0}), "max_tokens"),
            (json!({"prompt": "a", "max_tokens": 2, "min_tokens": 3}), "min_tokens"),
            (json!({"prompt": "a", "logprobs": 21}), "logprobs"),
            (json!({"prompt": "a", "logprobs": true}), "logprobs"),
            (json!({"prompt": "a", "echo": true, "logprobs": 1, "stream": true, "n": 2}), "echo"),
        ];
        for (body, param) in cases {
            assert_eq!(read(&body).unwrap_err().field(), Some(param), "{body}");
        }
        read(&json!({"prompt": "a", "best_of": 2, "n": 2, "suffix": ""})).unwrap();
    }
}
