//! KIVI's windows: keys are coded when their block is full, values when a block's worth of tokens has come
//! after them. Against dense attention over rows quantised here, token by token, in f64.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Random, cache, layer};
use kvasir_cache::{AttentionScratch, BatchSlice, KvCache, LayerGeometry, Recipe, SequenceId};

const DIM: usize = 32;
const BLOCK: usize = 32;

fn f16(x: f64) -> f64 {
    half::f16::from_f64(x).to_f64()
}

/// Min-max quantisation of one group as METHODS of the paper has it; scale and zero in f16.
fn quantise(group: &mut [&mut f64], bits: u32) {
    let low = group.iter().fold(f64::MAX, |m, x| m.min(**x));
    let high = group.iter().fold(f64::MIN, |m, x| m.max(**x));
    let levels = f64::from((1u32 << bits) - 1);
    let (scale, zero) = (f16((high - low) / levels), f16(low));
    for x in group {
        **x = ((**x - zero) / scale).round().clamp(0.0, levels) * scale + zero;
    }
}

/// Keys per channel over 32 tokens, values per token over 32 channels.
fn quantised(rows: &[f32], tokens: usize, bits: u32, per_channel: bool) -> Vec<f64> {
    let mut rows: Vec<f64> = rows.iter().map(|x| f16(f64::from(*x))).collect();
    if per_channel {
        for block in rows[..tokens / BLOCK * BLOCK * DIM].chunks_exact_mut(BLOCK * DIM) {
            for channel in 0..DIM {
                let mut group: Vec<&mut f64> = block[channel..].iter_mut().step_by(DIM).collect();
                quantise(&mut group, bits);
            }
        }
    } else {
        for row in rows[..tokens * DIM].chunks_exact_mut(DIM) {
            quantise(&mut row.iter_mut().collect::<Vec<_>>(), bits);
        }
    }
    rows
}

fn dense(q: &[f32], k: &[f64], v: &[f64], scale: f32) -> Vec<f32> {
    let scores: Vec<f64> = k
        .chunks_exact(DIM)
        .map(|k| k.iter().zip(q).map(|(a, b)| a * f64::from(*b)).sum::<f64>() * f64::from(scale))
        .collect();
    let sum: f64 = scores.iter().map(|s| s.exp()).sum();
    let mixed = |d: usize| {
        let terms = scores.iter().zip(v.chunks_exact(DIM)).map(|(s, v)| s.exp() * v[d]);
        (terms.sum::<f64>() / sum) as f32
    };
    (0..DIM).map(mixed).collect()
}

/// Writes `len` tokens and returns what the last of them attends to.
fn append(
    cache: &mut KvCache,
    id: SequenceId,
    start: usize,
    [q, k, v]: [&[f32]; 3],
    len: usize,
) -> Vec<f32> {
    let rows = start * DIM..(start + len) * DIM;
    cache.reserve(id, len).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start, len }];
    cache.write(0, &slices, &k[rows.clone()], &v[rows.clone()]).unwrap();
    let mut out = vec![f32::NAN; len * DIM];
    cache.attend(0, &slices, &q[rows], &mut out, &mut AttentionScratch::default()).unwrap();
    cache.commit(id, &vec![7; len]).unwrap();
    cache.check_integrity().unwrap();
    out[(len - 1) * DIM..].to_vec()
}

#[test]
fn every_token_attends_to_what_the_paper_says() {
    let l = LayerGeometry { rope: None, ..layer(1, 1, DIM) };
    let mut random = Random::new(21);
    let tokens = 140;
    let [q, k, v] = [(); 3].map(|()| random.values(tokens * DIM));
    for (recipe, bits) in [(Recipe::KIVI4, 4), (Recipe::KIVI2, 2)] {
        for prompt in [1, 31, 32, 33, 70] {
            let mut cache = cache(vec![l.clone()], BLOCK, recipe, 8 << 20, false);
            let id = cache.add_sequence(None).unwrap();
            append(&mut cache, id, 0, [&q, &k, &v], prompt);
            for n in prompt..tokens {
                let got = append(&mut cache, id, n, [&q, &k, &v], 1);
                let seen = (n + 1) * DIM;
                // `n` tokens were committed before this one; it and the last 32 of them are exact.
                let keys = quantised(&k[..seen], n, bits, true);
                let values = quantised(&v[..seen], n.saturating_sub(BLOCK), bits, false);
                let expected = dense(&q[n * DIM..seen], &keys, &values, l.score_scale);
                let pairs = got.iter().zip(&expected);
                let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 5e-3, "{recipe}, prompt {prompt}, token {n}: off by {worst}");
            }
            cache.remove_sequence(id).unwrap();
            assert_eq!(cache.stats().physical_bytes, 0);
        }
    }
}
