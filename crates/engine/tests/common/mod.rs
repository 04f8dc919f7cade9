//! An engine on a tiny random model, and how to run it to its end.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use kvasir_cache::offline::{Method, Tables};
use kvasir_cache::stats::Statistics;
use kvasir_engine::{Engine, EngineConfig, Request, SamplingParams, SequenceOutput};
use kvasir_model::testkit::tiny_model;
use kvasir_model::{Calibration, Model, Runner, Threads, corpus};

pub fn model() -> Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    Arc::clone(MODEL.get_or_init(|| tiny_model(1)))
}

/// Of the tiny model, at the block size of [`config`].
pub fn statistics() -> Arc<Statistics> {
    static STATISTICS: OnceLock<Arc<Statistics>> = OnceLock::new();
    let measure = || {
        let texts: Vec<&str> = corpus::embedded().iter().take(2).map(|t| t.text).collect();
        let block_size = config().block_size;
        let calibration = Calibration { texts: &texts, tokens_per_text: 200, block_size };
        let mut runner = Runner::new(Threads::new(1).unwrap());
        Arc::new(model().calibrate(&calibration, &mut runner, &mut |_, _| {}).unwrap())
    };
    Arc::clone(STATISTICS.get_or_init(measure))
}

/// The same for the tables of all methods.
pub fn tables() -> Tables {
    static TABLES: OnceLock<Tables> = OnceLock::new();
    let make = || {
        let texts: Vec<&str> = corpus::embedded().iter().take(2).map(|t| t.text).collect();
        let block_size = config().block_size;
        let calibration = Calibration { texts: &texts, tokens_per_text: 200, block_size };
        let mut runner = Runner::new(Threads::new(1).unwrap());
        let mut tables = Tables::default();
        for method in Method::ALL {
            let table = model().make_table(method, &calibration, &mut runner, &mut |_, _| {});
            tables.add(table.unwrap());
        }
        tables
    };
    TABLES.get_or_init(make).clone()
}

pub fn config() -> EngineConfig {
    EngineConfig { kv_cache_memory: 4 << 20, block_size: 16, threads: 1, ..EngineConfig::default() }
}

pub fn engine(config: EngineConfig) -> Engine {
    Engine::new(model(), config).unwrap()
}

pub fn request(id: &str, prompt: &[u32], params: SamplingParams) -> Request {
    Request {
        id: id.into(),
        prompt: prompt.to_vec(),
        params: params.into(),
        cache_salt: None,
        kv_cache: None,
    }
}

/// Tokens that look random but are not.
pub fn prompt(len: usize, seed: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 31 + seed * 97 + i * i) % 256).collect()
}

#[derive(Debug, Default, Clone, PartialEq)]
pub struct Finished {
    pub tokens: Vec<u32>,
    pub text: String,
    pub last: Option<SequenceOutput>,
    pub outputs: usize,
}

/// Steps until nothing is left.
pub fn run(engine: &mut Engine) -> BTreeMap<(String, usize), Finished> {
    let mut all: BTreeMap<(String, usize), Finished> = BTreeMap::new();
    let mut steps = 0;
    while engine.has_unfinished() {
        for output in engine.step().unwrap().outputs {
            let entry = all.entry((output.request_id.to_string(), output.index)).or_default();
            entry.tokens.extend(&output.token_ids);
            entry.text.push_str(&output.text);
            entry.outputs += 1;
            assert!(output.num_output_tokens >= entry.tokens.len());
            entry.last = Some(output);
        }
        engine.check_integrity().unwrap();
        let stats = engine.stats();
        assert!(stats.kv_physical_bytes <= stats.kv_budget_bytes);
        steps += 1;
        assert!(steps < 100_000, "the engine makes no progress");
    }
    all
}

pub fn generate(engine: &mut Engine, prompt: &[u32], params: SamplingParams) -> Finished {
    engine.add_request(request("one", prompt, params)).unwrap();
    run(engine).remove(&("one".to_owned(), 0)).unwrap()
}

pub fn empty(engine: &mut Engine) {
    engine.check_integrity().unwrap();
    engine.reset_prefix_cache().unwrap();
    let stats = engine.stats();
    assert_eq!((stats.kv_physical_bytes, stats.num_running, stats.num_waiting), (0, 0, 0));
}

pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { ignore_eos: true, ..SamplingParams::greedy(max_tokens) }
}
