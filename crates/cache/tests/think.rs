//! ThinK against a dense simulation: scores lack exactly what the pruned channels would add.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
mod dense;

use dense::{
    BLOCK, DIM, GROUP, KV_HEADS, QUERY_HEADS, Tokens, check, rotate, softmax, top, with_kept,
};

/// Newest tokens whose keys stay whole.
const RECENT: usize = 32;

/// The channels that a KV head keeps.
fn kept_channels(tokens: &Tokens, kv_head: usize, kept: usize) -> Vec<usize> {
    let n = tokens.prompt;
    let mut queries = [0.0; DIM];
    for m in n.saturating_sub(RECENT)..n {
        for head in kv_head * GROUP..(kv_head + 1) * GROUP {
            let q = rotate(Tokens::row(&tokens.q, QUERY_HEADS, m, head), m);
            queries.iter_mut().zip(q).for_each(|(sum, q)| *sum += q * q);
        }
    }
    let mut keys = [0.0; DIM];
    for t in 0..n {
        let k = rotate(Tokens::row(&tokens.k, KV_HEADS, t, kv_head), t);
        keys.iter_mut().zip(k).for_each(|(sum, k)| *sum += k * k);
    }
    let scores: Vec<f64> = queries.iter().zip(keys).map(|(q, k)| q * k).collect();
    top(&scores, kept)
}

/// Tokens generated after a prompt whose old keys have lost channels.
fn simulate(tokens: &Tokens, kept: usize) -> Vec<Vec<f64>> {
    let n = tokens.prompt;
    let channels: Vec<_> = (0..KV_HEADS).map(|head| kept_channels(tokens, head, kept)).collect();
    let narrow = n.saturating_sub(RECENT) / BLOCK * BLOCK;
    (n..tokens.len())
        .map(|m| {
            tokens.mix(|head| {
                let q = rotate(Tokens::row(&tokens.q, QUERY_HEADS, m, head), m);
                let score = |t: usize| {
                    let k = rotate(Tokens::row(&tokens.k, KV_HEADS, t, head / GROUP), t);
                    let lost: f64 = match t < narrow {
                        true => (0..DIM)
                            .filter(|c| !channels[head / GROUP].contains(c))
                            .map(|c| q[c] * k[c])
                            .sum(),
                        false => 0.0,
                    };
                    tokens.score(m, m, head, t, t) - lost / (DIM as f64).sqrt()
                };
                let seen: Vec<usize> = (0..=m).collect();
                let weights = softmax(&seen.iter().map(|t| score(*t)).collect::<Vec<_>>());
                (seen, weights)
            })
        })
        .collect()
}

#[test]
fn scores_lack_what_pruned_channels_would_add() {
    for (recipe, kept, tolerance) in
        [("think:0.6+f32", 10, 2e-5), ("think:0.25+f32", 4, 2e-5), ("think:0.6", 10, 3e-2)]
    {
        check(recipe, RECENT, 20, tolerance, |tokens| simulate(tokens, kept));
    }
}

#[test]
fn codecs_code_what_is_left() {
    for (recipe, tolerance) in [("think:0.6+int8", 0.1), ("think:0.6+kivi4", 0.6)] {
        check(recipe, RECENT, 50, tolerance, |tokens| simulate(tokens, 10));
    }
}

#[test]
fn all_channels_are_the_cache_without_it() {
    let all = |tokens: &Tokens| with_kept(tokens, &vec![(0..tokens.prompt).collect(); KV_HEADS]);
    check("think:1+f32", RECENT, 20, 2e-5, all);
    check("think:1", RECENT, 20, 3e-2, all);
}
