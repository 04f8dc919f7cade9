//! The program on a tiny random model.
// Compiled into several test binaries, none of which uses all of it; a failure in a helper is a failed test.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use kvasir_model::testkit::tiny_gguf;
use serde_json::Value;

/// Writes the model; its path.
pub fn tiny(folder: &Path) -> String {
    let path = folder.join("tiny.gguf");
    fs::write(&path, tiny_gguf(1).build()).unwrap();
    path.to_str().unwrap().to_owned()
}

pub fn kvasir(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvasir"));
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_remove("KVASIR_API_KEY")
        .env_remove("OPENAI_API_KEY");
    command
}

pub fn run(args: &[&str]) -> Output {
    kvasir(args).output().unwrap()
}

pub fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What a command that must fail said.
pub fn error(output: &Output) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    text
}

/// Ends with the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server that is ready, where it is, and its log.
pub fn serve(args: &[&str]) -> (Running, String, BufReader<ChildStderr>) {
    let mut served = Running(
        kvasir(&["serve"]).args(args).args(["--port", "0", "--threads", "1"]).spawn().unwrap(),
    );
    let mut log = BufReader::new(served.0.stderr.take().unwrap());
    let url = loop {
        let mut line = String::new();
        assert!(log.read_line(&mut line).unwrap() > 0, "the server ended early");
        if let Some((_, url)) = line.split_once("ready: ") {
            break url.trim().to_owned();
        }
    };
    (served, url, log)
}
