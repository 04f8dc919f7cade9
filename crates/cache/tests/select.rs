//! Policies against a dense simulation in f64 that knows nothing of blocks: the same tokens are kept, and what
//! follows attends to exactly those.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
mod dense;

use common::cache;
use dense::{
    BLOCK, DIM, GROUP, KV_HEADS, QUERY_HEADS, Run, Tokens, check, softmax, top, with_kept,
};
use kvasir_cache::BatchSlice;

fn budget(share: f64, n: usize) -> usize {
    ((n as f64 * share) as usize).max(1)
}

fn snapkv_scores(tokens: &Tokens, window: usize, kernel: usize) -> Vec<Vec<f64>> {
    let n = tokens.prompt;
    let window = window.min(n);
    (0..KV_HEADS)
        .map(|head| {
            let paid = tokens.paid_to_kv(head, n - window..n);
            let before = n - window;
            let half = kernel / 2;
            let pooled = (0..before).map(|i| {
                let near = i.saturating_sub(half)..(i + half + 1).min(before);
                paid[near].iter().sum::<f64>() / kernel as f64
            });
            pooled.chain(std::iter::repeat_n(f64::INFINITY, window)).collect()
        })
        .collect()
}

#[test]
fn snapkv_keeps_what_the_window_attends_to() {
    for (share, recipe) in [(0.5, "snapkv:0.5:window=8+f32"), (0.2, "snapkv:0.2:window=8+f32")] {
        check(recipe, 8, 20, 2e-5, |tokens| {
            let kept: Vec<_> = snapkv_scores(tokens, 8, 5)
                .iter()
                .map(|scores| top(scores, budget(share, tokens.prompt)))
                .collect();
            with_kept(tokens, &kept)
        });
    }
}

#[test]
fn a_whole_budget_keeps_everything() {
    let all = |tokens: &Tokens| with_kept(tokens, &vec![(0..tokens.prompt).collect(); KV_HEADS]);
    for policy in [
        "snapkv:1",
        "chunkkv:1",
        "streaming:1",
        "h2o:1",
        "dbudget:0",
        "compactor:1",
        "clusterkv:0.1",
    ] {
        check(&format!("{policy}+f32"), 8, 20, 2e-5, all);
        check(policy, 8, 20, 3e-2, all);
    }
    // Rows in a file are in f16, whatever the rest.
    for recipe in ["clusterkv:1:whole=0:size=10+f32", "clusterkv:1:whole=0:sinks=3"] {
        check(recipe, 8, 20, 3e-2, all);
    }
    // What follows the prompt is in the codec's own frame.
    for (recipe, tolerance) in [("snapkv:1+int8", 0.1), ("chunkkv:1+kivi4", 0.6)] {
        check(recipe, 8, 50, tolerance, all);
    }
}

/// With clusters of one token each query head attends to exactly the keys that its query has the largest products with.
#[test]
fn clusterkv_of_single_tokens_is_the_best_products() {
    check("clusterkv:0.4:whole=0:size=1:sinks=4+f32", 8, 20, 2e-2, |tokens| {
        let n = tokens.prompt;
        let sinks = n.min(4);
        let budget = budget(0.4, n).saturating_sub(4);
        (n..tokens.len())
            .map(|m| {
                tokens.mix(|head| {
                    let scores: Vec<f64> =
                        (sinks..n).map(|t| tokens.score(m, m, head, t, t)).collect();
                    let best = top(&scores, budget).into_iter().map(|t| t + sinks);
                    let seen: Vec<usize> = (0..sinks).chain(best).chain(n..=m).collect();
                    let weights = tokens.weights(m, head, &seen);
                    (seen, weights)
                })
            })
            .collect()
    });
}

#[test]
fn chunkkv_keeps_whole_chunks() {
    check("chunkkv:0.5:chunk=5:window=8+f32", 8, 20, 2e-5, |tokens| {
        let n = tokens.prompt;
        let mut scores = snapkv_scores(tokens, 8, 5);
        let means = 1.0 / (8.min(n) * GROUP) as f64;
        let finite = scores.iter().flatten().copied().filter(|s| s.is_finite());
        let window = finite.fold(0.0, f64::max) * means + 1.0;
        for score in scores.iter_mut().flatten() {
            *score = if score.is_finite() { *score * means } else { window };
        }
        let sums: Vec<f64> = (0..n).map(|t| scores.iter().map(|s| s[t]).sum()).collect();
        let mut chunks: Vec<(f64, usize)> = sums
            .chunks(5)
            .enumerate()
            .map(|(i, c)| (c.iter().sum::<f64>() / c.len() as f64, i))
            .collect();
        chunks.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        let mut left = budget(0.5, n);
        let mut kept = Vec::new();
        for (_, chunk) in chunks {
            let end = (5 * chunk + 5).min(n);
            let begin = end - left.min(end - 5 * chunk);
            kept.extend(begin..end);
            left -= end - begin;
        }
        kept.sort_unstable();
        with_kept(tokens, &vec![kept; KV_HEADS])
    });
}

#[test]
fn dbudget_keeps_as_much_as_the_last_query_needs() {
    for (recipe, most, apart) in [
        ("dbudget:0.01+f32", 0.01, false),
        ("dbudget:0.2+f32", 0.2, false),
        ("dbudget:0.2:sinks=apart+f32", 0.2, true),
    ] {
        let simulate = move |tokens: &Tokens| {
            let n = tokens.prompt;
            let rows: Vec<Vec<f64>> =
                (0..QUERY_HEADS).map(|head| tokens.paid(head, n - 1..n)).collect();
            let sinks = n.min(4);
            let ranked: Vec<usize> = (0..sinks).chain((sinks..n).rev()).collect();
            let skipped = if apart { sinks } else { 0 };
            let norm = |end: usize| {
                let own = |row: &Vec<f64>| {
                    ranked[skipped..end].iter().map(|t| row[*t].powi(2)).sum::<f64>().sqrt()
                };
                rows.iter().map(own).sum::<f64>()
            };
            let cut = (skipped + 1..=n).find(|t| 1.0 - norm(*t) / norm(n) <= most).unwrap_or(n);
            let mut kept = ranked[..cut].to_vec();
            kept.sort_unstable();
            // The two layers that keep everything come first.
            (kept, with_kept(tokens, &vec![(0..n).collect(); KV_HEADS]))
        };
        check(recipe, 8, 5, 2e-5, |tokens| simulate(tokens).1);
        // The third layer of three: what it keeps shows in its bytes.
        for n in [3, 40, 150] {
            let tokens = [Tokens::new(n, 3, n as u64)];
            let mut run = Run::new(recipe, &tokens, None);
            run.layers = vec![run.layers[0].clone(); 3];
            run.cache = cache(run.layers.clone(), BLOCK, recipe.parse().unwrap(), 16 << 20, false);
            run.ids = vec![run.cache.add_sequence(None).unwrap()];
            run.cache.expect_prompt(run.ids[0], n).unwrap();
            let found = run.run(&tokens, 64);
            let (kept, _) = simulate(&tokens[0]);
            let expected = with_kept(&tokens[0], &vec![kept; KV_HEADS]);
            for (found, expected) in found[0].iter().zip(&expected) {
                for (a, b) in found.iter().zip(expected) {
                    assert!((f64::from(*a) - b).abs() < 2e-5, "{recipe}, {n}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn streaming_reads_the_cache_as_one_short_text() {
    check("streaming:tokens=24:sinks=3+f32", 24, 60, 2e-5, |tokens| {
        (tokens.prompt..tokens.len())
            .map(|m| {
                // Tokens of the cache when `m` comes, itself included.
                let seen: Vec<usize> = match m < 24 {
                    true => (0..=m).collect(),
                    false => (0..3).chain(m - 20..=m).collect(),
                };
                let places: Vec<usize> = (0..seen.len()).collect();
                tokens.mix(|head| {
                    let last = seen.len() - 1;
                    let scores = seen.iter().zip(&places);
                    let scores = scores.map(|(t, at)| tokens.score(m, last, head, *t, *at));
                    (seen.clone(), softmax(&scores.collect::<Vec<_>>()))
                })
            })
            .collect()
    });
}

#[test]
fn h2o_keeps_heavy_hitters_while_it_generates() {
    for (share, recipe) in [(0.5, "h2o:0.5+f32"), (0.2, "h2o:0.2+f32")] {
        check(recipe, 8, 50, 2e-5, |tokens| {
            let n = tokens.prompt;
            let all = budget(share, n);
            let (heavy, recent) = (all / 2, all - all / 2);
            let mut scores: Vec<Vec<f64>> =
                (0..KV_HEADS).map(|head| tokens.paid_to_kv(head, 0..n)).collect();
            let mut kept: Vec<Vec<usize>> =
                scores.iter().map(|s| top(&s[..n - recent], heavy)).collect();
            let mut outputs = Vec::new();
            for m in n..tokens.len() {
                let newest = (m + 1).saturating_sub(recent);
                for (scores, kept) in scores.iter_mut().zip(&mut kept) {
                    scores.push(0.0);
                    // What leaves the window with this token.
                    if newest > n - recent {
                        let leaves = newest - 1;
                        let least =
                            kept.iter().copied().min_by(|a, b| scores[*a].total_cmp(&scores[*b]));
                        if let Some(least) = least.filter(|least| scores[*least] < scores[leaves]) {
                            kept.retain(|t| *t != least);
                            kept.push(leaves);
                        }
                    }
                }
                let seen = |head: usize| -> Vec<usize> {
                    kept[head / GROUP].iter().copied().chain(newest..=m).collect()
                };
                outputs.push(tokens.mix(|head| {
                    let seen = seen(head);
                    let weights = tokens.weights(m, head, &seen);
                    (seen, weights)
                }));
                for head in 0..QUERY_HEADS {
                    let seen = seen(head);
                    for (t, w) in seen.iter().zip(tokens.weights(m, head, &seen)) {
                        scores[head / GROUP][*t] += w;
                    }
                }
            }
            outputs
        });
    }
}

/// Constant bytes, however long a text gets.
#[test]
fn streaming_and_h2o_take_no_more_bytes_as_they_go_on() {
    for recipe in ["streaming:tokens=100", "h2o:0.5", "streaming:tokens=100+kivi4"] {
        let tokens = [Tokens::new(200, 8192 + 64, 5)];
        let mut run = Run::new(recipe, &tokens, None);
        while run.cache.num_tokens(run.ids[0]).unwrap() < 200 {
            run.step(&tokens, &[100]);
        }
        let mut seen = Vec::new();
        for step in 0..8192 + 64 {
            let id = run.ids[0];
            let start = run.cache.num_tokens(id).unwrap();
            let slices = [BatchSlice { sequence: id, row: 0, start, len: 1 }];
            let t = 200 + step % 64;
            run.cache.reserve(id, 1).unwrap();
            let (k, q) =
                (&tokens[0].k[t * KV_HEADS * DIM..], &tokens[0].q[t * QUERY_HEADS * DIM..]);
            let (k, q) = (&k[..KV_HEADS * DIM], &q[..QUERY_HEADS * DIM]);
            let mut out = vec![0.0; QUERY_HEADS * DIM];
            run.cache.write(0, &slices, k, k).unwrap();
            run.cache.attend(0, &slices, q, &mut out, &mut run.scratch).unwrap();
            run.cache.observe(0, &slices, q, &mut run.scratch).unwrap();
            run.cache.commit(id, &[1]).unwrap();
            if (step + 1) % (8 * BLOCK) == 0 {
                run.cache.check_integrity().unwrap();
                seen.push(run.cache.sequence_bytes(id).unwrap().1);
            }
        }
        // The window's blocks of the prompt have left after one window.
        let settled = &seen[2..];
        assert!(settled.iter().all(|bytes| bytes == &settled[0]), "{recipe}: {settled:?}");
        run.finish();
    }
}

/// Layers with a window keep what is in it, whatever the policy, and read it as before.
#[test]
fn windows_of_layers_stay() {
    let window = 21;
    for policy in
        ["snapkv:0.3:window=8", "chunkkv:0.3", "streaming:tokens=40", "h2o:0.9", "dbudget:0.1"]
    {
        for n in [5, 20, 21, 22, 100] {
            let tokens = [Tokens::new(n, 40, n as u64)];
            let mut run = Run::new(&format!("{policy}+f32"), &tokens, Some(window));
            let found = run.run(&tokens, 33);
            // No policy's own window may be narrower than the layer's here.
            if policy.starts_with("h2o") && n < 40 {
                continue;
            }
            for (step, found) in found[0].iter().enumerate() {
                let m = n + step;
                let expected = tokens[0].mix(|head| {
                    let seen: Vec<usize> = ((m + 1).saturating_sub(window)..=m).collect();
                    let weights = tokens[0].weights(m, head, &seen);
                    (seen, weights)
                });
                for (a, b) in found.iter().zip(&expected) {
                    assert!((f64::from(*a) - b).abs() < 2e-5, "{policy}, {n} + {step}: {a} {b}");
                }
            }
        }
    }
}
