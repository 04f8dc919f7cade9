//! A dense simulation in f64 of a layer that knows nothing of blocks, and a cache that runs the same tokens.
#![allow(dead_code)]

use kvasir_cache::{AttentionScratch, BatchSlice, KvCache, LayerGeometry, Recipe, SequenceId};

use crate::common::{ROPE_BASE, Random, cache, layer};

pub(crate) const DIM: usize = 16;
pub(crate) const QUERY_HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const GROUP: usize = QUERY_HEADS / KV_HEADS;
pub(crate) const BLOCK: usize = 16;

/// One sequence's tokens.
pub(crate) struct Tokens {
    pub(crate) prompt: usize,
    pub(crate) q: Vec<f32>, // [tokens, query_heads, dim]
    pub(crate) k: Vec<f32>, // [tokens, kv_heads, dim]
    pub(crate) v: Vec<f32>, // the same
}

impl Tokens {
    pub(crate) fn new(prompt: usize, generated: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let tokens = prompt + generated;
        let mut of = |heads: usize, by: f32| -> Vec<f32> {
            random.values(tokens * heads * DIM).iter().map(|x| x * by).collect()
        };
        Self { prompt, q: of(QUERY_HEADS, 2.0), k: of(KV_HEADS, 2.0), v: of(KV_HEADS, 1.0) }
    }

    pub(crate) fn len(&self) -> usize {
        self.v.len() / (KV_HEADS * DIM)
    }

    pub(crate) fn row(x: &[f32], heads: usize, t: usize, head: usize) -> &[f32] {
        &x[(t * heads + head) * DIM..][..DIM]
    }

    /// The score of the query of token `m` and the key of token `t` at the given positions.
    pub(crate) fn score(&self, m: usize, at: usize, head: usize, t: usize, key_at: usize) -> f64 {
        let (q, k) = (
            Self::row(&self.q, QUERY_HEADS, m, head),
            Self::row(&self.k, KV_HEADS, t, head / GROUP),
        );
        let (q, k) = (rotate(q, at), rotate(k, key_at));
        q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / (DIM as f64).sqrt()
    }

    /// Attention of token `m` in a query head to some tokens, as weights; positions are their own but for queries and keys
    /// that `place` moves.
    pub(crate) fn weights(&self, m: usize, head: usize, seen: &[usize]) -> Vec<f64> {
        softmax(&seen.iter().map(|t| self.score(m, m, head, *t, *t)).collect::<Vec<_>>())
    }

    /// `[query_heads, dim]` of weights over tokens, by query head.
    pub(crate) fn mix(&self, weights: impl Fn(usize) -> (Vec<usize>, Vec<f64>)) -> Vec<f64> {
        let mut out = vec![0.0; QUERY_HEADS * DIM];
        for (head, out) in out.chunks_exact_mut(DIM).enumerate() {
            let (seen, weights) = weights(head);
            for (t, w) in seen.iter().zip(weights) {
                let v = Self::row(&self.v, KV_HEADS, *t, head / GROUP);
                out.iter_mut().zip(v).for_each(|(o, v)| *o += w * f64::from(*v));
            }
        }
        out
    }

    /// Sums of the attention that tokens before `end` were paid by some of the prompt's queries, in one query head.
    pub(crate) fn paid(&self, head: usize, queries: std::ops::Range<usize>) -> Vec<f64> {
        let mut sums = vec![0.0; self.prompt];
        for m in queries {
            let seen: Vec<usize> = (0..=m).collect();
            sums.iter_mut().zip(self.weights(m, head, &seen)).for_each(|(s, w)| *s += w);
        }
        sums
    }

    /// The same over the query heads of a KV head.
    pub(crate) fn paid_to_kv(&self, kv_head: usize, queries: std::ops::Range<usize>) -> Vec<f64> {
        let heads = kv_head * GROUP..(kv_head + 1) * GROUP;
        let all: Vec<Vec<f64>> = heads.map(|head| self.paid(head, queries.clone())).collect();
        (0..self.prompt).map(|t| all.iter().map(|sums| sums[t]).sum()).collect()
    }
}

pub(crate) fn rotate(x: &[f32], position: usize) -> Vec<f64> {
    let pairs = DIM / 2;
    let mut out = vec![0.0; DIM];
    for j in 0..pairs {
        let angle = position as f64 * f64::from(ROPE_BASE).powf(-2.0 * j as f64 / DIM as f64);
        let (a, b) = (f64::from(x[j]), f64::from(x[j + pairs]));
        out[j] = a * angle.cos() - b * angle.sin();
        out[j + pairs] = b * angle.cos() + a * angle.sin();
    }
    out
}

pub(crate) fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    scores.iter().map(|s| (s - max).exp() / sum).collect()
}

pub(crate) fn top(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(b.cmp(a)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// What runs: sequences of a cache of one layer, step by step.
pub(crate) struct Run {
    pub(crate) cache: KvCache,
    pub(crate) ids: Vec<SequenceId>,
    pub(crate) scratch: AttentionScratch,
    pub(crate) layers: Vec<LayerGeometry>,
}

impl Run {
    pub(crate) fn new(recipe: &str, all: &[Tokens], window: Option<usize>) -> Self {
        let layers = vec![LayerGeometry { window, ..layer(QUERY_HEADS, KV_HEADS, DIM) }];
        let recipe: Recipe = recipe.parse().unwrap();
        let mut cache = cache(layers.clone(), BLOCK, recipe, 16 << 20, true);
        let ids: Vec<SequenceId> = all
            .iter()
            .enumerate()
            .map(|(i, tokens)| {
                // Their ids are alike, and their keys are not.
                let id = cache.add_sequence(Some(&i.to_string())).unwrap();
                cache.expect_prompt(id, tokens.prompt).unwrap();
                id
            })
            .collect();
        Self { cache, ids, scratch: AttentionScratch::default(), layers }
    }

    /// The next `lens` tokens of every sequence in one step; what they attended to, `[tokens, query_heads, dim]` each.
    pub(crate) fn step(&mut self, all: &[Tokens], lens: &[usize]) -> Vec<Vec<f32>> {
        let (mut slices, mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut row = 0;
        for ((id, tokens), len) in self.ids.iter().zip(all).zip(lens) {
            let start = self.cache.num_tokens(*id).unwrap();
            assert!(*len <= self.cache.most_next(*id).unwrap());
            self.cache.reserve(*id, *len).unwrap();
            slices.push(BatchSlice { sequence: *id, row, start, len: *len });
            row += len;
            let rows = |heads: usize| start * heads * DIM..(start + len) * heads * DIM;
            q.extend_from_slice(&tokens.q[rows(QUERY_HEADS)]);
            k.extend_from_slice(&tokens.k[rows(KV_HEADS)]);
            v.extend_from_slice(&tokens.v[rows(KV_HEADS)]);
        }
        let mut out = vec![f32::NAN; q.len()];
        for layer in 0..self.layers.len() {
            self.cache.write(layer, &slices, &k, &v).unwrap();
            self.cache.attend(layer, &slices, &q, &mut out, &mut self.scratch).unwrap();
            self.cache.observe(layer, &slices, &q, &mut self.scratch).unwrap();
        }
        for slice in &slices {
            let ids: Vec<u32> = (slice.start..slice.start + slice.len).map(|t| t as u32).collect();
            self.cache.commit(slice.sequence, &ids).unwrap();
        }
        self.cache.check_integrity().unwrap();
        let width = QUERY_HEADS * DIM;
        slices.iter().map(|s| out[s.row * width..(s.row + s.len) * width].to_vec()).collect()
    }

    /// All prompts, `chunk` tokens at a time, then one token after another; the outputs of those.
    pub(crate) fn run(&mut self, all: &[Tokens], chunk: usize) -> Vec<Vec<Vec<f32>>> {
        loop {
            let left = |(id, tokens): (&SequenceId, &Tokens)| {
                tokens.prompt.saturating_sub(self.cache.num_tokens(*id).unwrap()).min(chunk)
            };
            let lens: Vec<usize> = self.ids.iter().zip(all).map(left).collect();
            if lens.iter().all(|len| *len == 0) {
                break;
            }
            self.step(all, &lens);
        }
        let mut outputs = vec![Vec::new(); all.len()];
        let generated = all[0].len() - all[0].prompt;
        for _ in 0..generated {
            let step = self.step(all, &vec![1; all.len()]);
            outputs.iter_mut().zip(step).for_each(|(outputs, out)| outputs.push(out));
        }
        outputs
    }

    pub(crate) fn finish(mut self) {
        for id in self.ids {
            self.cache.remove_sequence(id).unwrap();
        }
        self.cache.reset_prefix_cache().unwrap();
        self.cache.check_integrity().unwrap();
        assert_eq!(self.cache.stats().physical_bytes, 0);
    }
}

/// Runs sequences of the lengths around blocks and windows, in pairs of unequal ones, against `expected(tokens, step)`.
pub(crate) fn check(
    recipe: &str,
    window: usize,
    generated: usize,
    tolerance: f64,
    simulate: impl Fn(&Tokens) -> Vec<Vec<f64>>,
) {
    let w = window;
    let mut lengths = vec![1, w - 1, w, w + 1, BLOCK - 1, BLOCK, BLOCK + 1, 77, 150];
    lengths.retain(|n| *n > 0);
    for (i, n) in lengths.iter().enumerate() {
        let other = lengths[(i + 4) % lengths.len()];
        let all = [*n, other].map(|n| Tokens::new(n, generated, (7 * n + 1) as u64));
        let expected: Vec<_> = all.iter().map(&simulate).collect();
        for chunk in [23, 200] {
            let mut run = Run::new(recipe, &all, None);
            let found = run.run(&all, chunk);
            for ((tokens, found), expected) in all.iter().zip(&found).zip(&expected) {
                for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
                    for (a, b) in found.iter().zip(expected) {
                        let what = format!("{recipe}, {} + {step} tokens: {a} {b}", tokens.prompt);
                        assert!((f64::from(*a) - b).abs() < tolerance, "{what}");
                    }
                }
            }
            run.finish();
        }
    }
}

/// Attention of generated tokens to what each KV head kept, and to all that was generated.
pub(crate) fn with_kept(tokens: &Tokens, kept: &[Vec<usize>]) -> Vec<Vec<f64>> {
    (tokens.prompt..tokens.len())
        .map(|m| {
            tokens.mix(|head| {
                let seen: Vec<usize> =
                    kept[head / GROUP].iter().copied().chain(tokens.prompt..=m).collect();
                let weights = tokens.weights(m, head, &seen);
                (seen, weights)
            })
        })
        .collect()
}
