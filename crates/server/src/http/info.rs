//! Everything that does not generate.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::prepare;
use super::state::App;
use crate::ApiError;
use crate::api::{openapi, parse};
use crate::metrics::{CLASSIC_TYPE, OPENMETRICS_TYPE, to_classic};

type Answer = Result<Response, ApiError>;
type Body = Result<Bytes, BytesRejection>;

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn answer(value: &Value) -> Response {
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (kind, value.to_string()).into_response()
}

pub(super) async fn index() -> String {
    let mut text = format!("Kvasir {VERSION}\n\n");
    for route in openapi::ROUTES {
        text.push_str(&format!("{:<5} {}\n", route.method.to_uppercase(), route.path));
    }
    text.push_str("\nFields of requests and answers: /openapi.json\n");
    text
}

pub(super) async fn openapi_json() -> Response {
    answer(&openapi::document())
}

/// Ready for requests or not. Says nothing if so, as vLLM.
pub(super) async fn health(State(app): State<Arc<App>>) -> Result<(), ApiError> {
    app.ready().map(|_| ())
}

pub(super) async fn version() -> Response {
    answer(&json!({"version": VERSION}))
}

pub(super) async fn load(State(app): State<Arc<App>>) -> Response {
    answer(&json!({"server_load": app.num_active()}))
}

pub(super) async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Answer {
    let text = app.metrics.encode(&app.stats());
    let text = text.map_err(|_| ApiError::internal("the metrics could not be written"))?;
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let (kind, text) = match accepts {
        Some(kinds) if kinds.contains("application/openmetrics-text") => (OPENMETRICS_TYPE, text),
        _ => (CLASSIC_TYPE, to_classic(&text)),
    };
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], text).into_response())
}

fn card(app: &App, name: &str) -> Result<Value, ApiError> {
    let loaded = app.loaded()?;
    Ok(json!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "kvasir",
        "root": loaded.info.root,
        "parent": null,
        "max_model_len": loaded.text.max_model_len(),
    }))
}

pub(super) async fn models(State(app): State<Arc<App>>) -> Answer {
    let cards = app.config.served_model_names.iter().map(|name| card(&app, name));
    let cards: Vec<Value> = cards.collect::<Result<_, _>>()?;
    Ok(answer(&json!({"object": "list", "data": cards})))
}

pub(super) async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    let name = app.model_name(Some(&id))?;
    Ok(answer(&card(&app, &name)?))
}

pub(super) async fn server_info(State(app): State<Arc<App>>) -> Answer {
    let loaded = app.loaded()?;
    let stats = loaded.driver.stats();
    Ok(answer(&json!({
        "version": VERSION,
        "model": app.config.model_name(),
        "root": loaded.info.root,
        "max_model_len": loaded.text.max_model_len(),
        "vocab_size": loaded.text.vocab_size(),
        "config": loaded.info.settings,
        "kv_cache": {
            "logical_bytes": stats.kv_logical_bytes,
            "physical_bytes": stats.kv_physical_bytes,
            "evictable_bytes": stats.kv_evictable_bytes,
            "budget_bytes": stats.kv_budget_bytes,
            "peak_physical_bytes": stats.kv_peak_physical_bytes,
        },
    })))
}

pub(super) async fn tokenize(State(app): State<Arc<App>>, body: Body) -> Answer {
    app.loaded()?;
    let body = prepare::body(&app, body)?;
    prepare::off_thread(body.len(), move || {
        let request = parse::tokenize(&body)?;
        app.model_name(request.model.as_deref())?;
        let tokens = prepare::tokenize(&app, &request)?;
        let text = app.loaded()?.text.as_ref();
        let strs = request.return_token_strs.then(|| {
            let piece = |token: &u32| text.token_piece(*token).map(|piece| piece.into_owned());
            tokens.iter().map(piece).collect::<Vec<_>>()
        });
        Ok(answer(&json!({
            "count": tokens.len(),
            "max_model_len": text.max_model_len(),
            "tokens": tokens,
            "token_strs": strs,
        })))
    })
    .await
}

pub(super) async fn detokenize(State(app): State<Arc<App>>, body: Body) -> Answer {
    app.loaded()?;
    let body = prepare::body(&app, body)?;
    prepare::off_thread(body.len(), move || {
        let request = parse::detokenize(&body)?;
        app.model_name(request.model.as_deref())?;
        let text = app.loaded()?.text.as_ref();
        prepare::check_tokens(text, &request.tokens)
            .map_err(|error| ApiError::bad_field("tokens", error.message()))?;
        Ok(answer(&json!({"prompt": text.decode(&request.tokens, false)})))
    })
    .await
}

pub(super) async fn reset_prefix_cache(State(app): State<Arc<App>>) -> Answer {
    let freed = app.loaded()?.driver.reset_prefix_cache().await?;
    Ok(answer(&json!({"freed_bytes": freed})))
}

pub(super) async fn abort_requests(State(app): State<Arc<App>>, body: Body) -> Answer {
    let request = parse::abort(&prepare::body(&app, body)?)?;
    let aborted = app.loaded()?.driver.abort(request.ids).await;
    Ok(answer(&json!({"aborted": aborted})))
}
