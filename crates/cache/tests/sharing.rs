//! Sharing by content: bytes are freed, limits are kept, tenants never meet, and the books stay right in
//! any order of sharing, sealing, lowering and freeing.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Random, layer, sharing_cache};
use kvasir_cache::{
    AttentionScratch, BatchSlice, CacheError, KvCache, Recipe, SequenceId, Sharing,
};
use proptest::prelude::*;

const LAYERS: usize = 2;
const BLOCK: usize = 16;
const WIDTH: usize = 2 * 32;

fn new_cache(recipe: Recipe, sharing: &str) -> KvCache {
    let l = layer(4, 2, 32);
    let sharing: Sharing = sharing.parse().unwrap();
    sharing_cache(vec![l; LAYERS], BLOCK, recipe, 8 << 20, false, sharing)
}

/// Keys and values of a passage: the same for the same ids, but for noise.
fn rows(passage: u32, noise: f32, seed: u64) -> Vec<f32> {
    let base = Random::new(u64::from(passage) + 100).values(BLOCK * WIDTH);
    let extra = Random::new(seed).values(BLOCK * WIDTH);
    base.iter().zip(&extra).map(|(x, n)| x + noise * n).collect()
}

/// Appends passages of one block each.
fn append(cache: &mut KvCache, id: SequenceId, passages: &[u32], noise: f32, seed: u64) -> bool {
    for (i, passage) in passages.iter().enumerate() {
        let start = cache.num_tokens(id).unwrap();
        match cache.reserve(id, BLOCK) {
            Ok(()) => {}
            Err(CacheError::Exhausted { .. }) => return false,
            Err(other) => panic!("{other}"),
        }
        let slices = [BatchSlice { sequence: id, row: 0, start, len: BLOCK }];
        for layer in 0..LAYERS {
            let k = rows(*passage, noise, seed + 7 * i as u64);
            let v = rows(*passage + 50, noise, seed + 7 * i as u64 + 3);
            cache.write(layer, &slices, &k, &v).unwrap();
        }
        let tokens: Vec<u32> = (0..BLOCK as u32).map(|t| passage * 1000 + t).collect();
        cache.commit(id, &tokens).unwrap();
    }
    true
}

fn output(cache: &KvCache, id: SequenceId) -> Vec<f32> {
    let tokens = cache.num_tokens(id).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start: tokens - 1, len: 1 }];
    let queries = Random::new(1).values(4 * 32);
    let mut out = vec![0.0; 4 * 32];
    let mut scratch = AttentionScratch::default();
    cache.attend(0, &slices, &queries, &mut out, &mut scratch).unwrap();
    out
}

#[test]
fn equal_passages_in_any_order_are_stored_once() {
    for (recipe, sharing) in [
        (Recipe::F16, "tokens"),
        (Recipe::INT8, "tokens"),
        (Recipe::JOINT3, "tokens"),
        (Recipe::JOINT3, "sketch"),
        (Recipe::F16, "sketch"),
    ] {
        let mut cache = new_cache(recipe, sharing);
        let a = cache.add_sequence(None).unwrap();
        let b = cache.add_sequence(None).unwrap();
        append(&mut cache, a, &[9, 1, 2, 3], 0.01, 1);
        let before = cache.stats().physical_bytes;
        append(&mut cache, b, &[8, 3, 1, 2], 0.01, 99);
        cache.check_integrity().unwrap();
        let stats = cache.stats();
        assert_eq!(stats.sharing.shared % 3, 0, "{recipe} {sharing}");
        assert!(stats.sharing.shared >= 3 * 4, "{recipe} {sharing}: {:?}", stats.sharing);
        let (logical, physical) = cache.bytes_of(&[a, b], true).unwrap();
        let (_, alone) = cache.bytes_of(&[a], true).unwrap();
        assert!(
            physical < alone * 13 / 10,
            "{recipe} {sharing}: {physical} of {logical}, alone {alone}"
        );
        // All that b added is its first block, tables and what an index holds.
        assert!(stats.physical_bytes < before * 18 / 10);
        for id in [a, b] {
            cache.remove_sequence(id).unwrap();
            cache.check_integrity().unwrap();
        }
        cache.reset_prefix_cache().unwrap();
        assert_eq!(cache.stats().physical_bytes, 0, "{recipe} {sharing}");
    }
}

#[test]
fn what_differs_too_much_is_not_shared() {
    for recipe in [Recipe::F16, Recipe::JOINT3] {
        let mut cache = new_cache(recipe, "tokens:0.02");
        let a = cache.add_sequence(None).unwrap();
        let b = cache.add_sequence(None).unwrap();
        append(&mut cache, a, &[9, 1, 2], 0.8, 1);
        append(&mut cache, b, &[8, 1, 2], 0.8, 77);
        let counts = cache.stats().sharing;
        assert!(counts.with_candidates > 0);
        assert_eq!(counts.shared, 0, "{recipe}");
    }
}

#[test]
fn tenants_never_share() {
    for sharing in ["tokens", "sketch"] {
        let mut cache = new_cache(Recipe::JOINT3, sharing);
        let a = cache.add_sequence(Some("a")).unwrap();
        let b = cache.add_sequence(Some("b")).unwrap();
        append(&mut cache, a, &[9, 1, 2, 3], 0.0, 1);
        append(&mut cache, b, &[9, 1, 2, 3], 0.0, 1);
        let counts = cache.stats().sharing;
        assert_eq!((counts.with_candidates, counts.shared), (0, 0), "{sharing}");
        let (_, both) = cache.bytes_of(&[a, b], false).unwrap();
        let (_, one) = cache.bytes_of(&[a], false).unwrap();
        assert_eq!(both, 2 * one);
    }
}

#[test]
fn limit_zero_without_repeats_changes_no_bit() {
    for recipe in [Recipe::F16, Recipe::JOINT3] {
        let outputs = ["off", "tokens:0", "sketch:0"].map(|sharing| {
            let mut cache = new_cache(recipe, sharing);
            let a = cache.add_sequence(None).unwrap();
            append(&mut cache, a, &[1, 2, 3, 4], 0.0, 1);
            assert_eq!(cache.stats().sharing.shared, 0);
            output(&cache, a)
        });
        assert_eq!(outputs[0], outputs[1]);
        assert_eq!(outputs[0], outputs[2]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_sharing_and_freeing_ends_empty(
        ops in prop::collection::vec((0..8u8, 0..4u32, 1..5usize), 1..60),
        recipe in 0..Recipe::all().len(),
        sharing in 0..2usize,
        prefix_caching in any::<bool>(),
        budget in 60..400usize,
    ) {
        let l = layer(4, 2, 32);
        let sharing: Sharing = ["tokens:0.3", "sketch:0.3"][sharing].parse().unwrap();
        let recipe = Recipe::all()[recipe];
        let mut cache =
            sharing_cache(vec![l; LAYERS], BLOCK, recipe, budget << 10, prefix_caching, sharing);
        let mut live = Vec::new();
        for (op, passage, n) in ops {
            match op {
                0..=1 => {
                    let salt = (passage % 2 == 0).then_some("tenant");
                    live.push(cache.add_sequence(salt).unwrap());
                }
                2..=5 if !live.is_empty() => {
                    let id = live[n % live.len()];
                    append(&mut cache, id, &vec![passage; n], 0.05 * f32::from(op), n as u64);
                }
                6 if !live.is_empty() => {
                    let id = live.swap_remove(n % live.len());
                    cache.remove_sequence(id).unwrap();
                }
                _ => {}
            }
            cache.check_integrity().unwrap();
            let stats = cache.stats();
            prop_assert!(stats.physical_bytes <= budget << 10);
        }
        for id in live {
            cache.remove_sequence(id).unwrap();
        }
        cache.reset_prefix_cache().unwrap();
        cache.check_integrity().unwrap();
        prop_assert_eq!(cache.stats().physical_bytes, 0);
    }
}
