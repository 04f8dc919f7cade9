//! Requests whose recipe a risk model decides.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::{config, empty, engine, generate, greedy, model, prompt, request, run, statistics};
use kvasir_engine::guard::{Guard, Linear, PromptFeatures, RatedRecipe, RiskModel, Weight};
use kvasir_engine::{Engine, EngineConfig, EngineError, Recipe, Request, SamplingParams};

const TOKENS: usize = 24;

/// Risks follow the share of different tokens in the prompt, and the recipe's loss.
fn risk_model() -> RiskModel {
    let names = PromptFeatures::NAMES.len() + RiskModel::OF_RECIPES.len();
    let mut linear = Linear { features: vec![Weight::default(); names], constant: -9.0 };
    linear.features[2] =
        Weight { mean: 0.5, scale: 1.0, weight: 20.0, low: 0.0, high: 1.0, ..Weight::default() };
    let loss = PromptFeatures::NAMES.len();
    linear.features[loss] = Weight {
        mean: 0.01f64.ln(),
        scale: 1.0,
        weight: 1.0,
        low: -99.0,
        high: 99.0,
        ..Weight::default()
    };
    let rated = |recipe: &str, bytes_share: f64, loss: f64| RatedRecipe {
        recipe: recipe.to_owned(),
        bytes_share,
        loss,
    };
    let recipes =
        vec![rated("joint4", 0.3, 0.001), rated("joint2", 0.2, 0.1), rated("int8", 0.6, 1e-5)];
    RiskModel::new("tiny".to_owned(), 0.1, (10, 1), linear, recipes)
}

fn guarded(most_risk: f64) -> EngineConfig {
    EngineConfig {
        kv_cache: Recipe::AUTO,
        statistics: Some(statistics()),
        guard: Some(Guard { model: Arc::new(risk_model()), most_risk }),
        ..config()
    }
}

/// So many different tokens, three at least.
fn dull(len: usize, different: u32) -> Vec<u32> {
    (0..len as u32).map(|i| if i < different { i } else { i % 3 }).collect()
}

#[test]
fn a_large_limit_takes_the_cheapest_and_none_takes_nothing() {
    let prompt = dull(100, 10);
    let exact = generate(&mut engine(config()), &prompt, greedy(TOKENS));
    for (most_risk, recipe) in [(1.0, Recipe::JOINT2), (0.0, Recipe::F16)] {
        let mut engine = engine(guarded(most_risk));
        let found = generate(&mut engine, &prompt, greedy(TOKENS));
        let finish = found.last.as_ref().unwrap().finish.clone().unwrap();
        assert_eq!(finish.recipe, recipe);
        // The prompt is computed exactly.
        assert_eq!(found.tokens[0], exact.tokens[0]);
        let stats = engine.stats();
        assert_eq!(stats.guarded_by_recipe, [(recipe, 1)]);
        assert_eq!(stats.sequences_by_recipe, [(recipe, 1)]);
        assert_eq!(stats.guard_no_room, 0);
        let risk = finish.risk.unwrap();
        assert_eq!(stats.guard_risks, risk);
        if recipe == Recipe::F16 {
            assert_eq!((&found.tokens, risk), (&exact.tokens, 0.0));
            assert!(finish.kv_physical_bytes >= finish.kv_logical_bytes);
        } else {
            assert!(finish.kv_physical_bytes * 2 < finish.kv_logical_bytes, "{finish:?}");
            assert!(risk > 0.0 && stats.guard_seconds > 0.0);
        }
        empty(&mut engine);
    }
}

#[test]
fn each_request_gets_what_the_model_says_of_it() {
    let prompts: Vec<Vec<u32>> = [3, 40, 72, 110, 118].map(|different| dull(120, different)).into();
    // What is known of them, from an engine that only looks.
    let mut looking = engine(EngineConfig {
        observe_prompts: Some(Vec::new()),
        ..EngineConfig { statistics: Some(statistics()), ..config() }
    });
    let model = risk_model();
    let expected: Vec<Recipe> = prompts
        .iter()
        .map(|prompt| {
            let done = generate(&mut looking, prompt, greedy(1));
            let features = done.last.unwrap().features.unwrap();
            assert_eq!(features.prompt_tokens, 120);
            let chosen = model.choose(&features, 0.02);
            chosen.map_or(Recipe::F16, |(rated, _)| rated.recipe.parse().unwrap())
        })
        .collect();
    let kinds: std::collections::HashSet<String> = expected.iter().map(Recipe::to_string).collect();
    assert!(kinds.len() == 4, "{kinds:?}");
    let mut engine = engine(guarded(0.02));
    for (i, prompt) in prompts.iter().enumerate() {
        engine.add_request(request(&i.to_string(), prompt, greedy(TOKENS))).unwrap();
    }
    let done = run(&mut engine);
    for (i, expected) in expected.iter().enumerate() {
        let last = done[&(i.to_string(), 0)].last.clone().unwrap();
        assert_eq!(last.finish.unwrap().recipe, *expected, "{i}");
        // Nobody asked to see what was known.
        assert!(last.features.is_none());
    }
    empty(&mut engine);
}

#[test]
fn what_is_known_does_not_depend_on_how_it_was_computed() {
    let prompt = prompt(150, 5);
    let observe = EngineConfig {
        observe_prompts: Some(vec![Recipe::JOINT2, Recipe::INT8]),
        statistics: Some(statistics()),
        ..config()
    };
    let features = |engine: &mut Engine| {
        let mut found = Vec::new();
        engine.add_request(request("r", &prompt, greedy(3))).unwrap();
        while engine.has_unfinished() {
            found.extend(engine.step().unwrap().outputs.into_iter().map(|output| output.features));
        }
        assert!(found.len() == 3 && found[1].is_none() && found[2].is_none());
        *found[0].clone().unwrap()
    };
    let mut whole = engine(observe.clone());
    let first = features(&mut whole);
    assert_eq!(first.max_tokens, 3);
    assert!(first.attention_entropy > 0.0 && first.attention_entropy < 1.0, "{first:?}");
    let [two, eight] = ["joint2", "int8"].map(|name| first.coding_errors[name]);
    assert!(eight > 0.0 && eight < 1e-3 && two > 10.0 * eight, "{first:?}");
    // From the prefix cache, and in chunks.
    let cached = features(&mut whole);
    let chunks = features(&mut engine(EngineConfig { max_num_batched_tokens: 16, ..observe }));
    for other in [cached, chunks] {
        assert_eq!(other.coding_errors, first.coding_errors);
        for (a, b) in other.numbers().iter().zip(first.numbers()) {
            assert!((a - b).abs() < 1e-3, "{other:?} {first:?}");
        }
    }
}

#[test]
fn requests_with_recipes_of_their_own_are_left_alone() {
    let mut engine = engine(guarded(1.0));
    let prompt = dull(100, 10);
    for recipe in [Recipe::F16, Recipe::INT8] {
        let own = Request { kv_cache: Some(recipe), ..request("own", &prompt, greedy(4)) };
        engine.add_request(own).unwrap();
        let finish = run(&mut engine)[&("own".to_owned(), 0)].last.clone().unwrap().finish.unwrap();
        assert_eq!((finish.recipe, finish.risk), (recipe, None));
    }
    assert!(engine.stats().guarded_by_recipe.is_empty());
    // By name it is guarded like those that ask for nothing.
    let auto = Request { kv_cache: Some(Recipe::AUTO), ..request("own", &prompt, greedy(4)) };
    engine.add_request(auto).unwrap();
    let finish = run(&mut engine)[&("own".to_owned(), 0)].last.clone().unwrap().finish.unwrap();
    assert_eq!(finish.recipe, Recipe::JOINT2);
    empty(&mut engine);
}

#[test]
fn sequences_of_one_request_share_what_is_coded() {
    let mut engine = engine(guarded(1.0));
    let params = SamplingParams { n: 3, temperature: 1.0, seed: Some(4), ..greedy(8) };
    engine.add_request(request("n", &prompt(160, 2), params)).unwrap();
    let mut peak = 0;
    while engine.has_unfinished() {
        engine.step().unwrap();
        engine.check_integrity().unwrap();
        if engine.num_running() == 3 {
            let stats = engine.stats();
            peak = peak.max(stats.kv_physical_bytes - stats.kv_evictable_bytes);
        }
    }
    assert_eq!(engine.stats().guarded_by_recipe, [(Recipe::JOINT2, 3)]);
    // Three tails, and one prompt in joint2.
    let whole = 160 * engine.kv_bytes_per_token();
    assert!(peak > 0 && peak < whole, "{peak} {whole}");
    empty(&mut engine);
}

#[test]
fn a_crowded_cache_preempts_and_keeps_what_was_decided() {
    let tokens = 120;
    let lonely: Vec<_> = (0..6)
        .map(|seed| {
            generate(&mut engine(guarded(0.02)), &dull(90, 15 * (seed + 1)), greedy(tokens))
        })
        .collect();
    let mut preempted = 0;
    for kib in (60..200).step_by(20) {
        let Ok(mut engine) = Engine::new(
            model(),
            EngineConfig { kv_cache_memory: (kib << 10) + (64 << 10), ..guarded(0.02) },
        ) else {
            continue;
        };
        for seed in 0..6 {
            let prompt = dull(90, 15 * (seed + 1));
            match engine.add_request(request(&seed.to_string(), &prompt, greedy(tokens))) {
                Ok(()) | Err(EngineError::PromptTooLong { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        let done = run(&mut engine);
        preempted += engine.stats().preemptions;
        for ((id, _), found) in &done {
            let alone = &lonely[id.parse::<usize>().unwrap()];
            let recipe = |of: &common::Finished| of.last.clone().unwrap().finish.unwrap().recipe;
            // Where there was no room to code all of it, or the prompt was computed again over coded blocks, later tokens
            // may differ; what was decided does not.
            assert_eq!(recipe(found), recipe(alone), "{kib} KiB");
            assert_eq!(found.tokens[0], alone.tokens[0], "{kib} KiB");
        }
        empty(&mut engine);
    }
    assert!(preempted > 0, "the budgets were meant to be too small");
}

/// A codec needs tails and coded blocks side by side for a prompt in one chunk: more than f16, by whose bytes it was accepted.
#[test]
fn what_would_not_fit_again_stays_as_it_is() {
    for kib in (60..240).step_by(12) {
        let budget = EngineConfig { kv_cache_memory: kib << 10, ..guarded(1.0) };
        let Ok(mut engine) = Engine::new(model(), budget) else { continue };
        let most = engine.max_model_len();
        let half = most / 2 - 2;
        // The older one is not guarded, and grows until the other is preempted.
        let old = Request {
            kv_cache: Some(Recipe::F16),
            ..request("old", &dull(20, 9), greedy(most - 24))
        };
        engine.add_request(old).unwrap();
        engine.add_request(request("new", &dull(half, 9), greedy(most - half - 1))).unwrap();
        let done = run(&mut engine);
        assert!(done.values().all(|one| one.last.as_ref().unwrap().finish.is_some()), "{kib}");
        empty(&mut engine);
    }
}

#[test]
fn guards_come_and_go() {
    let mut engine = engine(EngineConfig { statistics: Some(statistics()), ..config() });
    let auto = |id: &str| Request {
        kv_cache: Some(Recipe::AUTO),
        ..request(id, &dull(100, 10), greedy(4))
    };
    let recipe = |engine: &mut Engine| {
        engine.add_request(auto("a")).unwrap();
        run(engine)[&("a".to_owned(), 0)].last.clone().unwrap().finish.unwrap().recipe
    };
    assert_eq!(recipe(&mut engine), Recipe::AUTO);
    let guard = |most_risk| Some(Guard { model: Arc::new(risk_model()), most_risk });
    engine.set_guard(guard(1.0)).unwrap();
    assert_eq!(recipe(&mut engine), Recipe::JOINT2);
    // One that is under way stays as it is.
    engine.add_request(auto("b")).unwrap();
    engine.set_guard(None).unwrap();
    let finish = run(&mut engine)[&("b".to_owned(), 0)].last.clone().unwrap().finish.unwrap();
    assert_eq!((finish.recipe, finish.risk), (Recipe::F16, None));
    assert!(engine.set_guard(guard(f64::NAN)).is_err());
    assert_eq!(recipe(&mut engine), Recipe::AUTO);
    empty(&mut engine);
}

#[test]
fn what_cannot_be_guarded_is_said() {
    let refuse = |config: EngineConfig| Engine::new(model(), config).unwrap_err().to_string();
    let error = refuse(guarded(1.5));
    assert_eq!(error, "--kv-risk must be a chance, 0 to 1, got 1.5");
    let error = refuse(EngineConfig { kv_sharing: "tree:0.5".parse().unwrap(), ..guarded(0.1) });
    assert!(error.starts_with("--kv-risk must be without --kv-sharing tree"), "{error}");
    let error = refuse(EngineConfig { statistics: None, ..guarded(0.1) });
    assert!(error.contains("statistics"), "{error}");
    // Prompts are whole in f16 before anything is decided: what fits is what fits then.
    let small = |config: EngineConfig| EngineConfig { kv_cache_memory: 300 << 10, ..config };
    let plain =
        Engine::new(model(), small(EngineConfig { statistics: Some(statistics()), ..config() }));
    let guard = Engine::new(model(), small(guarded(0.1))).unwrap();
    assert_eq!(guard.max_model_len(), plain.unwrap().max_model_len());
}
