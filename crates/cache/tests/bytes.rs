//! What prompts take once they are complete, against the formulas of the methods.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Random, cache, layer};
use kvasir_cache::{AttentionScratch, BatchSlice};

/// 16 prompts hold what the method's formula says, within 5 %: kept tokens in f16, and H2O's scores. Blocks that are not
/// full, tables and slots' sizes are in what is held.
#[test]
fn bytes_are_the_methods() {
    const N: usize = 2000;
    let (heads, dim) = (3, 64);
    let (row, left) = (2.0 * dim as f64, (N % 32) as f64);
    // Bytes of a token in one KV head of a layer, and of a KV head whatever its tokens.
    for (recipe, token, head) in [
        ("snapkv:0.5", row, 0.0),
        ("chunkkv:0.5", row, 0.0),
        ("compactor:0.5", row, 0.0),
        ("streaming:0.5", row, 0.0),
        ("h2o:0.5", row + 2.0, 0.0),
        // The sums are in f32.
        ("less:0.5", row + 2.0, 8.0 * 4.0 * (dim + 1) as f64),
        ("less:0.5:over=snapkv", row, 8.0 * 4.0 * (dim + 1) as f64),
        ("think:0.6", 0.6 * row + row, dim as f64 / 8.0),
        // What does not fill a block is not coded.
        ("think:0.5+kivi4", (0.5 * row + row) * 5.0 / 16.0, dim as f64 / 8.0 + left * 2.0 * row),
        ("snapkv:0.5+think:0.6", (0.6 * row + row) / 2.0, dim as f64 / 8.0),
        ("lorc:0.5", row, left * row),
        ("recalkv:0.5", row, left * row),
        ("kvsharer:0.5", row, 0.0),
        ("kvsharer:0.5+recalkv:0.5", row / 2.0, left * row / 2.0),
    ] {
        // Half of two layers is one.
        let layers = if recipe.starts_with("kvsharer") { 2 } else { 1 };
        let shape = vec![layer(9, heads, dim); layers];
        let mut cache = cache(shape, 32, recipe.parse().unwrap(), 256 << 20, false);
        let mut scratch = AttentionScratch::default();
        let mut random = Random::new(3);
        let (q, k) = (random.values(N * 9 * dim), random.values(N * heads * dim));
        for _ in 0..16 {
            let id = cache.add_sequence(None).unwrap();
            cache.expect_prompt(id, N).unwrap();
            cache.reserve(id, N).unwrap();
            let slices = [BatchSlice { sequence: id, row: 0, start: 0, len: N }];
            let mut out = vec![0.0; q.len()];
            for layer in 0..layers {
                cache.write(layer, &slices, &k, &k).unwrap();
                cache.attend(layer, &slices, &q, &mut out, &mut scratch).unwrap();
                cache.observe(layer, &slices, &q, &mut scratch).unwrap();
            }
            cache.commit(id, &vec![1; N]).unwrap();
        }
        cache.check_integrity().unwrap();
        let formula = (16 * layers * heads) as f64 * (N as f64 * token + head);
        let held = cache.stats().physical_bytes;
        let off = held as f64 / formula;
        assert!((0.98..1.05).contains(&off), "{recipe}: {held} held, {formula} by formula: {off}");
    }
}
