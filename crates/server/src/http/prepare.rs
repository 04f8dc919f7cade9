//! From a checked request to prompts in tokens. Runs off the async threads for large bodies.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use kvasir_engine::{EngineError, TokenId};

use super::state::{App, Loaded, unix_seconds};
use crate::ApiError;
use crate::api::completion::Prompt;
use crate::api::job::{Api, Job, PromptInput};
use crate::api::sampling::Common;
use crate::api::{parse, tokenize};
use crate::text_model::TextModel;

/// Bodies above this are parsed and tokenised on a blocking thread.
const LARGE_BODY: usize = 16 << 10;

/// Runs `work` where it does not hold up other requests.
pub(super) async fn off_thread<T: Send + 'static>(
    size: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if size <= LARGE_BODY {
        return work();
    }
    let result = tokio::task::spawn_blocking(work).await;
    result.unwrap_or_else(|error| Err(ApiError::internal(error.to_string())))
}

/// The body, or what was wrong with reading it.
pub(super) fn body(app: &App, body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| match rejection.into_response().status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::body_too_large(app.config.max_body_bytes),
        _ => ApiError::unreadable_body(),
    })
}

pub(super) fn chat(app: &App, loaded: &Loaded, id: &str, body: &[u8]) -> Result<Job, ApiError> {
    let request = parse::chat(body)?;
    let model = app.model_name(request.common.model.as_deref())?;
    let special = request.common.add_special_tokens.unwrap_or(false);
    let tokens = conversation(loaded.text.as_ref(), &request.conversation, special)?;
    let prompts = vec![PromptInput { tokens, echo: String::new() }];
    let explicit = request.common.params.max_tokens.is_some();
    job(loaded, Api::Chat, format!("chatcmpl-{id}"), model, request.common, prompts, explicit)
}

pub(super) fn completion(
    app: &App,
    loaded: &Loaded,
    id: &str,
    body: &[u8],
) -> Result<Job, ApiError> {
    let request = parse::completion(body)?;
    let model = app.model_name(request.common.model.as_deref())?;
    let special = request.common.add_special_tokens.unwrap_or(true);
    let text = loaded.text.as_ref();
    let mut prompts = Vec::with_capacity(request.prompts.len());
    for prompt in request.prompts {
        let mut input = match prompt {
            Prompt::Text(prompt) => PromptInput {
                tokens: text
                    .encode(&prompt, special)
                    .map_err(|error| ApiError::tokenizer(&error, "prompt"))?,
                echo: prompt,
            },
            Prompt::Tokens(tokens) => {
                check_tokens(text, &tokens)?;
                let echo = if request.echo { text.decode(&tokens, false) } else { String::new() };
                PromptInput { tokens, echo }
            }
        };
        if !request.echo {
            input.echo = String::new();
        }
        prompts.push(input);
    }
    let api = Api::Completion { echo: request.echo, only_prompt: request.only_prompt };
    let explicit = request.explicit_max_tokens;
    job(loaded, api, format!("cmpl-{id}"), model, request.common, prompts, explicit)
}

/// Most sequences that one body may ask for, prompts × n.
const MAX_SEQUENCES: usize = 1024;

fn job(
    loaded: &Loaded,
    api: Api,
    id: String,
    model: String,
    options: Common,
    prompts: Vec<PromptInput>,
    explicit_max_tokens: bool,
) -> Result<Job, ApiError> {
    let text: &dyn TextModel = loaded.text.as_ref();
    let outside = |token: &TokenId| *token as usize >= text.vocab_size();
    let biased = options.params.logit_bias.iter().map(|(token, _)| token);
    if let Some(token) = biased.copied().find(|token| outside(token)) {
        let what = format!("names token {token}, outside a vocabulary of {}", text.vocab_size());
        return Err(ApiError::bad_field("logit_bias", what));
    }
    let sequences = prompts.len() * options.params.n;
    if sequences > MAX_SEQUENCES {
        let what =
            format!("times the number of prompts must be at most {MAX_SEQUENCES}, got {sequences}");
        return Err(ApiError::bad_field("n", what));
    }
    // A limit the client has chosen must be reachable; a default is cut to what is left.
    if let Some(max_tokens) = options.params.max_tokens.filter(|_| explicit_max_tokens) {
        for prompt in &prompts {
            if prompt.tokens.len().saturating_add(max_tokens) > text.max_model_len() {
                let (prompt, most) = (prompt.tokens.len(), text.max_model_len());
                return Err(ApiError::context_length(prompt, max_tokens, most));
            }
        }
    }
    let text = loaded.text.clone();
    Ok(Job { api, id, created: unix_seconds(), model, options, prompts, text })
}

pub(super) fn conversation(
    text: &dyn TextModel,
    conversation: &crate::api::chat::Conversation,
    add_special: bool,
) -> Result<Vec<TokenId>, ApiError> {
    let rendered =
        text.render_chat(&conversation.prompt()).map_err(|error| ApiError::template(&error))?;
    text.encode(&rendered, add_special).map_err(|error| ApiError::tokenizer(&error, "messages"))
}

pub(super) fn tokenize(
    loaded: &Arc<App>,
    request: &tokenize::TokenizeRequest,
) -> Result<Vec<TokenId>, ApiError> {
    let text = loaded.loaded()?.text.as_ref();
    match &request.source {
        tokenize::Source::Text(prompt) => text
            .encode(prompt, request.add_special_tokens)
            .map_err(|error| ApiError::tokenizer(&error, "prompt")),
        tokenize::Source::Chat(chat) => conversation(text, chat, request.add_special_tokens),
    }
}

pub(super) fn check_tokens(text: &dyn TextModel, tokens: &[TokenId]) -> Result<(), ApiError> {
    let vocab_size = text.vocab_size();
    match tokens.iter().find(|token| **token as usize >= vocab_size) {
        None => Ok(()),
        Some(&token_id) => {
            Err(ApiError::admission(&EngineError::UnknownToken { token_id, vocab_size }))
        }
    }
}
