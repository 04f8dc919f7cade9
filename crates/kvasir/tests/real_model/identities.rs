//! Every method at the limit where it gives nothing up is the uncompressed cache: to 1e-3 of a logit over f32 blocks; over
//! f16 blocks to what rounding keys and values to 11 bits moves (`golden.rs`: .008), since some round twice.

use std::sync::Arc;

use kvasir_cache::offline::{KvSharerTable, LessTable, Method, Table, Tables};
use kvasir_cache::{BatchSlice, Recipe};
use kvasir_model::{
    CacheOptions, Calibration, Dtype, ForwardBatch, LoadOptions, Model, Runner, Threads, corpus,
};

use crate::models;

/// Around a window of queries (8, 32, 64), a block, and neither.
const PROMPTS: [usize; 6] = [1, 31, 32, 33, 65, 150];

/// Logits after each of some tokens that follow the prompt.
fn logits(
    model: &Model,
    runner: &mut Runner,
    tables: &Tables,
    recipe: Recipe,
    (prompt, tokens): (usize, &[u32]),
) -> Vec<f32> {
    let options = CacheOptions { tables: tables.clone(), ..CacheOptions::of(recipe) };
    let mut cache = model.new_cache(options).unwrap();
    let id = cache.add_sequence(None).unwrap();
    cache.expect_prompt(id, prompt).unwrap();
    let mut all = Vec::new();
    let mut start = 0;
    while start < tokens.len() {
        let len = if start < prompt { 50.min(prompt - start) } else { 1 };
        let len = len.min(cache.most_next(id).unwrap());
        let tokens = &tokens[start..start + len];
        cache.reserve(id, len).unwrap();
        let slices = [BatchSlice { sequence: id, row: 0, start, len }];
        let batch = ForwardBatch { tokens, slices: &slices };
        model.forward(batch, &mut cache, runner).unwrap();
        cache.commit(id, tokens).unwrap();
        let mut out = Vec::new();
        if start >= prompt {
            model.logits(&[0], runner, &mut out);
        }
        all.extend(out);
        start += len;
    }
    cache.check_integrity().unwrap();
    all
}

#[test]
fn nothing_given_up_is_nothing_lost() {
    let options = LoadOptions { dtype: Dtype::Float32, ..LoadOptions::default() };
    let model = Arc::new(Model::load(&models::path("smollm2"), &options).unwrap());
    let mut runner = Runner::new(Threads::new(0).unwrap());
    let texts: Vec<&str> = corpus::embedded().iter().take(2).map(|text| text.text).collect();
    let calibration = Calibration { texts: &texts, tokens_per_text: 384, block_size: 32 };
    let mut tables = Tables::default();
    for method in [Method::Lorc, Method::ReCalKv] {
        tables.add(model.make_table(method, &calibration, &mut runner, &mut |_, _| {}).unwrap());
    }
    // No layer is shared, so no search is needed.
    let none = KvSharerTable { layers: 30, pairs: Vec::new() };
    tables.add(Table::KvSharer(none.into()));
    // Nothing is forgotten, so nothing need be learnt.
    let cache = model.new_cache(CacheOptions::of(Recipe::F16)).unwrap();
    tables.add(Table::Less(LessTable::untrained(cache.geometry(), 16).into()));
    let text = model.tokenizer().encode(corpus::embedded()[0].text, true).unwrap();
    for prompt in PROMPTS {
        let tokens = &text[..prompt + 3];
        let mut run = |recipe: &str| {
            let recipe = recipe.parse().unwrap();
            logits(&model, &mut runner, &tables, recipe, (prompt, tokens))
        };
        let [f32, f16] = ["f32", "f16"].map(&mut run);
        for method in [
            "streaming:1",
            "h2o:1",
            "snapkv:1",
            "chunkkv:1",
            "compactor:1",
            "dbudget:0",
            "clusterkv:1:sinks=4",
            "think:1",
            "lorc:1",
            "recalkv:1",
            "kvsharer:1",
            "less:1",
        ] {
            // Rows in files are in f16 always.
            let exact = if method.starts_with("clusterkv") { 1e-2 } else { 1e-3 };
            for (recipe, whole, limit) in
                [(format!("{method}+f32"), &f32, exact), (method.to_owned(), &f16, 1e-2)]
            {
                let found = run(&recipe);
                assert_eq!(found.len(), whole.len());
                let off = found.iter().zip(whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                println!("{recipe}, {prompt} tokens: logits {off:.5} off");
                assert!(off < limit, "{recipe}, {prompt} tokens: logits {off} off");
            }
        }
    }
}
