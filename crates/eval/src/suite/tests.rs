use std::fs;
use std::io::Write;
use std::path::Path;

use kvasir_engine::{Engine, EngineConfig};
use kvasir_model::testkit::tiny_model;

use super::*;
use crate::error::EvalError;
use crate::tasks::Generated;

fn config() -> SuiteConfig {
    let lanes = vec![Lane::greedy("f16"), Lane::greedy("int8"), Lane::drawn("f16", 0.9, 3)];
    let mut config = SuiteConfig::new("tiny".to_owned(), lanes, 1);
    let task = |task, samples| TaskConfig { task, tokens: vec![40], samples };
    config.tasks = vec![task(Generated::Keys, 3), task(Generated::Open, 2)];
    config
}

fn create(path: &Path, config: &SuiteConfig) -> Result<RunDir> {
    RunDir::create(path, config, &Environment::here("0", 1))
}

fn backend() -> EngineBackend {
    let config = EngineConfig {
        kv_cache_memory: 8 << 20,
        block_size: 16,
        threads: 1,
        ..EngineConfig::default()
    };
    EngineBackend::new(Engine::new(tiny_model(1), config).unwrap(), None)
}

/// Fails after some answers, as a server that dies.
struct Dies(EngineBackend, usize);

impl Backend for Dies {
    fn answer(
        &mut self,
        lane: &Lane,
        samples: &[&Sample],
        answered: &mut dyn FnMut(Answer) -> Result<()>,
    ) -> Result<()> {
        let left = &mut self.1;
        self.0.answer(lane, samples, &mut |answer| {
            if *left == 0 {
                return Err(EvalError::Settings { what: "gone".to_owned() });
            }
            *left -= 1;
            answered(answer)
        })
    }
}

#[test]
fn a_run_that_was_cut_short_goes_on_and_says_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let mut run_of_all = create(&whole, &config()).unwrap();
    let mut last = 0;
    run(&mut run_of_all, &mut backend(), &mut |p| {
        assert_eq!(p.all, 15);
        last = p.done;
    })
    .unwrap();
    assert_eq!(last, 15);

    let cut = folder.path().join("cut");
    let mut first = create(&cut, &config()).unwrap();
    let error = run(&mut first, &mut Dies(backend(), 4), &mut |_| {}).unwrap_err();
    assert_eq!(error.to_string(), "gone");
    drop(first);
    // Killed while it wrote a line.
    let answers = cut.join("answers.jsonl");
    fs::OpenOptions::new().append(true).open(&answers).unwrap().write_all(b"{\"sam").unwrap();
    assert_eq!(RunDir::open(&cut).unwrap().answers().len(), 4);
    let mut second = create(&cut, &config()).unwrap();
    assert_eq!(second.answers().len(), 4);
    run(&mut second, &mut backend(), &mut |_| {}).unwrap();

    let sorted = |path: &Path| {
        let run = RunDir::open(path).unwrap();
        let mut answers = run.answers().to_vec();
        answers.sort_by_key(|a| (a.lane.clone(), a.sample.clone()));
        answers
    };
    let (a, b) = (sorted(&whole), sorted(&cut));
    assert_eq!(a.len(), 15);
    assert_eq!(a, b);
    let open = a.iter().find(|answer| answer.sample == "open-0").unwrap();
    assert_eq!(open.score, None);
    assert!(a.iter().all(|a| a.physical_bytes > Some(0) && a.output_tokens > 0));
}

#[test]
fn directories_of_others_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    create(&path, &config()).unwrap();
    let refused = |config: SuiteConfig, expected: &str| {
        let error = create(&path, &config).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(SuiteConfig { seed: 2, ..config() }, "other settings: the seed differ");
    let lanes = vec![Lane::greedy("f16")];
    refused(SuiteConfig { lanes, ..config() }, "other settings: the recipes differ");
    let text = fs::read_to_string(path.join("config.json")).unwrap();
    fs::write(path.join("config.json"), text.replace("\"version\": 2", "\"version\": 9")).unwrap();
    refused(config(), "is of version 9");
    let lanes = Vec::new();
    let empty = serde_json::to_string(&SuiteConfig { lanes, ..config() }).unwrap();
    fs::write(path.join("config.json"), empty).unwrap();
    let error = RunDir::open(&path).unwrap_err().to_string();
    assert!(error.contains("config.json: a run needs a recipe"), "{error}");
    fs::write(path.join("config.json"), "{").unwrap();
    refused(config(), "config.json: EOF");
    // What a run left that was killed while it wrote its first files is its own.
    let early = folder.path().join("early");
    fs::create_dir(&early).unwrap();
    fs::write(early.join("environment.partial"), "{").unwrap();
    create(&early, &config()).unwrap();
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.txt"), "x").unwrap();
    let error = create(&other, &config()).unwrap_err().to_string();
    assert!(error.contains("has files, and is no run's"), "{error}");
    assert!(RunDir::open(&other).is_err());
}

#[test]
fn settings_that_make_no_run_are_said() {
    let two = vec![Lane::greedy("f16"), Lane::greedy("f16")];
    let long = TaskConfig { task: Generated::Keys, tokens: vec![1 << 40], samples: 1 };
    for (config, expected) in [
        (SuiteConfig { lanes: Vec::new(), ..config() }, "needs a recipe"),
        (SuiteConfig { lanes: two, ..config() }, "'f16' is there twice"),
        (SuiteConfig { tasks: Vec::new(), ..config() }, "needs a task"),
        (SuiteConfig { tasks: vec![long], ..config() }, "of more than 131072 tokens"),
    ] {
        let error = config.samples().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn samples_draw_each_for_itself() {
    let lane = Lane::drawn("f16", 0.7, 1);
    let seeds: std::collections::HashSet<u64> =
        (0..100).map(|i| lane.seed_of(&format!("keys-{i}"))).collect();
    assert_eq!(seeds.len(), 100);
    assert!(seeds.iter().all(|seed| *seed < 1 << 31));
    assert_ne!(lane.seed_of("a"), Lane::drawn("f16", 0.7, 2).seed_of("a"));
}
