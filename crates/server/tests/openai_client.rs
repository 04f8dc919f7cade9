//! The official `openai` client for Python against the scripted engine. Runs where Python has
//! that package; `KVASIR_TEST_PYTHON` names the interpreter.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{MODEL, start, start_with, with_keys};
use kvasir_server::testkit::MockConfig;

fn python() -> Option<String> {
    let python = std::env::var("KVASIR_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import openai"]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    eprintln!("skipped: {python} cannot import openai (KVASIR_TEST_PYTHON names another)");
    None
}

fn run(python: &str, base_url: &str, key: Option<&str>) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/python/openai_client.py");
    let mut command = Command::new(python);
    command.arg(script).args([base_url, MODEL]);
    if let Some(key) = key {
        command.args(["--api-key", key]);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    assert!(text.contains(" passed, 0 failed"));
}

#[test]
fn the_official_client_is_content() {
    let Some(python) = python() else { return };
    let server = start();
    run(&python, &format!("http://{}/v1", server.addr), None);
    let server = start_with(with_keys(&["secret-key"]), MockConfig::default());
    run(&python, &format!("http://{}/v1", server.addr), Some("secret-key"));
}
