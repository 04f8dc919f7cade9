//! The command line as a user meets it: help, mistakes, exit codes, `inspect`.
// unwrap: in the helpers, where a failure is a failed test.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const COMMANDS: [&str; 6] = ["serve", "chat", "run", "pull", "inspect", "calibrate"];

fn kvasir(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasir"));
    command
        .args(args)
        .stdin(Stdio::null())
        // Nothing here may fetch anything.
        .env("KVASIR_HOME", "/dev/null/none")
        .env("KVASIR_PYTHON", "no-such-python")
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env_remove("KVASIR_API_KEY");
    command
}

fn run(args: &[&str]) -> Output {
    kvasir(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The command fails with code 1 and says so in one line, which is returned.
fn one_line_error(args: &[&str]) -> String {
    let output = run(args);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
    assert!(output.stdout.is_empty(), "{args:?}: {}", stdout(&output));
    let lines: Vec<&str> = error.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{args:?}: {error}");
    assert_eq!(error.lines().last(), lines.first().copied(), "{args:?}: {error}");
    assert!(!error.contains("panicked") && !error.contains("backtrace"), "{error}");
    lines[0].to_owned()
}

#[test]
fn every_help_has_examples_that_parse() {
    let top = run(&["--help"]);
    assert!(top.status.success());
    let help = stdout(&top);
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is missing from:\n{help}");
        for flag in ["--help", "-h"] {
            let output = run(&[command, flag]);
            assert!(output.status.success());
            let help = stdout(&output);
            assert!(help.contains("Examples:\n"), "{command} {flag}:\n{help}");
            assert!(help.contains(&format!("  kvasir {command}")), "{command} {flag}:\n{help}");
        }
    }
}

#[test]
fn version() {
    let output = run(&["--version"]);
    assert_eq!(stdout(&output), format!("kvasir {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_ends_with_2() {
    for args in [
        &[][..],
        &["fly"],
        &["--fly"],
        &["pull"],
        &["run"],
        &["run", "a", "b"],
        &["run", "a", "--temperature", "hot"],
        &["run", "a", "--block-size", "17"],
        &["run", "a", "--kv-cache", "f12"],
        &["run", "a", "--kv-cache-memory", "0"],
        &["chat", "--json"],
        &["calibrate", "--block-size", "17"],
        &["calibrate", "--tokens-per-text", "0"],
        &["serve", "a", "--model", "b"],
        &["serve", "--port", "65536"],
        &["serve", "--log-level", "loud"],
        &["serve", "--api-key", ""],
        &["inspect"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(stderr(&output).contains("--help"), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn an_unknown_model_is_answered_with_the_known_ones() {
    for args in [
        &["pull", "gpt-9"][..],
        &["run", "--model", "gpt-9", "hello"],
        &["chat", "--model", "gpt-9"],
        &["serve", "gpt-9", "--port", "0"],
        &["inspect", "gpt-9"],
    ] {
        let error = one_line_error(args);
        for part in ["'gpt-9'", "smollm2", "gemma3-270m", "hf:OWNER/REPO/FILE"] {
            assert!(error.contains(part), "{args:?}: {error}");
        }
    }
}

#[test]
fn mistakes_are_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.gguf");
    fs::write(&text, "this is no model").unwrap();
    let text = text.to_str().unwrap();
    for (args, part) in [
        (&["pull", "hf:only/two"][..], "hf:OWNER/REPO/FILE"),
        (&["pull", "./none.gguf"], "there is no file or folder './none.gguf'"),
        (&["pull", "smollm2"], "KVASIR_HOME"),
        (&["inspect", text], "text.gguf"),
        (&["run", "--model", text, "hello"], "text.gguf"),
        (&["chat", "--model", text], "text.gguf"),
        (&["serve", text, "--port", "0"], "text.gguf"),
        (&["serve", text, "--chat-template", "none.jinja"], "chat template none.jinja"),
        (&["serve", text, "--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ] {
        let error = one_line_error(args);
        assert!(error.contains(part), "{args:?}: {error}");
    }
}

#[test]
fn a_port_in_use_is_said_before_the_model_is_read() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let error = one_line_error(&["serve", "gpt-9", "--port", &port]);
    assert!(error.contains(&format!("127.0.0.1:{port}")), "{error}");
}

#[test]
fn a_prompt_on_stdin_must_be_text() {
    let mut child =
        kvasir(&["run", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\xff\xfe").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("stdin is not UTF-8"), "{}", stderr(&output));
}

/// A GGUF file of two keys in `general`, the shape of an attention, a vocabulary, and one tensor
/// of 2 × 3 f32 values.
fn write_gguf(path: &Path) {
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let key = |name: &str, ty: u32| [string(name), ty.to_le_bytes().to_vec()].concat();
    let uint = |name: &str, value: u32| [key(name, 4), value.to_le_bytes().to_vec()].concat();
    let mut file = Vec::new();
    file.extend(b"GGUF");
    file.extend(3_u32.to_le_bytes());
    file.extend(1_u64.to_le_bytes());
    file.extend(7_u64.to_le_bytes());
    file.extend([key("general.architecture", 8), string("llama")].concat());
    file.extend([key("general.name", 8), string("tiny \u{1b}[31mred")].concat());
    file.extend(uint("llama.block_count", 2));
    file.extend(uint("llama.embedding_length", 64));
    file.extend(uint("llama.attention.head_count", 4));
    file.extend(uint("llama.attention.head_count_kv", 1));
    file.extend(key("tokenizer.ggml.tokens", 9));
    file.extend(8_u32.to_le_bytes());
    file.extend(2_u64.to_le_bytes());
    file.extend([string("a"), string("b")].concat());
    file.extend(string("token_embd.weight"));
    file.extend(2_u32.to_le_bytes());
    file.extend(3_u64.to_le_bytes());
    file.extend(2_u64.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    file.extend(0_u64.to_le_bytes());
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend([0; 24]);
    fs::write(path, file).unwrap();
}

#[test]
fn inspect_shows_metadata_tensors_and_cache_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write_gguf(&path);
    let path = path.to_str().unwrap();

    let output = run(&["inspect", path, "--json", "--tensors"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["gguf_version"], 3);
    assert_eq!(json["architecture"], "llama");
    assert_eq!(json["parameters"], 6);
    assert_eq!(json["tensor_count"], 1);
    assert_eq!(json["tensor_bytes"], 24);
    assert_eq!(json["tensor_types"]["F32"]["count"], 1);
    // 2 layers × 1 KV head × (16 + 16) values × 2 bytes.
    assert_eq!(json["kv_cache"]["bytes_per_token_f16"], 128);
    assert_eq!(json["metadata"]["tokenizer.ggml.tokens"]["length"], 2);
    assert_eq!(json["tensors"][0]["name"], "token_embd.weight");
    assert_eq!(json["tensors"][0]["shape"], serde_json::json!([2, 3]));

    let plain = stdout(&run(&["inspect", path]));
    assert!(plain.contains("128 bytes per token"), "{plain}");
    assert!(plain.contains("[2 × string]"), "{plain}");
    assert!(!plain.contains('\u{1b}'), "{plain:?}");
    assert!(!plain.contains("token_embd.weight"), "{plain}");
    let with_tensors = stdout(&run(&["inspect", path, "--tensors"]));
    assert!(with_tensors.contains("token_embd.weight"), "{with_tensors}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    write_gguf(&path);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = kvasir(&["inspect", path.to_str().unwrap()]).stdout(writer).output().unwrap();
    assert!(output.status.success());
    assert_eq!(stderr(&output), "");
}
