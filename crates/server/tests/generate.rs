//! Chat and text completions over HTTP.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{gated, start};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(content: &str) -> Value {
    json!({"model": "mock", "messages": [{"role": "user", "content": content}]})
}

/// `usage.kvasir` of the scripted engine: a kibibyte for every token.
fn kv_usage(recipe: &str, tokens: usize) -> Value {
    let bytes = tokens * 1024;
    json!({"recipe": recipe, "logical_bytes": bytes, "physical_bytes": bytes, "ratio": 1.0})
}

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn chat_answers_with_what_was_said() {
    let server = start();
    let answer = server.post_json(CHAT, &chat("say:hello")).ok();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "mock");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(
        answer["choices"][0]["message"],
        json!({
            "role": "assistant", "content": "hello", "refusal": null
        })
    );
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["stop_reason"], Value::Null);
    let prompt = "user: say:hello\nassistant: ".len();
    assert_eq!(
        answer["usage"],
        json!({
            "prompt_tokens": prompt, "completion_tokens": 6, "total_tokens": prompt + 6,
            "prompt_tokens_details": {"cached_tokens": 0},
            "kvasir": kv_usage("f16", prompt + 6),
        })
    );
    // The second time, all whole blocks but the last token's are in the prefix cache.
    let again = server.post_json(CHAT, &chat("say:hello")).ok();
    let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached as usize, (prompt - 1) / 4 * 4);
}

#[test]
fn chat_stream_is_role_text_finish_usage_done() {
    let server = start();
    let mut body = chat("say:hi");
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let reply = server.post_json(CHAT, &body);
    assert_eq!(reply.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    let events = reply.events();
    let id = events[0]["id"].as_str().unwrap().to_owned();
    for event in &events {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["id"], id.as_str());
        assert!(event["created"].is_u64());
    }
    let seen: Vec<_> = events.iter().map(|event| (&event["choices"], &event["usage"])).collect();
    let choice = |delta: Value, finish: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]);
    let prompt = "user: say:hi\nassistant: ".len();
    let usage = json!({
        "prompt_tokens": prompt, "total_tokens": prompt + 3, "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
        "kvasir": kv_usage("f16", prompt + 3),
    });
    let expected = [
        (choice(json!({"role": "assistant", "content": ""}), Value::Null), Value::Null),
        (choice(json!({"content": "h"}), Value::Null), Value::Null),
        (choice(json!({"content": "i"}), Value::Null), Value::Null),
        (choice(json!({"content": ""}), "stop".into()), Value::Null),
        (json!([]), usage),
    ];
    let expected: Vec<_> = expected.iter().map(|(choices, usage)| (choices, usage)).collect();
    assert_eq!(seen, expected);
}

#[test]
fn a_stream_says_what_one_piece_says() {
    let server = start();
    let mut body = json!({"prompt": ["one", "two"], "n": 2, "seed": 5, "max_tokens": 12});
    let whole = texts(&server.post_json(COMPLETIONS, &body).ok());
    assert_eq!(whole.len(), 4);
    body["stream"] = true.into();
    let mut pieces = vec![String::new(); 4];
    for event in server.post_json(COMPLETIONS, &body).events() {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        pieces[index].push_str(choice["text"].as_str().unwrap());
    }
    assert_eq!(pieces, whole);
    assert_ne!(whole[0], whole[1]);
    assert_ne!(whole[0], whole[2]);
}

#[test]
fn completions_take_every_kind_of_prompt() {
    let server = start();
    let ask = |prompt: Value, special: bool| {
        let body = json!({"prompt": prompt, "max_tokens": 5, "temperature": 0,
                          "add_special_tokens": special});
        server.post_json(COMPLETIONS, &body).ok()
    };
    let text = ask(json!("ab"), false);
    let tokens = ask(json!([97, 98]), true);
    assert_eq!(text["object"], "text_completion");
    assert_eq!(texts(&text), texts(&tokens));
    assert_eq!(text["usage"]["prompt_tokens"], 2);
    assert_eq!(ask(json!("ab"), true)["usage"]["prompt_tokens"], 3);
    let lists = ask(json!([[97, 98], [99]]), false);
    assert_eq!(texts(&lists)[0], texts(&text)[0]);
    assert_eq!(texts(&ask(json!(["ab", "c"]), false)), texts(&lists));
    assert_eq!(lists["choices"][1]["finish_reason"], "length");
}

#[test]
fn default_limits_are_sixteen_tokens_and_the_rest_of_the_context() {
    let server = start();
    let answer = server.post_json(COMPLETIONS, &json!({"prompt": "ab"})).ok();
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    let answer = server.post_json(CHAT, &chat("hm")).ok();
    assert_eq!(answer["usage"]["total_tokens"], 4096);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let mut body = chat("hm");
    body["max_tokens"] = 9.into();
    body["max_completion_tokens"] = 4.into();
    assert_eq!(server.post_json(CHAT, &body).ok()["usage"]["completion_tokens"], 4);
}

#[test]
fn stop_conditions_are_reported() {
    let server = start();
    let ask = |extra: Value| {
        let mut body = json!({"prompt": "say:one two three", "max_tokens": 50});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.post_json(COMPLETIONS, &body).ok()["choices"][0].clone()
    };
    let by_text = ask(json!({"stop": [" t", "zzz"]}));
    assert_eq!((&by_text["text"], &by_text["stop_reason"]), (&json!("one"), &json!(" t")));
    let kept = ask(json!({"stop": " t", "include_stop_str_in_output": true}));
    assert_eq!(kept["text"], "one t");
    let by_token = ask(json!({"stop_token_ids": [b'e']}));
    assert_eq!((&by_token["text"], &by_token["stop_reason"]), (&json!("one"), &json!(101)));
    let on = ask(json!({"ignore_eos": true, "max_tokens": 20}));
    assert_eq!(on["finish_reason"], "length");
}

#[test]
fn logprobs_in_both_shapes() {
    let server = start();
    let mut body = chat("say:ab");
    body["logprobs"] = true.into();
    body["top_logprobs"] = 2.into();
    let content = server.post_json(CHAT, &body).ok()["choices"][0]["logprobs"]["content"].clone();
    assert_eq!(
        content[0],
        json!({
            "token": "a", "logprob": -0.5, "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "b", "logprob": -1.5, "bytes": [98]},
            ],
        })
    );
    assert_eq!(content[2]["token"], "<eos>");
    let body = json!({"prompt": "say:ab", "logprobs": 1, "prompt_logprobs": 1,
                      "return_token_ids": true, "add_special_tokens": false});
    let choice = server.post_json(COMPLETIONS, &body).ok()["choices"][0].clone();
    assert_eq!(
        choice["logprobs"],
        json!({
            "text_offset": [0, 1, 2], "token_logprobs": [-0.5, -0.5, -0.5],
            "tokens": ["a", "b", "<eos>"],
            "top_logprobs": [{"a": -0.5}, {"b": -0.5}, {"<eos>": -0.5}],
        })
    );
    assert_eq!(choice["token_ids"], json!([97, 98, 256]));
    assert_eq!(choice["prompt_token_ids"], json!("say:ab".as_bytes()));
    assert_eq!(choice["prompt_logprobs"][0], Value::Null);
    assert_eq!(
        choice["prompt_logprobs"][1]["97"],
        json!({
            "logprob": -0.5, "rank": 1, "decoded_token": "a"
        })
    );
    let plain = server.post_json(COMPLETIONS, &json!({"prompt": "x"})).ok()["choices"][0].clone();
    assert_eq!(plain["logprobs"], Value::Null);
    assert_eq!(plain.get("token_ids"), None);
}

#[test]
fn echo_scores_a_prompt() {
    let server = start();
    let body = json!({"prompt": "abc", "echo": true, "max_tokens": 0, "logprobs": 0,
                      "add_special_tokens": false});
    let answer = server.post_json(COMPLETIONS, &body).ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "abc");
    assert_eq!(choice["logprobs"]["tokens"], json!(["a", "b", "c"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    // From token ids, the echo is their text.
    let body = json!({"prompt": [97, 98], "echo": true, "max_tokens": 1});
    let text = server.post_json(COMPLETIONS, &body).ok()["choices"][0]["text"].clone();
    assert!(text.as_str().unwrap().starts_with("ab") && text.as_str().unwrap().len() == 3);
}

#[test]
fn seeds_repeat_and_differ() {
    let server = start();
    let ask = |seed: i64| {
        let body = json!({"prompt": "x", "seed": seed, "max_tokens": 20});
        texts(&server.post_json(COMPLETIONS, &body).ok())
    };
    assert_eq!(ask(7), ask(7));
    assert_ne!(ask(7), ask(-7));
}

#[test]
fn everything_asked_reaches_the_engine() {
    let server = start();
    let mut body = chat("say:x");
    for (name, value) in json!({
        "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.25, "logit_bias": {"97": 5},
        "min_tokens": 1, "skip_special_tokens": false, "cache_salt": "tenant",
        "chat_template_kwargs": {"enable_thinking": false}, "unknown_field": [1, 2],
        "user": "u", "tool_choice": "auto", "tools": [{"type": "function"}],
    })
    .as_object()
    .unwrap()
    {
        body[name] = value.clone();
    }
    server.post_json(CHAT, &body).ok();
    let request = server.control.wait(|state| !state.added.is_empty(), |s| s.added[0].clone());
    assert_eq!(request.params.temperature, 0.25);
    assert_eq!(request.params.top_k, 7);
    assert_eq!(request.params.logit_bias, [(97, 5.0)]);
    assert!(!request.params.skip_special_tokens);
    assert_eq!(request.params.max_tokens, None);
    assert_eq!(request.cache_salt.as_deref(), Some("tenant"));
    let prompt: Vec<u8> = request.prompt.iter().map(|token| *token as u8).collect();
    assert!(String::from_utf8(prompt).unwrap().contains("tool: {"));
}

#[test]
fn continues_a_final_message() {
    let server = start();
    let body = json!({
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "continue_final_message": true, "add_generation_prompt": false, "max_tokens": 1,
    });
    server.post_json(CHAT, &body).ok();
    let prompt = server.control.wait(|s| !s.added.is_empty(), |s| s.added[0].prompt.clone());
    assert_eq!(prompt.last(), Some(&u32::from(b'b')));
}

#[test]
fn many_streams_at_once_are_not_mixed_up() {
    let server = start();
    std::thread::scope(|scope| {
        for client in 0..32 {
            let server = &server;
            scope.spawn(move || {
                let said = format!("client {client} speaks");
                let mut body = chat(&format!("say:{said}"));
                body["stream"] = true.into();
                let events = server.post_json(CHAT, &body).events();
                let text: String = events
                    .iter()
                    .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
                    .collect();
                assert_eq!(text, said);
            });
        }
    });
    assert_eq!(server.get("/load").ok()["server_load"], 0);
    let aborted = server.control.wait(|state| state.unfinished == 0, |s| s.aborted.len());
    assert_eq!(aborted, 0);
}

#[test]
fn tokens_leave_as_they_are_made() {
    let server = gated();
    let mut body = chat("say:abc");
    body["stream"] = true.into();
    let mut stream = server.open("POST", CHAT, &[], body.to_string().as_bytes());
    server.control.permit(1);
    stream.read_until(r#""content":"a""#);
    server.control.permit(1);
    stream.read_until(r#""content":"b""#);
    server.control.open_gate();
    assert!(stream.finish().text().ends_with("data: [DONE]\n\n"));
}
