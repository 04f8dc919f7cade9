//! KVSharer: a layer that stores nothing reads exactly what its owner stored.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Random, cache, layer};
use kvasir_cache::{AttentionScratch, BatchSlice, Recipe};

const DIM: usize = 16;
const HEADS: usize = 2;

/// Outputs of both layers for the same queries, where each layer has keys and values of its own; and all bytes.
fn run(recipe: &str, tokens: usize) -> ([Vec<f32>; 2], usize) {
    let recipe: Recipe = recipe.parse().unwrap();
    let mut cache = cache(vec![layer(4, HEADS, DIM); 2], 16, recipe, 8 << 20, true);
    let id = cache.add_sequence(None).unwrap();
    cache.expect_prompt(id, tokens).unwrap();
    let mut random = Random::new(5);
    let mut scratch = AttentionScratch::default();
    let mut outputs = [Vec::new(), Vec::new()];
    let mut step = |len: usize| {
        let start = cache.num_tokens(id).unwrap();
        cache.reserve(id, len).unwrap();
        let slices = [BatchSlice { sequence: id, row: 0, start, len }];
        let q = random.values(len * 4 * DIM);
        for (layer, out) in outputs.iter_mut().enumerate() {
            let k = random.values(len * HEADS * DIM);
            let v = random.values(len * HEADS * DIM);
            *out = vec![f32::NAN; q.len()];
            cache.write(layer, &slices, &k, &v).unwrap();
            cache.attend(layer, &slices, &q, out, &mut scratch).unwrap();
            cache.observe(layer, &slices, &q, &mut scratch).unwrap();
        }
        cache.commit(id, &vec![7; len]).unwrap();
        cache.check_integrity().unwrap();
    };
    step(tokens);
    (0..40).for_each(|_| step(1));
    let bytes = cache.sequence_bytes(id).unwrap().1;
    assert!(
        cache.reads_others(1, &[BatchSlice { sequence: id, row: 0, start: 0, len: 1 }]).unwrap()
            == recipe.to_string().contains("kvsharer:0.5")
    );
    cache.remove_sequence(id).unwrap();
    cache.reset_prefix_cache().unwrap();
    cache.check_integrity().unwrap();
    assert_eq!(cache.stats().physical_bytes, 0);
    (outputs, bytes)
}

#[test]
fn a_shared_layer_reads_its_owners_bytes() {
    for with in ["f32", "f16", "kivi4", "joint3", "recalkv:0.5", "think:0.5"] {
        for tokens in [1, 15, 16, 17, 100] {
            let (alone, all) = run(with, tokens);
            let ([first, second], some) = run(&format!("kvsharer:0.5+{with}"), tokens);
            // The owner is what it was, and its reader sees the same.
            assert_eq!(first, alone[0], "{with}, {tokens} tokens");
            assert_eq!(second, first, "{with}, {tokens} tokens");
            assert_ne!(alone[1], alone[0]);
            assert!((some as f64) < 0.56 * all as f64, "{with}, {tokens}: {some} of {all} bytes");
        }
    }
}

#[test]
fn no_layer_shared_is_the_cache_without_it() {
    for with in ["f16", "kivi2"] {
        assert_eq!(run(&format!("kvsharer:1+{with}"), 50), run(with, 50));
    }
}
