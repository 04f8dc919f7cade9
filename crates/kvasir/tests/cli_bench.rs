//! `bench` on a tiny random model: what it prints, not how fast it is.
// unwrap: in the helpers, where a failure is a failed test.
#![allow(missing_docs, clippy::unwrap_used)]

mod tiny;

use std::fs;

use tiny::{json, kvasir, run, serve, stderr, tiny};

#[test]
fn every_benchmark_has_help_with_examples() {
    for benchmark in ["latency", "throughput", "serve"] {
        let output = run(&["bench", benchmark, "--help"]);
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(help.contains(&format!("Examples:\n  kvasir bench {benchmark}")), "{help}");
    }
}

#[test]
fn latency_measures_batches() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let args = ["bench", "latency", "--model", &model, "--threads", "1", "--repetitions", "2"];
    let decode = ["--test", "pp20", "--num-seqs", "1,3", "--context", "64", "--decode-len", "4"];
    let output = run(&[&args[..], &decode, &["--max-num-seqs", "1", "--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let tests = json(&output)["tests"].clone();
    let names = tests.as_array().unwrap().iter().map(|test| test["name"].as_str().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), ["pp20", "tg4@64x1", "tg4@64x3"]);
    assert!(tests.as_array().unwrap().iter().all(|t| t["runs"].as_array().unwrap().len() == 2));
}

#[test]
fn throughput_takes_every_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let prompts = folder.path().join("prompts.jsonl");
    fs::write(&prompts, "{\"prompt\":\"abc\"}\n{\"prompt\":[1,2],\"output_tokens\":2}\n").unwrap();
    let prompts = prompts.to_str().unwrap();
    for (dataset, input_tokens, output_tokens) in [
        (&["random", "--input-len", "9"][..], 27, 12),
        (&["prefix-repetition", "--input-len", "40", "--prefix-len", "32"], 120, 12),
        (&["retrieval", "--passages", "2", "--passage-len", "32"], 192, 12),
        (&["jsonl", "--dataset-path", prompts], 8, 10),
    ] {
        let args =
            ["bench", "throughput", "--model", &model, "--threads", "1", "--num-prompts", "3"];
        let args = [&args[..], &["--output-len", "4", "--json", "--dataset"], dataset].concat();
        let output = run(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        let json = json(&output);
        assert_eq!(json["dataset"], dataset[0]);
        assert_eq!(
            (&json["input_tokens"], &json["output_tokens"]),
            (&input_tokens.into(), &output_tokens.into()),
            "{json}"
        );
        assert!(json["output_tokens_per_second"].as_f64().unwrap() > 0.0, "{json}");
    }
}

#[test]
fn a_server_is_driven_and_reports_name_its_cache() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let (_served, url, _log) = serve(&[&model, "--api-key", "key", "--kv-cache", "int8"]);
    let bench = |args: &[&str]| {
        let common = ["bench", "serve", "--base-url", &url, "--num-prompts", "5"];
        kvasir(&[&common[..], args].concat()).env("OPENAI_API_KEY", "key").output().unwrap()
    };
    let lens = ["--input-len", "40", "--output-len", "6", "--ignore-eos", "--json"];
    let output = bench(&[&lens[..], &["--max-concurrency", "3"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let found = json(&output);
    assert_eq!((&found["recipe"], &found["sharing"]), (&"int8".into(), &"off".into()));
    assert_eq!((&found["completed"], &found["failed"]), (&5.into(), &0.into()));
    assert_eq!((&found["input_tokens"], &found["output_tokens"]), (&200.into(), &30.into()));
    assert_eq!((&found["preemptions"], &found["max_running_from"]), (&0.into(), &"server".into()));
    for (name, nothing) in [("ttft_ms", 0.0), ("tpot_ms", -1.0), ("itl_ms", -1.0), ("e2e_ms", 0.0)]
    {
        for share in ["p50", "p90", "p99"] {
            assert!(found[name][share].as_f64().unwrap() > nothing, "{name} {share}: {found}");
        }
    }
    for name in ["seconds", "output_tokens_per_second", "total_tokens_per_second"] {
        assert!(found[name].as_f64().unwrap() > 0.0, "{name}: {found}");
    }

    let text = ["--input-len", "40", "--output-len", "3", "--ignore-eos", "--text"];
    let text = bench(&[&text[..], &["--request-rate", "500"]].concat());
    assert!(text.status.success(), "{}", stderr(&text));
    let table = String::from_utf8(text.stdout).unwrap();
    assert!(table.contains("5 of 5 requests finished, 0 failed"), "{table}");
    assert!(table.contains("\n  time to first token (TTFT) "), "{table}");

    // Longer than the model's context: refused, and said so.
    let long = bench(&["--input-len", "20", "--output-len", "100000", "--json"]);
    assert_eq!(long.status.code(), Some(1));
    assert_eq!(json(&long)["failed"], 5);
    assert!(
        stderr(&long).starts_with("error: 5 of 5 requests failed: http://"),
        "{}",
        stderr(&long)
    );
    let keyless = run(&["bench", "serve", "--base-url", &url]);
    assert_eq!(keyless.status.code(), Some(1));
    assert!(stderr(&keyless).contains("401"), "{}", stderr(&keyless));
}

#[test]
fn a_server_that_is_not_there_is_one_line() {
    for (url, part) in
        [("http://127.0.0.1:9", "cannot reach http://127.0.0.1:9"), ("x", "--base-url")]
    {
        let output = run(&["bench", "serve", "--base-url", url]);
        assert_eq!(output.status.code(), Some(1));
        let error = stderr(&output);
        assert!(error.starts_with("error: ") && error.contains(part), "{error}");
        assert_eq!((error.lines().count(), output.stdout.len()), (1, 0), "{error}");
    }
}
