//! `eval suite`, `eval report`, `profile` and `plan` on a tiny random model: what is kept and what is said, not how good answers are.
// unwrap: in the helpers, where a failure is a failed test.
#![allow(missing_docs, clippy::unwrap_used)]

mod tiny;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tiny::{Running, error, kvasir, run, serve, tiny};

/// Answers in a run's directory, less those of the lane that draws.
fn answers(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("answers.jsonl")).unwrap_or_default();
    let whole = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut answers: Vec<Value> = whole.collect();
    answers.sort_by_key(|a| format!("{} {}", a["lane"], a["sample"]));
    answers
}

/// Two tasks of three samples each, three lanes: 18 answers.
const SMALL: [&str; 12] = [
    "eval",
    "suite",
    "--recipes",
    "f16,int8",
    "--tasks",
    "keys,arithmetic",
    "--lengths",
    "20",
    "--samples",
    "3",
    "--threads",
    "1",
];

#[test]
fn every_command_has_help_with_examples() {
    for command in
        [&["eval", "suite"][..], &["eval", "report"], &["eval", "risk"], &["profile"], &["plan"]]
    {
        let output = run(&[command, &["--help"]].concat());
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(help.contains(&format!("Examples:\n  kvasir {}", command.join(" "))), "{help}");
    }
}

#[test]
fn a_run_that_was_killed_goes_on_and_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let [whole, cut] = ["whole", "cut"].map(|name| folder.path().join(name));
    let suite = |out: &Path| {
        let rest = ["--answers-only", "--model", &model, "--json", "--out", out.to_str().unwrap()];
        kvasir(&[&SMALL[..], &rest].concat())
    };
    let output = suite(&whole).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["runs"][0]["complete"], 6);
    assert_eq!(answers(&whole).len(), 18);
    for name in ["report.html", "report.md"] {
        assert!(fs::read_to_string(whole.join(name)).unwrap().contains("int8"), "{name}");
    }

    let mut killed = Running(suite(&cut).spawn().unwrap());
    while answers(&cut).is_empty() && killed.0.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    drop(killed);
    let kept = answers(&cut).len();
    assert!((1..=18).contains(&kept), "{kept}");
    let output = suite(&cut).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(answers(&cut), answers(&whole));

    // Another question is another run.
    let other =
        run(&[&SMALL[..], &["--seed", "1", "--model", &model, "--out", cut.to_str().unwrap()]]
            .concat());
    assert!(error(&other).contains("was begun with other settings"), "{other:?}");
}

#[test]
fn a_disk_that_is_full_keeps_what_was_answered() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let out = folder.path().join("run");
    let out = out.to_str().unwrap();
    let rest = ["--answers-only", "--model", &model, "--out", out];
    let args = [&SMALL[..], &rest].concat();
    // No file may grow beyond some hundred answers' worth of blocks; writing more is an error and no signal.
    let script = "trap '' XFSZ; ulimit -f 5; exec \"$0\" \"$@\"";
    let full = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_kvasir")])
        .args(&args)
        .output()
        .unwrap();
    let text = error(&full);
    assert!(text.contains("answers are kept in") && text.contains("answers.jsonl"), "{text}");
    let kept = answers(Path::new(out)).len();
    assert!(kept > 0 && kept < 18, "{kept}");
    let output = run(&args);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(answers(Path::new(out)).len(), 18);
}

#[test]
fn servers_answer_as_the_engine_does_and_one_that_dies_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let (served, url, _log) = serve(&[&model]);
    let [over, here, dies] = ["over", "here", "dies"].map(|name| folder.path().join(name));
    let suite = |out: &Path, rest: &[&str]| {
        run(&[&SMALL[..], rest, &["--out", out.to_str().unwrap()]].concat())
    };
    let output = suite(&over, &["--server", &url]);
    assert!(output.status.success(), "{output:?}");
    let output = suite(&here, &["--answers-only", "--model", &model]);
    assert!(output.status.success(), "{output:?}");
    let texts = |out: &Path| -> Vec<(Value, Value, Value)> {
        let of = |a: Value| (a["lane"].clone(), a["text"].clone(), a["output_tokens"].clone());
        answers(out).into_iter().map(of).collect()
    };
    assert_eq!(texts(&over), texts(&here));
    // Kvasir tells bytes over HTTP too.
    assert!(answers(&over).iter().all(|a| a["physical_bytes"].as_u64() > Some(0)));

    // Hundreds of answers more, of which the server gives some.
    let many = [&SMALL[..8], &["--samples", "400", "--server", &url, "--out"]].concat();
    let mut asking =
        Running(kvasir(&[&many[..], &[dies.to_str().unwrap()]].concat()).spawn().unwrap());
    while answers(&dies).is_empty() && asking.0.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    drop(served);
    let mut text = String::new();
    asking.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(asking.0.wait().unwrap().code(), Some(1), "{text}");
    let kept = answers(&dies).len();
    assert!(text.contains(&format!("{kept} answers are kept in")), "{text}");
    assert!((1..2400).contains(&kept), "{kept}");
    // Nobody answers: nothing is lost.
    let text = error(&run(&[&many[..], &[dies.to_str().unwrap()]].concat()));
    assert!(text.contains("cannot reach http://127.0.0.1"), "{text}");
    assert_eq!(answers(&dies).len(), kept);
}

#[test]
fn what_is_wrong_is_said_before_a_model_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (out, empty, without) = (path("run"), path("empty.jsonl"), path("without.jsonl"));
    fs::write(&empty, "\n").unwrap();
    fs::write(&without, "{\"context\":\"x\",\"answers\":[],\"dataset\":\"lcc\"}\n").unwrap();
    let suite = |rest: &[&str]| {
        let args = ["eval", "suite", "--model", "/nothing", "--recipes", "f16", "--out", &out];
        error(&run(&[&args[..], rest].concat()))
    };
    assert!(suite(&["--longbench", &empty]).contains("has no samples"));
    assert!(suite(&["--longbench", &without]).contains("line 1: no answers"));
    assert!(suite(&["--temperature", "0"]).contains("--temperature must be above 0"));
    // A model that is not there begins no run.
    suite(&[]);
    assert!(!Path::new(&out).exists());
    fs::create_dir(&out).unwrap();
    fs::write(path("run/config.json"), "{\"version\": 7}").unwrap();
    assert!(suite(&[]).contains("is of version 7"));
    let text = error(&run(&["eval", "report", &path("none")]));
    assert!(text.contains("config.json"), "{text}");
    let text = error(&run(&["plan", "--profile", &path("none.json")]));
    assert!(text.contains("`kvasir profile` makes it"), "{text}");
}

#[test]
fn loads_are_planned_on_a_profile() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let profile = folder.path().join("profile.json");
    let profile = profile.to_str().unwrap();
    let args =
        ["profile", "--recipes", "f16,int8", "--model", &model, "--threads", "1", "--out", profile];
    let output = run(&[&args[..], &["--max-tokens", "600", "--json"]].concat());
    assert!(output.status.success(), "{output:?}");
    let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(rows[1]["recipe"], "int8");
    let smaller = rows[1]["bytes_per_token"].as_f64() < rows[0]["bytes_per_token"].as_f64();
    assert!(smaller && rows[0]["held_out_error"].as_f64() >= Some(0.0), "{rows}");

    let plan = |rest: &[&str]| {
        let args = ["plan", "--profile", profile, "--model", &model, "--json"];
        run(&[&args[..], rest].concat())
    };
    let load = ["--num-prompts", "9", "--input-len", "100", "--output-len", "7"];
    let output = plan(&load);
    assert!(output.status.success(), "{output:?}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&found["requests"], found["rows"].as_array().unwrap().len()), (&9.into(), 2));
    assert!(found["rows"].as_array().unwrap().iter().all(|row| row["max_running"] == 9), "{found}");

    let trace = folder.path().join("trace.jsonl");
    let line = r#"{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}"#;
    fs::write(&trace, format!("{line}\n{}\n", line.replace("\": 0", "\": 90000"))).unwrap();
    let output = plan(&["--recipe", "int8", "--trace", trace.to_str().unwrap()]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(found["rows"][0]["cached_share"].as_f64() > Some(0.4), "{found}");
    assert_eq!(found["blocks_by_distinct"], 2.0);
    let told = found["sharing_foretold"]["blocks_by_distinct"].as_f64().unwrap();
    assert!((told - 2.0).abs() < 1e-3, "{found}");

    let text = error(&plan(&["--recipe", "kivi4", "--num-prompts", "1"]));
    assert!(text.contains("has no steps of kivi4"), "{text}");
    let text =
        error(&plan(&["--input-len", "900", "--num-prompts", "1", "--kv-cache-memory", "1KiB"]));
    assert!(text.contains("does not fit"), "{text}");
    fs::write(profile, "{}").unwrap();
    let text = error(&plan(&load));
    assert!(text.contains("profile.json: no profile"), "{text}");
}
