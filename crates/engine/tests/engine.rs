//! The engine on a tiny random model: what a request gets must not depend on what else runs.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;

use common::{
    config, empty, engine, generate, greedy, model, prompt, request, run, statistics, tables,
};
use kvasir_cache::{Sharing, SharingMode};
use kvasir_engine::{
    Engine, EngineConfig, EngineError, FinishReason, Recipe, Request, RequestId, SamplingParams,
    StopReason,
};
use kvasir_model::testkit::{TINY_CONTEXT, TINY_EOS, TINY_VOCAB, deep_tiny_model};
use proptest::prelude::*;

#[test]
fn chunking_block_size_prefix_hits_and_recipes_do_not_change_greedy_tokens() {
    let prompt = prompt(150, 3);
    let expected = generate(&mut engine(config()), &prompt, greedy(40)).tokens;
    assert_eq!(expected.len(), 40);
    for max_num_batched_tokens in [1, 7, 64, 1000] {
        let mut engine = engine(EngineConfig { max_num_batched_tokens, ..config() });
        for _ in 0..2 {
            // The second time the prompt is in the prefix cache.
            assert_eq!(generate(&mut engine, &prompt, greedy(40)).tokens, expected);
        }
        assert!(engine.stats().cached_prompt_tokens >= 144);
        empty(&mut engine);
    }
    let off = EngineConfig { enable_prefix_caching: false, ..config() };
    assert_eq!(generate(&mut engine(off), &prompt, greedy(40)).tokens, expected);
}

#[test]
fn a_crowded_small_cache_preempts_and_changes_nothing() {
    let jobs: Vec<(Vec<u32>, usize)> =
        (0..24).map(|i| (prompt(10 + (i * 37) % 120, i as u32 % 5), 20 + (i * 13) % 60)).collect();
    let alone: Vec<Vec<u32>> = jobs
        .iter()
        .map(|(prompt, n)| generate(&mut engine(config()), prompt, greedy(*n)).tokens)
        .collect();
    for enable_prefix_caching in [true, false] {
        let mut engine = engine(EngineConfig {
            kv_cache_memory: 200 << 10,
            max_num_batched_tokens: 64,
            enable_prefix_caching,
            ..config()
        });
        for (i, (prompt, n)) in jobs.iter().enumerate() {
            engine.add_request(request(&format!("{i:02}"), prompt, greedy(*n))).unwrap();
        }
        let done = run(&mut engine);
        assert_eq!(done.len(), jobs.len());
        for (finished, alone) in done.values().zip(&alone) {
            assert_eq!(finished.tokens, *alone);
            let finish = finished.last.as_ref().unwrap().finish.as_ref().unwrap();
            assert_eq!(finish.reason, FinishReason::Length);
        }
        assert!(engine.stats().preemptions > 0, "the budget was meant to be too small");
        empty(&mut engine);
    }
}

#[test]
fn every_recipe_runs_a_crowd_and_coded_ones_hold_more() {
    let mut peak = BTreeMap::new();
    for recipe in Recipe::all() {
        let mut engine = engine(EngineConfig {
            kv_cache: recipe,
            statistics: recipe.needs_statistics().then(statistics),
            tables: tables(),
            kv_cache_memory: 300 << 10,
            max_num_batched_tokens: 64,
            enable_prefix_caching: false,
            ..config()
        });
        for i in 0..16u32 {
            engine.add_request(request(&i.to_string(), &prompt(100, i), greedy(60))).unwrap();
        }
        let mut most = 0;
        while engine.has_unfinished() {
            engine.step().unwrap();
            engine.check_integrity().unwrap();
            most = most.max(engine.stats().num_running);
        }
        empty(&mut engine);
        peak.insert(recipe.to_string(), most);
    }
    eprintln!("{peak:?}");
    assert!(peak["int8"] > peak["f16"] && peak["kivi2"] > peak["int8"], "{peak:?}");
    assert!(peak["f16"] > peak["f32"], "{peak:?}");
}

#[test]
fn seeds_repeat_whatever_else_runs() {
    let params = SamplingParams {
        seed: Some(5),
        max_tokens: Some(30),
        ignore_eos: true,
        ..Default::default()
    };
    let prompt = prompt(20, 1);
    let alone = generate(&mut engine(config()), &prompt, params.clone()).tokens;
    let mut busy = engine(EngineConfig { kv_cache_memory: 100 << 10, ..config() });
    for i in 0..6 {
        let params = SamplingParams { seed: None, ..params.clone() };
        busy.add_request(request(&format!("other {i}"), &prompt, params)).unwrap();
    }
    busy.add_request(request("one", &prompt, params.clone())).unwrap();
    let all = run(&mut busy);
    assert_eq!(all[&("one".to_owned(), 0)].tokens, alone);
    let other = SamplingParams { seed: Some(6), ..params };
    assert_ne!(generate(&mut engine(config()), &prompt, other).tokens, alone);
    let unseeded: Vec<_> = (0..6).map(|i| &all[&(format!("other {i}"), 0)].tokens).collect();
    assert_ne!(unseeded[0], unseeded[1]);
}

#[test]
fn n_sequences_share_the_prompt() {
    let params = SamplingParams {
        n: 4,
        seed: Some(1),
        max_tokens: Some(12),
        ignore_eos: true,
        ..Default::default()
    };
    let mut engine = engine(config());
    engine.add_request(request("many", &prompt(100, 2), params)).unwrap();
    let done = run(&mut engine);
    assert_eq!(done.len(), 4);
    let distinct: std::collections::BTreeSet<_> = done.values().map(|f| &f.tokens).collect();
    assert_eq!(distinct.len(), 4);
    // Three of four found the prompt's six full blocks.
    assert_eq!(engine.stats().cached_prompt_tokens, 3 * 96);
    empty(&mut engine);
}

#[test]
fn tenants_share_nothing() {
    let mut engine = engine(config());
    let prompt = prompt(100, 2);
    for (id, salt) in [("a", None), ("b", Some("x")), ("c", Some("y")), ("d", Some("x"))] {
        let salt = salt.map(str::to_owned);
        let request = Request { cache_salt: salt, ..request(id, &prompt, greedy(1)) };
        engine.add_request(request).unwrap();
        let done = run(&mut engine);
        let cached = done[&(id.to_owned(), 0)].last.as_ref().unwrap().num_cached_tokens;
        assert_eq!(cached, if id == "d" { 96 } else { 0 }, "{id}");
    }
}

#[test]
fn stops_by_token_string_and_minimum() {
    let prompt = prompt(30, 4);
    let all = generate(&mut engine(config()), &prompt, greedy(30));
    // A token that appears for the first time somewhere in the middle.
    let at = (5..30).find(|i| !all.tokens[..*i].contains(&all.tokens[*i])).unwrap();
    let token = all.tokens[at];

    let params = SamplingParams { stop_token_ids: vec![token], ..greedy(30) };
    let got = generate(&mut engine(config()), &prompt, params.clone());
    assert_eq!(got.tokens, all.tokens[..=at]);
    let finish = got.last.unwrap().finish.unwrap();
    assert_eq!(finish.reason, FinishReason::Stop);
    assert_eq!(finish.stop, Some(StopReason::Token(token)));

    let later = SamplingParams { min_tokens: at + 1, ..params };
    let got = generate(&mut engine(config()), &prompt, later);
    assert!(got.tokens.len() > at + 1);
    assert!(!got.tokens[..=at].contains(&token));

    let text: String = all.text.chars().skip(6).take(2).collect();
    let end = all.text.find(&text).unwrap();
    let params = SamplingParams { stop: vec![text.clone()], ..greedy(30) };
    let got = generate(&mut engine(config()), &prompt, params);
    assert_eq!(got.text, all.text[..end]);
    assert_eq!(got.last.unwrap().finish.unwrap().stop, Some(StopReason::String(text)));
}

#[test]
fn the_end_token_ends_unless_ignored() {
    let bias = vec![(TINY_EOS, 100.0)];
    let params = SamplingParams { logit_bias: bias, ignore_eos: false, ..greedy(5) };
    let got = generate(&mut engine(config()), &prompt(5, 0), params.clone());
    assert_eq!((got.tokens, got.text.as_str()), (vec![TINY_EOS], ""));
    let finish = got.last.unwrap().finish.unwrap();
    assert_eq!((finish.reason, finish.stop), (FinishReason::Stop, None));
    let params = SamplingParams { ignore_eos: true, ..params };
    assert_eq!(generate(&mut engine(config()), &prompt(5, 0), params).tokens, [TINY_EOS; 5]);
}

#[test]
fn the_model_length_is_a_limit() {
    let params = SamplingParams { max_tokens: None, ..greedy(1) };
    let mut engine = engine(config());
    let got = generate(&mut engine, &prompt(TINY_CONTEXT - 3, 0), params);
    assert_eq!(got.tokens.len(), 3);
    assert_eq!(got.last.unwrap().finish.unwrap().reason, FinishReason::Length);
    let error = engine.add_request(request("x", &prompt(TINY_CONTEXT, 0), greedy(1))).unwrap_err();
    assert!(matches!(error, EngineError::PromptTooLong { prompt_tokens: TINY_CONTEXT, .. }));
    empty(&mut engine);
}

#[test]
fn logprobs_of_output_and_prompt() {
    let prompt = prompt(40, 6);
    let params = SamplingParams { logprobs: Some(3), prompt_logprobs: Some(2), ..greedy(4) };
    for max_num_batched_tokens in [1000, 9] {
        let mut engine = engine(EngineConfig { max_num_batched_tokens, ..config() });
        // Twice: a prefix hit must not hide prompt tokens.
        for _ in 0..2 {
            engine.add_request(request("one", &prompt, params.clone())).unwrap();
            let mut outputs = Vec::new();
            while engine.has_unfinished() {
                outputs.extend(engine.step().unwrap().outputs);
            }
            let prompt_logprobs = outputs[0].prompt_logprobs.as_ref().unwrap();
            assert_eq!(prompt_logprobs.len(), 40);
            assert!(prompt_logprobs[0].is_none());
            for (found, token) in prompt_logprobs.iter().zip(&prompt).skip(1) {
                let found = found.as_ref().unwrap();
                assert_eq!(found.token_id, *token);
                assert_eq!(found.top.len(), 2);
                assert!(found.top[0].1 >= found.logprob);
            }
            assert!(outputs[1].prompt_logprobs.is_none());
            for output in &outputs {
                let chosen = &output.logprobs[0];
                assert_eq!((chosen.rank, chosen.token_id), (1, output.token_ids[0]));
                assert_eq!(chosen.top[0], (chosen.token_id, chosen.logprob));
                let mass: f32 = chosen.top.iter().map(|(_, l)| l.exp()).sum();
                assert!(mass <= 1.0 + 1e-5 && chosen.top.len() == 3);
            }
        }
    }
}

#[test]
fn abort_frees_everything_at_once() {
    let mut engine = engine(EngineConfig { enable_prefix_caching: false, ..config() });
    engine.add_request(request("a", &prompt(100, 1), greedy(50))).unwrap();
    engine.add_request(request("b", &prompt(100, 2), greedy(50))).unwrap();
    for _ in 0..5 {
        engine.step().unwrap();
    }
    let both = engine.stats().kv_physical_bytes;
    assert!(engine.abort(&RequestId::from("a")).unwrap());
    assert!(engine.stats().kv_physical_bytes < both);
    assert!(!engine.abort(&RequestId::from("a")).unwrap());
    engine.abort(&RequestId::from("b")).unwrap();
    assert!(!engine.has_unfinished());
    empty(&mut engine);
}

#[test]
fn bad_requests_are_refused_and_change_nothing() {
    let mut engine = engine(config());
    let refuse = |engine: &mut Engine, request: Request| engine.add_request(request).unwrap_err();
    assert!(matches!(refuse(&mut engine, request("a", &[], greedy(1))), EngineError::EmptyPrompt));
    let unknown = request("a", &[TINY_VOCAB as u32], greedy(1));
    assert!(matches!(refuse(&mut engine, unknown), EngineError::UnknownToken { .. }));
    let params = SamplingParams { top_p: 2.0, ..greedy(1) };
    let bad = refuse(&mut engine, request("a", &[1], params));
    assert_eq!(bad.to_string(), "top_p must be above 0 and at most 1, got 2");
    engine.add_request(request("a", &[1], greedy(1))).unwrap();
    let twice = refuse(&mut engine, request("a", &[1], greedy(1)));
    assert!(matches!(twice, EngineError::DuplicateRequest { .. }));
    assert_eq!(run(&mut engine).len(), 1);
    empty(&mut engine);
}

#[test]
fn the_queue_limit_counts_what_waits_while_others_run() {
    let limited = EngineConfig { max_num_queued_reqs: Some(2), max_num_seqs: 1, ..config() };
    let mut engine = engine(limited);
    let mut add = |id: &str| {
        let added = engine.add_request(request(id, &[1], greedy(20)));
        engine.step().unwrap();
        added
    };
    // One runs, two wait; a preempted or running one does not count.
    for id in ["a", "b", "c"] {
        add(id).unwrap();
    }
    let full = add("d").unwrap_err();
    assert!(matches!(full, EngineError::QueueFull { waiting: 2, limit: 2 }), "{full}");
    assert_eq!(run(&mut engine).len(), 3);
    // An idle engine takes a batch beyond the limit: it does not wait.
    for id in ["a", "b", "c"] {
        engine.add_request(request(id, &[1], greedy(1))).unwrap();
    }
    assert!(engine.add_request(request("d", &[1], greedy(1))).is_err());
    run(&mut engine);
    empty(&mut engine);
}

#[test]
fn aborting_thousands_of_sequences_leaves_nothing() {
    let mut engine = engine(config());
    let params = SamplingParams { n: 128, max_tokens: Some(5), ..Default::default() };
    for i in 0..200 {
        let id = i.to_string();
        engine.add_request(request(&id, &prompt(20, i), params.clone())).unwrap();
    }
    engine.step().unwrap();
    for i in 0..200 {
        assert!(engine.abort(&RequestId::from(i.to_string().as_str())).unwrap());
    }
    assert!(!engine.has_unfinished());
    empty(&mut engine);
}

#[test]
fn bad_configurations_are_refused() {
    let refuse = |config: EngineConfig| Engine::new(model(), config).unwrap_err().to_string();
    let small = refuse(EngineConfig { kv_cache_memory: 1000, ..config() });
    assert!(small.contains("cannot hold one sequence of 16 tokens"), "{small}");
    let long = refuse(EngineConfig {
        kv_cache_memory: 50 << 10,
        max_model_len: Some(TINY_CONTEXT),
        ..config()
    });
    assert!(long.contains("cannot hold one sequence of 512 tokens"), "{long}");
    let block = refuse(EngineConfig { block_size: 20, ..config() });
    assert_eq!(block, "block size must be 16, 32 or 64 tokens, got 20");
    assert!(refuse(EngineConfig { max_num_seqs: 0, ..config() }).contains("--max-num-seqs"));
    let longer = EngineConfig { max_model_len: Some(TINY_CONTEXT + 1), ..config() };
    assert!(refuse(longer).contains("--max-model-len"));
    // Without --max-model-len the budget decides.
    let engine = engine(EngineConfig { kv_cache_memory: 50 << 10, ..config() });
    let len = engine.max_model_len();
    assert!((16..TINY_CONTEXT).contains(&len), "{len}");
}

#[test]
fn a_request_as_long_as_allowed_runs_alone_in_a_small_budget() {
    for memory in [40 << 10, 50 << 10, 77_777, 100 << 10] {
        for block_size in [16, 32] {
            let mut engine =
                engine(EngineConfig { kv_cache_memory: memory, block_size, ..config() });
            let len = engine.max_model_len();
            for i in 0..3 {
                engine
                    .add_request(request(&i.to_string(), &prompt(len / 2, i), greedy(len)))
                    .unwrap();
            }
            let done = run(&mut engine);
            assert!(done.values().all(|f| f.tokens.len() == len - len / 2));
            empty(&mut engine);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any interleaving of adding, aborting and stepping ends with an empty pool.
    #[test]
    fn any_interleaving_ends_with_an_empty_pool(
        ops in prop::collection::vec((0..6u8, 1..140usize, 1..30usize), 1..60),
        memory_kib in 60..400usize,
        max_num_batched_tokens in 1..150usize,
        max_num_seqs in 1..10usize,
        enable_prefix_caching in any::<bool>(),
        recipe in 0..Recipe::all().len(),
        own_recipes in any::<bool>(),
    ) {
        let statistics = statistics();
        let mut engine = engine(EngineConfig {
            kv_cache_memory: (memory_kib << 10) + statistics.num_bytes(),
            statistics: Some(statistics),
            tables: tables(),
            max_num_batched_tokens,
            max_num_seqs,
            enable_prefix_caching,
            kv_cache: Recipe::all()[recipe],
            ..config()
        });
        let mut ids = Vec::new();
        for (i, (op, len, max_tokens)) in ops.into_iter().enumerate() {
            match op {
                0 | 1 => {
                    let n = if op == 0 { 1 } else { 3 };
                    let params = SamplingParams { n, max_tokens: Some(max_tokens), ..Default::default() };
                    let salt = (len % 3 == 0).then(|| "tenant".to_owned());
                    let added = engine.add_request(Request {
                        id: RequestId::from(i.to_string().as_str()),
                        prompt: prompt(len, len as u32 % 2),
                        params: params.into(),
                        cache_salt: salt,
                        kv_cache: own_recipes.then(|| Recipe::all()[len % Recipe::all().len()]),
                    });
                    match added {
                        Ok(()) => ids.push(i),
                        Err(
                            EngineError::PromptTooLong { .. } | EngineError::RecipeTooLarge { .. },
                        ) => {}
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                2 if !ids.is_empty() => {
                    let id = ids.swap_remove(len % ids.len());
                    engine.abort(&RequestId::from(id.to_string().as_str())).unwrap();
                }
                _ => {
                    engine.step().unwrap();
                }
            }
            engine.check_integrity().unwrap();
        }
        run(&mut engine);
        empty(&mut engine);
    }
}

#[test]
fn the_tree_fuses_prompts_of_running_requests_and_ends_empty() {
    let config = |mode| EngineConfig {
        kv_sharing: Sharing { mode, limit: (mode == SharingMode::Tree).then_some(0.5) },
        enable_prefix_caching: false,
        ..config()
    };
    let peaks = [SharingMode::Off, SharingMode::Tree].map(|mode| {
        let mut engine = Engine::new(deep_tiny_model(1, 6), config(mode)).unwrap();
        for i in 0..4 {
            engine.add_request(request(&format!("r{i}"), &prompt(80, 1), greedy(20))).unwrap();
        }
        engine.step().unwrap();
        let bytes = engine.stats().kv_physical_bytes;
        engine.check_integrity().unwrap();
        assert_eq!(run(&mut engine).len(), 4);
        engine.check_integrity().unwrap();
        assert_eq!(engine.stats().kv_physical_bytes, 0);
        bytes
    });
    assert!(peaks[1] < peaks[0], "{peaks:?}");
}
