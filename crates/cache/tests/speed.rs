//! `cargo test --release -p kvasir-cache --test speed -- --ignored --nocapture`

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Instant;

use common::{Random, cache, layer};
use kvasir_cache::{AttentionScratch, BatchSlice, Recipe};

/// Attention of a decode step over one layer of SmolLM2's shape, microseconds per sequence.
#[test]
#[ignore = "prints times"]
fn decode_attention() {
    let l = layer(9, 3, 64);
    let (context, readers) = (1024, 16);
    for recipe in [Recipe::F16, Recipe::JOINT4, Recipe::JOINT3, Recipe::JOINT2, Recipe::KIVI4] {
        for shared in [false, true] {
            let mut cache = cache(vec![l.clone()], 32, recipe, 256 << 20, true);
            let mut random = Random::new(5);
            let ids: Vec<_> = (0..readers)
                .map(|reader| {
                    let id = cache.add_sequence(None).unwrap();
                    let first = if shared { 0 } else { reader * context };
                    let tokens: Vec<u32> = (first as u32..).take(context + 1).collect();
                    let start = cache.match_prefix(id, &tokens).unwrap();
                    let len = context + 1 - start;
                    cache.reserve(id, len).unwrap();
                    let slices = [BatchSlice { sequence: id, row: 0, start, len }];
                    let (k, v) = (random.values(len * 192), random.values(len * 192));
                    cache.write(0, &slices, &k, &v).unwrap();
                    cache.commit(id, &tokens[start..]).unwrap();
                    id
                })
                .collect();
            let slices: Vec<_> = (ids.iter().enumerate())
                .map(|(row, id)| BatchSlice { sequence: *id, row, start: context, len: 1 })
                .collect();
            let queries = random.values(readers * 576);
            let mut out = vec![0.0; queries.len()];
            let mut scratch = AttentionScratch::default();
            let mut times: Vec<f64> = (0..200)
                .map(|_| {
                    let clock = Instant::now();
                    cache.attend(0, &slices, &queries, &mut out, &mut scratch).unwrap();
                    clock.elapsed().as_secs_f64() * 1e6 / readers as f64
                })
                .collect();
            times.sort_by(f64::total_cmp);
            println!("{recipe} shared {shared}: {:.1} us per sequence", times[100]);
        }
    }
}
