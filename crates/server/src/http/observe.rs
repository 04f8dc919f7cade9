//! The outermost layer: request ids, API keys, access log, HTTP metrics.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::state::{App, Meta};
use crate::ApiError;
use crate::api::openapi;
use crate::auth::Tenant;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 128;

pub(super) async fn observe(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let received = Instant::now();
    let request_id: Arc<str> = request_id(request.headers()).into();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    // Only known routes become labels: a client must not be able to make new series.
    let matched = request.extensions().get::<MatchedPath>();
    let handler = matched.map_or("none", MatchedPath::as_str).to_owned();
    let mut response = match tenant(&app, &request) {
        Ok(tenant) => {
            let meta = Meta { request_id: request_id.clone(), received, tenant };
            request.extensions_mut().insert(meta);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let (status, seconds) = (response.status().as_u16(), received.elapsed().as_secs_f64());
    app.metrics.observe_http(&handler, method_name(&method), status, seconds);
    let milliseconds = seconds * 1e3;
    if openapi::is_open(&path) {
        // Probes and scrapers come every few seconds.
        tracing::debug!(%method, path, status, milliseconds, %request_id, "request");
    } else {
        tracing::info!(%method, path, status, milliseconds, %request_id, "request");
    }
    response
}

/// Whose request this is; an error if it needs a key and has none of ours.
fn tenant(app: &App, request: &Request) -> Result<Tenant, ApiError> {
    let keys = &app.config.api_keys;
    if !keys.required() || openapi::is_open(request.uri().path()) {
        return Ok(Tenant(None));
    }
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    given.and_then(|given| keys.check(given)).ok_or_else(|| ApiError::unauthorized(given.is_some()))
}

/// The client's id if it can be shown in logs and headers as it is, else a fresh one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let harmless = |id: &&str| {
        (1..=MAX_REQUEST_ID).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    given.filter(harmless).map_or_else(fresh_id, str::to_owned)
}

/// 32 hexadecimal digits that no other request has. Not a secret.
fn fresh_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // Every RandomState has its own keys.
    let (high, low) = (RandomState::new().hash_one(count), RandomState::new().hash_one(count));
    format!("{high:016x}{low:016x}")
}

fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "OTHER",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_ids_are_kept() {
        let id = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_static(value));
            request_id(&headers)
        };
        assert_eq!(id("a-1_b.c:D"), "a-1_b.c:D");
        for bad in ["", "a b", "a\"b", "{}", "a/b"] {
            assert_eq!(id(bad).len(), 32, "{bad}");
        }
        assert_ne!(fresh_id(), fresh_id());
    }
}
