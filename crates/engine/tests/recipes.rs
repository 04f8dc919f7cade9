//! Requests that bring a recipe of their own.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{config, empty, engine, generate, greedy, prompt, request, run, statistics, tables};
use kvasir_engine::{Engine, EngineConfig, EngineError, Recipe, Request, SamplingParams};

/// Enough for decode steps that read sealed blocks.
const TOKENS: usize = 40;

fn own(id: &str, prompt: &[u32], params: SamplingParams, recipe: Recipe) -> Request {
    Request { kv_cache: Some(recipe), ..request(id, prompt, params) }
}

fn refuse(engine: &mut Engine, request: Request) -> EngineError {
    engine.add_request(request).unwrap_err()
}

#[test]
fn recipes_side_by_side_give_what_each_gives_alone() {
    let recipes = [Recipe::INT8, Recipe::F16, Recipe::ROTATION3, Recipe::KIVI2, Recipe::JOINT3];
    let prompt = prompt(100, 3);
    let config = || EngineConfig { statistics: Some(statistics()), ..config() };
    let alone: Vec<_> = recipes
        .iter()
        .map(|recipe| {
            let mut engine = engine(EngineConfig { kv_cache: *recipe, ..config() });
            generate(&mut engine, &prompt, greedy(TOKENS))
        })
        .collect();
    let mut engine = engine(config());
    for recipe in recipes {
        let id = recipe.to_string();
        engine.add_request(own(&id, &prompt, greedy(TOKENS), recipe)).unwrap();
    }
    let together = run(&mut engine);
    for (recipe, alone) in recipes.iter().zip(&alone) {
        let found = &together[&(recipe.to_string(), 0)];
        assert_eq!((&found.tokens, &found.text), (&alone.tokens, &alone.text), "{recipe}");
        let finish = found.last.as_ref().unwrap().finish.as_ref().unwrap();
        assert_eq!(Some(finish), alone.last.as_ref().unwrap().finish.as_ref());
        assert_eq!(finish.recipe, *recipe);
        let coded = finish.kv_physical_bytes < finish.kv_logical_bytes;
        assert_eq!(coded, *recipe != Recipe::F16, "{finish:?}");
    }
    let stats = engine.stats();
    assert_eq!(stats.sequences_by_recipe, recipes.map(|recipe| (recipe, 1)));
    assert!(stats.kv_statistics_bytes > 0);
    empty(&mut engine);
}

#[test]
fn prefixes_are_shared_within_a_recipe_only() {
    let mut engine = engine(config());
    let prompt = prompt(100, 2);
    let all = [
        ("a", None, 0),
        ("b", Some(Recipe::INT8), 0),
        ("c", Some(Recipe::ROTATION3), 0),
        ("d", Some(Recipe::INT8), 96),
        // The engine's own by name.
        ("e", Some(Recipe::F16), 96),
        ("f", None, 96),
    ];
    for (id, kv_cache, expected) in all {
        engine.add_request(Request { kv_cache, ..request(id, &prompt, greedy(1)) }).unwrap();
        let done = run(&mut engine);
        let cached = done[&(id.to_owned(), 0)].last.as_ref().unwrap().num_cached_tokens;
        assert_eq!(cached, expected, "{id}");
    }
    empty(&mut engine);
}

#[test]
fn the_sequences_of_a_request_share_its_recipe_and_prompt() {
    let mut engine = engine(config());
    let params = SamplingParams { n: 3, seed: Some(1), temperature: 1.0, ..greedy(20) };
    engine.add_request(own("many", &prompt(100, 2), params, Recipe::INT8)).unwrap();
    let done = run(&mut engine);
    assert_eq!(done.len(), 3);
    for finished in done.values() {
        let finish = finished.last.as_ref().unwrap().finish.as_ref().unwrap();
        assert_eq!(finish.recipe, Recipe::INT8);
    }
    assert_eq!(engine.stats().cached_prompt_tokens, 2 * 96);
    assert_eq!(engine.stats().sequences_by_recipe, [(Recipe::INT8, 3)]);
    empty(&mut engine);
}

#[test]
fn recipes_that_cannot_be_used_are_refused_and_change_nothing() {
    let unseeded = SamplingParams { max_tokens: Some(20), ignore_eos: true, ..Default::default() };
    let expected = generate(&mut engine(config()), &prompt(20, 1), unseeded.clone()).tokens;
    let mut engine = engine(config());
    let before = engine.stats();
    for recipe in [Recipe::JOINT3, Recipe::AUTO, "joint:2.5".parse().unwrap()] {
        let error = refuse(&mut engine, own("a", &[1], unseeded.clone(), recipe));
        assert!(matches!(error, EngineError::NoStatistics { .. }), "{error}");
        assert!(error.to_string().starts_with(&format!("KV cache recipe '{recipe}' needs")));
    }
    assert_eq!(engine.stats(), before);
    assert!(!engine.has_unfinished());
    // Same id, same engine; the random numbers of unseeded requests have not moved.
    assert_eq!(generate(&mut engine, &prompt(20, 1), unseeded).tokens, expected);
    empty(&mut engine);
}

#[test]
fn statistics_of_another_model_refuse_joint_requests_only() {
    let mut other = (*statistics()).clone();
    other.layers.pop();
    let config = EngineConfig { statistics: Some(other.into()), ..config() };
    let mut engine = engine(config);
    let error = refuse(&mut engine, own("a", &[1], greedy(1), Recipe::JOINT4));
    assert!(matches!(error, EngineError::Recipe { recipe: Recipe::JOINT4, .. }), "{error}");
    assert_eq!(generate(&mut engine, &[1], greedy(2)).tokens.len(), 2);
    empty(&mut engine);
}

#[test]
fn what_can_never_fit_is_refused_and_an_open_end_is_cut() {
    for memory in [50 << 10, 100 << 10] {
        let mut engine = engine(EngineConfig { kv_cache_memory: memory, ..config() });
        let len = engine.max_model_len();
        let half = prompt(len / 4, 1);
        let error = refuse(&mut engine, own("a", &half, greedy(len), Recipe::F32));
        assert!(matches!(error, EngineError::RecipeTooLarge { tokens, .. } if tokens == len));
        let whole = prompt(len - 1, 1);
        let open = SamplingParams { max_tokens: None, ..greedy(1) };
        let error = refuse(&mut engine, own("a", &whole, open.clone(), Recipe::F32));
        assert!(matches!(error, EngineError::RecipeTooLarge { tokens, .. } if tokens == len));
        // Two at once, so that one waits for the other's room.
        for id in ["a", "b"] {
            engine.add_request(own(id, &half, open.clone(), Recipe::F32)).unwrap();
        }
        for finished in run(&mut engine).values() {
            let total = half.len() + finished.tokens.len();
            assert!(total > half.len() && total < len, "{total} of {len}");
        }
        assert_eq!(generate(&mut engine, &half, open).tokens.len(), len - half.len());
        empty(&mut engine);
    }
}

/// A policy chooses the same tokens whatever else runs: in chunks, after preemption, from a cached prefix, for several
/// sequences of a request.
#[test]
fn policies_choose_the_same_in_a_crowd() {
    // So many that sequences outgrow the room they were admitted to.
    const LONG: usize = 130;
    let by_prompt = "compactor:quality=80:chunk=20".parse().unwrap();
    let policies = Recipe::all().into_iter().filter(|recipe| recipe.waits_for_prompt());
    for recipe in policies.chain([by_prompt]) {
        let config = |prefixes: bool| EngineConfig {
            kv_cache: recipe,
            enable_prefix_caching: prefixes,
            tables: tables(),
            ..config()
        };
        let prompts: Vec<Vec<u32>> = (0..10).map(|i| prompt(90 + 3 * i as usize, i % 4)).collect();
        let alone: Vec<_> = prompts
            .iter()
            .map(|prompt| generate(&mut engine(config(false)), prompt, greedy(LONG)).tokens)
            .collect();
        let mut preemptions = 0;
        for (prefixes, chunk, memory) in [
            (false, 512, 4 << 20),
            (true, 30, 4 << 20),
            (true, 64, 110 << 10),
            (true, 64, 170 << 10),
        ] {
            let mut crowded = engine(EngineConfig {
                max_num_batched_tokens: chunk,
                kv_cache_memory: memory,
                ..config(prefixes)
            });
            for (i, prompt) in prompts.iter().enumerate() {
                crowded.add_request(request(&i.to_string(), prompt, greedy(LONG))).unwrap();
            }
            let done = run(&mut crowded);
            for (i, alone) in alone.iter().enumerate() {
                let found = &done[&(i.to_string(), 0)].tokens;
                // A small budget may end it earlier.
                let whole = !found.is_empty() && alone.starts_with(found);
                assert!(whole, "{recipe}, request {i}, {chunk} a step: {found:?}, {alone:?}");
            }
            let kept: u64 = crowded.stats().kv_kept_shares.iter().sum();
            assert!(kept >= prompts.len() as u64, "{recipe}: {kept}");
            preemptions += crowded.stats().preemptions;
            empty(&mut crowded);
        }
        // Those with a window of their own do not outgrow what they were admitted with.
        let name = recipe.to_string();
        let bounded = ["streaming", "h2o", "less"].iter().any(|policy| name.starts_with(policy));
        assert!(preemptions > 0 || bounded, "{recipe}: the budget was meant to be too small");
        // Every sequence of a request chooses for itself, the later ones over a cached prefix.
        let drawn =
            |n: usize| SamplingParams { n, seed: Some(3), temperature: 1.0, ..greedy(LONG) };
        let one = generate(&mut engine(config(true)), &prompts[0], drawn(1)).tokens;
        let mut many = engine(config(true));
        many.add_request(request("n", &prompts[0], drawn(3))).unwrap();
        let done = run(&mut many);
        assert_eq!(done[&("n".to_owned(), 0)].tokens, one, "{recipe}");
        assert!(
            (1..3).all(|index| done[&("n".to_owned(), index)].tokens.len() == LONG),
            "{recipe}"
        );
        empty(&mut many);
    }
}

/// Projections hold matrices, so there is an end to them long before.
#[test]
fn different_projections_have_an_end() {
    let mut engine = engine(EngineConfig { tables: tables(), ..config() });
    let (prompt, mut taken) = (prompt(20, 1), 0);
    for i in 1..60 {
        let method = ["lorc", "recalkv"][i % 2];
        let recipe: Recipe = format!("{method}:0.{i:03}").parse().unwrap();
        match engine.add_request(own(&i.to_string(), &prompt, greedy(20), recipe)) {
            Ok(()) => taken += 1,
            Err(EngineError::Recipe { source, .. }) => {
                assert!(source.to_string().contains("16 different projections"), "{source}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(taken, 16);
    // Those that were met go on, and others that need no matrices.
    for (id, recipe) in [("again", "lorc:0.002"), ("other", "think:0.5")] {
        engine.add_request(own(id, &prompt, greedy(20), recipe.parse().unwrap())).unwrap();
    }
    assert_eq!(run(&mut engine).len(), 18);
    empty(&mut engine);
}

/// Parameters make recipes without end; a client's must not take the memory of all.
#[test]
fn different_recipes_have_an_end() {
    let mut engine = engine(config());
    let prompt = prompt(20, 1);
    let mut refused = 0;
    for i in 1..200 {
        let recipe: Recipe = format!("snapkv:0.{i:03}").parse().unwrap();
        let params = greedy(2);
        match engine.add_request(own(&i.to_string(), &prompt, params, recipe)) {
            Ok(()) => {}
            Err(EngineError::Recipe { source, .. }) => {
                assert!(source.to_string().contains("100 different recipes"), "{source}");
                refused += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(refused, 100, "the engine's own is one of them");
    // Those that were met go on.
    engine.add_request(own("again", &prompt, greedy(2), "snapkv:0.007".parse().unwrap())).unwrap();
    run(&mut engine);
    empty(&mut engine);
}
