//! Sequences whose recipe is decided when their prompt is complete.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
mod dense;

use common::{Random, cache, layer, statistics};
use dense::Tokens;
use kvasir_cache::{
    AttentionScratch, BatchSlice, CacheConfig, CacheError, Geometry, KvCache, Recipe, SequenceId,
    Sharing, SharingMode,
};
use kvasir_kernels::{Products, RopeScaling, RopeTable};
use proptest::prelude::*;
use std::sync::Arc;

const LAYERS: usize = 2;
const DIM: usize = 32;

/// A cache of f16 with statistics, for any recipe.
fn plain(budget_bytes: usize, sharing: Sharing) -> KvCache {
    let geometry = Geometry::new(vec![layer(4, 2, DIM); LAYERS], 16).unwrap();
    KvCache::new(CacheConfig {
        geometry: geometry.clone(),
        ropes: vec![RopeTable::new(DIM, common::ROPE_BASE, &RopeScaling::None, 1)],
        recipe: Recipe::F16,
        statistics: Some(Arc::new(statistics(&geometry, DIM))),
        tables: common::tables(&geometry),
        sharing,
        products: Products::Bf16,
        budget_bytes,
        prefix_caching: true,
    })
    .unwrap()
}

/// Writes some tokens, the same ones for the same seed, in one step; `odd` puts a value there that is no number.
fn write(cache: &mut KvCache, id: SequenceId, tokens: &[u32], odd: Option<usize>) {
    write_scaled(cache, id, tokens, odd, 1.0);
}

/// The same with keys and values that are so many times as large.
fn write_scaled(
    cache: &mut KvCache,
    id: SequenceId,
    tokens: &[u32],
    odd: Option<usize>,
    scale: f32,
) {
    let start = cache.num_tokens(id).unwrap();
    let len = tokens.len() - start;
    cache.reserve(id, len).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start, len }];
    let mut scratch = AttentionScratch::default();
    for layer in 0..LAYERS {
        // Rows follow from tokens: equal prefixes have equal rows.
        let rows = |part: u64, width: usize| -> Vec<f32> {
            let row =
                |t: &u32| Random::new(u64::from(*t) * 8 + part * 2 + layer as u64).values(width);
            tokens[start..].iter().flat_map(row).collect()
        };
        let (q, mut k, mut v) = (rows(0, 4 * DIM), rows(1, 2 * DIM), rows(2, 2 * DIM));
        k.iter_mut().chain(&mut v).for_each(|x| *x *= scale);
        if let Some(odd) = odd.filter(|odd| *odd >= start) {
            k[(odd - start) * 2 * DIM] = f32::NAN;
        }
        cache.write(layer, &slices, &k, &v).unwrap();
        let mut out = vec![0.0; len * 4 * DIM];
        cache.attend(layer, &slices, &q, &mut out, &mut scratch).unwrap();
        cache.observe(layer, &slices, &q, &mut scratch).unwrap();
    }
    cache.commit(id, &tokens[start..]).unwrap();
    cache.check_integrity().unwrap();
}

fn attend(cache: &KvCache, id: SequenceId) -> Vec<f32> {
    let tokens = cache.num_tokens(id).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start: tokens - 1, len: 1 }];
    let queries = Random::new(77).values(4 * DIM);
    let mut out = vec![0.0; queries.len()];
    let mut scratch = AttentionScratch::default();
    cache.attend(1, &slices, &queries, &mut out, &mut scratch).unwrap();
    out
}

fn watched(cache: &mut KvCache, tokens: &[u32]) -> SequenceId {
    let id = cache.add_sequence(None).unwrap();
    cache.watch_prompt(id, tokens.len()).unwrap();
    cache.match_prefix(id, tokens).unwrap();
    id
}

fn text(n: u32) -> Vec<u32> {
    (0..n).collect()
}

/// Recipes that a sequence may change to.
fn followers() -> Vec<Recipe> {
    let composed = ["lorc:0.5", "recalkv:0.5+int8", "joint:2.5"];
    let composed = composed.map(|name| name.parse::<Recipe>().unwrap());
    Recipe::all().into_iter().chain(composed).filter(|recipe| recipe.follows_f16()).collect()
}

#[test]
fn what_was_stored_late_is_what_would_have_been_stored() {
    let followers = followers();
    assert!(followers.contains(&Recipe::JOINT3) && followers.contains(&Recipe::INT8));
    assert!(!followers.contains(&Recipe::KIVI4) && !followers.contains(&Recipe::F32));
    for recipe in followers {
        let mut cache = plain(8 << 20, Sharing::OFF);
        let mut tokens = text(75);
        // A block with a value that is no number stays as it is in both.
        let at_once = cache.add_sequence_with(recipe, Some("other")).unwrap();
        write(&mut cache, at_once, &tokens, Some(20));
        let late = watched(&mut cache, &tokens);
        write(&mut cache, late, &tokens, Some(20));
        assert!(cache.recode(late, recipe, None, &tokens).unwrap(), "{recipe}");
        cache.check_integrity().unwrap();
        assert_eq!(attend(&cache, late), attend(&cache, at_once), "{recipe}");
        let bytes = |id| cache.sequence_bytes(id).unwrap();
        assert_eq!(bytes(late), bytes(at_once), "{recipe}");
        // And so it goes on.
        tokens.extend(100..130);
        write(&mut cache, at_once, &tokens, None);
        write(&mut cache, late, &tokens, None);
        assert_eq!(attend(&cache, late), attend(&cache, at_once), "{recipe}");
        for id in [late, at_once] {
            cache.remove_sequence(id).unwrap();
        }
        cache.reset_prefix_cache().unwrap();
        assert_eq!(cache.stats().physical_bytes, 0);
    }
}

#[test]
fn equal_prompts_are_coded_once() {
    let mut cache = plain(8 << 20, Sharing::OFF);
    let tokens = text(80);
    let first = watched(&mut cache, &tokens);
    write(&mut cache, first, &tokens, None);
    assert!(cache.recode(first, Recipe::JOINT3, None, &tokens).unwrap());
    let of_one = cache.stats().physical_bytes - cache.stats().evictable_bytes;
    let second = watched(&mut cache, &tokens);
    // The prompt of f16 is still known.
    assert_eq!(cache.num_tokens(second).unwrap(), 64);
    write(&mut cache, second, &tokens, None);
    assert!(cache.recode(second, Recipe::JOINT3, None, &tokens).unwrap());
    let of_two = cache.stats().physical_bytes - cache.stats().evictable_bytes;
    assert!(of_two < of_one * 3 / 2, "{of_one} {of_two}");
    assert_eq!(attend(&cache, first), attend(&cache, second));
    // A sequence that is coded from the start finds them, too; one of another tenant does not.
    let third = cache.add_sequence_with(Recipe::JOINT3, None).unwrap();
    assert_eq!(cache.match_prefix(third, &tokens).unwrap(), 64);
    let stranger = cache.add_sequence_with(Recipe::JOINT3, Some("stranger")).unwrap();
    assert_eq!(cache.match_prefix(stranger, &tokens).unwrap(), 0);
    cache.check_integrity().unwrap();
}

#[test]
fn blocks_are_shared_by_likeness_only_when_it_is_decided() {
    let mut cache = plain(8 << 20, Sharing { mode: SharingMode::Tokens, ..Sharing::OFF });
    // The same blocks at other positions.
    let (a, b): (Vec<u32>, Vec<u32>) = ((0..64).collect(), (16..80).collect());
    let shared = |cache: &KvCache| cache.stats().sharing.shared;
    for tokens in [&a, &b] {
        let id = watched(&mut cache, tokens);
        write(&mut cache, id, tokens, None);
        assert_eq!(shared(&cache), 0);
        if tokens == &a {
            assert!(cache.recode(id, Recipe::JOINT4, None, tokens).unwrap());
        } else {
            cache.stop_watching(id).unwrap();
        }
    }
    let late = watched(&mut cache, &b);
    write(&mut cache, late, &b, None);
    assert!(cache.recode(late, Recipe::JOINT4, None, &b).unwrap());
    assert!(shared(&cache) > 0);
}

#[test]
fn prefixes_that_stand_for_others_are_read_as_what_they_stand_for() {
    let mut cache = plain(8 << 20, Sharing { mode: SharingMode::Tokens, ..Sharing::OFF });
    let a: Vec<u32> = (0..64).collect();
    let b: Vec<u32> = (500..516).chain(0..64).chain(900..905).collect();
    let first = cache.add_sequence(None).unwrap();
    write(&mut cache, first, &a, None);
    // The same tokens elsewhere, half as large again: they share, with a gain.
    let second = cache.add_sequence(None).unwrap();
    write_scaled(&mut cache, second, &b, None, 1.5);
    assert!(cache.stats().sharing.shared > 0);
    let late = watched(&mut cache, &b);
    assert_eq!(cache.num_tokens(late).unwrap(), 80, "the prefix of the second");
    write_scaled(&mut cache, late, &b, None, 1.5);
    let entropy = cache.attention_entropy(late).unwrap().unwrap();
    assert!(cache.recode(late, Recipe::INT8, None, &b).unwrap());
    let (exact, coded) = (attend(&cache, second), attend(&cache, late));
    let error: f32 = exact.iter().zip(&coded).map(|(a, b)| (a - b).powi(2)).sum();
    let square: f32 = exact.iter().map(|a| a * a).sum();
    assert!(error < 1e-3 * square, "{error} {square}");
    // Without sharing all of it is as it was written.
    let mut apart = plain(8 << 20, Sharing::OFF);
    let alone = watched(&mut apart, &b);
    write_scaled(&mut apart, alone, &b, None, 1.5);
    let expected = apart.attention_entropy(alone).unwrap().unwrap();
    assert!((entropy - expected).abs() < 1e-3, "{entropy} {expected}");
}

#[test]
fn a_prompt_that_finds_no_room_stays_readable() {
    let tokens = text(160);
    let whole = {
        let mut cache = plain(8 << 20, Sharing::OFF);
        let id = watched(&mut cache, &tokens);
        write(&mut cache, id, &tokens, None);
        cache.stats().physical_bytes + cache.stats().statistics_bytes
    };
    let mut seen = [false; 2];
    for slack in (0..64).map(|i| i * 1024) {
        let statistics = plain(8 << 20, Sharing::OFF).stats().statistics_bytes;
        let mut cache = plain(whole + statistics + slack, Sharing::OFF);
        let id = watched(&mut cache, &tokens);
        if !matches!(cache.reserve(id, tokens.len()), Ok(())) {
            continue;
        }
        write(&mut cache, id, &tokens, None);
        let exact = attend(&cache, id);
        let all = cache.recode(id, Recipe::JOINT4, None, &tokens).unwrap();
        cache.check_integrity().unwrap();
        seen[usize::from(all)] = true;
        let coded = attend(&cache, id);
        let error: f32 = exact.iter().zip(&coded).map(|(a, b)| (a - b).powi(2)).sum();
        let square: f32 = exact.iter().map(|a| a * a).sum();
        assert!(error < 0.05 * square, "{error} {square}");
        cache.remove_sequence(id).unwrap();
        cache.reset_prefix_cache().unwrap();
        assert_eq!(cache.stats().physical_bytes, 0);
    }
    assert_eq!(seen, [true; 2], "of rooms both kinds were meant to be there");
}

#[test]
fn errors_are_those_of_the_codec() {
    let mut cache = plain(8 << 20, Sharing::OFF);
    let tokens = text(75);
    let id = watched(&mut cache, &tokens);
    assert_eq!(cache.coding_error(id, Recipe::JOINT3).unwrap(), None);
    write(&mut cache, id, &tokens, None);
    let mut of = |recipe| cache.coding_error(id, recipe).unwrap().unwrap();
    assert_eq!(of(Recipe::F16), 0.0);
    let [int8, joint4, joint3, joint2] =
        [Recipe::INT8, Recipe::JOINT4, Recipe::JOINT3, Recipe::JOINT2].map(&mut of);
    assert!(int8 < 1e-4 && int8 > 0.0, "{int8}");
    assert!(int8 < joint4 && joint4 < joint3 && joint3 < joint2, "{joint4} {joint3} {joint2}");
    // Uniform numbers on four bits, first blocks better than that; 3 dB a bit would be a factor of 4.
    assert!(joint4 < 0.02 && joint2 < 0.2, "{joint4} {joint2}");
    assert!(matches!(cache.coding_error(id, Recipe::KIVI4), Err(CacheError::Integrity { .. })));
}

#[test]
fn entropies_are_those_of_a_dense_simulation() {
    let tokens = Tokens::new(40, 0, 5);
    let mut cache = cache(
        vec![layer(dense::QUERY_HEADS, dense::KV_HEADS, dense::DIM)],
        16,
        Recipe::F16,
        1 << 20,
        true,
    );
    let id = cache.add_sequence(None).unwrap();
    cache.watch_prompt(id, 40).unwrap();
    let mut scratch = AttentionScratch::default();
    for (start, len) in [(0, 25), (25, 15)] {
        assert_eq!(cache.attention_entropy(id).unwrap(), None);
        cache.reserve(id, len).unwrap();
        let slices = [BatchSlice { sequence: id, row: 0, start, len }];
        let rows = |x: &[f32], heads: usize| -> Vec<f32> {
            x[start * heads * dense::DIM..(start + len) * heads * dense::DIM].to_vec()
        };
        let (q, k, v) = (
            rows(&tokens.q, dense::QUERY_HEADS),
            rows(&tokens.k, dense::KV_HEADS),
            rows(&tokens.v, dense::KV_HEADS),
        );
        cache.write(0, &slices, &k, &v).unwrap();
        let mut out = vec![0.0; q.len()];
        cache.attend(0, &slices, &q, &mut out, &mut scratch).unwrap();
        cache.observe(0, &slices, &q, &mut scratch).unwrap();
        cache.commit(id, &vec![1; len]).unwrap();
    }
    let seen: Vec<usize> = (0..40).collect();
    let of = |head| -> f64 {
        let weights = tokens.weights(39, head, &seen);
        weights.iter().map(|w| -w * w.ln()).sum::<f64>() / 40f64.ln()
    };
    let expected = (0..dense::QUERY_HEADS).map(of).sum::<f64>() / dense::QUERY_HEADS as f64;
    let found = cache.attention_entropy(id).unwrap().unwrap();
    assert!((found - expected).abs() < 1e-3, "{found} {expected}");
    assert!(found > 0.3 && found < 0.999, "{found}");
}

#[test]
fn what_cannot_follow_is_refused() {
    let mut cache = plain(8 << 20, Sharing::OFF);
    let tokens = text(40);
    let coded = cache.add_sequence_with(Recipe::JOINT3, None).unwrap();
    assert!(matches!(cache.watch_prompt(coded, 40), Err(CacheError::Integrity { .. })));
    let id = watched(&mut cache, &tokens);
    write(&mut cache, id, &tokens, None);
    for recipe in ["kivi4", "snapkv:0.5", "f32", "kvsharer:0.5", "think:0.5"] {
        let recipe: Recipe = recipe.parse().unwrap();
        let found = cache.recode(id, recipe, None, &tokens);
        assert!(matches!(found, Err(CacheError::Integrity { .. })), "{recipe}");
    }
    assert!(cache.recode(id, Recipe::JOINT3, None, &tokens[1..]).is_err());
    let other = cache.add_sequence(None).unwrap();
    assert!(cache.recode(other, Recipe::JOINT3, None, &[]).is_err(), "nobody watched it");
    cache.check_integrity().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Prompts that are decided in any way between others, in little room.
    #[test]
    fn any_decision_keeps_the_books(
        seed in any::<u64>(),
        ops in prop::collection::vec((0..8u8, 1..90u32), 1..60),
        budget in 180..900usize,
        share in any::<bool>(),
    ) {
        let followers = followers();
        let mode = if share { SharingMode::Tokens } else { SharingMode::Off };
        let mut cache = plain(budget << 10, Sharing { mode, ..Sharing::OFF });
        let mut random = Random::new(seed);
        let mut live: Vec<(SequenceId, Vec<u32>)> = Vec::new();
        for (op, n) in ops {
            match op {
                0..=3 => {
                    let tokens: Vec<u32> = (0..n).map(|t| if t < 32 { t } else { t + n % 2 }).collect();
                    let id = watched(&mut cache, &tokens);
                    let missing = tokens.len() - cache.num_tokens(id).unwrap();
                    if cache.reserve(id, missing).is_err() {
                        cache.remove_sequence(id).unwrap();
                    } else {
                        let odd = (random.below(4) == 0).then(|| random.below(n as usize));
                        write(&mut cache, id, &tokens, odd);
                        let recipe = followers[random.below(followers.len())];
                        if random.below(4) == 0 {
                            cache.stop_watching(id).unwrap();
                        } else {
                            cache.recode(id, recipe, None, &tokens).unwrap();
                        }
                        prop_assert!(attend(&cache, id).iter().all(|x| x.is_finite()));
                        live.push((id, tokens));
                    }
                }
                4..=6 if !live.is_empty() => {
                    let i = random.below(live.len());
                    let (id, tokens) = &mut live[i];
                    if cache.reserve(*id, n as usize).is_ok() {
                        tokens.extend((0..n).map(|_| 1000 + random.next() as u32 % 64));
                        write(&mut cache, *id, tokens, None);
                    }
                }
                7 if !live.is_empty() => {
                    let i = random.below(live.len());
                    cache.remove_sequence(live.swap_remove(i).0).unwrap();
                }
                _ => {}
            }
            cache.check_integrity().unwrap();
            prop_assert!(cache.stats().physical_bytes <= budget << 10);
        }
        for (id, _) in live {
            cache.remove_sequence(id).unwrap();
        }
        cache.reset_prefix_cache().unwrap();
        cache.check_integrity().unwrap();
        prop_assert_eq!(cache.stats().physical_bytes, 0);
    }
}
