//! Keys, probes, metrics, disconnects, shutdown: what an operator relies on.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::time::Duration;

use common::{MODEL, config, gated, start, start_unready, start_with, with_keys};
use kvasir_server::ServerConfig;
use kvasir_server::testkit::MockConfig;
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";

/// Generates until somebody ends it.
fn endless(stream: bool) -> String {
    json!({"prompt": "go", "max_tokens": 4000, "ignore_eos": true, "stream": stream}).to_string()
}

#[test]
fn not_ready_before_the_model_is_there() {
    let server = start_unready(config(), &MockConfig::default());
    for path in ["/health", "/ping", "/v1/health", "/v1/models", "/server_info"] {
        let reply = server.get(path);
        assert_eq!(reply.error(503).1.as_deref(), Some("model_loading"), "{path}");
        assert!(reply.header("retry-after").is_some());
    }
    server.post(COMPLETIONS, r#"{"prompt": "x"}"#).error(503);
    server.post("/tokenize", r#"{"prompt": "x"}"#).error(503);
    assert_eq!(server.get("/metrics").status, 200);
    assert_eq!(server.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    let server = server.make_ready(MockConfig::default());
    for path in ["/health", "/ping", "/v1/health"] {
        let reply = server.get(path);
        assert_eq!((reply.status, reply.text().as_str()), (200, ""), "{path}");
    }
    server.post(COMPLETIONS, r#"{"prompt": "x"}"#).ok();
}

#[test]
fn models_are_listed_with_their_aliases() {
    let server = start();
    let list = server.get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    let card = &list["data"][0];
    assert_eq!(card["id"], MODEL);
    assert_eq!(card["object"], "model");
    assert_eq!(card["root"], "mock.gguf");
    assert_eq!(card["parent"], Value::Null);
    assert_eq!(card["max_model_len"], 4096);
    assert_eq!(list["data"][1]["id"], "alias");
    assert_eq!(&server.get("/v1/models/mock").ok(), card);
    let info = server.get("/server_info").ok();
    assert_eq!((&info["model"], &info["vocab_size"]), (&json!(MODEL), &json!(258)));
}

#[test]
fn tokenize_and_detokenize_are_inverse() {
    let server = start();
    let body = json!({"prompt": "hé", "add_special_tokens": false, "return_token_strs": true});
    let answer = server.post_json("/tokenize", &body).ok();
    assert_eq!(answer["tokens"], json!("hé".as_bytes()));
    assert_eq!(answer["count"], 3);
    assert_eq!(answer["max_model_len"], 4096);
    assert_eq!(answer["token_strs"][0], "h");
    let back = server.post_json("/detokenize", &json!({"tokens": answer["tokens"]})).ok();
    assert_eq!(back["prompt"], "hé");
    let chat = json!({"messages": [{"role": "user", "content": "x"}]});
    let answer = server.post_json("/tokenize", &chat).ok();
    assert_eq!(answer["count"], "user: x\nassistant: ".len());
    assert_eq!(answer["token_strs"], Value::Null);
    // Above the size where work moves to another thread.
    let long = "x".repeat(50_000);
    assert_eq!(server.post_json("/tokenize", &json!({"prompt": long})).ok()["count"], 50_001);
}

#[test]
fn keys_guard_the_api_and_nothing_else() {
    let server = start_with(with_keys(&["alpha", "beta"]), MockConfig::default());
    let body = br#"{"prompt": "x"}"#;
    for path in [
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/reset_prefix_cache",
        "/abort_requests",
        "/detokenize",
    ] {
        let reply = server.send("POST", path, &[], body);
        assert_eq!(reply.error(401).1.as_deref(), Some("invalid_api_key"), "{path}");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        server.send("POST", path, &[("authorization", "Bearer wrong")], body).error(401);
    }
    for path in ["/v1/models", "/v1/models/mock", "/server_info", "/nowhere"] {
        server.get(path).error(401);
    }
    for path in
        ["/health", "/ping", "/v1/health", "/metrics", "/version", "/load", "/", "/openapi.json"]
    {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    for key in ["Bearer alpha", "bearer beta"] {
        server.send("POST", COMPLETIONS, &[("authorization", key)], body).ok();
    }
}

#[test]
fn keys_do_not_share_cached_prefixes() {
    let server = start_with(with_keys(&["alpha", "beta"]), MockConfig::default());
    let ask = |key: &str, salt: Value| {
        let body = json!({"prompt": "a prompt of some length", "cache_salt": salt}).to_string();
        let headers = [("authorization", key)];
        let answer = server.send("POST", COMPLETIONS, &headers, body.as_bytes()).ok();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(ask("Bearer alpha", Value::Null), 0);
    assert_eq!(ask("Bearer beta", Value::Null), 0);
    assert!(ask("Bearer alpha", Value::Null) > 0);
    assert_eq!(ask("Bearer alpha", "other".into()), 0);
    assert!(ask("Bearer alpha", "other".into()) > 0);
}

#[test]
fn request_ids_come_back_and_name_the_response() {
    let server = start();
    let send =
        |id: &str| server.send("POST", COMPLETIONS, &[("x-request-id", id)], br#"{"prompt":"x"}"#);
    let reply = send("my-id.7");
    assert_eq!(reply.header("x-request-id"), Some("my-id.7"));
    assert_eq!(reply.ok()["id"], "cmpl-my-id.7");
    let evil = send("a\"} b");
    assert_eq!(evil.header("x-request-id").unwrap().len(), 32);
    let own = server.get("/health").header("x-request-id").unwrap().to_owned();
    assert_ne!(own, server.get("/health").header("x-request-id").unwrap());
}

#[test]
fn one_id_may_be_used_by_two_requests_at_once() {
    let server = gated();
    let headers = [("x-request-id", "same")];
    let open = || server.open("POST", COMPLETIONS, &headers, br#"{"prompt": "say:x"}"#);
    let (first, second) = (open(), open());
    server.control.wait(|state| state.added.len() == 2, |_| ());
    server.control.open_gate();
    assert_eq!(first.finish().ok()["choices"][0]["text"], "x");
    assert_eq!(second.finish().ok()["choices"][0]["text"], "x");
}

#[test]
fn a_client_that_hangs_up_ends_its_request() {
    for stream in [true, false] {
        let server = gated();
        let connection = server.open("POST", COMPLETIONS, &[], endless(stream).as_bytes());
        let id = server.control.wait(|s| s.added.len() == 1, |s| s.added[0].id.clone());
        server.control.permit(3);
        drop(connection);
        let aborted = server.control.wait(|s| s.unfinished == 0, |s| s.aborted.clone());
        assert_eq!(aborted, [id], "stream: {stream}");
        let reason =
            r#"vllm:request_success_total{model_name="mock",engine="0",finished_reason="abort"}"#;
        server.await_metric(reason, 1.0);
        server.await_metric("kvasir_kv_physical_bytes", 0.0);
        // The bookkeeping was checked at the start, and again once the engine was idle.
        server.control.wait(|state| state.integrity_checks > 1, |_| ());
    }
}

#[test]
fn all_prompts_of_a_client_that_hangs_up_are_ended() {
    let server = gated();
    let body = json!({"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 4000, "stream": true});
    let mut connection = server.open("POST", COMPLETIONS, &[], body.to_string().as_bytes());
    server.control.permit(1);
    connection.read_until("data: ");
    drop(connection);
    let aborted = server.control.wait(|s| s.unfinished == 0, |s| s.aborted.len());
    assert_eq!(aborted, 3);
}

#[test]
fn an_operator_ends_requests() {
    let server = gated();
    let open = |id: &str, stream| {
        let headers = [("x-request-id", id)];
        server.open("POST", COMPLETIONS, &headers, endless(stream).as_bytes())
    };
    let (one, two, three) = (open("one", false), open("two", true), open("three", false));
    server.control.wait(|state| state.added.len() == 3, |_| ());
    assert_eq!(server.get("/load").ok()["server_load"], 3);
    let body = json!({"request_ids": ["cmpl-one", "cmpl-nobody"]});
    assert_eq!(server.post_json("/abort_requests", &body).ok()["aborted"], 1);
    assert_eq!(one.finish().ok()["choices"][0]["finish_reason"], "abort");
    assert_eq!(server.post("/abort_requests", "").ok()["aborted"], 2);
    let last = two.finish().events().pop().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "abort");
    assert_eq!(three.finish().ok()["choices"][0]["finish_reason"], "abort");
}

#[test]
fn prefix_cache_can_be_reset() {
    let server = start();
    let body = json!({"prompt": "a prompt of some length"});
    let cached = || {
        let answer = server.post_json(COMPLETIONS, &body).ok();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(), 0);
    assert!(cached() > 0);
    assert!(server.post("/reset_prefix_cache", "").ok()["freed_bytes"].as_u64().unwrap() > 0);
    assert_eq!(cached(), 0);
}

#[test]
fn metrics_have_vllms_names_and_count() {
    let server = start();
    let body = json!({"prompt": "say:hello", "n": 2, "add_special_tokens": false});
    server.post_json(COMPLETIONS, &body).ok();
    server.get("/v1/nowhere-at-all");
    let reply = server.get("/metrics");
    assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = reply.text();
    let names = [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_requests_waiting_by_reason",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total",
        "vllm:prompt_tokens_by_source_total",
        "vllm:prompt_tokens_cached_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:admission_rejections_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_prefill_time_seconds_bucket",
        "vllm:request_decode_time_seconds_bucket",
        "vllm:request_inference_time_seconds_bucket",
        "vllm:request_prompt_tokens_bucket",
        "vllm:request_generation_tokens_bucket",
        "vllm:request_max_num_generation_tokens_bucket",
        "vllm:request_params_n_bucket",
        "vllm:request_params_max_tokens_bucket",
        "vllm:request_num_preemptions_bucket",
        "vllm:request_prefill_kv_computed_tokens_bucket",
        "vllm:iteration_tokens_total_bucket",
        "kvasir_kv_logical_bytes",
        "kvasir_kv_physical_bytes",
        "kvasir_kv_compression_ratio",
        "kvasir_kv_evictable_bytes",
        "kvasir_kv_budget_bytes",
        "kvasir_kv_statistics_bytes",
    ];
    for name in names {
        let line = text
            .lines()
            .find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
        assert!(line.contains(r#"model_name="mock",engine="0""#), "{line}");
    }
    assert!(text.contains("# TYPE vllm:prompt_tokens_total counter\n"));
    assert!(text.contains(
        "http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"2xx\"} 1\n"
    ));
    assert!(text.contains("handler=\"none\"") && !text.contains("nowhere"));
    assert_eq!(server.metric("vllm:prompt_tokens_total"), 9.0);
    assert_eq!(server.metric("vllm:generation_tokens_total"), 12.0);
    assert_eq!(server.metric("vllm:time_to_first_token_seconds_count"), 2.0);
    assert_eq!(server.metric("vllm:inter_token_latency_seconds_count"), 10.0);
    assert_eq!(server.metric("vllm:request_params_n_sum"), 2.0);
    let stop = r#"vllm:request_success_total{model_name="mock",engine="0",finished_reason="stop"}"#;
    assert_eq!(server.metric(stop), 2.0);
    let accept = [("accept", "application/openmetrics-text; version=1.0.0")];
    let reply = server.send("GET", "/metrics", &accept, b"");
    assert!(reply.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(reply.text().ends_with("# EOF\n"));
}

#[test]
fn openapi_is_served() {
    let server = start();
    let document = server.get("/openapi.json").ok();
    let body = &document["paths"]["/v1/completions"]["post"]["requestBody"];
    assert!(body["content"]["application/json"]["schema"]["properties"]["min_p"].is_object());
    assert!(server.get("/").text().contains("/v1/chat/completions"));
}

#[test]
fn browsers_may_call_from_allowed_origins_only() {
    let config =
        ServerConfig { allowed_origins: vec!["https://a.example".into()], ..with_keys(&["k"]) };
    let server = start_with(config, MockConfig::default());
    let ask = |origin: &str| {
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization"),
        ];
        server.send("OPTIONS", COMPLETIONS, &headers, b"")
    };
    let reply = ask("https://a.example");
    assert_eq!(reply.status, 204);
    assert_eq!(reply.header("access-control-allow-origin"), Some("https://a.example"));
    assert_eq!(reply.header("access-control-allow-headers"), Some("authorization"));
    assert_eq!(ask("https://b.example").header("access-control-allow-origin"), None);
    let reply = server.send("GET", "/health", &[("origin", "https://a.example")], b"");
    assert_eq!(reply.header("access-control-allow-origin"), Some("https://a.example"));
}

#[test]
fn draining_finishes_what_runs_and_refuses_the_rest() {
    let mut server = gated();
    let body = json!({"prompt": "say:last words", "stream": true}).to_string();
    let mut stream = server.open("POST", COMPLETIONS, &[], body.as_bytes());
    server.control.permit(1);
    stream.read_until("data: ");
    server.stop();
    // The signal is handled by another thread: ask until it shows.
    while server.get("/health").status == 200 {
        std::thread::yield_now();
    }
    let reply = server.post(COMPLETIONS, r#"{"prompt": "x"}"#);
    assert_eq!(reply.error(503).1.as_deref(), Some("shutting_down"));
    assert!(reply.header("retry-after").is_some());
    server.control.open_gate();
    let text: String = stream
        .finish()
        .events()
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(text, "last words");
    server.join();
    assert!(std::net::TcpStream::connect(server.addr).is_err());
}

#[test]
fn draining_ends_what_takes_too_long() {
    let config = ServerConfig { shutdown_timeout: Duration::from_millis(50), ..config() };
    let mut server = start_with(config, MockConfig { gated: true, ..MockConfig::default() });
    let stream = server.open("POST", COMPLETIONS, &[], endless(true).as_bytes());
    let plain = server.open("POST", COMPLETIONS, &[], endless(false).as_bytes());
    server.control.wait(|state| state.added.len() == 2, |_| ());
    server.stop();
    let last = stream.finish().events().pop().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "abort");
    assert_eq!(plain.finish().ok()["choices"][0]["finish_reason"], "abort");
    server.join();
    let aborted = server.control.wait(|state| state.unfinished == 0, |s| s.aborted.len());
    assert_eq!(aborted, 2);
}

#[test]
fn stops_before_it_was_ready() {
    let mut server = start_unready(config(), &MockConfig::default());
    server.get("/health").error(503);
    server.stop();
    server.join();
}

#[test]
fn stops_under_idle_connections() {
    let mut server = start();
    let mut idle = server.connect();
    idle.write(b"GET /version HTTP/1.1\r\nhost: test\r\n\r\n");
    idle.read_until("version");
    server.stop();
    server.join();
}
