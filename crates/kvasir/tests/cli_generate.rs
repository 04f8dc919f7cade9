//! `run`, `chat` and `serve` on a tiny random model: gibberish, but always the same.
// unwrap: in the helpers, where a failure is a failed test.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use kvasir_model::testkit::{TINY_CONTEXT, tiny_gguf};
use serde_json::{Value, json};

struct Tiny {
    folder: tempfile::TempDir,
}

impl Tiny {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tiny.gguf"), tiny_gguf(1).build()).unwrap();
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tiny.gguf")
    }

    fn kvasir(&self, command: &str, args: &[&str]) -> Command {
        let mut kvasir = Command::new(env!("CARGO_BIN_EXE_kvasir"));
        kvasir
            .arg(command)
            .arg("--model")
            .arg(self.path())
            .args(["--threads", "1"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env_remove("KVASIR_API_KEY");
        kvasir
    }

    fn run(&self, args: &[&str], stdin: &str) -> Output {
        self.output("run", args, stdin)
    }

    fn output(&self, command: &str, args: &[&str], stdin: &str) -> Output {
        let mut child = self.kvasir(command, args).spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn run_json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--json"]].concat(), "");
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn run_prints_one_json_object() {
    let tiny = Tiny::new();
    let args = ["hello", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"];
    let json = tiny.run_json(&args);
    assert_eq!(json["model"], tiny.path().to_str().unwrap());
    assert_eq!(json["prompt"], "hello");
    assert_eq!(json["finish_reason"], "length");
    assert_eq!(
        json["usage"],
        json!({ "prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17 })
    );
    assert_eq!(json["token_ids"].as_array().unwrap().len(), 12);
    for name in [
        "load_s",
        "prompt_s",
        "prompt_tokens_per_second",
        "generation_s",
        "generation_tokens_per_second",
        "time_to_first_token_s",
    ] {
        assert!(json["timings"][name].as_f64().unwrap() > 0.0, "{name}: {json}");
    }
    assert!(json["kv"]["logical_bytes"].as_u64().unwrap() > 0, "{json}");
    assert!(json["kv"]["physical_bytes"].as_u64().unwrap() > 0, "{json}");

    let again = tiny.run_json(&args);
    assert_eq!(again["token_ids"], json["token_ids"]);
    // Streamed text is the same text and a line ending; stdin is the same prompt.
    let text = format!("{}\n", json["text"].as_str().unwrap());
    assert_eq!(stdout(&tiny.run(&args, "")), text);
    let from_stdin = [&["-"], &args[1..]].concat();
    assert_eq!(stdout(&tiny.run(&from_stdin, "hello\n")), text);
}

#[test]
fn seeds_repeat_and_differ() {
    let tiny = Tiny::new();
    let sample = |seed: &str| {
        let args =
            ["a", "--temperature", "1", "--max-tokens", "16", "--ignore-eos", "--seed", seed];
        tiny.run_json(&args)["token_ids"].clone()
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
}

#[test]
fn requests_that_cannot_run_are_one_line() {
    let tiny = Tiny::new();
    let long = "x".repeat(TINY_CONTEXT + 1);
    for (args, part) in [
        (&[long.as_str()][..], "513 tokens"),
        (&[""], "prompt is empty"),
        (&["x", "--temperature", "-1"], "temperature"),
        (&["x", "--kv-cache-memory", "1KiB"], "--kv-cache-memory"),
    ] {
        let output = tiny.run(args, "");
        assert_eq!(output.status.code(), Some(1));
        let error = stderr(&output);
        assert!(error.starts_with("error: ") && error.contains(part), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn chat_takes_piped_lines_and_reuses_the_prefix() {
    let tiny = Tiny::new();
    let args = ["--temperature", "0", "--max-tokens", "6", "--block-size", "16"];
    let lines = "a first message that fills a block or two of the cache\n/stats\n\nand \
                 another\n/stats\n/reset\n/system be brief\n/nothing\n/help\n/exit\nnever said\n";
    let output = tiny.output("chat", &args, lines);
    assert!(output.status.success(), "{}", stderr(&output));
    let out = stdout(&output);
    let found: Vec<&str> = out.lines().filter(|line| line.starts_with("prefix cache")).collect();
    assert_eq!(found.len(), 2, "{out}");
    assert!(found[0].starts_with("prefix cache  0 of "), "{out}");
    assert!(!found[1].starts_with("prefix cache  0 of "), "{out}");
    assert!(out.contains("/reset         begin again"), "{out}");
    let notes = stderr(&output);
    assert!(notes.contains("unknown command /nothing"), "{notes}");
    assert_eq!(notes.matches("(a new conversation)").count(), 2, "{notes}");
}

#[test]
fn chat_without_a_terminal_ends_at_the_first_error() {
    let tiny = Tiny::new();
    let output = tiny.output("chat", &[], &format!("{}\n/help\n", "x".repeat(TINY_CONTEXT)));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("error: the prompt has"), "{}", stderr(&output));
    assert!(output.stdout.is_empty());
}

/// A server on a free port, ready.
struct Served {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
    url: String,
}

impl Served {
    fn start(tiny: &Tiny, args: &[&str]) -> Self {
        let mut child = tiny.kvasir("serve", &[args, &["--port", "0"]].concat()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let url = loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "the server ended early");
            if let Some((_, url)) = line.split_once("ready: ") {
                break url.split("/v1").next().unwrap().to_owned();
            }
        };
        Self { child, log, url }
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let mut response = ureq::post(format!("{}{path}", self.url))
            .header("Authorization", "Bearer key")
            .header("Content-Type", "application/json")
            .config()
            .proxy(None)
            .build()
            .send(body.to_string())
            .unwrap();
        serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap()
    }

    /// Ends the server as a service manager does; returns its exit code and the rest of its log.
    fn stop(mut self) -> (Option<i32>, String) {
        signal(&self.child, "TERM");
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Not running any more after `stop`.
        let _ = self.child.kill();
    }
}

#[test]
fn serve_answers_as_run_does_and_drains() {
    let tiny = Tiny::new();
    let args = ["hello", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"];
    let expected = tiny.run_json(&args);
    let served =
        Served::start(&tiny, &["--api-key", "key", "--served-model-name", "tiny", "alias"]);
    let request = json!({
        "model": "alias", "prompt": "hello", "temperature": 0, "max_tokens": 12, "ignore_eos": true,
    });
    let answer = served.post("/v1/completions", &request);
    assert_eq!(answer["choices"][0]["text"], expected["text"]);
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    let (code, log) = served.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains('\u{1b}'), "colours in a pipe: {log}");
}

#[test]
fn serve_takes_a_chat_template() {
    let tiny = Tiny::new();
    let template = tiny.folder.path().join("template.jinja");
    fs::write(&template, "{{ messages[0].content }}!").unwrap();
    let template = path_text(&template);
    let served = Served::start(&tiny, &["--chat-template", template, "--log-json"]);
    let message = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    assert_eq!(served.post("/tokenize", &message)["tokens"], json!([b'h', b'i', b'!']));
    assert_eq!(served.stop().0, Some(0));

    fs::write(template, "{% if %}").unwrap();
    let args = ["--chat-template", template, "--port", "0"];
    let output = tiny.output("serve", &args, "");
    assert_eq!(output.status.code(), Some(1));
    let error = stderr(&output);
    assert!(error.lines().last().unwrap().starts_with("error: chat template"), "{error}");
}

fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}
