//! `/openapi.json`, made from the tables that also check requests.

use serde_json::{Map, Value, json};

use super::chat::{CHAT, CONVERSATION};
use super::completion::COMPLETION;
use super::fields::{Field, object_schema};
use super::response;
use super::sampling::COMMON;
use super::tokenize::{ABORT, DETOKENIZE, TOKENIZE};

type Tables = &'static [&'static [Field]];

pub(crate) const CHAT_BODY: Tables = &[CONVERSATION, CHAT, COMMON];
pub(crate) const COMPLETION_BODY: Tables = &[COMPLETION, COMMON];
pub(crate) const TOKENIZE_BODY: Tables = &[TOKENIZE, CONVERSATION];

/// One route.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) method: &'static str,
    pub(crate) path: &'static str,
    summary: &'static str,
    /// Whether a key is needed when keys are configured.
    pub(crate) guarded: bool,
    body: Option<Tables>,
    required: &'static [&'static str],
    answer: Answer,
}

#[derive(Debug, Clone, Copy)]
enum Answer {
    Json(Tables),
    /// JSON, or server-sent events of the same shape with `stream`.
    JsonOrEvents(Tables),
    Text(&'static str),
    Empty,
}

const fn get(path: &'static str, guarded: bool, answer: Answer, summary: &'static str) -> Route {
    Route { method: "get", path, summary, guarded, body: None, required: &[], answer }
}

const fn post(
    path: &'static str,
    body: Option<Tables>,
    required: &'static [&'static str],
    answer: Answer,
    summary: &'static str,
) -> Route {
    Route { method: "post", path, summary, guarded: true, body, required, answer }
}

/// Every route of the server.
pub(crate) const ROUTES: &[Route] = &[
    post(
        "/v1/chat/completions",
        Some(CHAT_BODY),
        &["messages"],
        Answer::JsonOrEvents(response::CHAT_ANSWER),
        "Answer a conversation",
    ),
    post(
        "/v1/completions",
        Some(COMPLETION_BODY),
        &["prompt"],
        Answer::JsonOrEvents(response::COMPLETION_ANSWER),
        "Continue a text",
    ),
    get("/v1/models", true, Answer::Json(response::MODELS), "List the models"),
    get("/v1/models/{id}", true, Answer::Json(response::MODEL), "Describe a model"),
    post(
        "/tokenize",
        Some(TOKENIZE_BODY),
        &[],
        Answer::Json(response::TOKENIZED),
        "Tokens of a text or conversation",
    ),
    post(
        "/detokenize",
        Some(&[DETOKENIZE]),
        &["tokens"],
        Answer::Json(response::DETOKENIZED),
        "Text of tokens",
    ),
    post(
        "/reset_prefix_cache",
        None,
        &[],
        Answer::Json(response::RESET),
        "Drop cached prefixes no request uses",
    ),
    post(
        "/abort_requests",
        Some(&[ABORT]),
        &[],
        Answer::Json(response::ABORTED),
        "End running requests",
    ),
    get("/server_info", true, Answer::Json(response::SERVER_INFO), "Model and settings"),
    get("/load", false, Answer::Json(response::LOAD), "Requests in progress"),
    get("/version", false, Answer::Json(response::VERSION), "Version"),
    get("/health", false, Answer::Empty, "200 if ready for requests, else 503"),
    get("/v1/health", false, Answer::Empty, "The same"),
    get("/ping", false, Answer::Empty, "The same"),
    get("/metrics", false, Answer::Text("text/plain"), "Metrics for Prometheus"),
    get("/openapi.json", false, Answer::Text("application/json"), "This document"),
    get("/", false, Answer::Text("text/plain"), "Where to find what"),
];

/// Whether a request to this path may be made without a key. Unknown paths may not.
pub(crate) fn is_open(path: &str) -> bool {
    ROUTES.iter().any(|route| !route.guarded && route.path == path)
}

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let item = paths.entry(route.path).or_insert_with(|| json!({}));
        item[route.method] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Kvasir", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {
            "schemas": {"Error": object_schema(response::ERROR)},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    })
}

fn operation(route: &Route) -> Value {
    let content = match route.answer {
        Answer::Json(tables) => json!({"application/json": {"schema": object_schema(tables)}}),
        Answer::JsonOrEvents(tables) => {
            let schema = object_schema(tables);
            let events = "Chunks of the same shape in `data:` lines, then `data: [DONE]`.";
            json!({
                "application/json": {"schema": schema},
                "text/event-stream": {"schema": {"type": "string", "description": events}},
            })
        }
        Answer::Text(kind) => {
            let mut content = json!({});
            content[kind] = json!({"schema": {}});
            content
        }
        Answer::Empty => json!({}),
    };
    let problem = json!({"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}});
    let mut operation = json!({
        "summary": route.summary,
        "responses": {
            "200": {"description": "Done", "content": content},
            "default": {"description": "An error", "content": problem},
        },
    });
    if let Some(tables) = route.body {
        let mut schema = object_schema(tables);
        if !route.required.is_empty() {
            schema["required"] = json!(route.required);
        }
        operation["requestBody"] = json!({"content": {"application/json": {"schema": schema}}});
    }
    if route.path.contains("{id}") {
        let id =
            json!({"name": "id", "in": "path", "required": true, "schema": {"type": "string"}});
        operation["parameters"] = json!([id]);
    }
    if route.guarded {
        operation["security"] = json!([{"key": []}]);
    }
    operation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_every_field_of_every_table() {
        let document = document();
        for route in ROUTES {
            let operation = &document["paths"][route.path][route.method];
            assert!(operation["summary"].is_string(), "{}", route.path);
            for field in route.body.into_iter().flatten().flat_map(|table| table.iter()) {
                let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
                assert!(schema["properties"][field.name]["description"].is_string(), "{field:?}");
            }
        }
    }

    #[test]
    fn no_table_names_a_field_twice() {
        for route in ROUTES {
            let mut names: Vec<_> =
                route.body.into_iter().flatten().flat_map(|table| table.iter()).collect();
            names.sort_by_key(|field| field.name);
            for pair in names.windows(2) {
                assert_ne!(pair[0].name, pair[1].name, "{}", route.path);
            }
        }
    }

    #[test]
    fn mutating_routes_need_a_key() {
        for route in ROUTES {
            assert!(route.guarded || route.method == "get", "{}", route.path);
        }
        assert!(is_open("/health") && is_open("/metrics") && is_open("/v1/health"));
        assert!(!is_open("/v1/models") && !is_open("/nowhere") && !is_open("/v1/models/{id}"));
    }
}
