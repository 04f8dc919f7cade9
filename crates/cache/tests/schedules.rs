//! Any order of adding, matching, writing and removing sequences keeps the books and ends empty.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Random, cache, layer, note_nll};
use kvasir_cache::{AttentionScratch, BatchSlice, CacheError, Recipe, SequenceId};
use proptest::prelude::*;

/// Every recipe, and policies over codecs.
fn recipes() -> Vec<Recipe> {
    let composed = [
        "snapkv:0.5:window=8+joint3",
        "snapkv:0.3:window=8+auto",
        "chunkkv:0.4:chunk=5:window=8+kivi4",
        "dbudget:0.1+int8",
        "dbudget:0.05:sinks=apart+rotation3",
        "streaming:0.5+joint2",
        "streaming:tokens=20+kivi2",
        "h2o:0.3",
        "compactor:0.3:chunk=20+joint3",
        "compactor:quality=90:chunk=20+kivi4",
        "snapkv:0.5:window=8+think:0.5+kivi4",
        "streaming:0.5+think:0.3+int8",
        "think:0.5+joint3",
        "lorc:0.3+kivi4",
        "recalkv:rank=3+f32",
        "chunkkv:0.5:chunk=5:window=8+recalkv:0.5+int8",
        "streaming:0.5+lorc:0.5",
        "kvsharer:0.5+kivi4",
        "clusterkv:0.3:whole=0:size=10+kivi4",
        "clusterkv:0.3:whole=1:size=10+kvsharer:0.5+joint3",
        "snapkv:0.5:window=8+kvsharer:0.5+think:0.5",
        "compactor:0.5:chunk=20+kvsharer:0.7+joint3",
        "kvsharer:0.5+recalkv:0.5",
        "less:0.3",
        "less:0.3:over=streaming",
        "less:0.3:over=snapkv+think:0.5+kivi4",
    ];
    Recipe::all().into_iter().chain(composed.map(|name| name.parse().unwrap())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn any_schedule_ends_with_an_empty_pool(
        seed in any::<u64>(),
        ops in prop::collection::vec((0..10u8, 1..60usize), 1..120),
        prefix_caching in any::<bool>(),
        budget_blocks in 6..40usize,
        recipe in 0..recipes().len(),
    ) {
        let l = layer(2, 1, 16);
        let budget = budget_blocks * 2 * 2 * (16 * 16 * 2 + 100);
        let recipe = recipes()[recipe];
        let mut scratch = AttentionScratch::default();
        let mut cache = cache(vec![l; 2], 16, recipe, budget, prefix_caching);
        let mut random = Random::new(seed);
        let mut live: Vec<(SequenceId, Vec<u32>)> = Vec::new();
        for (op, n) in ops {
            match op {
                0..=2 => {
                    // Few different tokens, so that prefixes repeat.
                    let tokens: Vec<u32> = (0..n as u32).map(|t| if t < 32 { t } else { t * 7 + (n as u32 % 2) }).collect();
                    let salt = (random.below(2) == 0).then_some("tenant");
                    let id = cache.add_sequence(salt).unwrap();
                    cache.expect_prompt(id, tokens.len()).unwrap();
                    let found = cache.match_prefix(id, &tokens).unwrap();
                    prop_assert!(found < tokens.len() || found == 0);
                    prop_assert_eq!(found % 16, 0);
                    live.push((id, tokens));
                }
                3..=8 if !live.is_empty() => {
                    let i = random.below(live.len());
                    let (id, tokens) = &mut live[i];
                    let start = cache.num_tokens(*id).unwrap();
                    let n = n.min(cache.most_next(*id).unwrap());
                    match cache.reserve(*id, n) {
                        Ok(()) => {
                            let slices = [BatchSlice { sequence: *id, row: 0, start, len: n }];
                            let (x, q) = (random.values(n * 16), random.values(n * 32));
                            let mut out = vec![f32::NAN; n * 32];
                            for layer in 0..2 {
                                cache.write(layer, &slices, &x, &x).unwrap();
                                cache.attend(layer, &slices, &q, &mut out, &mut scratch).unwrap();
                                cache.observe(layer, &slices, &q, &mut scratch).unwrap();
                            }
                            prop_assert!(out.iter().all(|x| x.is_finite()), "{}", recipe);
                            let nll = 1.0 + random.below(3) as f64;
                            note_nll(&mut cache, *id, start..start + n, tokens.len(), nll);
                            while tokens.len() < start + n {
                                tokens.push(random.next() as u32);
                            }
                            let new = tokens[start..start + n].to_vec();
                            cache.commit(*id, &new).unwrap();
                        }
                        Err(CacheError::Exhausted { .. }) => {}
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                9 if !live.is_empty() => {
                    let i = random.below(live.len());
                    let (id, _) = live.swap_remove(i);
                    cache.remove_sequence(id).unwrap();
                    prop_assert!(cache.remove_sequence(id).is_err());
                }
                _ => {}
            }
            cache.check_integrity().unwrap();
            let stats = cache.stats();
            prop_assert!(stats.physical_bytes <= budget);
            prop_assert!(stats.peak_physical_bytes <= budget);
            for (id, _) in &live {
                let (logical, physical) = cache.sequence_bytes(*id).unwrap();
                if recipe == Recipe::F16 {
                    prop_assert!(physical >= logical);
                }
                let (logical, physical) = cache.bytes_of(&[*id], true).unwrap();
                if recipe == Recipe::INT8 && logical > 0 {
                    prop_assert!(physical < logical);
                }
            }
        }
        for (id, _) in live {
            cache.remove_sequence(id).unwrap();
        }
        cache.reset_prefix_cache().unwrap();
        cache.check_integrity().unwrap();
        prop_assert_eq!(cache.stats().physical_bytes, 0);
    }
}

#[test]
fn writing_without_reserving_is_refused() {
    let mut cache = cache(vec![layer(1, 1, 16)], 16, Recipe::F16, 1 << 20, true);
    let id = cache.add_sequence(None).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start: 0, len: 1 }];
    let x = vec![0.0; 16];
    assert!(matches!(cache.write(0, &slices, &x, &x), Err(CacheError::NotReserved { .. })));
    assert!(matches!(cache.commit(id, &[1]), Err(CacheError::NotReserved { .. })));
    cache.remove_sequence(id).unwrap();
    assert!(matches!(cache.reserve(id, 1), Err(CacheError::UnknownSequence { .. })));
}

#[test]
fn what_fits_alone_can_be_reserved_to_the_last_byte_announced() {
    for block_size in [16, 32, 64] {
        for tokens in [1, 100, 1000] {
            let probe = cache(vec![layer(2, 2, 32); 3], block_size, Recipe::F16, 1 << 24, true);
            let needed = probe.bytes_alone(Recipe::F16, tokens);
            // The slab size depends on the budget: ask again with the budget in place.
            let budget = needed.max(
                cache(vec![layer(2, 2, 32); 3], block_size, Recipe::F16, needed, true)
                    .bytes_alone(Recipe::F16, tokens),
            );
            let mut cache = cache(vec![layer(2, 2, 32); 3], block_size, Recipe::F16, budget, true);
            assert!(cache.bytes_alone(Recipe::F16, tokens) <= budget);
            let id = cache.add_sequence(None).unwrap();
            cache.reserve(id, tokens).unwrap();
            cache.check_integrity().unwrap();
        }
    }
}

/// Every recipe, in steps of one token and of more, in exactly the bytes that it is said to take alone:
/// growing tails, slots for blocks to come and residual windows are all in them.
#[test]
fn what_fits_alone_can_grow_to_its_length() {
    let shapes = [(2, 2, 32, 3), (1, 1, 16, 1)];
    let prompts =
        |recipe: Recipe| if recipe.waits_for_prompt() { vec![1.0, 0.5, 0.1] } else { vec![1.0] };
    for (recipe, chunk, shape) in recipes()
        .into_iter()
        .flat_map(|r| [1, 7, 40, 72].map(|c| (r, c)))
        .flat_map(|(r, c)| shapes.map(|s| (r, c, s)))
    {
        let (query_heads, kv_heads, dim, layers) = shape;
        let lengths = [1, 20, 32, 33, 64, 112, 200].into_iter();
        for (tokens, share) in
            lengths.flat_map(|n| prompts(recipe).into_iter().map(move |s| (n, s)))
        {
            let of = |budget| {
                let layers = vec![layer(query_heads, kv_heads, dim); layers];
                let mut cache = cache(layers, 32, recipe, budget, true);
                cache.set_max_chunk(chunk);
                cache
            };
            // The slab size depends on the budget: ask until the budget in place is enough.
            let mut budget = of(4 << 20).bytes_alone(recipe, tokens);
            let mut cache = loop {
                let cache = of(budget);
                match cache.bytes_alone(recipe, tokens) {
                    needed if needed <= budget => break cache,
                    needed => budget = needed,
                }
            };
            let id = cache.add_sequence(None).unwrap();
            let prompt = ((tokens as f64 * share) as usize).max(1);
            cache.expect_prompt(id, prompt).unwrap();
            let x = vec![0.5; chunk * kv_heads * dim];
            let q = vec![0.5; chunk * query_heads * dim];
            let mut out = q.clone();
            let mut scratch = AttentionScratch::default();
            let mut start = 0;
            while start < tokens {
                let len = chunk.min(tokens - start).min(cache.most_next(id).unwrap());
                let reserved = cache.reserve(id, len);
                let what =
                    format!("{recipe}, {start} + {len} of {tokens}, {prompt} of them prompt");
                assert!(reserved.is_ok(), "{what}: {reserved:?}");
                let slices = [BatchSlice { sequence: id, row: 0, start, len }];
                for layer in 0..layers {
                    cache.write(layer, &slices, &x, &x).unwrap();
                    let out = &mut out[..len * query_heads * dim];
                    cache.attend(layer, &slices, &q, out, &mut scratch).unwrap();
                    cache.observe(layer, &slices, &q, &mut scratch).unwrap();
                }
                note_nll(&mut cache, id, start..start + len, prompt, 2.0);
                cache.commit(id, &vec![3; len]).unwrap();
                cache.check_integrity().unwrap();
                start += len;
            }
        }
    }
}

/// A block with values that are no numbers is counted and kept as it was written; its neighbours are coded.
#[test]
fn blocks_with_odd_values_are_not_coded() {
    for recipe in [Recipe::INT8, Recipe::JOINT3, Recipe::KIVI2, Recipe::ROTATION3] {
        let l = layer(1, 1, 32);
        let mut cache = cache(vec![l], 32, recipe, 8 << 20, false);
        let x = Random::new(3).values(32 * 32);
        let mut bytes = Vec::new();
        let id = cache.add_sequence(None).unwrap();
        for (block, odd) in
            [None, None, Some(f32::NAN), Some(f32::INFINITY), None].into_iter().enumerate()
        {
            let mut keys = x.clone();
            if let Some(odd) = odd {
                (keys[40], keys[41]) = (odd, odd);
            }
            cache.reserve(id, 32).unwrap();
            let slices = [BatchSlice { sequence: id, row: 0, start: 32 * block, len: 32 }];
            cache.write(0, &slices, &keys, &x).unwrap();
            cache.commit(id, &[1; 32]).unwrap();
            cache.check_integrity().unwrap();
            let (_, physical) = cache.bytes_of(&[id], true).unwrap();
            bytes.push(physical - bytes.iter().sum::<usize>());
        }
        let [_, coded, nan, infinite, after] = bytes[..] else { unreachable!() };
        assert!(coded == after && nan == infinite, "{recipe}: {bytes:?}");
        // The tail's two slots of f16 rows.
        assert!(nan >= 2 * 2 * 32 * 32 && coded < nan, "{recipe}: {bytes:?}");
        // RoPE takes an odd channel to its partner.
        assert_eq!(cache.stats().num_clamped, 8, "{recipe}");
        let mut out = vec![f32::NAN; 32];
        let slices = [BatchSlice { sequence: id, row: 0, start: 159, len: 1 }];
        let mut scratch = AttentionScratch::default();
        cache.attend(0, &slices, &x[..32], &mut out, &mut scratch).unwrap();
        assert!(out.iter().all(|x| x.is_finite()), "{recipe}: {out:?}");
        // Told that there must be room, it codes them like all others.
        let told = cache.add_sequence(None).unwrap();
        cache.code_odd_blocks(told).unwrap();
        for start in [0, 32, 64] {
            cache.reserve(told, 32).unwrap();
            let slices = [BatchSlice { sequence: told, row: 0, start, len: 32 }];
            cache.write(0, &slices, &[f32::NAN; 1024], &x).unwrap();
            cache.commit(told, &[1; 32]).unwrap();
        }
        assert_eq!(cache.bytes_of(&[told], true).unwrap().1, 2 * coded, "{recipe}");
        for id in [id, told] {
            cache.remove_sequence(id).unwrap();
        }
        assert_eq!(cache.stats().physical_bytes, 0);
    }
}

#[test]
fn a_full_pool_still_finds_and_publishes_prefixes() {
    // Prompts of 100 tokens fill the pool many times over; each is asked for twice in a row.
    let l = layer(2, 1, 16);
    let mut cache = cache(vec![l; 2], 16, Recipe::F16, 120 << 10, true);
    let x = vec![0.5f32; 100 * 16];
    for round in 0..200u32 {
        let tokens: Vec<u32> = (0..100).map(|t| t * 31 + round * 977).collect();
        for pass in 0..2 {
            let id = cache.add_sequence(None).unwrap();
            let found = cache.match_prefix(id, &tokens).unwrap();
            assert_eq!(found, 96 * pass, "round {round}, pass {pass}");
            let (start, len) = (found, 100 - found);
            assert!(cache.fits_new(cache.recipe(), None, &tokens, true, 16));
            cache.reserve(id, len).unwrap();
            let slices = [BatchSlice { sequence: id, row: 0, start, len }];
            for layer in 0..2 {
                cache.write(layer, &slices, &x[..len * 16], &x[..len * 16]).unwrap();
            }
            cache.commit(id, &tokens[start..]).unwrap();
            cache.remove_sequence(id).unwrap();
            cache.check_integrity().unwrap();
        }
    }
    assert!(cache.stats().peak_physical_bytes > 100 << 10, "the pool was meant to be full");
}

#[test]
fn values_that_cannot_be_stored_spoil_nothing_else() {
    let l = layer(1, 1, 16);
    let mut cache = cache(vec![l], 16, Recipe::F16, 1 << 20, false);
    let id = cache.add_sequence(None).unwrap();
    cache.reserve(id, 4).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start: 0, len: 4 }];
    let mut keys = vec![0.1f32; 64];
    let mut values = vec![0.2f32; 64];
    (keys[40], keys[41], values[50], values[60]) =
        (f32::INFINITY, 1e6, f32::NAN, f32::NEG_INFINITY);
    cache.write(0, &slices, &keys, &values).unwrap();
    let mut out = vec![f32::NAN; 64];
    let mut scratch = AttentionScratch::default();
    cache.attend(0, &slices, &vec![0.3; 64], &mut out, &mut scratch).unwrap();
    assert!(out.iter().all(|x| x.is_finite()), "{out:?}");
    assert!(out[..32].iter().all(|x| (x - 0.2).abs() < 1e-3), "tokens before are untouched");
    assert!(cache.stats().num_clamped >= 4);
}
