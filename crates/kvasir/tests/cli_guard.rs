//! `eval risk` and `--kv-risk` on a tiny random model: from answers to a risk model to a server that decides by it.
// unwrap: in the helpers, where a failure is a failed test.
#![allow(missing_docs, clippy::unwrap_used)]

mod tiny;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tiny::{error, kvasir, run, serve, tiny};

/// Forty samples under three recipes, on one thread.
const SUITE: [&str; 14] = [
    "eval",
    "suite",
    "--recipes",
    "f16,joint4,joint2",
    "--tasks",
    "keys,list",
    "--lengths",
    "60",
    "--samples",
    "20",
    "--threads",
    "1",
    "--answers-only",
    "--out",
];

/// A run of the tiny model, which is never right: so it is said that f16 always is, and that joint2 is not where the first
/// token was uncertain.
fn made_up_run(model: &str, out: &Path) {
    let output = run(&[&SUITE[..], &[out.to_str().unwrap(), "--model", model]].concat());
    assert!(output.status.success(), "{output:?}");
    let text = fs::read_to_string(out.join("answers.jsonl")).unwrap();
    let mut answers: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let entropy = |a: &Value| a["features"]["first_entropy"].as_f64();
    let of_sample: Vec<(String, f64)> = answers
        .iter()
        .filter_map(|a| Some((a["sample"].as_str()?.to_owned(), entropy(a)?)))
        .collect();
    assert_eq!(of_sample.len(), 40);
    let mut sorted: Vec<f64> = of_sample.iter().map(|(_, entropy)| *entropy).collect();
    sorted.sort_by(f64::total_cmp);
    for answer in &mut answers {
        let known = of_sample.iter().find(|(sample, _)| answer["sample"] == **sample);
        let uncertain = known.unwrap().1 > sorted[28];
        answer["score"] = json!(f64::from(u8::from(answer["lane"] != "joint2" || !uncertain)));
    }
    let lines: Vec<String> = answers.iter().map(Value::to_string).collect();
    fs::write(out.join("answers.jsonl"), lines.join("\n") + "\n").unwrap();
}

fn quality(out: &Path) {
    let point = |recipe: &str, kl: f64| json!({"recipe": recipe, "ratio_total": 3.0, "kl_mean": kl, "top1": 1.0, "nll_delta": 0.0});
    let points = json!([point("joint4", 0.001), point("joint2", 0.03)]);
    fs::write(out.join("quality.json"), points.to_string()).unwrap();
}

#[test]
fn from_answers_to_a_server_that_decides() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let run_dir = folder.path().join("run");
    made_up_run(&model, &run_dir);
    let run_path = run_dir.to_str().unwrap();
    let learn = |rest: &[&str]| run(&[&["eval", "risk", run_path, "--json"], rest].concat());
    let text = error(&learn(&[]));
    assert!(text.contains("has no measured predictions"), "{text}");
    quality(&run_dir);
    let text = error(&learn(&["--model", "gemma3-270m"]));
    assert!(text.contains("not of --model gemma3-270m"), "{text}");
    let output = learn(&["--model", &model]);
    assert!(output.status.success(), "{output:?}");
    let found = tiny::json(&output);
    assert_eq!(
        (&found["model"]["samples"], &found["model"]["negatives"]),
        (&80.into(), &11.into())
    );
    let all = found["accuracy"].as_array().unwrap().iter().find(|row| row[0] == "").unwrap();
    assert!(all[1]["auc"].as_f64() > Some(0.9), "{all}");
    let cheapest = &found["guards"]["at_bytes"][0];
    assert_eq!((&cheapest["recipe"], &cheapest["negatives"]), (&"joint2".into(), &11.into()));
    assert!(folder.path().join("tiny.gguf.b32.kvrisk").exists());

    assert!(run(&["eval", "report", run_path]).status.success());
    let page = fs::read_to_string(run_dir.join("report.html")).unwrap();
    assert!(page.contains("<h3>Guards</h3>") && page.contains("joint2"), "{page}");
    let short = fs::read_to_string(run_dir.join("report.md")).unwrap();
    assert!(short.contains("of a guard of no more bytes"), "{short}");

    // Samples that were answered under a guard.
    let again = folder.path().join("again");
    let args = [&SUITE[..], &[again.to_str().unwrap(), "--model", &model]].concat();
    let output = kvasir(&args).args(["--kv-risk", "0.05,1", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let report = tiny::json(&output);
    let lanes: Vec<&Value> =
        report["runs"][0]["lanes"].as_array().unwrap().iter().map(|lane| &lane["name"]).collect();
    assert_eq!(lanes, ["f16", "joint4", "joint2", "risk 0.05", "risk 1", "f16 at T=0.7"]);
    let ratio = |lane: usize| report["runs"][0]["lanes"][lane]["ratio"].as_f64().unwrap();
    assert!(ratio(3) <= ratio(4) && ratio(4) > ratio(0), "{report}");

    let (_served, url, _log) = serve(&[&model, "--kv-cache", "auto", "--kv-risk", "1"]);
    let root = url.split("/v1").next().unwrap();
    let request = json!({"prompt": "hello ".repeat(20), "max_tokens": 4, "ignore_eos": true});
    let mut response = ureq::post(format!("{root}/v1/completions"))
        .header("Content-Type", "application/json")
        .config()
        .proxy(None)
        .build()
        .send(request.to_string())
        .unwrap();
    let answer: Value =
        serde_json::from_str(&response.body_mut().read_to_string().unwrap()).unwrap();
    let kv = &answer["usage"]["kvasir"];
    let recipe = kv["recipe"].as_str().unwrap();
    assert!(["f16", "joint4", "joint2"].contains(&recipe), "{answer}");
    assert!(kv["risk"].as_f64().is_some_and(|risk| risk < 1.0), "{answer}");
    let mut metrics =
        ureq::get(format!("{root}/metrics")).config().proxy(None).build().call().unwrap();
    let metrics = metrics.body_mut().read_to_string().unwrap();
    let decided = metrics.lines().find(|line| line.starts_with("kvasir_kv_guard_decisions_total"));
    let decided = decided.unwrap_or_default();
    assert!(
        decided.contains(&format!("recipe=\"{recipe}\"")) && decided.ends_with(" 1"),
        "{metrics}"
    );
}

#[test]
fn what_is_wrong_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny(folder.path());
    let try_run = |args: &[&str]| {
        let common = ["run", "hello", "--max-tokens", "2", "--threads", "1", "--model", &model];
        error(&run(&[&common[..], args].concat()))
    };
    let text = try_run(&["--kv-risk", "0.1"]);
    assert!(text.contains("needs --kv-cache auto, not 'f16'"), "{text}");
    let text = try_run(&["--kv-risk-model", "x"]);
    assert!(text.contains("--kv-risk-model is nothing without --kv-risk"), "{text}");
    let guard = ["--kv-cache", "auto", "--kv-risk", "0.1"];
    let text = try_run(&guard);
    assert!(text.contains("tiny.gguf.b32.kvrisk is not there"), "{text}");
    assert!(text.contains("kvasir eval risk"), "{text}");
    let damaged = folder.path().join("damaged");
    fs::write(&damaged, "{\"version\": 1, \"theta\": 0.1}").unwrap();
    let text = try_run(&[&guard[..], &["--kv-risk-model", damaged.to_str().unwrap()]].concat());
    assert!(text.contains("damaged: risk model: missing field `model`"), "{text}");
    let text = try_run(&[&guard[..], &["--kv-risk-model", "/nothing"]].concat());
    assert!(text.contains("cannot read /nothing"), "{text}");
    let suite = [&SUITE[..], &["/nothing/run", "--model", &model, "--kv-risk", "0.1"]].concat();
    assert!(error(&run(&suite)).contains("kvrisk"), "no risk model");
    let text = error(&run(&["eval", "risk", "/nothing"]));
    assert!(text.contains("/nothing"), "{text}");
    // Nobody is ever right: there is nothing to learn.
    let out = folder.path().join("run");
    let output = run(&[&SUITE[..], &[out.to_str().unwrap(), "--model", &model]].concat());
    assert!(output.status.success(), "{output:?}");
    quality(&out);
    let text = error(&run(&["eval", "risk", out.to_str().unwrap(), "--model", &model]));
    assert!(text.contains("nothing to learn"), "{text}");
}
