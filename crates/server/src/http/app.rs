//! The route table.

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, get, post};

use super::state::App;
use super::{cors, generate, info, observe};
use crate::ApiError;

fn routes() -> Vec<(&'static str, MethodRouter<Arc<App>>)> {
    vec![
        ("/v1/chat/completions", post(generate::chat)),
        ("/v1/completions", post(generate::completion)),
        ("/v1/models", get(info::models)),
        ("/v1/models/{id}", get(info::model)),
        ("/tokenize", post(info::tokenize)),
        ("/detokenize", post(info::detokenize)),
        ("/reset_prefix_cache", post(info::reset_prefix_cache)),
        ("/abort_requests", post(info::abort_requests)),
        ("/server_info", get(info::server_info)),
        ("/load", get(info::load)),
        ("/version", get(info::version)),
        ("/health", get(info::health)),
        ("/v1/health", get(info::health)),
        ("/ping", get(info::health).post(info::health)),
        ("/metrics", get(info::metrics)),
        ("/openapi.json", get(info::openapi_json)),
        ("/", get(info::index)),
    ]
}

pub(super) fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for (path, methods) in routes() {
        router = router.route(path, methods);
    }
    let limit = DefaultBodyLimit::max(app.config.max_body_bytes);
    router
        .method_not_allowed_fallback(not_allowed)
        .fallback(not_found)
        .layer(limit)
        .layer(from_fn_with_state(app.clone(), observe::observe))
        .layer(from_fn_with_state(app.clone(), cors::cors))
        .with_state(app)
}

async fn not_found(request: Request) -> ApiError {
    ApiError::unknown_route(request.method().as_str(), request.uri().path())
}

async fn not_allowed(request: Request) -> ApiError {
    ApiError::method_not_allowed(request.method().as_str(), request.uri().path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::openapi::ROUTES;

    #[test]
    fn routes_and_their_description_agree() {
        let mut served: Vec<_> = routes().into_iter().map(|(path, _)| path).collect();
        let mut described: Vec<_> = ROUTES.iter().map(|route| route.path).collect();
        served.sort_unstable();
        described.sort_unstable();
        assert_eq!(served, described);
    }
}
