//! Many clients, a small budget, clients that leave.

use serde_json::{Value, json};

use crate::client::{Served, jobs};

const BUDGET: f64 = (64 << 20) as f64;

/// 64 requests at once against 64 MiB, which holds 2,880 of their 8,500 tokens.
#[test]
fn a_crowd_in_a_small_budget_gets_what_each_would_get_alone() {
    let served = Served::start(&["--kv-cache-memory", "64MiB"]);
    let jobs = jobs(64);
    let crowd: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> =
            jobs.iter().map(|job| scope.spawn(|| served.complete(job, "crowd"))).collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    let preemptions = served.metric("vllm:num_preemptions_total");
    assert!(preemptions > 0.0, "the budget was meant to be too small");
    assert!(served.metric("kvasir_kv_peak_physical_bytes") <= BUDGET);
    for (job, (tokens, text, finish)) in jobs.iter().zip(crowd) {
        assert_eq!((tokens.len(), finish.as_str()), (job.max_tokens, "length"));
        // Another salt: nothing of the crowd's blocks is reused.
        let alone = served.complete(job, "alone");
        assert_eq!((tokens, text), (alone.0, alone.1), "{:?}", job.prompt);
    }
    assert_eq!(served.metric("vllm:num_requests_running"), 0.0);
    let success = served.metric("vllm:request_success_total");
    assert_eq!(success, 128.0);
    let (status, _) = served.post("/reset_prefix_cache", "");
    assert_eq!(status, 200);
    served.wait_until("an empty pool", |s| s.metric("kvasir_kv_physical_bytes") == 0.0);
    eprintln!("{preemptions} preemptions");
}

#[test]
fn a_client_that_hangs_up_frees_its_blocks() {
    let served = Served::start(&["--no-enable-prefix-caching"]);
    let body = json!({
        "model": "smollm2", "prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": true,
        "stream": true,
    });
    let mut events = 0;
    served.stream(&body, |_| {
        events += 1;
        events < 3
    });
    served.wait_until("an abandoned request is dropped", |s| {
        s.metric("vllm:num_requests_running") == 0.0
    });
    assert_eq!(served.metric("kvasir_kv_physical_bytes"), 0.0);
    assert!(served.metric("vllm:generation_tokens_total") < 4000.0);
}

#[test]
fn bad_requests_get_one_clear_line_and_the_server_stays_up() {
    let served = Served::start(&["--max-model-len", "256"]);
    let long = "word ".repeat(400);
    let cases = [
        (json!({"prompt": long, "max_tokens": 1}).to_string(), 400, "256"),
        ("{\"prompt\": ".to_owned(), 400, "line 1"),
        (json!({"prompt": "a", "temperature": "hot"}).to_string(), 400, "temperature"),
        (json!({"prompt": "a", "top_p": 7}).to_string(), 400, "top_p"),
        (json!({"prompt": "a", "model": "gpt-5"}).to_string(), 404, "gpt-5"),
        (json!({"prompt": [99_999_999]}).to_string(), 400, "99999999"),
    ];
    for (body, status, named) in cases {
        let (got, answer) = served.post("/v1/completions", &body);
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert_eq!(got, status, "{body:.80}: {answer}");
        assert!(message.contains(named) && !message.contains('\n'), "{body:.80}: {message}");
    }
    let (status, _) = served.post("/v1/chat/completions", "{\"messages\": 7}");
    assert_eq!(status, 400);
    assert_eq!(served.get("/nothing").0, 404);
    let (status, answer) =
        served.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 3}).to_string());
    assert_eq!((status, &answer["usage"]["completion_tokens"]), (200, &Value::from(3)));
}

#[test]
fn resident_memory_at_idle_is_below_350_mib() {
    let served = Served::start(&[]);
    let (status, _) =
        served.post("/v1/completions", &json!({"prompt": "Hello", "max_tokens": 8}).to_string());
    assert_eq!(status, 200);
    // Linux only, like /proc.
    let Ok(text) = std::fs::read_to_string(format!("/proc/{}/status", served.process_id())) else {
        return;
    };
    let resident = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    let kib: usize = resident.trim().trim_end_matches(" kB").parse().unwrap();
    eprintln!("{} MiB resident", kib / 1024);
    assert!(kib < 350 << 10, "{kib} KiB");
}
