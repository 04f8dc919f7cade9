//! `calibrate`, and what other commands make of its file, on a tiny random model.
// unwrap: in the helpers, where a failure is a failed test.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use kvasir_model::testkit::tiny_gguf;
use serde_json::Value;

struct Tiny {
    folder: tempfile::TempDir,
}

impl Tiny {
    fn new() -> Self {
        let tiny = Self { folder: tempfile::tempdir().unwrap() };
        fs::write(tiny.path("tiny.gguf"), tiny_gguf(1).build()).unwrap();
        tiny
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn kvasir(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_kvasir"))
            .args(args)
            .args(["--model", "tiny.gguf", "--threads", "1"])
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Stdout and stderr of a command that does what it should.
    fn done(&self, args: &[&str]) -> (String, String) {
        let output = self.kvasir(args);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{args:?}: {stderr}");
        (stdout, stderr)
    }

    fn calibrate_json(&self, args: &[&str]) -> Value {
        let (stdout, stderr) = self.done(&[&["calibrate", "--json"], args].concat());
        assert_eq!(stderr, "");
        serde_json::from_str(&stdout).unwrap()
    }

    /// The one line that a command fails with.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.kvasir(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: "), "{args:?}: {stderr}");
        stderr
    }
}

const RUN: [&str; 8] =
    ["run", "hello", "--temperature", "0", "--max-tokens", "80", "--ignore-eos", "--kv-cache"];

fn run(recipe: &str) -> Vec<&str> {
    [&RUN[..], &[recipe]].concat()
}

#[test]
fn calibrate_says_what_it_wrote_and_where() {
    let tiny = Tiny::new();
    let report = tiny.calibrate_json(&[]);
    assert_eq!(report["path"], "tiny.gguf.b32.kvstats");
    assert_eq!(report["corpus"], "embedded");
    assert_eq!((&report["layers"], &report["block_size"]), (&2.into(), &32.into()));
    // 18 texts of 384 tokens, each without its first block.
    assert_eq!(report["tokens"], 18 * (384 - 32));
    assert!(report["seconds"].as_f64().unwrap() > 0.0);
    for part in ["keys", "values"] {
        let share = report["first_quarter_energy"][part].as_f64().unwrap();
        assert!((0.25..=1.0).contains(&share), "{report}");
    }
    let bytes = fs::metadata(tiny.path("tiny.gguf.b32.kvstats")).unwrap().len();
    assert_eq!(report["bytes"], bytes);

    let args = ["--block-size", "16", "--tokens-per-text", "100", "--out", "out.kvstats"];
    let report = tiny.calibrate_json(&args);
    assert_eq!((&report["path"], &report["tokens"]), (&"out.kvstats".into(), &(18 * 84).into()));
    assert!(tiny.path("out.kvstats").exists() && !tiny.path("tiny.gguf.b16.kvstats").exists());

    let (text, _) = tiny.done(&["calibrate"]);
    let lines: Vec<&str> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(lines, ["file", "corpus", "model", "energy"], "{text}");
}

#[test]
fn mistakes_are_told_in_a_line() {
    let tiny = Tiny::new();
    fs::write(tiny.path("short.txt"), "too short to show anything").unwrap();
    let error = tiny.fails(&["calibrate", "--corpus", "short.txt"]);
    assert!(
        error.contains("on corpus short.txt (texts: 1; tokens measured of each: at most 352)"),
        "{error}"
    );
    assert!(error.contains("0 tokens are too few to show 32 directions"), "{error}");
    fs::write(tiny.path("empty.jsonl"), "").unwrap();
    assert!(tiny.fails(&["calibrate", "--corpus", "empty.jsonl"]).contains("texts: 0"));
    let error = tiny.fails(&["calibrate", "--corpus", "none.txt"]);
    assert!(error.contains("cannot read corpus none.txt"), "{error}");
    let error = tiny.fails(&["calibrate", "--tokens-per-text", "4k"]);
    assert!(error.contains("the model's context is 512 tokens"), "{error}");
    let error = tiny.fails(&["calibrate", "--out", "none/a.kvstats"]);
    assert!(error.contains("there is no folder none"), "{error}");
    assert_eq!(fs::read_dir(tiny.folder.path()).unwrap().count(), 3);
}

#[test]
fn joint_recipes_calibrate_once() {
    let tiny = Tiny::new();
    let file = tiny.path("tiny.gguf.b32.kvstats");
    tiny.done(&run("f16"));
    assert!(!file.exists());
    let first = tiny.done(&run("joint:4"));
    assert_eq!(first.1, "");
    let written = fs::read(&file).unwrap();
    // The same text with the same statistics, which are not written again.
    assert_eq!(tiny.done(&run("joint:4")), first);
    assert_eq!(fs::read(&file).unwrap(), written);

    // Damage is told once, and gone.
    fs::write(&file, &written[..written.len() / 2]).unwrap();
    let (_, stderr) = tiny.done(&run("f16"));
    assert!(stderr.starts_with("warning: statistics ") && stderr.contains("not used"), "{stderr}");
    let (stdout, stderr) = tiny.done(&run("joint:4"));
    assert_eq!((&stdout, stderr.lines().count()), (&first.0, 1), "{stderr}");
    assert!(stderr.contains("damaged") && stderr.contains("measuring anew"), "{stderr}");
    assert_eq!(tiny.done(&run("joint:4")), first);

    // Another model under the same name.
    fs::write(tiny.path("tiny.gguf"), tiny_gguf(2).build()).unwrap();
    let (_, stderr) = tiny.done(&run("joint:4"));
    assert!(stderr.contains("of another model; measuring anew"), "{stderr}");
    assert_eq!(tiny.done(&run("joint:4")).1, "");
}

#[test]
fn a_corpus_of_the_users_stays() {
    let tiny = Tiny::new();
    fs::write(tiny.path("mine.txt"), "One two three four five. ".repeat(20)).unwrap();
    let report = tiny.calibrate_json(&["--corpus", "mine.txt"]);
    let written = fs::read(tiny.path("tiny.gguf.b32.kvstats")).unwrap();
    assert_eq!((&report["corpus"], &report["tokens"]), (&"mine.txt".into(), &(384 - 32).into()));
    assert_eq!(tiny.done(&run("joint:4")).1, "");
    let quality = ["eval", "quality", "--recipe", "joint:4", "--contexts", "1"];
    let short = ["--context-len", "64", "--continuation", "4"];
    assert_eq!(tiny.done(&[&quality[..], &short].concat()).1, "");
    assert_eq!(fs::read(tiny.path("tiny.gguf.b32.kvstats")).unwrap(), written);
}

#[test]
fn a_named_file_must_be_right() {
    let tiny = Tiny::new();
    tiny.calibrate_json(&["--out", "a.kvstats"]);
    let named = [&run("joint:4")[..], &["--kv-statistics", "a.kvstats"]].concat();
    tiny.done(&named);
    assert!(!tiny.path("tiny.gguf.b32.kvstats").exists());
    let error = tiny.fails(&[&named[..], &["--block-size", "16"]].concat());
    assert!(error.contains("a.kvstats refused: for blocks of 32 tokens, not 16"), "{error}");
    fs::write(tiny.path("tiny.gguf"), tiny_gguf(2).build()).unwrap();
    assert!(tiny.fails(&named).contains("a.kvstats refused: of another model"));
    let quality = ["eval", "quality", "--recipe", "int8", "--kv-statistics", "a.kvstats"];
    assert!(tiny.fails(&quality).contains("refused"));
    let none = [&RUN[..], &["f16", "--kv-statistics", "none.kvstats"]].concat();
    assert!(tiny.fails(&none).contains("cannot read none.kvstats"));
}
