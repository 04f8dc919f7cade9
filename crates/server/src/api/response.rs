//! The bodies of answers, in the shapes of OpenAI's API with vLLM's additions.

use kvasir_engine::{Finish, FinishReason, StopReason, TokenId};
use serde::Serialize;
use serde_json::Value;

use super::fields::{Field, Kind, field};
use super::kv_usage::KvUsage;
use super::logprobs::{ChatLogprobs, CompletionLogprobs};

/// Tells answers of different builds apart.
pub(crate) const FINGERPRINT: &str = concat!("kvasir-", env!("CARGO_PKG_VERSION"));

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Usage {
    /// Every prompt counted once, whatever `n`.
    pub(crate) prompt_tokens: usize,
    pub(crate) total_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) prompt_tokens_details: PromptTokensDetails,
    /// Absent until a sequence has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kvasir: Option<KvUsage>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct PromptTokensDetails {
    /// Prompt tokens whose keys and values came from the prefix cache.
    pub(crate) cached_tokens: usize,
}

impl Usage {
    pub(crate) fn new(prompt_tokens: usize, completion_tokens: usize, cached: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: cached },
            kvasir: None,
        }
    }
}

/// What stopped a choice, where it was not the model's own end token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum StopCause {
    Text(String),
    Token(TokenId),
}

/// The end of a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) reason: &'static str,
    pub(crate) cause: Option<StopCause>,
}

impl From<Finish> for End {
    fn from(finish: Finish) -> Self {
        let cause = finish.stop.map(|stop| match stop {
            StopReason::String(text) => StopCause::Text(text),
            StopReason::Token(token) => StopCause::Token(token),
        });
        Self { reason: reason_name(finish.reason), cause }
    }
}

impl End {
    pub(crate) fn aborted() -> Self {
        Self { reason: reason_name(FinishReason::Abort), cause: None }
    }
}

/// `finish_reason` in answers and metrics.
pub(crate) fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
    }
}

/// A whole answer or one chunk; `C` is the type of its choices.
#[derive(Debug, Serialize)]
pub(crate) struct Answer<'a, C> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'static str,
    pub(crate) choices: Vec<C>,
    /// `Some(None)` is written as `null`: chunks before the last, if usage was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<Usage>>,
    /// Chat only; text completions have it in the choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: Message,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    pub(crate) stop_reason: Option<StopCause>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<TokenId>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Message {
    pub(crate) role: &'static str,
    pub(crate) content: String,
    pub(crate) refusal: Option<()>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ChunkChoice {
    pub(crate) index: usize,
    pub(crate) delta: Delta,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_reason: Option<StopCause>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<TokenId>>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
}

/// A choice of a text completion, whole or in chunks.
#[derive(Debug, Serialize)]
pub(crate) struct CompletionChoice {
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<CompletionLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    pub(crate) stop_reason: Option<StopCause>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<TokenId>>,
}

// --- the same shapes as tables, for /openapi.json --------------------------------------------

const COUNT: Kind = Kind::Int { min: 0, max: i64::MAX };
const REASON: Kind = Kind::OneOf(&["stop", "length", "abort"]);

const CACHED: &[Field] = &[field("cached_tokens", COUNT, "Taken from the prefix cache.")];
const KV_USAGE: &[Field] = &[
    field("recipe", Kind::Text, "How keys and values were stored."),
    field("logical_bytes", COUNT, "Bytes of the tokens' keys and values in f16."),
    field("physical_bytes", COUNT, "Bytes held; blocks shared with others count whole in each."),
    field("ratio", Kind::Float { min: 0.0, max: f64::MAX }, "Logical by physical bytes."),
];
const USAGE: &[Field] = &[
    field("prompt_tokens", COUNT, "Every prompt counted once."),
    field("completion_tokens", COUNT, "Of all choices."),
    field("total_tokens", COUNT, "Their sum."),
    field("prompt_tokens_details", Kind::Object(CACHED), "Where prompt tokens came from."),
    field("kvasir", Kind::Object(KV_USAGE), "The cache of the sequences that have ended."),
];
const MESSAGE: &[Field] = &[
    field("role", Kind::Text, "assistant"),
    field("content", Kind::Text, "The text."),
    field("refusal", Kind::Any, "Always null."),
];
const CHAT_CHOICE: &[Field] = &[
    field("index", COUNT, "Which of n."),
    field("message", Kind::Object(MESSAGE), "The answer; chunks have delta instead."),
    field("delta", Kind::Object(MESSAGE), "In chunks: what is new."),
    field("logprobs", Kind::Any, "content: one object per token, if asked for."),
    field("finish_reason", REASON, "Why it ended; null before the end."),
    field("stop_reason", Kind::Any, "The stop text or token that ended it."),
    field("token_ids", Kind::Tokens, "With return_token_ids."),
];
const TEXT_CHOICE: &[Field] = &[
    field("index", COUNT, "Prompt times n plus which of n."),
    field("text", Kind::Text, "The text; in chunks: what is new."),
    field("logprobs", Kind::Any, "text_offset, tokens, token_logprobs, top_logprobs."),
    field("finish_reason", REASON, "Why it ended; null before the end."),
    field("stop_reason", Kind::Any, "The stop text or token that ended it."),
    field("prompt_logprobs", Kind::Any, "With prompt_logprobs."),
    field("prompt_token_ids", Kind::Tokens, "With return_token_ids."),
    field("token_ids", Kind::Tokens, "With return_token_ids."),
];
const HEAD: &[Field] = &[
    field("id", Kind::Text, "Names the response; /abort_requests takes it."),
    field("object", Kind::Text, "Type of this object."),
    field("created", COUNT, "Unix time in seconds."),
    field("model", Kind::Text, "The model."),
    field("system_fingerprint", Kind::Text, "The build."),
    field("usage", Kind::Object(USAGE), "Tokens counted."),
];

pub(crate) const CHAT_ANSWER: &[&[Field]] = &[
    HEAD,
    &[
        field("choices", Kind::List(CHAT_CHOICE), "One per sequence."),
        field("prompt_logprobs", Kind::Any, "With prompt_logprobs."),
        field("prompt_token_ids", Kind::Tokens, "With return_token_ids."),
    ],
];
pub(crate) const COMPLETION_ANSWER: &[&[Field]] =
    &[HEAD, &[field("choices", Kind::List(TEXT_CHOICE), "One per sequence.")]];

const ERROR_BODY: &[Field] = &[
    field("message", Kind::Text, "One line."),
    field("type", Kind::Text, "Class of the error."),
    field("param", Kind::Text, "The field it is about, or null."),
    field("code", Kind::Text, "For programs, or null."),
];
pub(crate) const ERROR: &[&[Field]] =
    &[&[field("error", Kind::Object(ERROR_BODY), "What went wrong.")]];

const MODEL_CARD: &[Field] = &[
    field("id", Kind::Text, "Name to use in requests."),
    field("object", Kind::Text, "model"),
    field("created", COUNT, "Unix time in seconds."),
    field("owned_by", Kind::Text, "kvasir"),
    field("root", Kind::Text, "Where it was loaded from."),
    field("parent", Kind::Any, "Always null."),
    field("max_model_len", COUNT, "Prompt and output in tokens."),
];
pub(crate) const MODEL: &[&[Field]] = &[MODEL_CARD];
pub(crate) const MODELS: &[&[Field]] = &[&[
    field("object", Kind::Text, "list"),
    field("data", Kind::List(MODEL_CARD), "The models, aliases included."),
]];
pub(crate) const TOKENIZED: &[&[Field]] = &[&[
    field("count", COUNT, "Number of tokens."),
    field("max_model_len", COUNT, "Prompt and output in tokens."),
    field("tokens", Kind::Tokens, "The ids."),
    field("token_strs", Kind::Texts, "With return_token_strs, else null."),
]];
pub(crate) const DETOKENIZED: &[&[Field]] = &[&[field("prompt", Kind::Text, "The text.")]];
pub(crate) const VERSION: &[&[Field]] = &[&[field("version", Kind::Text, "Of this server.")]];
pub(crate) const LOAD: &[&[Field]] = &[&[field("server_load", COUNT, "Requests in progress.")]];
pub(crate) const RESET: &[&[Field]] = &[&[field("freed_bytes", COUNT, "Bytes given back.")]];
pub(crate) const ABORTED: &[&[Field]] = &[&[field("aborted", COUNT, "Requests ended.")]];
pub(crate) const SERVER_INFO: &[&[Field]] = &[&[
    field("version", Kind::Text, "Of this server."),
    field("model", Kind::Text, "The served model."),
    field("root", Kind::Text, "Where it was loaded from."),
    field("max_model_len", COUNT, "Prompt and output in tokens."),
    field("vocab_size", COUNT, "Number of tokens."),
    field("config", Kind::AnyObject, "Resolved settings."),
    field("kv_cache", Kind::AnyObject, "Bytes: logical, physical, evictable, budget, peak."),
]];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_named_as_openai_names_them() {
        let finish = |reason, stop| Finish {
            reason,
            stop,
            recipe: kvasir_engine::Recipe::F16,
            risk: None,
            kv_logical_bytes: 0,
            kv_physical_bytes: 0,
            num_preemptions: 0,
        };
        let end = End::from(finish(FinishReason::Stop, Some(StopReason::String("x".into()))));
        assert_eq!((end.reason, end.cause), ("stop", Some(StopCause::Text("x".into()))));
        let end = End::from(finish(FinishReason::Stop, Some(StopReason::Token(7))));
        assert_eq!(serde_json::to_string(&end.cause).unwrap(), "7");
        assert_eq!(End::from(finish(FinishReason::Length, None)).reason, "length");
    }

    #[test]
    fn usage_adds_up() {
        assert_eq!(
            serde_json::to_string(&Usage::new(3, 4, 2)).unwrap(),
            r#"{"prompt_tokens":3,"total_tokens":7,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":2}}"#
        );
    }

    #[test]
    fn a_null_usage_differs_from_none() {
        let answer = |usage| Answer::<()> {
            id: "i",
            object: "o",
            created: 1,
            model: "m",
            system_fingerprint: "f",
            choices: vec![],
            usage,
            prompt_logprobs: None,
            prompt_token_ids: None,
        };
        assert!(serde_json::to_string(&answer(Some(None))).unwrap().contains(r#""usage":null"#));
        assert!(!serde_json::to_string(&answer(None)).unwrap().contains("usage"));
    }
}
