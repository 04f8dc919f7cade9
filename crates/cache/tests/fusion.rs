//! The paper's tree over a cache: what is shared, what it frees, and what stays as it is.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Random, layer, sharing_cache};
use kvasir_cache::offline::Tables;
use kvasir_cache::{
    AttentionScratch, BatchSlice, CacheConfig, CacheError, Geometry, KvCache, Recipe, SequenceId,
    Sharing, SharingMode,
};
use kvasir_kernels::Products;
use proptest::prelude::*;

const TOKENS: usize = 16;
const HEADS: usize = 2;
const DIM: usize = 16;
/// Numbers of a block of a layer.
const UNIT: usize = TOKENS * HEADS * DIM;
const LAYERS: usize = 6;

fn tree(threshold: f32) -> Sharing {
    Sharing { mode: SharingMode::Tree, limit: Some(threshold) }
}

fn cache_of(recipe: Recipe, sharing: Sharing, budget: usize) -> KvCache {
    sharing_cache(vec![layer(2, HEADS, DIM); LAYERS], TOKENS, recipe, budget, true, sharing)
}

fn cache(recipe: Recipe, threshold: f32) -> KvCache {
    cache_of(recipe, tree(threshold), 16 << 20)
}

/// Appends whole blocks, `[blocks, UNIT]` keys and values, to every layer.
fn append(cache: &mut KvCache, id: SequenceId, keys: &[f32], values: &[f32]) {
    let len = keys.len() / (HEADS * DIM);
    let start = cache.num_tokens(id).unwrap();
    cache.reserve(id, len).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start, len }];
    for layer in 0..LAYERS {
        cache.write(layer, &slices, keys, values).unwrap();
    }
    let tokens: Vec<u32> = (0..len as u32).collect();
    cache.commit(id, &tokens).unwrap();
}

fn sequence(cache: &mut KvCache, salt: Option<&str>, keys: &[f32], values: &[f32]) -> SequenceId {
    let id = cache.add_sequence(salt).unwrap();
    append(cache, id, keys, values);
    id
}

/// What one query at the end of a sequence reads from a layer.
fn attend(cache: &KvCache, id: SequenceId, layer: usize) -> Vec<f32> {
    let slices =
        [BatchSlice { sequence: id, row: 0, start: cache.num_tokens(id).unwrap() - 1, len: 1 }];
    let queries = Random::new(9).values(2 * DIM);
    let mut out = vec![f32::NAN; 2 * DIM];
    cache.attend(layer, &slices, &queries, &mut out, &mut AttentionScratch::default()).unwrap();
    out
}

fn all_outputs(cache: &KvCache, ids: &[SequenceId]) -> Vec<Vec<f32>> {
    let layers = |id: &SequenceId| (0..LAYERS).map(|l| attend(cache, *id, l)).collect::<Vec<_>>();
    ids.iter().flat_map(layers).collect()
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn copies_are_stored_once_in_the_layers_that_take_part() {
    for recipe in [Recipe::F16, Recipe::F32] {
        let mut cache = cache(recipe, 0.9);
        let (keys, values) = (Random::new(1).values(3 * UNIT), Random::new(2).values(3 * UNIT));
        let ids: Vec<SequenceId> =
            (0..4).map(|_| sequence(&mut cache, None, &keys, &values)).collect();
        let before = all_outputs(&cache, &ids);
        let report = cache.fuse(&ids, 500).unwrap();
        cache.check_integrity().unwrap();
        assert_eq!((report.blocks, report.layers.len(), report.rejected()), (12, 2, 0));
        for (layer, l) in report.layers.iter().enumerate() {
            assert_eq!((l.layer, l.blocks, l.representatives), (layer + 2, 12, 3));
            assert_eq!((l.new, l.moved), (12, 9));
        }
        assert_eq!(report.counted_ratio(), 4.0);
        // Nine units of two layers, keys and values.
        let unit = UNIT * if recipe == Recipe::F32 { 4 } else { 2 };
        assert_eq!(report.bytes_before - report.bytes_after, 9 * 2 * 2 * unit);
        assert_eq!(cache.stats().physical_bytes, report.bytes_after);
        assert!(report.predicted.unwrap().ratio > 1.5, "{report:?}");
        let off = worst(&before, &all_outputs(&cache, &ids));
        assert!(off < 2e-3, "{off}");
    }
}

#[test]
fn gains_give_every_reader_its_own_length() {
    let mut cache = cache(Recipe::F32, 0.9);
    let (keys, values) = (Random::new(1).values(UNIT), Random::new(2).values(UNIT));
    let scaled = |x: &[f32], by: f32| x.iter().map(|x| x * by).collect::<Vec<f32>>();
    let ids: Vec<SequenceId> = [(1.0, 1.0), (0.5, 3.0), (1.5, 0.25)]
        .map(|(k, v)| sequence(&mut cache, None, &scaled(&keys, k), &scaled(&values, v)))
        .into();
    let before = all_outputs(&cache, &ids);
    let report = cache.fuse(&ids, 0).unwrap();
    assert_eq!((report.counted_ratio(), report.predicted), (3.0, None));
    // Gains are f16: 3 digits.
    let off = worst(&before, &all_outputs(&cache, &ids));
    assert!(off < 4e-3, "{off}");
    // A block that comes later joins as well, and keeps its length.
    let late = sequence(&mut cache, None, &scaled(&keys, 2.0), &scaled(&values, 2.0));
    let expected = all_outputs(&cache, &[late]);
    let kept = all_outputs(&cache, &ids);
    let all = [ids.as_slice(), &[late]].concat();
    let report = cache.fuse(&all, 0).unwrap();
    assert_eq!((report.blocks, report.counted_ratio()), (1, 4.0));
    assert!(report.bytes_after < report.bytes_before);
    assert!(worst(&expected, &all_outputs(&cache, &[late])) < 8e-3);
    assert_eq!(kept, all_outputs(&cache, &ids), "what was fused is never written again");
    cache.check_integrity().unwrap();
}

#[test]
fn a_representative_is_the_mean_of_directions() {
    // Two blocks that differ by a known angle, in one token's values of layers without rotation.
    let mut l = layer(2, HEADS, DIM);
    l.rope = None;
    let geometry = Geometry::new(vec![l; LAYERS], TOKENS).unwrap();
    let mut cache = KvCache::new(CacheConfig {
        tables: Tables::default(),
        geometry,
        ropes: Vec::new(),
        recipe: Recipe::F32,
        statistics: None,
        sharing: tree(0.5),
        products: Products::F32,
        budget_bytes: 16 << 20,
        prefix_caching: false,
    })
    .unwrap();
    let block = |angle: f32, length: f32| {
        let mut x = vec![0.0; UNIT];
        (x[0], x[1]) = (length * angle.cos(), length * angle.sin());
        x
    };
    let ids = [(0.0, 1.0), (0.8, 3.0)].map(|(angle, length)| {
        sequence(&mut cache, None, &block(angle, 1.0), &block(angle, length))
    });
    assert_eq!(cache.fuse(&ids, 0).unwrap().counted_ratio(), 2.0);
    for (id, length) in ids.into_iter().zip([1.0, 3.0]) {
        // The first token's value, at the softmax weight that the query gives it.
        let out = attend(&cache, id, 2);
        assert!((out[1] / out[0] - 0.4f32.tan()).abs() < 1e-3, "{out:?}");
        let weight = (out[0].powi(2) + out[1].powi(2)).sqrt() / length;
        assert!((0.03..0.2).contains(&weight), "{weight}");
    }
}

#[test]
fn where_nothing_matches_nothing_changes() {
    let mut cache = cache(Recipe::F16, 0.7);
    let ids: Vec<SequenceId> = (0..4)
        .map(|i| {
            let keys = Random::new(10 + i).values(3 * UNIT);
            sequence(&mut cache, None, &keys, &keys)
        })
        .collect();
    let before = all_outputs(&cache, &ids);
    let report = cache.fuse(&ids, 100).unwrap();
    assert_eq!((report.counted_ratio(), report.realised_ratio()), (1.0, 1.0));
    assert_eq!(report.predicted.unwrap().ratio, 1.0);
    assert_eq!(before, all_outputs(&cache, &ids));
}

#[test]
fn each_block_is_fused_once() {
    let mut cache = cache(Recipe::F16, 0.5);
    let common = Random::new(1).values(2 * UNIT);
    let ids: Vec<SequenceId> = (0..6)
        .map(|i| {
            let own = Random::new(20 + i).values(2 * UNIT);
            let keys: Vec<f32> = common.iter().zip(&own).map(|(c, o)| c + 0.6 * o).collect();
            sequence(&mut cache, None, &keys, &keys)
        })
        .collect();
    let first = cache.fuse(&ids, 0).unwrap();
    assert!(first.counted_ratio() > 2.0, "{first:?}");
    let outputs = all_outputs(&cache, &ids);
    let second = cache.fuse(&ids, 100).unwrap();
    assert_eq!((second.blocks, second.bytes_before), (0, second.bytes_after));
    assert!(second.layers.is_empty() && second.predicted.is_none());
    assert_eq!(outputs, all_outputs(&cache, &ids));
    // Named twice is named once.
    append(&mut cache, ids[0], &common, &common);
    let third = cache.fuse(&[ids[0], ids[1], ids[0]], 0).unwrap();
    assert_eq!(third.blocks, 2);
    cache.check_integrity().unwrap();
}

#[test]
fn tenants_are_never_fused_with_each_other() {
    let mut cache = cache(Recipe::F16, 0.5);
    let keys = Random::new(1).values(2 * UNIT);
    let ids = [None, Some("a"), Some("b")].map(|salt| sequence(&mut cache, salt, &keys, &keys));
    let report = cache.fuse(&ids, 0).unwrap();
    assert_eq!((report.blocks, report.counted_ratio(), report.realised_ratio()), (6, 1.0, 1.0));
    let again = sequence(&mut cache, Some("a"), &keys, &keys);
    let all = [&ids[..], &[again]].concat();
    let report = cache.fuse(&all, 0).unwrap();
    assert_eq!((report.blocks, report.counted_ratio()), (2, 2.0), "the new one joins its tenant's");
    cache.check_integrity().unwrap();
}

#[test]
fn a_single_sequence_is_fused_over_its_chunks() {
    // Without positions a repeated block is a copy wherever it stands.
    let mut l = layer(2, HEADS, DIM);
    l.rope = None;
    let layers = vec![l; LAYERS];
    let mut cache = sharing_cache(layers, TOKENS, Recipe::F16, 16 << 20, false, tree(0.9));
    let keys = Random::new(1).values(UNIT).repeat(40);
    let id = sequence(&mut cache, None, &keys, &keys);
    let report = cache.fuse(&[id], 0).unwrap();
    // Chunks of 16, 16 and 8; those of the last join the second's, and a copy of one chunk stays.
    let representatives = report.layers[0].representatives;
    assert!((15..=32).contains(&representatives), "{report:?}");
    cache.check_integrity().unwrap();
    cache.remove_sequence(id).unwrap();
    assert_eq!(cache.stats().physical_bytes, 0);
}

#[test]
fn sequences_leave_in_any_order() {
    let keys = Random::new(1).values(3 * UNIT);
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]] {
        let mut cache = cache(Recipe::F16, 0.9);
        let ids: Vec<SequenceId> =
            (0..3).map(|_| sequence(&mut cache, None, &keys, &keys)).collect();
        let before = all_outputs(&cache, &ids);
        cache.fuse(&ids, 0).unwrap();
        for (gone, i) in order.into_iter().enumerate() {
            for left in &order[gone..] {
                let off = worst(&before[..LAYERS], &all_outputs(&cache, &[ids[*left]]));
                assert!(off < 2e-3, "{off}");
            }
            cache.remove_sequence(ids[i]).unwrap();
            cache.check_integrity().unwrap();
        }
        assert_eq!(cache.stats().physical_bytes, 0);
    }
}

#[test]
fn coded_recipes_are_refused_and_other_modes_fuse_nothing() {
    for recipe in Recipe::all()
        .into_iter()
        .filter(|r| !r.needs_statistics() && r.needs_tables().next().is_none())
    {
        let mut cache = cache(Recipe::F16, 0.7);
        let prepared = cache.prepare(recipe);
        if [Recipe::F16, Recipe::F32].contains(&recipe) {
            prepared.unwrap();
        } else {
            assert!(matches!(prepared, Err(CacheError::TreeRecipe { .. })));
            assert!(cache.add_sequence_with(recipe, None).is_err());
        }
    }
    let mut cache = cache_of(Recipe::F16, Sharing::OFF, 16 << 20);
    let keys = Random::new(1).values(2 * UNIT);
    let ids = [0, 1].map(|_| sequence(&mut cache, None, &keys, &keys));
    let report = cache.fuse(&ids, 100).unwrap();
    assert_eq!((report.blocks, report.bytes_before), (0, report.bytes_after));
    assert!(report.layers.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_schedule_with_fusion_ends_with_an_empty_pool(
        seed in any::<u64>(),
        ops in prop::collection::vec((0..10u8, 1..70usize), 1..80),
        threshold in 0.1..0.99f32,
        f32_recipe in any::<bool>(),
    ) {
        let recipe = if f32_recipe { Recipe::F32 } else { Recipe::F16 };
        let mut cache = cache_of(recipe, tree(threshold), 2 << 20);
        let mut random = Random::new(seed);
        let common = random.values(UNIT);
        let mut live: Vec<SequenceId> = Vec::new();
        for (op, n) in ops {
            match op {
                0..=2 => {
                    let salt = (random.below(3) == 0).then_some("tenant");
                    live.push(cache.add_sequence(salt).unwrap());
                }
                3..=6 if !live.is_empty() => {
                    let id = live[random.below(live.len())];
                    let start = cache.num_tokens(id).unwrap();
                    match cache.reserve(id, n) {
                        Ok(()) => {
                            let slices = [BatchSlice { sequence: id, row: 0, start, len: n }];
                            let width = HEADS * DIM;
                            let noise = random.values(n * width);
                            let x: Vec<f32> = noise.iter().enumerate()
                                .map(|(i, x)| common[(start * width + i) % UNIT] + 0.5 * x).collect();
                            for layer in 0..LAYERS {
                                cache.write(layer, &slices, &x, &x).unwrap();
                            }
                            cache.commit(id, &vec![1; n]).unwrap();
                        }
                        Err(CacheError::Exhausted { .. }) => {}
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                7..=8 => {
                    let some: Vec<SequenceId> =
                        live.iter().copied().filter(|_| random.below(4) > 0).collect();
                    let report = cache.fuse(&some, 8).unwrap();
                    prop_assert!(report.bytes_after <= report.bytes_before);
                    let unit = UNIT * if f32_recipe { 4 } else { 2 };
                    let moved: usize = report.layers.iter().map(|l| l.moved).sum();
                    prop_assert_eq!(report.bytes_before - report.bytes_after, moved * 2 * unit);
                    prop_assert_eq!(cache.fuse(&some, 0).unwrap().blocks, 0);
                }
                9 if !live.is_empty() => {
                    let i = random.below(live.len());
                    cache.remove_sequence(live.swap_remove(i)).unwrap();
                }
                _ => {}
            }
            cache.check_integrity().unwrap();
            for id in &live {
                if cache.num_tokens(*id).unwrap() > 0 {
                    prop_assert!(attend(&cache, *id, 2).iter().all(|x| x.is_finite()));
                }
            }
        }
        for id in live {
            cache.remove_sequence(id).unwrap();
        }
        cache.check_integrity().unwrap();
        prop_assert_eq!(cache.stats().physical_bytes, 0);
    }
}
