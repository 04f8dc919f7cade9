//! A `kvasir serve` process and a blocking client for it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::models::kvasir;

/// A server of SmolLM2 on a free port; stopped when dropped.
pub struct Served {
    process: Child,
    pub base: String,
    agent: ureq::Agent,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Served {
    /// Starts it and waits until it says that it is ready.
    pub fn start(args: &[&str]) -> Self {
        crate::models::path("smollm2");
        let mut command = kvasir(&["serve", "smollm2", "--port", "0"]);
        let mut process =
            command.args(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut seen = Vec::new();
        let base = loop {
            let Some(Ok(line)) = lines.next() else { panic!("the server ended: {seen:#?}") };
            if let Some(at) = line.find("ready: ") {
                break line[at + 7..].trim().trim_end_matches("/v1").to_owned();
            }
            seen.push(line);
        };
        // Nobody reading would block the server at a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(600)))
            .build()
            .into();
        Self { process, base, agent }
    }

    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Waits for the process to end by itself.
    pub fn ended(mut self) -> std::process::ExitStatus {
        self.process.wait().unwrap()
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        let mut response = self.agent.get(format!("{}{path}", self.base)).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    pub fn post(&self, path: &str, body: &str) -> (u16, Value) {
        let request = self.agent.post(format!("{}{path}", self.base));
        let mut response =
            request.header("Content-Type", "application/json").send(body.as_bytes()).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        (response.status().as_u16(), body)
    }

    /// Reads a streamed completion event by event; `on_event` says whether to go on. Stopping early
    /// hangs up.
    pub fn stream(&self, body: &Value, mut on_event: impl FnMut(&Value) -> bool) {
        let request = self.agent.post(format!("{}/v1/completions", self.base));
        let mut response = request
            .header("Content-Type", "application/json")
            .send(body.to_string().as_bytes())
            .unwrap();
        assert_eq!(response.status().as_u16(), 200, "{body}");
        for line in BufReader::new(response.body_mut().as_reader()).lines() {
            let line = line.unwrap();
            match line.strip_prefix("data: ") {
                Some("[DONE]") => return,
                Some(event) => {
                    let event: Value = serde_json::from_str(event).unwrap();
                    assert!(event.get("error").is_none(), "{event}");
                    if !on_event(&event) {
                        return;
                    }
                }
                None => {}
            }
        }
        panic!("the stream ended without [DONE]");
    }

    /// A greedy streamed completion: token ids, text, finish reason.
    pub fn complete(&self, job: &Job, salt: &str) -> (Vec<u64>, String, String) {
        let body = json!({
            "model": "smollm2",
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "return_token_ids": true,
            "cache_salt": salt,
        });
        let (mut tokens, mut text, mut finish) = (Vec::new(), String::new(), String::new());
        self.stream(&body, |event| {
            let choice = &event["choices"][0];
            text.push_str(choice["text"].as_str().unwrap_or_default());
            let new = choice["token_ids"].as_array().into_iter().flatten();
            tokens.extend(new.filter_map(Value::as_u64));
            finish.push_str(choice["finish_reason"].as_str().unwrap_or_default());
            true
        });
        (tokens, text, finish)
    }

    /// A value of `/metrics`, summed over its labels.
    pub fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let lines =
            text.lines().filter(|l| l.strip_prefix(name).is_some_and(|l| l.starts_with('{')));
        let values: Vec<f64> =
            lines.map(|l| l.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        assert!(!values.is_empty(), "no {name} in\n{text}");
        values.iter().sum()
    }

    /// Asks for `/metrics` until `holds`; gives up after a minute.
    pub fn wait_until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = std::time::Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
            std::thread::yield_now();
        }
    }
}

/// A completion to ask for.
#[derive(Debug, Clone)]
pub struct Job {
    pub prompt: String,
    pub max_tokens: usize,
}

/// `n` prompts of mixed length cut from English text.
pub fn jobs(n: usize) -> Vec<Job> {
    let text = include_str!("../../../../LICENSE");
    (0..n)
        .map(|i| {
            let start = (i * 487) % (text.len() - 1200);
            let end = start + 40 + (i * 211) % 700;
            let job = Job { prompt: text[start..end].to_owned(), max_tokens: 16 + (i * 29) % 55 };
            assert!(text.is_ascii(), "cut at any byte");
            job
        })
        .collect()
}
