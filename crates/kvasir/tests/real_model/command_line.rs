//! The commands on a real model, and on damaged ones.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::client::Served;
use crate::models::{self, kvasir};

fn fails(args: &[&str], code: i32, named: &str) {
    let output = kvasir(args).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
    let last = errors.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && last.contains(named), "{args:?}: {errors}");
}

#[test]
fn run_prints_json() {
    models::path("smollm2");
    let output = kvasir(&[
        "run",
        "--model",
        "smollm2",
        "--temperature",
        "0",
        "--max-tokens",
        "32",
        "The capital of France is",
        "--json",
    ])
    .output()
    .unwrap();
    assert!(output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["text"].as_str().unwrap().starts_with(" Paris."));
    assert_eq!(report["token_ids"][0], 7042);
    assert_eq!(report["usage"]["prompt_tokens"], 5);
    assert!(report["timings"]["generation_tokens_per_second"].as_f64().unwrap() > 0.0);
}

/// 4,000 tokens would take minutes: what is printed shows that the signal was heard.
#[test]
fn ctrl_c_ends_a_generation_cleanly() {
    models::path("smollm2");
    let args = ["run", "--ignore-eos", "--max-tokens", "4000", "--temperature", "0", "Once upon"];
    let mut child = kvasir(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 1]).unwrap();
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout.ends_with(b"\n") && output.stdout.len() < 2000);
}

#[test]
fn damaged_files_give_one_line() {
    let model = std::fs::read(models::path("smollm2")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let mut wrong_magic = model[..4096].to_vec();
    wrong_magic[..4].copy_from_slice(b"GGML");
    let mut huge = model[..4096].to_vec();
    huge[8..16].copy_from_slice(&(1u64 << 60).to_le_bytes());
    let mut architecture = model.clone();
    let at = architecture.windows(5).position(|w| w == b"llama").unwrap();
    architecture[at..at + 5].copy_from_slice(b"lhama");
    let mut tensor = model.clone();
    let at = tensor.windows(21).position(|w| w == b"blk.7.ffn_down.weight").unwrap();
    tensor[at..at + 5].copy_from_slice(b"xxx.7");
    let mut utf8 = model.clone();
    let at = utf8.windows(12).position(|w| w == b"general.type").unwrap();
    // Behind the key: type (4 bytes) and length (8), then the string "model".
    utf8[at + 24] = 0xFF;
    let cases = [
        (write("truncated.gguf", &model[..1000]), "damaged"),
        (write("half.gguf", &model[..model.len() / 2]), "damaged"),
        (write("magic.gguf", &wrong_magic), "not a model"),
        (write("huge.gguf", &huge), "damaged"),
        (write("architecture.gguf", &architecture), "unknown architecture 'lhama'"),
        (write("tensor.gguf", &tensor), "blk.7.ffn_down.weight"),
        (write("utf8.gguf", &utf8), "UTF-8"),
        (write("empty.gguf", b""), "not a model"),
    ];
    for (path, named) in &cases {
        fails(&["run", "--model", path, "hello"], 1, named);
    }
    fails(&["inspect", &cases[0].0], 1, "damaged");
    assert!(Path::new(&cases[0].0).exists());
}

#[test]
fn budgets_ports_and_flags() {
    models::path("smollm2");
    fails(&["run", "--kv-cache-memory", "100KiB", "hello"], 1, "cannot hold one sequence");
    let small = ["run", "--kv-cache-memory", "64MiB", "--max-model-len", "8192", "hello"];
    fails(&small, 1, "cannot hold one sequence of 8192 tokens");
    fails(&["run", "--max-model-len", "9000", "hello"], 1, "--max-model-len");
    let served = Served::start(&[]);
    let port = served.base.rsplit(':').next().unwrap().to_owned();
    fails(&["serve", "--port", &port], 1, &port);
    assert_eq!(served.get("/health").0, 200);
}

#[test]
fn sigterm_ends_the_server_cleanly() {
    let served = Served::start(&[]);
    let id = served.process_id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let status = served.ended();
    assert_eq!(status.code(), Some(0));
}
