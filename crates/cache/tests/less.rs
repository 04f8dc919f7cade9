//! LESS against a dense simulation in f64 that keeps every token that went, and weighs it by products of features.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
mod dense;

use common::{cache, layer, tables};
use dense::{BLOCK, DIM, GROUP, KV_HEADS, QUERY_HEADS, Run, Tokens, check, rotate, top};
use kvasir_cache::Geometry;
use kvasir_cache::offline::{LessTable, Method, Table};

fn budget(share: f64, n: usize) -> usize {
    ((n as f64 * share) as usize).max(1)
}

fn networks() -> LessTable {
    let geometry = Geometry::new(vec![layer(QUERY_HEADS, KV_HEADS, DIM)], BLOCK).unwrap();
    let Some(Table::Less(table)) = tables(&geometry).get(Method::Less).cloned() else { panic!() };
    (*table).clone()
}

fn turned(x: &[f32], at: usize) -> Vec<f32> {
    rotate(x, at).into_iter().map(|x| x as f32).collect()
}

/// What token `m` attends to in a query head: tokens, each with the positions that its query and its key have, and tokens
/// that are gone. Returns the weights of the former and of all of the latter, and the output.
fn attend(
    networks: &LessTable,
    tokens: &Tokens,
    (m, head): (usize, usize),
    seen: &[(usize, usize, usize)],
    gone: &[usize],
) -> (Vec<f64>, Vec<f64>) {
    let kv_head = head / GROUP;
    let q = turned(Tokens::row(&tokens.q, QUERY_HEADS, m, head), m);
    let features = networks.query_features(0, head, &q);
    let mut weights: Vec<f64> =
        seen.iter().map(|(t, at, key_at)| tokens.score(m, *at, head, *t, *key_at).exp()).collect();
    let of_gone = gone.iter().map(|t| {
        let k = turned(Tokens::row(&tokens.k, KV_HEADS, *t, kv_head), *t);
        let own = networks.key_features(0, kv_head, &k);
        features.iter().zip(own).map(|(a, b)| f64::from(a * b)).sum::<f64>()
    });
    weights.extend(of_gone);
    let all: f64 = weights.iter().sum();
    let mut out = vec![0.0; DIM];
    let who = seen.iter().map(|(t, ..)| t).chain(gone);
    for (t, weight) in who.zip(&mut weights) {
        *weight /= all;
        let value = Tokens::row(&tokens.v, KV_HEADS, *t, kv_head);
        out.iter_mut().zip(value).for_each(|(o, v)| *o += *weight * f64::from(*v));
    }
    weights.truncate(seen.len());
    (weights, out)
}

fn own(seen: impl Iterator<Item = usize>, m: usize) -> Vec<(usize, usize, usize)> {
    seen.map(|t| (t, m, t)).collect()
}

fn others(n: usize, kept: &[usize]) -> Vec<usize> {
    (0..n).filter(|t| !kept.contains(t)).collect()
}

#[test]
fn what_snapkv_gives_up_of_a_prompt_is_remembered() {
    let networks = networks();
    for share in [0.3, 1.0] {
        check(&format!("less:{share}:over=snapkv+f32"), 8, 12, 1e-4, |tokens| {
            let n = tokens.prompt;
            let window = n.min(64);
            let kept: Vec<Vec<usize>> = (0..KV_HEADS)
                .map(|head| {
                    let paid = tokens.paid_to_kv(head, n - window..n);
                    let pooled = (0..n - window).map(|i| {
                        let near = i.saturating_sub(2)..(i + 3).min(n - window);
                        paid[near].iter().sum::<f64>() / 5.0
                    });
                    let all = std::iter::repeat_n(f64::INFINITY, window);
                    top(&pooled.chain(all).collect::<Vec<_>>(), budget(share, n))
                })
                .collect();
            let out = |m: usize| {
                let head = |head: usize| {
                    let kept = &kept[head / GROUP];
                    let seen = own(kept.iter().copied().chain(n..=m), m);
                    attend(&networks, tokens, (m, head), &seen, &others(n, kept)).1
                };
                (0..QUERY_HEADS).flat_map(head).collect()
            };
            (n..tokens.len()).map(out).collect()
        });
    }
}

#[test]
fn what_leaves_a_window_is_remembered_token_by_token() {
    let networks = networks();
    check("less:0.4:over=streaming+f32", 8, 60, 1e-4, |tokens| {
        let n = tokens.prompt;
        let all = budget(0.4, n);
        let sinks = 4.min(all - 1);
        let window = all - sinks;
        let out = |m: usize| {
            let newest = (m + 1).saturating_sub(window).max(sinks);
            let kept: Vec<usize> = (0..sinks).chain(newest..=m).collect();
            // Sinks are read as if they were next to the window.
            let seen: Vec<_> = kept
                .iter()
                .enumerate()
                .map(
                    |(place, t)| {
                        if place < sinks { (*t, kept.len() - 1, place) } else { (*t, m, *t) }
                    },
                )
                .collect();
            let gone = others(newest, &kept[..sinks]);
            (0..QUERY_HEADS)
                .flat_map(|head| attend(&networks, tokens, (m, head), &seen, &gone).1)
                .collect()
        };
        (n..tokens.len()).map(out).collect()
    });
}

#[test]
fn whoever_loses_its_row_among_heavy_hitters_is_remembered() {
    let networks = networks();
    check("less:0.4+f32", 8, 50, 1e-4, |tokens| {
        let n = tokens.prompt;
        let all = budget(0.4, n);
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
            let mut output = Vec::new();
            let mut paid = Vec::new();
            for head in 0..QUERY_HEADS {
                let kept = &kept[head / GROUP];
                let seen = own(kept.iter().copied().chain(newest..=m), m);
                let gone = others(newest, kept);
                let (weights, out) = attend(&networks, tokens, (m, head), &seen, &gone);
                output.extend(out);
                paid.extend(seen.iter().zip(weights).map(|((t, ..), w)| (head, *t, w)));
            }
            paid.into_iter().for_each(|(head, t, w)| scores[head / GROUP][t] += w);
            outputs.push(output);
        }
        outputs
    });
}

/// Keys whose features are nothing leave the policy as it is.
#[test]
fn without_features_the_policy_is_alone() {
    for over in ["h2o", "snapkv", "streaming"] {
        let all = [Tokens::new(90, 40, 3), Tokens::new(33, 40, 4)];
        let policy = if over == "snapkv" { "snapkv:0.3" } else { &format!("{over}:0.3") };
        let mut alone = Run::new(policy, &all, None);
        let expected = alone.run(&all, 40);
        let recipe = format!("less:0.3:over={over}");
        let mut run = Run::new(&recipe, &all, None);
        let geometry = Geometry::new(run.layers.clone(), BLOCK).unwrap();
        let mut tensors = Table::Less(networks().into()).to_tensors();
        for tensor in tensors.iter_mut().filter(|t| t.name.contains("keys")) {
            tensor.data.fill(0.0);
        }
        let mut tables = tables(&geometry);
        tables.add(Table::from_tensors(Method::Less, &geometry, tensors).unwrap());
        let ids = run.ids.len();
        run.cache = common::cache_with(run.layers.clone(), BLOCK, recipe.parse().unwrap(), tables);
        run.ids = (0..ids).map(|i| run.cache.add_sequence(Some(&i.to_string())).unwrap()).collect();
        for (id, tokens) in run.ids.iter().zip(&all) {
            run.cache.expect_prompt(*id, tokens.prompt).unwrap();
        }
        assert_eq!(run.run(&all, 40), expected, "{recipe}");
        run.finish();
    }
}

/// What is remembered takes the same bytes however much it is.
#[test]
fn sums_do_not_grow() {
    let all = [Tokens::new(100, 200, 9)];
    let mut run = Run::new("less:0.3", &all, None);
    while run.cache.num_tokens(run.ids[0]).unwrap() < 100 {
        run.step(&all, &[50]);
    }
    let before = run.cache.sequence_bytes(run.ids[0]).unwrap();
    for _ in 0..200 {
        run.step(&all, &[1]);
    }
    let after = run.cache.sequence_bytes(run.ids[0]).unwrap();
    assert!(after.1 <= before.1 + 4096, "{before:?} {after:?}");
    run.finish();
}

#[test]
fn without_networks_it_is_refused() {
    let l = vec![layer(QUERY_HEADS, KV_HEADS, DIM)];
    let mut cache = cache(l, BLOCK, "f16".parse().unwrap(), 1 << 20, false);
    let error = cache.prepare("less:0.5".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("kvasir calibrate --method less"), "{error}");
}
