//! From the bytes of a body to a checked request. Total: any input gives a request or an error.

use serde_json::{Map, Value};

use super::chat::ChatRequest;
use super::completion::CompletionRequest;
use super::fields::describe;
use super::tokenize::{AbortRequest, DetokenizeRequest, TokenizeRequest};
use crate::ApiError;

/// Which body to expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// `POST /v1/chat/completions`
    Chat,
    /// `POST /v1/completions`
    Completion,
    /// `POST /tokenize`
    Tokenize,
    /// `POST /detokenize`
    Detokenize,
    /// `POST /abort_requests`
    Abort,
}

impl RequestKind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Chat, Self::Completion, Self::Tokenize, Self::Detokenize, Self::Abort];
}

/// Reads a body as the server does and says how many prompts it holds; the entry for fuzzing.
pub fn parse_request(kind: RequestKind, body: &[u8]) -> Result<usize, ApiError> {
    match kind {
        RequestKind::Chat => chat(body).map(|_| 1),
        RequestKind::Completion => completion(body).map(|request| request.prompts.len()),
        RequestKind::Tokenize => tokenize(body).map(|_| 1),
        RequestKind::Detokenize => detokenize(body).map(|_| 0),
        RequestKind::Abort => abort(body).map(|_| 0),
    }
}

pub(crate) fn chat(body: &[u8]) -> Result<ChatRequest, ApiError> {
    ChatRequest::read(&json_object(body)?)
}

pub(crate) fn completion(body: &[u8]) -> Result<CompletionRequest, ApiError> {
    CompletionRequest::read(&json_object(body)?)
}

pub(crate) fn tokenize(body: &[u8]) -> Result<TokenizeRequest, ApiError> {
    TokenizeRequest::read(&json_object(body)?)
}

pub(crate) fn detokenize(body: &[u8]) -> Result<DetokenizeRequest, ApiError> {
    DetokenizeRequest::read(&json_object(body)?)
}

/// An empty body aborts everything.
pub(crate) fn abort(body: &[u8]) -> Result<AbortRequest, ApiError> {
    if body.trim_ascii().is_empty() {
        return Ok(AbortRequest { ids: None });
    }
    AbortRequest::read(&json_object(body)?)
}

fn json_object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match serde_json::from_slice(body).map_err(|error| ApiError::bad_json(&error))? {
        Value::Object(object) => Ok(object),
        other => Err(ApiError::not_an_object(&describe(&other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_json_is_located() {
        let error = chat(b"{\n  \"messages\": [,]\n}").unwrap_err();
        assert_eq!(error.status(), 400);
        assert!(error.message().contains("line 2 column 16"), "{}", error.message());
    }

    #[test]
    fn any_bytes_are_answered() {
        let deep = "[".repeat(100_000);
        let wide = format!("{{\"messages\":[{}", "{".repeat(50_000));
        let cases: [&[u8]; 9] = [
            b"",
            b"\xff\xfe",
            b"null",
            b"[]",
            b"7",
            b"{\"prompt\":1e999}",
            b"{\"prompt\":\"\\ud800\"}",
            deep.as_bytes(),
            wide.as_bytes(),
        ];
        for body in cases {
            for kind in RequestKind::ALL {
                let result = parse_request(kind, body);
                assert!(result.is_err() || (kind == RequestKind::Abort && body.is_empty()));
            }
        }
    }

    #[test]
    fn every_field_survives_every_type() {
        // No type in any known field may panic; most are refused.
        let values =
            ["null", "true", "-1", "1.5", "1e300", "\"x\"", "[]", "[1]", "[[]]", "[{}]", "{}"];
        let tables: [(RequestKind, &[&[super::super::fields::Field]]); 3] = [
            (RequestKind::Chat, super::super::openapi::CHAT_BODY),
            (RequestKind::Completion, super::super::openapi::COMPLETION_BODY),
            (RequestKind::Tokenize, super::super::openapi::TOKENIZE_BODY),
        ];
        let mut refused = 0;
        for (kind, tables) in tables {
            for field in tables.iter().flat_map(|table| table.iter()) {
                for value in values {
                    let mut body = Map::new();
                    body.insert("prompt".into(), "a".into());
                    body.insert(field.name.into(), serde_json::from_str(value).unwrap());
                    let body = serde_json::to_vec(&body).unwrap();
                    refused += usize::from(parse_request(kind, &body).is_err());
                }
            }
        }
        assert!(refused > 500, "{refused}");
    }
}
