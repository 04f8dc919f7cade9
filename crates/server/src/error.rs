//! Errors, and the only place where an HTTP status is decided.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kvasir_engine::EngineError;
use kvasir_model::ModelError;
use serde::Serialize;

/// Why the server could not start or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// `host:port` as configured.
        addr: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A setting that cannot be used.
    #[error("{option} must be {expected}, got {found}")]
    BadConfig {
        /// Name of the flag.
        option: &'static str,
        /// What it has to be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// [`crate::ServerHandle::set_ready`] was called a second time.
    #[error("the server already has a model")]
    AlreadyReady,
    /// A thread, signal handler or socket was refused by the operating system.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// An answer that is not 2xx, in OpenAI's shape:
/// `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
    retry_after_seconds: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct ErrorBody {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: &'a ErrorBody,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let body = ErrorBody { message: message.into(), kind, param: None, code: None };
        Self { status, body, retry_after_seconds: None }
    }

    fn code(mut self, code: &'static str) -> Self {
        self.body.code = Some(code);
        self
    }

    fn param(mut self, param: impl Into<String>) -> Self {
        self.body.param = Some(param.into());
        self
    }

    fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// 400: field `param` has a type or value that cannot be used.
    pub(crate) fn bad_field(param: impl Into<String>, what: impl std::fmt::Display) -> Self {
        let param = param.into();
        Self::new(StatusCode::BAD_REQUEST, INVALID, format!("'{param}' {what}")).param(param)
    }

    /// 400: the body is not JSON.
    pub(crate) fn bad_json(source: &serde_json::Error) -> Self {
        // serde_json's text ends with " at line L column C".
        let message = format!("the request body is not valid JSON: {source}");
        Self::new(StatusCode::BAD_REQUEST, INVALID, message).code("invalid_json")
    }

    /// 400: the body is JSON, but not an object.
    pub(crate) fn not_an_object(found: &str) -> Self {
        let message = format!("the request body must be a JSON object, got {found}");
        Self::new(StatusCode::BAD_REQUEST, INVALID, message).code("invalid_json")
    }

    /// 400: the body ended early or broke HTTP's framing.
    pub(crate) fn unreadable_body() -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, "the request body could not be read")
    }

    /// 400: prompt and `max_tokens` together do not fit the model.
    pub(crate) fn context_length(
        prompt_tokens: usize,
        max_tokens: usize,
        max_model_len: usize,
    ) -> Self {
        let total = prompt_tokens.saturating_add(max_tokens);
        let message = format!(
            "the model's context length is {max_model_len} tokens, but {total} were requested \
             ({prompt_tokens} in the prompt, {max_tokens} for the output)"
        );
        Self::new(StatusCode::BAD_REQUEST, INVALID, message).code(CONTEXT_LENGTH)
    }

    /// 401.
    pub(crate) fn unauthorized(given: bool) -> Self {
        let message = if given {
            "incorrect API key provided"
        } else {
            "no API key provided: send it in an Authorization header (Bearer YOUR_KEY)"
        };
        Self::new(StatusCode::UNAUTHORIZED, INVALID, message).code("invalid_api_key")
    }

    /// 404: no such model.
    pub(crate) fn model_not_found(name: &str) -> Self {
        let message = format!("the model '{}' does not exist", shorten(name));
        Self::new(StatusCode::NOT_FOUND, INVALID, message).param("model").code("model_not_found")
    }

    /// 404: no such route.
    pub(crate) fn unknown_route(method: &str, path: &str) -> Self {
        let message = format!("unknown route: {} {}", shorten(method), shorten(path));
        Self::new(StatusCode::NOT_FOUND, INVALID, message).code("unknown_url")
    }

    /// 405: the route exists under another method.
    pub(crate) fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("{} is not allowed on {}", shorten(method), shorten(path));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, message).code("method_not_allowed")
    }

    /// 413.
    pub(crate) fn body_too_large(limit: usize) -> Self {
        let message = format!("the request body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, message).code("request_too_large")
    }

    /// 503: the model is not loaded yet.
    pub(crate) fn loading() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "the model is still being loaded")
            .code("model_loading")
            .retry_after(1)
    }

    /// 503: the server is about to stop.
    pub(crate) fn draining() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, "the server is shutting down")
            .code("shutting_down")
            .retry_after(5)
    }

    /// 503: the engine failed earlier, so nothing new is accepted.
    pub(crate) fn engine_down(cause: &str) -> Self {
        let message = format!("the engine has failed and takes no more requests: {cause}");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, message).code("engine_failed")
    }

    /// 500: the engine failed while it worked on this request.
    pub(crate) fn engine_failed(cause: &str) -> Self {
        let message = format!("the engine failed while it worked on this request: {cause}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, message).code("engine_failed")
    }

    /// 500: a bug of this server.
    pub(crate) fn internal(what: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, what)
    }

    /// A chat template that refuses the messages is the client's fault.
    pub(crate) fn template(error: &ModelError) -> Self {
        match error {
            ModelError::Template { .. } | ModelError::Unsupported { .. } => {
                Self::new(StatusCode::BAD_REQUEST, INVALID, error.to_string()).param("messages")
            }
            _ => Self::internal(error.to_string()),
        }
    }

    /// A text the tokenizer refuses is the client's fault.
    pub(crate) fn tokenizer(error: &ModelError, param: &str) -> Self {
        match error {
            ModelError::Tokenizer { .. } | ModelError::Unsupported { .. } => {
                Self::new(StatusCode::BAD_REQUEST, INVALID, error.to_string()).param(param)
            }
            _ => Self::internal(error.to_string()),
        }
    }

    /// 400: a recipe that does not exist, or that this engine cannot store the request by.
    pub(crate) fn recipe(error: &dyn std::error::Error) -> Self {
        let message = format!("'{RECIPE}': {error}");
        Self::new(StatusCode::BAD_REQUEST, INVALID, message).param(RECIPE)
    }

    /// What the engine said to a new request.
    pub(crate) fn admission(error: &EngineError) -> Self {
        let bad = || Self::new(StatusCode::BAD_REQUEST, INVALID, error.to_string());
        match error {
            EngineError::PromptTooLong { .. } => bad().code(CONTEXT_LENGTH),
            EngineError::EmptyPrompt | EngineError::UnknownToken { .. } => bad().param("prompt"),
            EngineError::BadParam { param, .. } => bad().param(*param),
            EngineError::Recipe { .. }
            | EngineError::NoStatistics { .. }
            | EngineError::RecipeTooLarge { .. } => Self::recipe(error),
            EngineError::DuplicateRequest { .. } => bad(),
            EngineError::QueueFull { .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", error.to_string())
                    .code("queue_full")
                    .retry_after(1)
            }
            _ => Self::internal(error.to_string()),
        }
    }

    /// The status it is sent with.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// One line for the client.
    pub fn message(&self) -> &str {
        &self.body.message
    }

    /// The field of the request it is about.
    pub fn field(&self) -> Option<&str> {
        self.body.param.as_deref()
    }

    /// The JSON body.
    pub(crate) fn to_json(&self) -> String {
        // Strings only: serialising cannot fail.
        serde_json::to_string(&Envelope { error: &self.body }).unwrap_or_default()
    }
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const CONTEXT_LENGTH: &str = "context_length_exceeded";
/// Field of a request's own recipe.
const RECIPE: &str = "kv_cache";

/// The first characters of a client's text, so that an error never repeats a megabyte.
pub(crate) fn shorten(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let json = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut response = (self.status, [json], self.to_json()).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_engine::{CacheError, Recipe};

    #[test]
    fn has_openais_shape() {
        let error = ApiError::bad_field("temperature", "must be a number, got a string");
        assert_eq!(
            error.to_json(),
            r#"{"error":{"message":"'temperature' must be a number, got a string","type":"invalid_request_error","param":"temperature","code":null}}"#
        );
    }

    #[test]
    fn maps_the_engines_answers() {
        let full = ApiError::admission(&EngineError::QueueFull { waiting: 3, limit: 3 });
        assert_eq!(full.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(full.into_response().headers()[header::RETRY_AFTER], "1");
        let long = EngineError::PromptTooLong { prompt_tokens: 9, max_model_len: 8 };
        let long = ApiError::admission(&long);
        assert_eq!(long.status(), StatusCode::BAD_REQUEST);
        assert_eq!(long.body.code, Some("context_length_exceeded"));
        let broken = ApiError::admission(&EngineError::Integrity { what: "x".into() });
        assert_eq!(broken.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn only_a_requests_own_recipe_is_the_clients_fault() {
        let source = || CacheError::Statistics { what: "of another model".into() };
        let error = EngineError::Recipe { recipe: Recipe::JOINT3, source: source() };
        let error = ApiError::admission(&error);
        assert_eq!((error.status(), error.field()), (StatusCode::BAD_REQUEST, Some("kv_cache")));
        assert_eq!(
            error.message(),
            "'kv_cache': KV cache recipe 'joint3': statistics: of another model"
        );
        let error = ApiError::admission(&EngineError::Cache(source()));
        assert_eq!(error.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn shortens_on_character_borders() {
        assert_eq!(shorten("abc"), "abc");
        let long = shorten(&"é".repeat(100));
        assert_eq!(long.chars().count(), 81);
    }
}
