//! `kv_cache` of requests, on a real engine with a tiny model.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{TestServer, config, start_unready};
use kvasir_engine::EngineConfig;
use kvasir_server::testkit::MockConfig;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const PROMPT: &str = "a prompt of more than one block of sixteen tokens, each of them one byte";

fn start(kv_cache_memory: usize) -> TestServer {
    let engine =
        EngineConfig { kv_cache_memory, block_size: 16, threads: 1, ..EngineConfig::default() };
    start_unready(config(), &MockConfig::default()).with_tiny_model(engine)
}

fn completion(kv_cache: impl Into<Value>) -> Value {
    let kv_cache: Value = kv_cache.into();
    json!({
        "prompt": PROMPT, "kv_cache": kv_cache, "max_tokens": 24, "seed": 5,
        "ignore_eos": true,
    })
}

#[track_caller]
fn check(usage: &Value, recipe: &str) {
    let kv = &usage["kvasir"];
    assert_eq!(kv["recipe"], recipe);
    let (logical, physical) = (&kv["logical_bytes"], &kv["physical_bytes"]);
    let ratio = logical.as_f64().unwrap() / physical.as_f64().unwrap();
    assert!((kv["ratio"].as_f64().unwrap() - ratio).abs() < 1e-9, "{kv}");
}

#[test]
fn both_routes_streams_and_n_take_a_recipe_and_report_it() {
    let server = start(4 << 20);
    check(&server.post_json(COMPLETIONS, &completion(Value::Null)).ok()["usage"], "f16");
    let single = server.post_json(COMPLETIONS, &completion("int8")).ok();
    check(&single["usage"], "int8");
    let mut body = completion("int8");
    body["n"] = 3.into();
    let many = server.post_json(COMPLETIONS, &body).ok();
    check(&many["usage"], "int8");
    let logical = |answer: &Value| answer["usage"]["kvasir"]["logical_bytes"].as_u64().unwrap();
    assert_eq!(logical(&many), 3 * logical(&single));
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let events = server.post_json(COMPLETIONS, &body).events();
    assert_eq!(events.last().unwrap()["usage"]["kvasir"], many["usage"]["kvasir"]);
    let chat = json!({
        "messages": [{"role": "user", "content": PROMPT}], "kv_cache": "kivi2", "max_tokens": 24,
    });
    check(&server.post_json(CHAT, &chat).ok()["usage"], "kivi2");
    let counted = |recipe: &str| {
        let labels = format!(r#"model_name="mock",engine="0",recipe="{recipe}""#);
        server.metric(&format!("kvasir_sequences_by_recipe_total{{{labels}}}"))
    };
    assert_eq!([counted("f16"), counted("int8"), counted("kivi2")], [1.0, 7.0, 1.0]);
}

#[test]
fn recipes_that_cannot_be_used_are_400_and_named() {
    // Room for a sequence of about 350 tokens in f32.
    let server = start(180 << 10);
    let long = json!({"prompt": PROMPT, "kv_cache": "f32", "max_tokens": 300});
    let cases = [
        (completion("f15"), "unknown KV cache recipe 'f15' (known: f16, f32, int8, "),
        (completion("joint:7"), "a rate of '7' bits a channel"),
        (completion("joint3"), "the server must be started with them (`kvasir calibrate`"),
        (completion("auto"), "KV cache recipe 'auto' needs statistics"),
        (completion(7), "must be a string, got 7"),
        (long.clone(), "KV cache recipe 'f32': a sequence of "),
    ];
    for (mut body, what) in cases {
        for stream in [false, true] {
            body["stream"] = stream.into();
            body["n"] = 2.into();
            let reply = server.post_json(COMPLETIONS, &body);
            assert_eq!(reply.error(400).0.as_deref(), Some("kv_cache"), "{body}");
            assert!(reply.text().contains(what), "{}", reply.text());
        }
    }
    // Of several prompts the first are in the engine already when a later one is refused.
    let mut several = long;
    several["prompt"] = "a".into();
    check(&server.post_json(COMPLETIONS, &several).ok()["usage"], "f32");
    several["prompt"] = json!(["a", PROMPT]);
    assert_eq!(server.post_json(COMPLETIONS, &several).error(400).0.as_deref(), Some("kv_cache"));
    assert_eq!(server.metric("vllm:num_requests_running"), 0.0);
    assert_eq!(server.metric("vllm:num_requests_waiting{"), 0.0);
    check(&server.post_json(COMPLETIONS, &completion("f32")).ok()["usage"], "f32");
}
