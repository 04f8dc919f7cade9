//! `cargo bench -p kvasir-cache --bench sealing`: committing a block of 32 tokens (keys and values of four
//! layers of three heads of 64 channels: 256 coded rows) with few and with many blocks in the pool. One
//! thread's own processor time.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Duration;

use common::{Random, layer, sharing_cache};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kvasir_cache::{BatchSlice, KvCache, Recipe, SequenceId};
use rustix::time::{ClockId, clock_gettime};

const LAYERS: usize = 4;
const WIDTH: usize = 3 * 64;
const BLOCK: usize = 32;
/// Blocks of a sequence.
const LENGTH: usize = 100;

fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Appends a block of tokens; returns how long it took to commit it.
fn append(cache: &mut KvCache, id: SequenceId, first: u32, random: &mut Random) -> Duration {
    let start = cache.num_tokens(id).unwrap();
    cache.reserve(id, BLOCK).unwrap();
    let slices = [BatchSlice { sequence: id, row: 0, start, len: BLOCK }];
    for layer in 0..LAYERS {
        let (k, v) = (random.values(BLOCK * WIDTH), random.values(BLOCK * WIDTH));
        cache.write(layer, &slices, &k, &v).unwrap();
    }
    let tokens: Vec<u32> = (first..).take(BLOCK).collect();
    let before = thread_time();
    cache.commit(id, &tokens).unwrap();
    thread_time() - before
}

/// A cache with so many blocks in use, no two alike, and the next token.
fn filled(recipe: Recipe, sharing: &str, blocks: usize) -> (KvCache, Random, u32) {
    let layers = vec![layer(9, 3, 64); LAYERS];
    let sharing = sharing.parse().unwrap();
    let mut cache = sharing_cache(layers, BLOCK, recipe, 4 << 30, true, sharing);
    let mut random = Random::new(5);
    let (mut first, mut held) = (0, None);
    for block in 0..blocks {
        if block % LENGTH == 0 {
            held = Some(cache.add_sequence(None).unwrap());
        }
        append(&mut cache, held.unwrap(), first, &mut random);
        first += BLOCK as u32;
    }
    (cache, random, first)
}

fn sealing(c: &mut Criterion) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for (recipe, sharing) in [
        (Recipe::F16, "off"),
        (Recipe::JOINT3, "off"),
        (Recipe::JOINT3, "tokens"),
        (Recipe::JOINT3, "sketch"),
    ] {
        let mut group = c.benchmark_group(format!("sealing, {recipe}, sharing {sharing}"));
        for blocks in [10, 10_000] {
            // Made only if it is asked for.
            let mut full = None;
            group.bench_function(BenchmarkId::from_parameter(blocks), |b| {
                let (cache, random, first) =
                    full.get_or_insert_with(|| filled(recipe, sharing, blocks));
                b.iter_custom(|times| {
                    let mut one = || {
                        let id = cache.add_sequence(None).unwrap();
                        // The first block is coded in another way.
                        append(cache, id, *first, random);
                        let took = append(cache, id, *first + BLOCK as u32, random);
                        cache.remove_sequence(id).unwrap();
                        cache.reset_prefix_cache().unwrap();
                        *first += 2 * BLOCK as u32;
                        took
                    };
                    pool.install(|| (0..times).map(|_| one()).sum())
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(2));
    targets = sealing
}
criterion_main!(benches);
