use std::path::Path;

use super::*;
use crate::predict::PromptFeatures;
use crate::profile::Cell;
use crate::suite::extras::{self, QualityPoint};
use crate::suite::{Answer, Environment, Lane, RunDir, SuiteConfig, TaskConfig};
use crate::tasks::Generated;
use crate::throughput::{AtMemory, Throughput};

/// f16 is always right, `int8` loses every second sample, and tells `<b>`.
fn run(folder: &Path) -> RunDir {
    let lanes = vec![Lane::greedy("f16"), Lane::greedy("int8"), Lane::drawn("f16", 0.9, 1)];
    let mut config = SuiteConfig::new("tiny <1>".to_owned(), lanes, 1);
    let task = |task, samples| TaskConfig { task, tokens: vec![60], samples };
    config.tasks = vec![task(Generated::Keys, 4), task(Generated::Open, 3)];
    let mut run = RunDir::create(folder, &config, &Environment::here("0", 1)).unwrap();
    for lane in ["f16", "int8", "f16 at T=0.9"] {
        for (i, sample) in run.samples().to_vec().into_iter().enumerate() {
            let open = sample.metric.is_none();
            let wrong = lane == "int8" && i % 2 == 1;
            run.append(Answer {
                sample: sample.id.clone(),
                lane: lane.to_owned(),
                text: if wrong { "it is <b>1</b>".to_owned() } else { sample.answers.join("\n") },
                score: (!open).then_some(f64::from(u8::from(!wrong))),
                prompt_tokens: 60,
                output_tokens: if lane == "int8" { 30 } else { 20 },
                capped: false,
                logical_bytes: Some(2000),
                physical_bytes: Some(if lane == "int8" { 1000 } else { 2000 }),
                features: Some(PromptFeatures {
                    prompt_tokens: 2,
                    max_tokens: 30,
                    first_margin: 0.9 + i as f64,
                    ..PromptFeatures::default()
                }),
            })
            .unwrap();
        }
    }
    run
}

#[test]
fn numbers_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let run = run(folder.path());
    let summary = RunSummary::of(&run).unwrap();
    assert_eq!((summary.samples, summary.complete), (7, 7));
    let int8 = &summary.lanes[1];
    assert_eq!((int8.ratio, int8.score), (Some(2.0), 0.5));
    let at = summary.thetas.iter().position(|theta| *theta == 0.1).unwrap();
    assert_eq!((int8.negatives[at].negatives, int8.negatives[at].benign), (2, 4));
    // 30 tokens for 20: half as long again.
    assert_eq!((int8.lengths.known, int8.lengths.mean, int8.lengths.longer), (3, -0.5, 1.0));
    assert_eq!(int8.latency, None);
    assert_eq!(summary.families, ["retrieval"]);
    let (name, risk) = &summary.risks[0];
    assert_eq!((&**name, risk.benign, risk.negatives), ("int8", 4, 2));
    assert_eq!(summary.answer_lengths[0].1.answers, 7);
    assert_eq!(summary.risks.last().unwrap().0, "all");
    assert_eq!(summary.worst.len(), 2);
    assert!(summary.worst[0].found.0.contains("<b>"));
    assert_eq!(summary.recipes().map(|lane| &*lane.name).collect::<Vec<_>>(), ["int8"]);
}

#[test]
fn what_was_not_answered_by_all_is_not_compared() {
    let folder = tempfile::tempdir().unwrap();
    drop(run(folder.path()));
    let answers = folder.path().join("answers.jsonl");
    let text = std::fs::read_to_string(&answers).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    std::fs::write(&answers, lines[..8].join("\n") + "\n").unwrap();
    let summary = RunSummary::of(&RunDir::open(folder.path()).unwrap()).unwrap();
    assert_eq!((summary.complete, summary.lanes[1].answered), (0, 1));
    assert!(page(&Report { runs: vec![summary] }).contains("0 of them answered"));
}

#[test]
fn pages_stand_alone_and_say_everything() {
    let folder = tempfile::tempdir().unwrap();
    let run = run(folder.path());
    let cell = |recipe: &str, decode: f64| Cell {
        recipe: recipe.to_owned(),
        num_seqs: 2,
        context: 64,
        prefill: 900.0,
        decode,
        tokens: 140,
        tail_tokens: 12,
        logical_bytes: 2000,
        physical_bytes: 1000,
        reserved_bytes: 1500,
    };
    let throughput = Throughput {
        seconds: 1.0,
        output_tokens_per_second: 345.0,
        total_tokens_per_second: 400.0,
        max_running: 17,
        preemptions: 3,
        peak_kv_physical_bytes: 900,
    };
    let mut summary = RunSummary::of(&run).unwrap();
    summary.speed = vec![cell("f16", 100.0), cell("int8", 80.0)];
    summary.equal_memory =
        vec![AtMemory { recipe: "int8".to_owned(), budget: 1 << 20, throughput }];
    summary.quality = vec![QualityPoint {
        recipe: "int8".to_owned(),
        ratio_total: 1.9,
        kl_mean: 0.001,
        top1: 0.99,
        nll_delta: 0.0,
    }];
    let report = Report { runs: vec![summary] };
    let html = page(&report);
    for word in [
        "tiny &lt;1&gt;",
        "int8",
        "Negatives",
        "Lengths",
        "Decode",
        "345",
        "Rate and quality",
        "<mark>",
    ] {
        assert!(html.contains(word), "{word}");
    }
    for word in ["<b>", "http", "<script", "src=", "@import", "url(", "NaN"] {
        assert!(!html.contains(word), "{word}");
    }
    for tag in ["section", "svg", "table", "details", "div", "tr", "td", "dl"] {
        let opened =
            html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    let text = markdown(&report);
    assert!(text.contains("| int8 | 2.00 | 50.0 % | 2 of 4, 50.0 %"), "{text}");
    assert!(text.contains("| keys-60 | 4 | 100.0 | 50.0 | 100.0 |"), "{text}");
}

#[test]
fn damaged_files_beside_the_answers_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let run = run(folder.path());
    run.set_extra(extras::EQUAL_MEMORY, &"nothing").unwrap();
    let error = RunSummary::of(&run).unwrap_err().to_string();
    assert!(error.contains("equal_memory.json"), "{error}");
}
