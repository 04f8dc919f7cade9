//! Leaving rows out of the last layer changes nothing of what comes after: not what policies choose, not what is known of
//! watched prompts, not the logits of the rows that are wanted.
#![allow(clippy::unwrap_used)]

use kvasir_cache::{BatchSlice, Recipe};
use kvasir_model::testkit::tiny_model;
use kvasir_model::{CacheOptions, ForwardBatch, Model, Runner, Threads};

/// Chunks of the prompt, and tokens after it.
const CHUNKS: [usize; 2] = [40, 56];
const STEPS: usize = 3;

/// Logits of the prompt's last token and of each one after it, and, of a watched prompt, its entropy.
fn logits(model: &Model, recipe: Recipe, watched: bool, all: bool) -> (Vec<Vec<f32>>, Option<f64>) {
    let mut runner = Runner::new(Threads::new(2).unwrap());
    let mut cache = model.new_cache(CacheOptions::of(recipe)).unwrap();
    let id = cache.add_sequence(None).unwrap();
    let prompt: usize = CHUNKS.iter().sum();
    cache.expect_prompt(id, prompt).unwrap();
    if watched {
        cache.watch_prompt(id, prompt).unwrap();
    }
    let tokens: Vec<u32> = (0..(prompt + STEPS) as u32).map(|i| i * 7 % 256).collect();
    let (mut logits, mut entropy, mut start) = (Vec::new(), None, 0);
    for len in CHUNKS.into_iter().chain([1; STEPS]) {
        let chunk = &tokens[start..start + len];
        let end = start + len >= prompt;
        let wanted: &[usize] = if end { &[len - 1] } else { &[] };
        cache.reserve(id, len).unwrap();
        let slices = [BatchSlice { sequence: id, row: 0, start, len }];
        let batch = ForwardBatch { tokens: chunk, slices: &slices };
        match all {
            true => model.forward(batch, &mut cache, &mut runner).unwrap(),
            false => model.forward_for(wanted, batch, &mut cache, &mut runner).unwrap(),
        }
        cache.commit(id, chunk).unwrap();
        start += len;
        if watched && start == prompt {
            entropy = cache.attention_entropy(id).unwrap();
            cache.stop_watching(id).unwrap();
        }
        if end {
            let mut out = Vec::new();
            model.logits(wanted, &mut runner, &mut out);
            logits.push(out);
        }
    }
    cache.check_integrity().unwrap();
    (logits, entropy)
}

#[test]
fn leaving_rows_out_changes_nothing_that_follows() {
    let model = tiny_model(1);
    for recipe in [
        "f16",
        "f32",
        "int8",
        "kivi4",
        "streaming:0.5",
        "h2o:0.5",
        "snapkv:0.5",
        "chunkkv:0.5",
        "compactor:0.5",
        "clusterkv:0.5",
        "think:0.6",
        "snapkv:0.5+think:0.6",
    ] {
        let parsed: Recipe = recipe.parse().unwrap();
        let (all, some) =
            (logits(&model, parsed, false, true), logits(&model, parsed, false, false));
        assert_eq!(all.0.len(), 1 + STEPS);
        assert!(all.0.iter().flatten().all(|x| x.is_finite()), "{recipe}");
        assert!(all == some, "{recipe}");
    }
}

#[test]
fn watched_prompts_show_all_queries() {
    let model = tiny_model(1);
    let [all, some] = [true, false].map(|all| logits(&model, Recipe::F16, true, all));
    assert!(all.1.is_some() && all == some, "{:?} {:?}", all.1, some.1);
}

/// Rows of several sequences, of which one has none that is wanted, and one begins after others of its tokens.
#[test]
fn wanted_rows_keep_their_sequences_and_places() {
    let model = tiny_model(1);
    let tokens: Vec<u32> = (0..90).map(|i| i * 11 % 256).collect();
    let run = |wanted: Option<&[usize]>| {
        let mut runner = Runner::new(Threads::new(2).unwrap());
        let mut cache = model.new_cache(CacheOptions::of(Recipe::F16)).unwrap();
        let mut slices = Vec::new();
        // The first one holds 20 tokens already.
        for (row, start, len) in [(0, 20, 25), (25, 0, 30), (55, 0, 35)] {
            let sequence = cache.add_sequence(None).unwrap();
            cache.reserve(sequence, start + len).unwrap();
            if start > 0 {
                let slices = [BatchSlice { sequence, row: 0, start: 0, len: start }];
                let batch = ForwardBatch { tokens: &tokens[60..60 + start], slices: &slices };
                model.forward(batch, &mut cache, &mut runner).unwrap();
                cache.commit(sequence, &tokens[60..60 + start]).unwrap();
            }
            slices.push(BatchSlice { sequence, row, start, len });
        }
        let batch = ForwardBatch { tokens: &tokens, slices: &slices };
        match wanted {
            None => model.forward(batch, &mut cache, &mut runner).unwrap(),
            Some(wanted) => model.forward_for(wanted, batch, &mut cache, &mut runner).unwrap(),
        }
        let mut out = Vec::new();
        model.logits(&[3, 24, 56, 89], &mut runner, &mut out);
        out
    };
    assert!(run(None) == run(Some(&[3, 24, 56, 89])));
}
