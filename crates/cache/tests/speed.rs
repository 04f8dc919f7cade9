//! `cargo test --release -p kvasir-cache --test speed -- --ignored --nocapture --test-threads 1`, of one recipe with
//! `KVASIR_RECIPE=f16`.
//!
//! Times are of the thread's own processor time (one thread), the least of many runs, so that they mean something
//! on a machine that does other things too.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Random, cache, layer};
use kvasir_cache::{AttentionScratch, BatchSlice, KvCache, Recipe, SequenceId};
use rustix::time::{ClockId, clock_gettime};

/// SmolLM2's shape.
const HEADS: (usize, usize, usize) = (9, 3, 64);

fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Whether `KVASIR_RECIPE`, if set, names this one.
fn wanted(recipe: Recipe) -> bool {
    std::env::var("KVASIR_RECIPE").map_or(true, |name| name == recipe.to_string())
}

/// A pool that runs on this thread only.
fn alone<R: Send>(run: impl FnOnce() -> R + Send) -> R {
    run()
}

/// Least thread time and least wall time of a run, in microseconds.
fn least(budget: Duration, mut run: impl FnMut()) -> (f64, f64) {
    let begin = Instant::now();
    let (mut cpu, mut wall) = (f64::MAX, f64::MAX);
    while begin.elapsed() < budget {
        let (before, clock) = (thread_time(), Instant::now());
        run();
        cpu = cpu.min((thread_time() - before).as_secs_f64() * 1e6);
        wall = wall.min(clock.elapsed().as_secs_f64() * 1e6);
    }
    (cpu, wall)
}

/// A sequence whose first `committed` tokens are in the cache, and one layer of whose next `len` are written.
fn sequence(
    cache: &mut KvCache,
    random: &mut Random,
    first: u32,
    committed: usize,
    len: usize,
) -> SequenceId {
    let width = HEADS.1 * HEADS.2;
    let id = cache.add_sequence(None).unwrap();
    let tokens: Vec<u32> = (first..).take(committed).collect();
    let mut start = match committed {
        0 => 0,
        _ => cache.match_prefix(id, &tokens).unwrap(),
    };
    while start < committed + len {
        let len = 512.min(if start < committed { committed - start } else { len });
        cache.reserve(id, len).unwrap();
        let slices = [BatchSlice { sequence: id, row: 0, start, len }];
        let (k, v) = (random.values(len * width), random.values(len * width));
        cache.write(0, &slices, &k, &v).unwrap();
        if start < committed {
            cache.commit(id, &tokens[start..start + len]).unwrap();
        }
        start += len;
    }
    id
}

/// Attention of a decode step over one layer, microseconds per sequence.
#[test]
#[ignore = "prints times"]
fn decode_attention() {
    let l = layer(HEADS.0, HEADS.1, HEADS.2);
    let recipes =
        [Recipe::F16, Recipe::F32, Recipe::JOINT4, Recipe::JOINT3, Recipe::JOINT2, Recipe::KIVI4];
    for recipe in recipes.into_iter().filter(|recipe| wanted(*recipe)) {
        // Many sequences are more than the last cache holds.
        for (context, readers, shared) in [
            (512, 64, false),
            (1024, 1, false),
            (1024, 64, false),
            (1024, 16, true),
            (8192, 4, false),
        ] {
            let mut cache = cache(vec![l.clone()], 32, recipe, 512 << 20, true);
            let mut random = Random::new(5);
            let slices: Vec<_> = (0..readers)
                .map(|row| {
                    let first = if shared { 0 } else { row * context };
                    let id = sequence(&mut cache, &mut random, first as u32, context, 1);
                    BatchSlice { sequence: id, row, start: context, len: 1 }
                })
                .collect();
            let queries = random.values(readers * HEADS.0 * HEADS.2);
            let mut out = vec![0.0; queries.len()];
            let mut scratch = AttentionScratch::default();
            let (cpu, wall) = alone(|| {
                least(Duration::from_millis(400), || {
                    cache.attend(0, &slices, &queries, &mut out, &mut scratch).unwrap();
                })
            });
            println!(
                "{recipe}, {readers} × {context}{}: {:.1} us (wall {:.1}) a sequence",
                if shared { " shared" } else { "" },
                cpu / readers as f64,
                wall / readers as f64
            );
        }
    }
}

/// Attention of a prompt in chunks of at most 512 tokens over one layer.
#[test]
#[ignore = "prints times"]
fn prefill_attention() {
    let l = layer(HEADS.0, HEADS.1, HEADS.2);
    let recipes = [Recipe::F16, Recipe::F32, Recipe::JOINT4, Recipe::JOINT3, Recipe::KIVI4];
    for recipe in recipes.into_iter().filter(|recipe| wanted(*recipe)) {
        for tokens in [512, 2048] {
            let mut cpu = 0.0;
            for start in (0..tokens).step_by(512) {
                let mut cache = cache(vec![l.clone()], 32, recipe, 64 << 20, false);
                let mut random = Random::new(5);
                let id = sequence(&mut cache, &mut random, 0, start, 512);
                let slices = [BatchSlice { sequence: id, row: 0, start, len: 512 }];
                let queries = random.values(512 * HEADS.0 * HEADS.2);
                let mut out = vec![0.0; queries.len()];
                let mut scratch = AttentionScratch::default();
                cpu += alone(|| {
                    least(Duration::from_millis(300), || {
                        cache.attend(0, &slices, &queries, &mut out, &mut scratch).unwrap();
                    })
                })
                .0;
            }
            // Visible pairs only.
            let flops = 4 * HEADS.0 * HEADS.2 * tokens * (tokens + 1) / 2;
            println!(
                "{recipe}, prompt of {tokens}: {cpu:.0} us, {:.1} GFLOP/s",
                flops as f64 / cpu * 1e-3
            );
        }
    }
}
