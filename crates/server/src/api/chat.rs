//! The body of `POST /v1/chat/completions`.

use serde_json::{Map, Value};

use super::fields::{Body, Field, Kind, describe, field};
use super::sampling::{COMMON, Common, MAX_LOGPROBS, check_token_limits};
use crate::ApiError;
use crate::text_model::ChatPrompt;

/// Fields that describe a conversation; `/tokenize` has them too.
pub(crate) const CONVERSATION: &[Field] = &[
    field(
        "messages",
        Kind::Objects,
        "The conversation: objects with role and content (a string, or text parts).",
    ),
    field("tools", Kind::Objects, "Given to the chat template. Calls are not parsed."),
    field("documents", Kind::Objects, "Given to the chat template."),
    field("chat_template_kwargs", Kind::AnyObject, "Further variables of the chat template."),
    field("chat_template", Kind::Unsupported, "Not supported: the model's own is used."),
    field("add_generation_prompt", Kind::Bool, "End with the assistant's header. Default true."),
    field("continue_final_message", Kind::Bool, "Leave the last message open. Default false."),
];

/// Fields beyond [`COMMON`] and [`CONVERSATION`].
pub(crate) const CHAT: &[Field] = &[
    field(
        "max_tokens",
        Kind::Int { min: 1, max: u32::MAX as i64 },
        "Most tokens to generate. Default: the rest of the context.",
    ),
    field(
        "max_completion_tokens",
        Kind::Int { min: 1, max: u32::MAX as i64 },
        "The same; goes before max_tokens.",
    ),
    field("logprobs", Kind::Bool, "Report log probabilities."),
    field(
        "top_logprobs",
        Kind::Int { min: 0, max: MAX_LOGPROBS },
        "And this many alternatives per token.",
    ),
    field("tool_choice", Kind::Any, "Only none and auto."),
    field("functions", Kind::Unsupported, "Not supported."),
    field("audio", Kind::Unsupported, "Not supported."),
];

/// What a chat template is given.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Conversation {
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    kwargs: Map<String, Value>,
    add_generation_prompt: bool,
    continue_final_message: bool,
}

impl Conversation {
    pub(crate) fn read(body: &Body<'_>) -> Result<Self, ApiError> {
        let Some(messages) = body.list("messages") else {
            return Err(ApiError::bad_field("messages", "is missing"));
        };
        let messages = messages.iter().enumerate().map(|(at, message)| read_message(at, message));
        let continue_final_message = body.bool("continue_final_message").unwrap_or(false);
        let add_generation_prompt = body.bool("add_generation_prompt").unwrap_or(true);
        if continue_final_message && add_generation_prompt {
            let what = "needs add_generation_prompt: false";
            return Err(ApiError::bad_field("continue_final_message", what));
        }
        Ok(Self {
            messages: messages.collect::<Result<_, _>>()?,
            tools: body.list("tools").cloned(),
            documents: body.list("documents").cloned(),
            kwargs: body.object("chat_template_kwargs").cloned().unwrap_or_default(),
            add_generation_prompt,
            continue_final_message,
        })
    }

    pub(crate) fn prompt(&self) -> ChatPrompt<'_> {
        ChatPrompt {
            messages: &self.messages,
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            tools: self.tools.as_deref(),
            documents: self.documents.as_deref(),
            kwargs: &self.kwargs,
        }
    }
}

/// A checked request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ChatRequest {
    pub(crate) common: Common,
    pub(crate) conversation: Conversation,
}

impl ChatRequest {
    pub(crate) fn read(object: &Map<String, Value>) -> Result<Self, ApiError> {
        let body = Body::check(object, &[COMMON, CONVERSATION, CHAT])?;
        let mut common = Common::read(&body)?;
        let conversation = Conversation::read(&body)?;
        match body.value("tool_choice") {
            None => {}
            Some(Value::String(choice)) if choice == "none" || choice == "auto" => {}
            Some(other) => {
                let what = format!("must be none or auto, got {}", describe(other));
                return Err(ApiError::bad_field("tool_choice", what));
            }
        }
        let logprobs = body.bool("logprobs").unwrap_or(false);
        let top_logprobs = body.usize("top_logprobs");
        if top_logprobs.is_some_and(|top| top > 0) && !logprobs {
            return Err(ApiError::bad_field("top_logprobs", "is only allowed with logprobs: true"));
        }
        common.params.logprobs = logprobs.then(|| top_logprobs.unwrap_or(0));
        common.params.max_tokens =
            body.usize("max_completion_tokens").or_else(|| body.usize("max_tokens"));
        check_token_limits(&common.params)?;
        Ok(Self { common, conversation })
    }
}

/// Checks a message and brings it into the form templates are written for: `content` is a
/// string, and the arguments of earlier tool calls are objects. Everything else stays.
fn read_message(at: usize, message: &Value) -> Result<Value, ApiError> {
    let path = |field: &str| format!("messages[{at}].{field}");
    let Some(object) = message.as_object() else {
        return Err(ApiError::bad_field(format!("messages[{at}]"), "must be an object"));
    };
    match object.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        Some(other) => {
            let what = format!("must be a role, got {}", describe(other));
            return Err(ApiError::bad_field(path("role"), what));
        }
        None => return Err(ApiError::bad_field(path("role"), "is missing")),
    }
    let mut message = object.clone();
    match object.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            message.insert("content".into(), join_parts(&path("content"), parts)?.into());
        }
        // An assistant's message may consist of tool calls alone.
        None | Some(Value::Null) if object.contains_key("tool_calls") => {
            message.insert("content".into(), "".into());
        }
        None | Some(Value::Null) => {
            return Err(ApiError::bad_field(path("content"), "is missing"));
        }
        Some(other) => {
            let what = format!("must be a string or a list of parts, got {}", describe(other));
            return Err(ApiError::bad_field(path("content"), what));
        }
    }
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments") {
            let parsed = arguments.as_str().and_then(|text| serde_json::from_str(text).ok());
            if let Some(object @ Value::Object(_)) = parsed {
                *arguments = object;
            }
        }
    }
    Ok(Value::Object(message))
}

/// The text of a content given in parts, a line each.
fn join_parts(path: &str, parts: &[Value]) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (at, part) in parts.iter().enumerate() {
        match part.get("type").and_then(Value::as_str) {
            Some("text") => {}
            Some(other) => {
                let what = format!("must be text (this model reads nothing else), got '{}'", {
                    crate::error::shorten(other)
                });
                return Err(ApiError::bad_field(format!("{path}[{at}].type"), what));
            }
            None => return Err(ApiError::bad_field(format!("{path}[{at}].type"), "is missing")),
        }
        match part.get("text").and_then(Value::as_str) {
            Some(text) => texts.push(text),
            None => {
                return Err(ApiError::bad_field(format!("{path}[{at}].text"), "must be a string"));
            }
        }
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value) -> Result<ChatRequest, ApiError> {
        ChatRequest::read(body.as_object().unwrap())
    }

    fn with(field: &str, value: Value) -> Value {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        body[field] = value;
        body
    }

    #[test]
    fn defaults() {
        let request = read(&with("user", json!("u"))).unwrap();
        assert_eq!(request.common.params.max_tokens, None);
        assert_eq!(request.common.params.temperature, 1.0);
        let prompt = request.conversation.prompt();
        assert!(prompt.add_generation_prompt && !prompt.continue_final_message);
        assert_eq!(prompt.messages, [json!({"role": "user", "content": "hi"})]);
    }

    #[test]
    fn logprobs_and_limits() {
        let mut body = with("logprobs", json!(true));
        body["max_tokens"] = json!(5);
        assert_eq!(read(&body).unwrap().common.params.logprobs, Some(0));
        body["top_logprobs"] = json!(4);
        body["max_completion_tokens"] = json!(6);
        let params = read(&body).unwrap().common.params;
        assert_eq!((params.logprobs, params.max_tokens), (Some(4), Some(6)));
    }

    #[test]
    fn parts_are_joined_and_tool_calls_are_opened() {
        let body = json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "content": "ok", "tool_call_id": "1"},
        ]});
        let request = read(&body).unwrap();
        let messages = request.conversation.prompt().messages;
        assert_eq!(messages[0]["content"], "a\nb");
        assert_eq!(messages[1]["content"], "");
        assert_eq!(messages[1]["tool_calls"][0]["function"]["arguments"]["x"], 1);
        assert_eq!(messages[2]["tool_call_id"], "1");
    }

    #[test]
    fn errors_name_the_field() {
        let image = json!([{"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}]);
        let cases = [
            (json!({}), "messages"),
            (json!({"messages": "hi"}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": [1]}), "messages[0]"),
            (json!({"messages": [{"content": "a"}]}), "messages[0].role"),
            (json!({"messages": [{"role": 1, "content": "a"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
            (json!({"messages": image}), "messages[0].content[1].type"),
            (with("top_logprobs", json!(2)), "top_logprobs"),
            (with("logprobs", json!(5)), "logprobs"),
            (with("tool_choice", json!("required")), "tool_choice"),
            (with("tool_choice", json!({"type": "function"})), "tool_choice"),
            (with("continue_final_message", json!(true)), "continue_final_message"),
            (with("max_tokens", json!(0)), "max_tokens"),
            (with("max_tokens", json!("many")), "max_tokens"),
            (with("chat_template", json!("{{ x }}")), "chat_template"),
            (with("tools", json!({})), "tools"),
        ];
        for (body, param) in cases {
            assert_eq!(read(&body).unwrap_err().field(), Some(param), "{body}");
        }
    }
}
