//! `/v1/chat/completions` and `/v1/completions`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use kvasir_engine::{Request, RequestId};

use super::prepare;
use super::state::{Active, App, Loaded, Meta};
use crate::ApiError;
use crate::api::collect::Collector;
use crate::api::job::{Job, PromptInput};
use crate::api::stream::Streamer;
use crate::driver::{Event, Running};

/// A silent stream gets a comment this often, so that proxies keep it open and a client that
/// is gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

type Prepare = fn(&App, &Loaded, &str, &[u8]) -> Result<Job, ApiError>;

pub(super) async fn chat(
    State(app): State<Arc<App>>,
    Extension(meta): Extension<Meta>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    generate(app, meta, body, prepare::chat).await
}

pub(super) async fn completion(
    State(app): State<Arc<App>>,
    Extension(meta): Extension<Meta>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    generate(app, meta, body, prepare::completion).await
}

async fn generate(
    app: Arc<App>,
    meta: Meta,
    body: Result<Bytes, BytesRejection>,
    prepare: Prepare,
) -> Result<Response, ApiError> {
    let (active, loaded) = app.begin()?;
    let body = prepare::body(&app, body)?;
    let (worker, id) = (app.clone(), meta.request_id.clone());
    let job =
        prepare::off_thread(body.len(), move || prepare(&worker, worker.loaded()?, &id, &body))
            .await?;
    let requests = requests(&job, &meta);
    let running = loaded.driver.submit(&job.id, requests, meta.received).await?;
    if job.options.stream {
        Ok(events(Streamer::new(job), running, active))
    } else {
        collect(Collector::new(job), running).await
    }
}

/// One request of the engine per prompt.
fn requests(job: &Job, meta: &Meta) -> Vec<Request> {
    let cache_salt = meta.tenant.salt(job.options.cache_salt.as_deref());
    let params = Arc::new(job.options.params.clone());
    let request = |prompt: &PromptInput| Request {
        // The driver puts a unique one.
        id: RequestId::from(job.id.as_str()),
        prompt: prompt.tokens.clone(),
        params: Arc::clone(&params),
        cache_salt: cache_salt.clone(),
        kv_cache: job.options.kv_cache,
    };
    job.prompts.iter().map(request).collect()
}

async fn collect(mut collector: Collector, mut running: Running) -> Result<Response, ApiError> {
    while !collector.done() {
        match running.next().await {
            Event::Output(prompt, output) => collector.absorb(prompt, *output),
            Event::Aborted => collector.abort(),
            Event::Failed(cause) => {
                running.finished();
                return Err(ApiError::engine_failed(&cause));
            }
        }
    }
    running.finished();
    let json = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(([json], collector.into_json()?).into_response())
}

struct Stream {
    streamer: Streamer,
    running: Running,
    /// Held until the last byte is handed over.
    _active: Active,
}

fn events(streamer: Streamer, running: Running, active: Active) -> Response {
    let state = Stream { streamer, running, _active: active };
    let body = stream::unfold(Some(state), |state| async move {
        let mut state = state?;
        let chunk = state.next_chunk().await;
        let rest = (!state.streamer.closed()).then_some(state);
        Some((Ok::<_, Infallible>(Bytes::from(chunk)), rest))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // nginx buffers answers unless told otherwise.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(body)).into_response()
}

impl Stream {
    /// Waits for something to send, and takes along what else is there.
    async fn next_chunk(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        while out.is_empty() && !self.streamer.closed() {
            match tokio::time::timeout(KEEP_ALIVE, self.running.next()).await {
                Ok(event) => self.take(event, &mut out),
                Err(_) => out.extend_from_slice(b": keep-alive\n\n"),
            }
            while let Ok(event) = self.running.events.try_recv() {
                self.take(event, &mut out);
            }
        }
        if self.streamer.closed() {
            self.running.finished();
        }
        out
    }

    fn take(&mut self, event: Event, out: &mut Vec<u8>) {
        if self.streamer.closed() {
            return;
        }
        match event {
            Event::Output(prompt, output) => self.streamer.absorb(prompt, *output, out),
            Event::Aborted => self.streamer.abort(out),
            Event::Failed(cause) => self.streamer.fail(&ApiError::engine_failed(&cause), out),
        }
    }
}
