//! Paged attention in the block-relative frame against dense attention in the absolute one.

#![allow(clippy::unwrap_used)]

mod common;

use common::{ROPE_BASE, Random, cache, layer, scaled_cache};
use kvasir_cache::{AttentionScratch, BatchSlice, KvCache, LayerGeometry, Recipe, SequenceId};
use kvasir_kernels::{RopeScaling, RopeTable};

/// Angle per position of every RoPE pair.
fn frequencies(dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| f64::from(ROPE_BASE).powf(-((2 * i) as f64) / dim as f64)).collect()
}

/// Rotates every head of `[tokens, heads, dim]` by its token's position, in f64.
fn rope64(x: &[f32], heads: usize, dim: usize, frequencies: &[f64]) -> Vec<f64> {
    let mut out: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    for (row, head) in out.chunks_exact_mut(dim).enumerate() {
        let position = (row / heads) as f64;
        for i in 0..dim / 2 {
            let angle = position * frequencies[i];
            let (a, b) = (head[i], head[i + dim / 2]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + dim / 2] = b * angle.cos() + a * angle.sin();
        }
    }
    out
}

/// Dense attention in f64 with ordinary (absolute) RoPE.
/// `q`: `[tokens, query_heads, dim]`, `k`, `v`: `[tokens, kv_heads, dim]`, not rotated.
fn dense(l: &LayerGeometry, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    dense_scaled(l, &frequencies(l.head_dim), q, k, v)
}

fn dense_scaled(
    l: &LayerGeometry,
    frequencies: &[f64],
    q: &[f32],
    k: &[f32],
    v: &[f32],
) -> Vec<f32> {
    let dim = l.head_dim;
    let tokens = q.len() / l.query_heads / dim;
    let plain = |x: &[f32]| x.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
    let (q, k) = match l.rope {
        Some(_) => {
            let rotated = |x: &[f32], heads| rope64(x, heads, dim, frequencies);
            (rotated(q, l.query_heads), rotated(k, l.kv_heads))
        }
        None => (plain(q), plain(k)),
    };
    let group = l.query_heads / l.kv_heads;
    let mut out = vec![0.0f32; q.len()];
    for m in 0..tokens {
        for h in 0..l.query_heads {
            let q = &q[(m * l.query_heads + h) * dim..][..dim];
            let first = l.window.map_or(0, |w| (m + 1).saturating_sub(w));
            let scores: Vec<f64> = (first..=m)
                .map(|n| {
                    let k = &k[(n * l.kv_heads + h / group) * dim..][..dim];
                    let s: f64 =
                        q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * f64::from(l.score_scale);
                    l.score_cap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for d in 0..dim {
                let mixed: f64 = (first..=m)
                    .zip(&scores)
                    .map(|(n, s)| {
                        (s - max).exp() / sum * f64::from(v[(n * l.kv_heads + h / group) * dim + d])
                    })
                    .sum();
                out[(m * l.query_heads + h) * dim + d] = mixed as f32;
            }
        }
    }
    out
}

/// Runs `tokens` tokens through the cache in chunks; returns the attention output of every token from
/// `from` on. `q`, `k`, `v` hold one layer used for all layers.
#[allow(clippy::too_many_arguments)]
fn paged(
    cache: &mut KvCache,
    id: SequenceId,
    l: &LayerGeometry,
    from: usize,
    chunks: &[usize],
    q: &[f32],
    k: &[f32],
    v: &[f32],
) -> Vec<f32> {
    let mut scratch = AttentionScratch::default();
    let (qw, kw) = (l.query_heads * l.head_dim, l.kv_heads * l.head_dim);
    let mut all = Vec::new();
    let mut start = from;
    for chunk in chunks {
        cache.reserve(id, *chunk).unwrap();
        let slices = [BatchSlice { sequence: id, row: 0, start, len: *chunk }];
        let mut out = vec![f32::NAN; chunk * qw];
        for layer in 0..cache.geometry().layers().len() {
            let range = start * kw..(start + chunk) * kw;
            cache.write(layer, &slices, &k[range.clone()], &v[range]).unwrap();
            let q = &q[start * qw..(start + chunk) * qw];
            cache.attend(layer, &slices, q, &mut out, &mut scratch).unwrap();
        }
        all.extend(out);
        let tokens: Vec<u32> = (start..start + chunk).map(|t| t as u32).collect();
        cache.commit(id, &tokens).unwrap();
        start += chunk;
        cache.check_integrity().unwrap();
    }
    all
}

fn chunkings(tokens: usize, random: &mut Random) -> Vec<Vec<usize>> {
    let mut cut = vec![];
    let mut left = tokens;
    while left > 0 {
        let n = 1 + random.below(left.min(90));
        cut.push(n);
        left -= n;
    }
    vec![vec![tokens], vec![1; tokens], cut]
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn variants() -> Vec<(&'static str, LayerGeometry)> {
    let base = layer(6, 2, 16);
    vec![
        ("full", base.clone()),
        ("window", LayerGeometry { window: Some(21), ..base.clone() }),
        ("window of one", LayerGeometry { window: Some(1), ..base.clone() }),
        ("no rope", LayerGeometry { rope: None, ..base.clone() }),
        ("capped", LayerGeometry { score_cap: Some(0.5), ..base }),
        ("one head", layer(1, 1, 64)),
    ]
}

/// How far uncompressed recipes may be off with numbers up to 1: f16's rows are rounded to bf16 where products are of
/// that, by up to 2⁻⁹ each.
const EXACTNESS: [(Recipe, f32); 2] = [(Recipe::F32, 1e-5), (Recipe::F16, 5e-3)];

#[test]
fn equals_dense_attention_for_any_block_size_and_chunking() {
    for (name, l) in variants() {
        for tokens in [1, 15, 16, 17, 31, 32, 33, 131] {
            let mut random = Random::new(tokens as u64);
            let q = random.values(tokens * l.query_heads * l.head_dim);
            let k = random.values(tokens * l.kv_heads * l.head_dim);
            let v = random.values(tokens * l.kv_heads * l.head_dim);
            let expected = dense(&l, &q, &k, &v);
            for block_size in [16, 32, 64] {
                for chunks in chunkings(tokens, &mut random) {
                    for (recipe, limit) in EXACTNESS {
                        let mut cache =
                            cache(vec![l.clone(); 2], block_size, recipe, 8 << 20, false);
                        let id = cache.add_sequence(None).unwrap();
                        let got = paged(&mut cache, id, &l, 0, &chunks, &q, &k, &v);
                        let error = worst(&got, &expected);
                        assert!(
                            error < limit,
                            "{name}, {tokens} tokens, block {block_size}, {recipe}: {error}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn scaled_rotations_split_into_block_and_offset_like_others() {
    let factors = (0..16).map(|i| 1.0 + i as f32 / 3.0).collect();
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 64.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
    };
    for scaling in [RopeScaling::Linear { factor: 8.0 }, RopeScaling::Factors(factors), yarn] {
        let rope = RopeTable::new(32, ROPE_BASE, &scaling, 2);
        // What the table turns by from one position to the next; its tests hold it to the papers.
        let (cos, sin) = rope.at(1);
        let turns = cos.iter().zip(sin).map(|(c, s)| f64::from(*s).atan2(f64::from(*c)));
        let turns: Vec<f64> = turns.collect();
        let l = layer(4, 2, 32);
        let absolute =
            LayerGeometry { score_scale: l.score_scale * rope.score_factor(), ..l.clone() };
        let tokens = 150;
        let mut random = Random::new(31);
        let q = random.values(tokens * 4 * 32);
        let k = random.values(tokens * 2 * 32);
        let v = random.values(tokens * 2 * 32);
        let mut cache = scaled_cache(&l, rope);
        let id = cache.add_sequence(None).unwrap();
        let got = paged(&mut cache, id, &l, 0, &[70, 1, 79], &q, &k, &v);
        let error = worst(&got, &dense_scaled(&absolute, &turns, &q, &k, &v));
        assert!(error < 2e-5, "{scaling:?}: {error}");
    }
}

#[test]
fn chunking_does_not_change_a_bit() {
    for (name, l) in variants() {
        let tokens = 150;
        let mut random = Random::new(11);
        let q = random.values(tokens * l.query_heads * l.head_dim);
        let k = random.values(tokens * l.kv_heads * l.head_dim);
        let v = random.values(tokens * l.kv_heads * l.head_dim);
        let mut runs = chunkings(tokens, &mut random).into_iter().map(|chunks| {
            let mut cache = cache(vec![l.clone()], 32, Recipe::F16, 8 << 20, false);
            let id = cache.add_sequence(None).unwrap();
            paged(&mut cache, id, &l, 0, &chunks, &q, &k, &v)
        });
        let first = runs.next().unwrap();
        for other in runs {
            assert_eq!(first, other, "{name}");
        }
    }
}

/// Contexts of several ranges, which threads may share or not.
#[test]
fn neither_threads_nor_chunks_change_a_bit_of_long_contexts() {
    for window in [None, Some(400)] {
        let l = LayerGeometry { window, ..layer(4, 2, 32) };
        let tokens = 1100;
        let mut random = Random::new(13);
        let q = random.values(tokens * 4 * 32);
        let k = random.values(tokens * 2 * 32);
        let v = random.values(tokens * 2 * 32);
        let expected = dense(&l, &q, &k, &v);
        for (recipe, limit) in EXACTNESS {
            let run = |threads: usize, chunks: &[usize]| {
                let mut cache = cache(vec![l.clone()], 32, recipe, 8 << 20, false);
                let id = cache.add_sequence(None).unwrap();
                let pool = kvasir_kernels::Threads::new(threads).unwrap();
                pool.run(|| paged(&mut cache, id, &l, 0, chunks, &q, &k, &v))
            };
            let whole = run(1, &[tokens]);
            let error = worst(&whole, &expected);
            assert!(error < limit, "{recipe}, {window:?}: {error}");
            // The last tokens one by one, whose jobs more threads cut into ranges.
            let single: Vec<usize> = [1000, 70].into_iter().chain([1; 30]).collect();
            for threads in [1, 2, 5] {
                for chunks in [&single[..], &[300, 800], &[1030, 70]] {
                    assert_eq!(whole, run(threads, chunks), "{recipe}, {window:?}, {threads}");
                }
            }
        }
    }
}

#[test]
fn a_prefix_hit_does_not_change_a_bit_and_shares_bytes() {
    let l = layer(6, 2, 16);
    let tokens = 100;
    let mut random = Random::new(5);
    let q = random.values(tokens * l.query_heads * l.head_dim);
    let k = random.values(tokens * l.kv_heads * l.head_dim);
    let v = random.values(tokens * l.kv_heads * l.head_dim);
    let mut cache = cache(vec![l.clone(); 2], 32, Recipe::F16, 8 << 20, true);
    let ids: Vec<u32> = (0..tokens as u32).collect();

    let first = cache.add_sequence(None).unwrap();
    assert_eq!(cache.match_prefix(first, &ids).unwrap(), 0);
    let cold = paged(&mut cache, first, &l, 0, &[tokens], &q, &k, &v);
    let one = cache.stats().physical_bytes;

    let second = cache.add_sequence(None).unwrap();
    assert_eq!(cache.match_prefix(second, &ids).unwrap(), 96);
    let warm = paged(&mut cache, second, &l, 96, &[1, 3], &q, &k, &v);
    assert_eq!(warm, cold[96 * 6 * 16..]);
    let tail_and_tables = cache.stats().physical_bytes - one;
    assert!(tail_and_tables < one / 3, "{tail_and_tables} of {one}");

    // Another tenant shares nothing.
    let other = cache.add_sequence(Some("tenant")).unwrap();
    assert_eq!(cache.match_prefix(other, &ids).unwrap(), 0);

    for id in [first, second, other] {
        cache.remove_sequence(id).unwrap();
    }
    cache.check_integrity().unwrap();
    let stats = cache.stats();
    assert_eq!(stats.physical_bytes, stats.evictable_bytes);
    assert!(cache.reset_prefix_cache().unwrap() > 0);
    assert_eq!(cache.stats().physical_bytes, 0);
}

#[test]
fn equal_content_at_another_position_has_equal_stored_bytes() {
    // Two sequences with equal keys in different blocks give equal scores when the distance is equal:
    // seen from outside, shifting everything by whole blocks changes no bit.
    let l = layer(2, 1, 64);
    let mut random = Random::new(3);
    let (q, k, v) = (random.values(64 * 128), random.values(64 * 64), random.values(64 * 64));
    let window = LayerGeometry { window: Some(20), ..l };
    let run = |shift: usize| {
        let mut cache = cache(vec![window.clone()], 32, Recipe::F16, 8 << 20, false);
        let id = cache.add_sequence(None).unwrap();
        let pad = |x: &[f32], width: usize| {
            let mut padded = Random::new(9).values(shift * width);
            padded.extend_from_slice(x);
            padded
        };
        let out = paged(
            &mut cache,
            id,
            &window,
            0,
            &[shift + 64],
            &pad(&q, 128),
            &pad(&k, 64),
            &pad(&v, 64),
        );
        out[(shift + 20) * 128..].to_vec()
    };
    assert_eq!(run(0), run(32));
    assert_eq!(run(0), run(320));
}

/// Reading tiles in their basis, turning them back, and turning them to the queries are the same function.
#[test]
fn all_paths_over_coded_blocks_agree() {
    for (query_heads, kv_heads, dim) in [(6, 3, 64), (4, 1, 128), (2, 2, 48)] {
        let l = layer(query_heads, kv_heads, dim);
        for recipe in [Recipe::JOINT3, Recipe::ROTATION4, "joint:1.75".parse().unwrap()] {
            let mut cache = cache(vec![l.clone()], 32, recipe, 64 << 20, false);
            let mut random = Random::new(11);
            let id = cache.add_sequence(None).unwrap();
            let (tokens, new) = (200, 100);
            let mut write = |cache: &mut KvCache, start: usize, len: usize| {
                cache.reserve(id, len).unwrap();
                let slices = [BatchSlice { sequence: id, row: 0, start, len }];
                let x = random.values(2 * len * kv_heads * dim);
                let (k, v) = x.split_at(len * kv_heads * dim);
                cache.write(0, &slices, k, v).unwrap();
            };
            write(&mut cache, 0, tokens);
            cache.commit(id, &(0..tokens as u32).collect::<Vec<_>>()).unwrap();
            write(&mut cache, tokens, new);
            let width = query_heads * dim;
            let queries = Random::new(12).values(new * width);
            let attend = |first: usize, len: usize| {
                let slices = [BatchSlice { sequence: id, row: 0, start: tokens + first, len }];
                let mut out = vec![0.0; len * width];
                let queries = &queries[first * width..(first + len) * width];
                let mut scratch = AttentionScratch::default();
                cache.attend(0, &slices, queries, &mut out, &mut scratch).unwrap();
                out
            };
            let whole = attend(0, new);
            for (first, len) in [(new - 1, 1), (0, 1), (7, 3), (20, 12)] {
                let part = attend(first, len);
                let expected = &whole[first * width..(first + len) * width];
                let worst =
                    part.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 2e-3, "{recipe} {dim}: rows {first}+{len} differ by {worst}");
            }
        }
    }
}

/// Sequences that walk their blocks side by side, some over one prefix, get what each gets alone.
#[test]
fn company_does_not_change_a_bit() {
    for window in [None, Some(70)] {
        let l = LayerGeometry { window, ..layer(6, 3, 32) };
        let mut cache = cache(vec![l.clone()], 32, Recipe::JOINT3, 64 << 20, true);
        let mut random = Random::new(17);
        let mut slices: Vec<BatchSlice> = Vec::new();
        let rotation = Recipe::ROTATION3;
        let same = "joint:2.5".parse().unwrap();
        for (recipe, prefix, tokens, new) in [
            (Recipe::JOINT3, 0, 200, 1),
            (rotation, 0, 130, 2),
            (Recipe::JOINT3, 0, 300, 1),
            (Recipe::F16, 0, 90, 1),
            (same, 0, 160, 1),
            (Recipe::JOINT3, 1000, 200, 3),
            (Recipe::JOINT3, 0, 201, 2),
            // Of several ranges.
            (Recipe::JOINT3, 2000, 1100, 1),
            (Recipe::F16, 2000, 1100, 1),
        ] {
            let id = cache.add_sequence_with(recipe, None).unwrap();
            let ids: Vec<u32> = (prefix..).take(tokens).collect();
            let start = cache.match_prefix(id, &ids).unwrap();
            for (start, len, commit) in [(start, tokens - start, true), (tokens, new, false)] {
                cache.reserve(id, len).unwrap();
                let row = slices.iter().map(|s| s.len).sum();
                let slice = BatchSlice { sequence: id, row, start, len };
                let (k, v) = (random.values(len * 96), random.values(len * 96));
                cache.write(0, &[BatchSlice { row: 0, ..slice }], &k, &v).unwrap();
                match commit {
                    true => cache.commit(id, &ids[start..]).unwrap(),
                    false => slices.push(slice),
                }
            }
        }
        let rows: usize = slices.iter().map(|s| s.len).sum();
        let queries = random.values(rows * 192);
        let attend = |slices: &[BatchSlice], queries: &[f32]| {
            let mut out = vec![f32::NAN; queries.len()];
            let mut scratch = AttentionScratch::default();
            cache.attend(0, slices, queries, &mut out, &mut scratch).unwrap();
            out
        };
        // The fewer threads, the more sequences an item has.
        for threads in [1, 2] {
            let pool = kvasir_kernels::Threads::new(threads).unwrap();
            let together = pool.run(|| attend(&slices, &queries));
            for slice in &slices {
                let rows = slice.row * 192..(slice.row + slice.len) * 192;
                let alone = attend(&[BatchSlice { row: 0, ..*slice }], &queries[rows.clone()]);
                assert_eq!(
                    alone, together[rows],
                    "{slice:?}, window {window:?}, {threads} threads"
                );
            }
        }
    }
}
