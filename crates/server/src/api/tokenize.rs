//! The bodies of `/tokenize`, `/detokenize` and `/abort_requests`.

use serde_json::{Map, Value};

use super::chat::{CONVERSATION, Conversation};
use super::fields::{Body, Field, Kind, field};
use crate::ApiError;

/// Fields of `/tokenize` beyond [`CONVERSATION`].
pub(crate) const TOKENIZE: &[Field] = &[
    field("model", Kind::Text, "Name of the model; the served one if absent."),
    field("prompt", Kind::Text, "The text; or give messages."),
    field("add_special_tokens", Kind::Bool, "Add BOS. Default true for a prompt, else false."),
    field(
        "return_token_strs",
        Kind::Bool,
        "Add token_strs: the tokens as the vocabulary has them.",
    ),
];

/// Fields of `/detokenize`.
pub(crate) const DETOKENIZE: &[Field] = &[
    field("model", Kind::Text, "Name of the model; the served one if absent."),
    field("tokens", Kind::Tokens, "Token ids."),
];

/// Fields of `/abort_requests`.
pub(crate) const ABORT: &[Field] =
    &[field("request_ids", Kind::Texts, "Ids of responses to end; absent: all.")];

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    Text(String),
    Chat(Conversation),
}

/// A checked `/tokenize`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) source: Source,
    pub(crate) add_special_tokens: bool,
    pub(crate) return_token_strs: bool,
}

impl TokenizeRequest {
    pub(crate) fn read(object: &Map<String, Value>) -> Result<Self, ApiError> {
        let body = Body::check(object, &[TOKENIZE, CONVERSATION])?;
        let (source, special) = match (body.text("prompt"), body.list("messages")) {
            (Some(text), None) => (Source::Text(text.to_owned()), true),
            (None, Some(_)) => (Source::Chat(Conversation::read(&body)?), false),
            (Some(_), Some(_)) => {
                return Err(ApiError::bad_field("prompt", "and 'messages' exclude each other"));
            }
            (None, None) => {
                return Err(ApiError::bad_field("prompt", "is missing (or give messages)"));
            }
        };
        Ok(Self {
            model: body.text("model").map(str::to_owned),
            source,
            add_special_tokens: body.bool("add_special_tokens").unwrap_or(special),
            return_token_strs: body.bool("return_token_strs").unwrap_or(false),
        })
    }
}

/// A checked `/detokenize`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DetokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Vec<u32>,
}

impl DetokenizeRequest {
    pub(crate) fn read(object: &Map<String, Value>) -> Result<Self, ApiError> {
        let body = Body::check(object, &[DETOKENIZE])?;
        let Some(tokens) = body.tokens("tokens") else {
            return Err(ApiError::bad_field("tokens", "is missing"));
        };
        Ok(Self { model: body.text("model").map(str::to_owned), tokens })
    }
}

/// A checked `/abort_requests`: the responses to end, or all.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AbortRequest {
    pub(crate) ids: Option<Vec<String>>,
}

impl AbortRequest {
    pub(crate) fn read(object: &Map<String, Value>) -> Result<Self, ApiError> {
        let body = Body::check(object, &[ABORT])?;
        Ok(Self { ids: body.texts("request_ids") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn special_tokens_default_by_source() {
        let read = |body: Value| TokenizeRequest::read(body.as_object().unwrap());
        assert!(read(json!({"prompt": "a"})).unwrap().add_special_tokens);
        let chat = json!({"messages": [{"role": "user", "content": "a"}]});
        assert!(!read(chat).unwrap().add_special_tokens);
        assert_eq!(read(json!({})).unwrap_err().field(), Some("prompt"));
        assert_eq!(read(json!({"prompt": ["a"]})).unwrap_err().field(), Some("prompt"));
    }

    #[test]
    fn detokenize_needs_tokens() {
        let read = |body: Value| DetokenizeRequest::read(body.as_object().unwrap());
        assert_eq!(read(json!({"tokens": [1, 2]})).unwrap().tokens, [1, 2]);
        assert_eq!(read(json!({})).unwrap_err().field(), Some("tokens"));
        assert_eq!(read(json!({"tokens": "x"})).unwrap_err().field(), Some("tokens"));
    }

    #[test]
    fn abort_takes_a_list_or_all() {
        let read = |body: Value| AbortRequest::read(body.as_object().unwrap());
        assert_eq!(read(json!({})).unwrap().ids, None);
        assert_eq!(read(json!({"request_ids": ["a"]})).unwrap().ids, Some(vec!["a".into()]));
        assert_eq!(read(json!({"request_ids": "a"})).unwrap_err().field(), Some("request_ids"));
    }
}
