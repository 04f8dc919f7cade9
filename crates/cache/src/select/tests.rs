//! Policies against kvpress 0.5.5 on the same queries, keys and values (`scripts/make_press_fixtures.py`).
//!
//! Where kvpress differs from what a policy here says it does, only what is alike is compared: see `deviations` in
//! the file.

use std::ops::Range;

use kvasir_kernels::{Products, RopeScaling, RopeTable};
use serde_json::Value;

use super::compactor::{attention, leverage, sketch, standardise};
use super::policy::{Choice, PromptRows};
use super::{Select, dbudget::DBudget};
use crate::attention::{AttentionScratch, BatchSlice};
use crate::geometry::{Geometry, tests::layer};
use crate::kv_cache::{CacheConfig, KvCache};
use crate::offline::Tables;
use crate::sequence::{Sequence, SequenceId};
use crate::sharing::Sharing;

fn fixture() -> Value {
    serde_json::from_str(include_str!("../../tests/fixtures/press.json")).unwrap()
}

fn whole(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn number(value: &Value) -> f32 {
    value.as_f64().unwrap() as f32
}

fn positions(value: &Value) -> Vec<Vec<u32>> {
    let list = |v: &Value| v.as_array().unwrap().iter().map(|p| whole(p) as u32).collect();
    value.as_array().unwrap().iter().map(list).collect()
}

fn rows(value: &Value) -> Vec<Vec<f32>> {
    let list = |v: &Value| v.as_array().unwrap().iter().map(number).collect();
    value.as_array().unwrap().iter().map(list).collect()
}

/// The fixture's generator.
struct Generator(u64);

impl Generator {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as f32 / (1u64 << 30) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }
}

/// A cache whose only sequence holds one of the inputs, observed but not chosen from.
struct Prompt {
    cache: KvCache,
    id: SequenceId,
    tokens: usize,
}

impl Prompt {
    fn new(input: &Value, recipe: &str, chunk: usize) -> Self {
        let [query_heads, kv_heads, dim, tokens, factor] =
            ["query_heads", "kv_heads", "head_dim", "tokens", "key_factor"]
                .map(|k| whole(&input[k]));
        let mut generator = Generator::new(input["seed"].as_u64().unwrap());
        let q = generator.values(tokens * query_heads * dim);
        let mut k = generator.values(tokens * kv_heads * dim);
        let v = generator.values(tokens * kv_heads * dim);
        k.iter_mut().for_each(|k| *k *= factor as f32);
        let geometry = Geometry::new(vec![layer(query_heads, kv_heads, dim)], 32).unwrap();
        let mut cache = KvCache::new(CacheConfig {
            geometry,
            ropes: vec![RopeTable::new(dim, 10_000.0, &RopeScaling::None, 1)],
            recipe: recipe.parse().unwrap(),
            statistics: None,
            tables: Tables::default(),
            sharing: Sharing::OFF,
            products: Products::F32,
            budget_bytes: 64 << 20,
            prefix_caching: false,
        })
        .unwrap();
        let id = cache.add_sequence(None).unwrap();
        cache.expect_prompt(id, tokens).unwrap();
        let mut scratch = AttentionScratch::default();
        for start in (0..tokens).step_by(chunk) {
            let len = chunk.min(tokens - start);
            cache.reserve(id, len).unwrap();
            let slices = [BatchSlice { sequence: id, row: 0, start, len }];
            let of = |x: &[f32], heads: usize| {
                x[start * heads * dim..(start + len) * heads * dim].to_vec()
            };
            let (q, k, v) = (of(&q, query_heads), of(&k, kv_heads), of(&v, kv_heads));
            let mut out = vec![0.0; q.len()];
            cache.write(0, &slices, &k, &v).unwrap();
            cache.attend(0, &slices, &q, &mut out, &mut scratch).unwrap();
            cache.observe(0, &slices, &q, &mut scratch).unwrap();
            if start + len < tokens {
                cache.commit(id, &vec![0; len]).unwrap();
            }
        }
        // As if the last tokens were committed, and nobody had chosen yet.
        let sequence = cache.sequences[0].as_mut().unwrap();
        sequence.num_tokens = tokens;
        Self { cache, id, tokens }
    }

    fn sequence(&self) -> &Sequence {
        self.cache.sequence(self.id).unwrap()
    }

    fn columns(&self) -> &[Vec<f32>] {
        &self.sequence().selection.as_ref().unwrap().columns
    }

    fn choice(&self) -> Choice {
        let sequence = self.sequence();
        let policy = sequence.recipe.select().unwrap().policy();
        let selection = sequence.selection.as_ref().unwrap();
        self.cache.choices(policy, sequence, selection).unwrap().remove(0)
    }

    fn plain_keys(&self, kv_head: usize, tokens: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let rows =
            super::choose::LayerRows { cache: &self.cache, sequence: self.sequence(), layer: 0 };
        rows.plain_keys(kv_head, tokens)
    }
}

/// Every case of a press, with its input.
fn cases(press: &str) -> Vec<(Value, Value)> {
    let fixture = fixture();
    let cases = fixture["cases"].as_array().unwrap().iter().filter(|c| c["press"] == press);
    let found: Vec<_> = cases
        .map(|case| (fixture["inputs"][whole(&case["input"])].clone(), case.clone()))
        .collect();
    assert!(!found.is_empty(), "{press}");
    found
}

/// The thousandths that keep `count` of `tokens`.
fn share(count: usize, tokens: usize) -> f32 {
    (count * 1000).div_ceil(tokens).max(1) as f32 / 1000.0
}

fn close(found: &[f32], expected: &[f32], relative: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= relative * b.abs().max(1e-3), "{what}, {i}: {a} {b}");
    }
}

#[test]
fn snapkv_is_kvpress() {
    for (input, case) in cases("snapkv") {
        let share = 1.0 - number(&case["ratio"]);
        let (window, kernel) = (&case["window"], &case["kernel"]);
        for chunk in [40, 512] {
            let recipe = format!("snapkv:{share}:window={window}:kernel={kernel}+f32");
            let expected = positions(&case["kept"]);
            // Which tokens of the window stay is not defined in kvpress if not all do.
            if expected[0].len() >= whole(window) {
                assert_eq!(
                    Prompt::new(&input, &recipe, chunk).choice().heads,
                    expected,
                    "{recipe}"
                );
            }
        }
    }
}

#[test]
fn chunkkv_ranks_chunks_as_kvpress() {
    for (input, case) in cases("chunkkv") {
        let expected = positions(&case["kept"]);
        let tokens = whole(&input["tokens"]);
        let share = share(expected[0].len(), tokens);
        let (chunk, window) = (&case["chunk"], &case["window"]);
        let recipe =
            format!("chunkkv:{share}:chunk={chunk}:window={window}:kernel={}+f32", case["kernel"]);
        let choice = Prompt::new(&input, &recipe, 512).choice();
        // Chunks inside the window tie in kvpress, and the last one may not be full.
        let window = whole(window);
        let inside = (tokens - window) / whole(chunk) * whole(chunk) + whole(chunk);
        let all_inside =
            (inside.min(tokens) as u32..tokens as u32).all(|p| expected[0].contains(&p));
        if all_inside {
            assert_eq!(choice.heads, expected, "{recipe}");
        }
    }
}

#[test]
fn streaming_is_kvpress() {
    for (input, case) in cases("streaming") {
        let share = 1.0 - number(&case["ratio"]);
        let recipe = format!("streaming:{share}:sinks={}+f32", case["sinks"]);
        let choice = Prompt::new(&input, &recipe, 512).choice();
        assert_eq!(choice.heads, positions(&case["kept"]), "{recipe}");
    }
}

#[test]
fn h2o_scores_are_column_sums() {
    let mut scored = 0;
    for (input, case) in cases("h2o") {
        let (heavy, recent) = (whole(&case["heavy"]), whole(&case["recent"]));
        let prompt = Prompt::new(&input, "h2o:0.5+f32", 50);
        let tokens = prompt.tokens;
        let expected = positions(&case["kept"]);
        for (head, columns) in prompt.columns().iter().enumerate() {
            let mut kept = super::rank::top(&columns[..tokens - recent], heavy);
            kept.extend((tokens - recent..tokens).map(|p| p as u32));
            assert_eq!(kept, expected[head]);
            if case["at"].is_null() && !case["scores"].is_null() {
                close(columns, &rows(&case["scores"])[head], 1e-4, "h2o");
                scored += 1;
            }
        }
    }
    assert!(scored > 0);
}

#[test]
fn observed_attention_is_kvpress() {
    // Divided by the queries that see a token.
    for (input, case) in cases("observed").into_iter().filter(|(_, c)| !c["scores"].is_null()) {
        let prompt = Prompt::new(&input, "h2o:0.5+f32", 512);
        let group = whole(&input["query_heads"]) / whole(&input["kv_heads"]);
        for (columns, expected) in prompt.columns().iter().zip(rows(&case["scores"])) {
            let seen = |t: usize| ((prompt.tokens - t) * group) as f32;
            let scores: Vec<f32> =
                columns.iter().enumerate().map(|(t, sum)| sum / seen(t)).collect();
            let at = match case["at"].as_array() {
                Some(at) => at.iter().map(whole).collect(),
                None => (0..prompt.tokens).collect::<Vec<_>>(),
            };
            let scores: Vec<f32> = at.iter().map(|t| scores[*t]).collect();
            close(&scores, &expected, 1e-3, "observed");
        }
    }
}

#[test]
fn leverage_is_kvpress() {
    for (input, case) in cases("leverage") {
        let prompt = Prompt::new(&input, "compactor:0.5+f32", 512);
        let dim = whole(&input["head_dim"]);
        let phi = sketch(dim, whole(&case["sketch"]), case["phi_seed"].as_u64().unwrap());
        let mut scores: Vec<Vec<f32>> = (0..whole(&input["kv_heads"]))
            .map(|head| leverage(&prompt.plain_keys(head, 0..prompt.tokens).0, dim, &phi))
            .collect();
        if !case["raw"].is_null() && case["at"].is_null() {
            for (found, expected) in scores.iter().zip(rows(&case["raw"])) {
                close(found, &expected, 2e-3, "leverage");
            }
        }
        standardise(&mut scores);
        let expected = positions(&case["kept"]);
        for (scores, expected) in scores.iter().zip(&expected) {
            assert_eq!(&super::rank::top(scores, expected.len()), expected, "{case}");
        }
    }
}

#[test]
fn chunks_are_kvpress_without_its_padding() {
    let mut compared = 0;
    for (input, case) in cases("non_causal").into_iter().filter(|(_, c)| c["at"].is_null()) {
        let chunk = whole(&case["chunk"]);
        let expected = match case["raw_unpadded"].is_null() {
            true => rows(&case["raw"]),
            false => rows(&case["raw_unpadded"]),
        };
        let group = (whole(&input["query_heads"]) / whole(&input["kv_heads"])) as f32;
        for steps in [29, 512] {
            let recipe = format!("compactor:0.5:chunk={chunk}:first=0:last=0+f32");
            let prompt = Prompt::new(&input, &recipe, steps);
            for (columns, expected) in prompt.columns().iter().zip(&expected) {
                let found: Vec<f32> = columns.iter().map(|sum| sum / group).collect();
                close(&found, expected, 5e-3, &format!("{recipe}, {steps}"));
                compared += 1;
            }
        }
    }
    assert!(compared > 0);
}

#[test]
fn compactor_is_kvpress_where_chunks_are_full() {
    let mut compared = 0;
    for (input, case) in cases("compactor") {
        let (tokens, chunk) = (whole(&input["tokens"]), whole(&case["chunk"]));
        let expected = positions(&case["kept"]);
        let [sketch, first, last] = ["sketch", "first", "last"].map(|k| whole(&case[k]));
        if (tokens - first - last) % chunk != 0 || expected[0].len() < 13 {
            continue;
        }
        let share = 1.0 - number(&case["ratio"]);
        let blend = (number(&case["blending"]) * 100.0).round();
        let recipe = format!(
            "compactor:{share}:chunk={chunk}:blend={blend}:sketch={sketch}:first={first}:last={last}+f32"
        );
        for steps in [50, 512] {
            let choice = Prompt::new(&input, &recipe, steps).choice();
            assert_eq!(choice.heads, expected, "{recipe}");
            compared += 1;
        }
    }
    assert!(compared > 0);
}

#[test]
fn values_and_neighbours_weigh_attention() {
    assert_eq!(attention(&[2.0, 4.0, 6.0], &[3.0, 1.0, 0.5], 2), [5.0 / 3.0, 6.5 / 3.0, 3.5 / 3.0]);
    let mut scores = vec![vec![1.0, 3.0], vec![5.0, 7.0]];
    standardise(&mut scores);
    assert!(scores.iter().flatten().sum::<f32>().abs() < 1e-6);
}

#[test]
fn dbudget_counts_are_the_definition() {
    for (input, case) in cases("dbudget") {
        let word = case["denominator"].as_str().unwrap();
        let text = format!("dbudget:{}:sinks={word}", case["threshold"]);
        let Some(Select::DBudget(policy)) = Select::parse(&text).unwrap() else { unreachable!() };
        let _: DBudget = policy;
        let prompt = Prompt::new(&input, &format!("{text}+f32"), 512);
        let rows: Vec<&[f32]> =
            prompt.columns().iter().flat_map(|rows| rows.chunks_exact(prompt.tokens)).collect();
        assert_eq!(policy.count(&rows, prompt.tokens), whole(&case["count"]), "{text}");
    }
}

#[test]
fn think_is_kvpress() {
    for (input, case) in cases("think") {
        let share = 1.0 - number(&case["pruned_ratio"]);
        for chunk in [27, 512] {
            let prompt = Prompt::new(&input, &format!("think:{share}+f32"), chunk);
            let selection = prompt.sequence().selection.as_ref().unwrap();
            let think = prompt.sequence().recipe.think().unwrap();
            let all: Vec<u32> = (0..prompt.tokens as u32).collect();
            for (head, pruned) in positions(&case["pruned"]).iter().enumerate() {
                let [keys, _] = prompt.cache.gather_chosen(prompt.sequence(), 0, head, &all);
                let channels = think.choose(&selection.energies[head], &keys);
                let dim = whole(&input["head_dim"]) as u32;
                let found: Vec<u32> = (0..dim)
                    .filter(|c| channels.mask()[*c as usize / 32] >> (c % 32) & 1 == 0)
                    .collect();
                assert_eq!(&found, pruned, "{case}, head {head}");
            }
        }
    }
}
