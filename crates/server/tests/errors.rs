//! Everything a client can do wrong, and that the server stays up.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{config, start, start_with};
use kvasir_server::testkit::MockConfig;
use kvasir_server::{Server, ServerConfig, ServerError};
use serde_json::json;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[test]
fn bad_fields_are_400_and_named() {
    let server = start();
    let cases = [
        (CHAT, json!({}), "messages"),
        (CHAT, json!({"messages": []}), "messages"),
        (CHAT, json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (CHAT, json!({"messages": [{"role": "alien", "content": "x"}]}), "messages"),
        (COMPLETIONS, json!({}), "prompt"),
        (COMPLETIONS, json!({"prompt": 7}), "prompt"),
        (COMPLETIONS, json!({"prompt": ""}), "prompt"),
        (COMPLETIONS, json!({"prompt": [5000]}), "prompt"),
        (COMPLETIONS, json!({"prompt": "x", "temperature": "hot"}), "temperature"),
        (COMPLETIONS, json!({"prompt": "x", "temperature": -1}), "temperature"),
        (COMPLETIONS, json!({"prompt": "x", "max_tokens": -5}), "max_tokens"),
        (COMPLETIONS, json!({"prompt": "x", "n": 1.5}), "n"),
        (COMPLETIONS, json!({"prompt": vec!["x"; 9], "n": 128}), "n"),
        (COMPLETIONS, json!({"prompt": "x", "top_p": 1.5}), "top_p"),
        (COMPLETIONS, json!({"prompt": "x", "stream": "yes"}), "stream"),
        (COMPLETIONS, json!({"prompt": "x", "suffix": "y"}), "suffix"),
        (COMPLETIONS, json!({"prompt": "x", "logit_bias": {"99999": 1}}), "logit_bias"),
        (
            COMPLETIONS,
            json!({"prompt": "x", "response_format": {"type": "json_object"}}),
            "response_format",
        ),
        ("/tokenize", json!({}), "prompt"),
        ("/detokenize", json!({"tokens": [300]}), "tokens"),
        ("/abort_requests", json!({"request_ids": 5}), "request_ids"),
    ];
    for (path, mut body, param) in cases {
        if body.get("prompt") == Some(&json!("")) {
            body["add_special_tokens"] = false.into();
        }
        let (named, _) = server.post_json(path, &body).error(400);
        assert_eq!(named.as_deref(), Some(param), "{path} {body}");
    }
    server.post_json(COMPLETIONS, &json!({"prompt": "still up"})).ok();
}

#[test]
fn bad_json_is_located() {
    let server = start();
    let reply = server.post(CHAT, "{\"messages\": [}");
    assert_eq!(reply.error(400).1.as_deref(), Some("invalid_json"));
    assert!(reply.text().contains("line 1 column 15"), "{}", reply.text());
    server.post(CHAT, "").error(400);
    server.post(CHAT, "[]").error(400);
    server.send("POST", CHAT, &[], b"\xff\xfe\x00").error(400);
}

#[test]
fn a_megabyte_of_garbage_is_a_400() {
    let server = start();
    // A fixed linear congruential generator: bytes without meaning, the same in every run.
    let mut state = 1_u64;
    let garbage: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(1 << 20)
    .collect();
    for path in [CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/abort_requests"] {
        server.send("POST", path, &[], &garbage).error(400);
    }
    server.post(CHAT, &"[".repeat(1 << 20)).error(400);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn too_large_is_a_413() {
    let server = start();
    let body = format!("{{\"prompt\": \"{}\"}}", "x".repeat(3 << 20));
    let (_, code) = server.post(COMPLETIONS, &body).error(413);
    assert_eq!(code.as_deref(), Some("request_too_large"));
}

#[test]
fn chunked_bodies_are_read() {
    let server = start();
    let mut connection = server.connect();
    connection.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
          transfer-encoding: chunked\r\n\r\n",
    );
    for part in [&br#"{"prompt": "say"#[..], br#":in parts"}"#] {
        connection.write(format!("{:x}\r\n", part.len()).as_bytes());
        connection.write(part);
        connection.write(b"\r\n");
    }
    connection.write(b"0\r\n\r\n");
    assert_eq!(connection.finish().ok()["choices"][0]["text"], "in parts");
    // A size that is no number ends the connection, not the server.
    let mut connection = server.connect();
    connection.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
          transfer-encoding: chunked\r\n\r\nxyz\r\n",
    );
    assert_eq!(connection.finish().status, 400);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_body_cut_short_leaves_the_server_up() {
    let server = start();
    let mut connection = server.connect();
    connection.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\n{\"pro",
    );
    drop(connection);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn unknown_models_routes_and_methods() {
    let server = start();
    let body = json!({"model": "gpt-9", "prompt": "x"});
    let (param, code) = server.post_json(COMPLETIONS, &body).error(404);
    assert_eq!((param.as_deref(), code.as_deref()), (Some("model"), Some("model_not_found")));
    server.get("/v1/models/gpt-9").error(404);
    server.get("/v1/nowhere").error(404);
    let reply = server.get(CHAT);
    reply.error(405);
    assert_eq!(reply.header("allow"), Some("POST"));
    let alias = json!({"model": "alias", "prompt": "x"});
    assert_eq!(server.post_json(COMPLETIONS, &alias).ok()["model"], "alias");
}

#[test]
fn prompts_must_fit_the_context() {
    let mock = MockConfig { max_model_len: 20, ..MockConfig::default() };
    let server = start_with(config(), mock);
    let ask = |prompt: &str, max_tokens: Option<u32>| {
        let body = json!({"prompt": prompt, "max_tokens": max_tokens,
                          "add_special_tokens": false});
        server.post_json(COMPLETIONS, &body)
    };
    let code = Some("context_length_exceeded".to_owned());
    assert_eq!(ask(&"x".repeat(20), None).error(400).1, code);
    assert_eq!(ask(&"x".repeat(10), Some(11)).error(400).1, code);
    assert_eq!(ask(&"x".repeat(10), Some(10)).ok()["usage"]["total_tokens"], 20);
    // A default is cut to what is left.
    assert_eq!(ask(&"x".repeat(19), None).ok()["usage"]["completion_tokens"], 1);
}

#[test]
fn a_full_queue_is_a_429() {
    let mock =
        MockConfig { max_running: 1, max_waiting: Some(1), gated: true, ..MockConfig::default() };
    let server = start_with(config(), mock);
    let body = json!({"prompt": "say:x"}).to_string();
    let first = server.open("POST", COMPLETIONS, &[], body.as_bytes());
    server.control.wait(|state| state.added.len() == 1, |_| ());
    // One step moves the first from the queue into the batch.
    server.control.permit(1);
    server.control.wait(|state| state.running == 1, |_| ());
    let second = server.open("POST", COMPLETIONS, &[], body.as_bytes());
    server.control.wait(|state| state.added.len() == 2, |_| ());
    let reply = server.post(COMPLETIONS, &body);
    assert_eq!(reply.error(429).1.as_deref(), Some("queue_full"));
    assert_eq!(reply.header("retry-after"), Some("1"));
    // A list of prompts is taken as a whole or not at all.
    server.post_json(COMPLETIONS, &json!({"prompt": ["a", "b"]})).error(429);
    assert_eq!(server.metric("vllm:admission_rejections_total"), 2.0);
    server.control.open_gate();
    first.finish().ok();
    second.finish().ok();
}

#[test]
fn a_port_in_use_is_told_in_one_line() {
    let server = start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = ServerConfig { port: server.addr.port(), ..config() };
    let error = runtime.block_on(Server::bind(config)).unwrap_err();
    assert!(matches!(error, ServerError::Bind { .. }));
    let text = error.to_string();
    assert!(text.starts_with(&format!("cannot listen on {}: ", server.addr)), "{text}");
    assert!(!text.contains('\n'));
}

#[test]
fn a_broken_engine_hangs_nobody() {
    for (word, told) in [("PANIC", "asked to panic"), ("FAIL", "asked to fail")] {
        let server = start_with(config(), MockConfig { gated: true, ..MockConfig::default() });
        let victim = json!({"prompt": "innocent"}).to_string();
        let plain = server.open("POST", COMPLETIONS, &[], victim.as_bytes());
        let stream = json!({"prompt": "innocent", "stream": true}).to_string();
        let mut stream = server.open("POST", COMPLETIONS, &[], stream.as_bytes());
        stream.read_until("200 OK");
        server.control.wait(|state| state.added.len() == 2, |_| ());
        let culprit = json!({"prompt": word}).to_string();
        let culprit = server.open("POST", COMPLETIONS, &[], culprit.as_bytes());
        server.control.wait(|state| state.added.len() == 3, |_| ());
        server.control.open_gate();
        for reply in [plain.finish(), culprit.finish()] {
            assert_eq!(reply.error(500).1.as_deref(), Some("engine_failed"));
            assert!(reply.text().contains(told), "{}", reply.text());
        }
        let events = stream.finish().events();
        assert_eq!(events.last().unwrap()["error"]["code"], "engine_failed");
        server.get("/health").error(503);
        server.post(COMPLETIONS, &victim).error(503);
        assert_eq!(server.post("/reset_prefix_cache", "").status, 503);
        assert_eq!(server.get("/version").status, 200);
        let reason =
            r#"vllm:request_success_total{model_name="mock",engine="0",finished_reason="error"}"#;
        assert_eq!(server.metric(reason), 3.0);
    }
}
