//! Cross-origin requests of browsers, for `--allowed-origins`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::state::App;

pub(super) async fn cors(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let allowed = &app.config.allowed_origins;
    let origin = request.headers().get(header::ORIGIN).cloned();
    let Some(origin) = origin.and_then(|origin| allow(allowed, origin)) else {
        return next.run(request).await;
    };
    let asks_first = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if asks_first {
        // Browsers ask without the key: the answer must not need one.
        let mut response = StatusCode::NO_CONTENT.into_response();
        let headers = response.headers_mut();
        insert(headers, header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST");
        insert(headers, header::ACCESS_CONTROL_MAX_AGE, "600");
        let wanted = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS);
        if let Some(wanted) = wanted {
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
        }
        response
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    insert(headers, header::ACCESS_CONTROL_EXPOSE_HEADERS, "x-request-id");
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    response
}

/// The value of `Access-Control-Allow-Origin` for a request from `origin`.
fn allow(allowed: &[String], origin: HeaderValue) -> Option<HeaderValue> {
    if allowed.iter().any(|known| known == "*") {
        return Some(HeaderValue::from_static("*"));
    }
    allowed.iter().any(|known| known.as_bytes() == origin.as_bytes()).then_some(origin)
}

fn insert(headers: &mut HeaderMap, name: header::HeaderName, value: &'static str) {
    headers.insert(name, HeaderValue::from_static(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_match_exactly() {
        let allowed = ["https://a.example".to_owned()];
        let origin = HeaderValue::from_static;
        assert!(allow(&allowed, origin("https://a.example")).is_some());
        assert!(allow(&allowed, origin("https://a.example.evil")).is_none());
        assert!(allow(&[], origin("https://a.example")).is_none());
        assert_eq!(allow(&["*".to_owned()], origin("https://b")), Some(origin("*")));
    }
}
