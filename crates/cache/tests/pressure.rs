//! The pressure ladder: more tokens fit because old blocks are coded again, nobody's output is spoiled, and
//! the books stay right.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Random, cache, layer};
use kvasir_cache::{AttentionScratch, BatchSlice, CacheError, KvCache, Recipe, SequenceId};

const CHUNK: usize = 32;
const LAYERS: usize = 2;

/// Appends chunks of random tokens to a sequence until there is no room; returns the tokens it holds.
fn fill(cache: &mut KvCache, id: SequenceId, random: &mut Random, most: usize) -> usize {
    let mut start = 0;
    while start < most {
        match cache.reserve(id, CHUNK) {
            Ok(()) => {}
            Err(CacheError::Exhausted { .. }) => break,
            Err(other) => panic!("{other}"),
        }
        let slices = [BatchSlice { sequence: id, row: 0, start, len: CHUNK }];
        for layer in 0..LAYERS {
            let (k, v) = (random.values(CHUNK * 64), random.values(CHUNK * 64));
            cache.write(layer, &slices, &k, &v).unwrap();
        }
        let tokens: Vec<u32> = (start as u32..).take(CHUNK).collect();
        cache.commit(id, &tokens).unwrap();
        cache.check_integrity().unwrap();
        start += CHUNK;
    }
    start
}

fn attend(cache: &KvCache, id: SequenceId, tokens: usize, queries: &[f32]) -> Vec<f32> {
    let slices = [BatchSlice { sequence: id, row: 0, start: tokens - 1, len: 1 }];
    let mut out = vec![0.0; queries.len()];
    let mut scratch = AttentionScratch::default();
    cache.attend(1, &slices, queries, &mut out, &mut scratch).unwrap();
    out
}

#[test]
fn a_full_pool_codes_old_blocks_again_before_it_gives_up() {
    let l = layer(4, 2, 32);
    let tokens_held = |recipe: Recipe| {
        let mut cache = cache(vec![l.clone(); LAYERS], 32, recipe, 256 << 10, false);
        let id = cache.add_sequence(None).unwrap();
        let held = fill(&mut cache, id, &mut Random::new(5), usize::MAX);
        let stats = cache.stats();
        assert!(stats.physical_bytes <= stats.budget_bytes);
        cache.remove_sequence(id).unwrap();
        cache.check_integrity().unwrap();
        assert_eq!(cache.stats().physical_bytes, 0);
        (held, stats.num_lowered)
    };
    let (joint4, none) = tokens_held(Recipe::JOINT4);
    let (joint2, _) = tokens_held(Recipe::JOINT2);
    let (auto, lowered) = tokens_held(Recipe::AUTO);
    assert_eq!(none, 0);
    assert!(lowered > 0);
    assert!(auto * 10 >= joint2 * 9, "{auto} tokens with the ladder, {joint2} at its floor");
    assert!(joint2 * 10 > joint4 * 17, "{joint2} {joint4}");
}

#[test]
fn lowered_blocks_are_read_as_what_they_are() {
    let l = layer(4, 2, 32);
    let queries = Random::new(9).values(4 * 32);
    let mut held = Vec::new();
    for (recipe, budget) in
        [(Recipe::F16, 64 << 20), (Recipe::AUTO, 8 << 20), (Recipe::AUTO, 136 << 10)]
    {
        let mut cache = cache(vec![l.clone(); LAYERS], 32, recipe, budget, false);
        let id = cache.add_sequence(None).unwrap();
        let tokens = fill(&mut cache, id, &mut Random::new(5), 640);
        assert_eq!(tokens, 640);
        held.push((attend(&cache, id, tokens, &queries), cache.stats().num_lowered));
    }
    assert_eq!(held[1].1, 0);
    assert!(held[2].1 > 0, "the small budget was meant to press");
    let error = |a: &[f32], b: &[f32]| {
        let square: f32 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
        (square / a.iter().map(|a| a * a).sum::<f32>()).sqrt()
    };
    let (four_bits, pressed) = (error(&held[0].0, &held[1].0), error(&held[0].0, &held[2].0));
    assert!(four_bits < 0.15 && pressed < 0.6, "{four_bits} {pressed}");
    assert!(four_bits < pressed, "{four_bits} {pressed}");
}
