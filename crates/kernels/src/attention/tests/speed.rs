//! How long a block takes.

use super::*;

/// A slot's bytes: all of them, or those that bytes for the same rows take.
fn bytes_of(x: &[f16], form: Stored) -> &[u8] {
    let len = if form == Stored::Bytes { x.len() + 2 * 32 } else { 2 * x.len() };
    // SAFETY: any bytes are bytes.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), len) }
}

/// Nanoseconds of one block, at best. `CASE=2` measures the third case alone, for longer, as a profiler wants it.
#[test]
#[ignore = "prints times"]
fn speed() {
    let (dim, capacity, group) = (64, 32, 3);
    let some = std::env::var("CASE").ok().and_then(|case| case.parse().ok());
    let cases = [
        (4, 1, false),
        (2048, 1, false),
        (16384, 1, false),
        (4, 4, false),
        (4, 64, false),
        (4, 64, true),
        (4, 256, true),
        (4, 16, true),
        (1, 16, true),
    ];
    let all = cases.into_iter().flat_map(|(blocks, tokens, many)| {
        [
            (Products::Bf16, Stored::Half),
            (Products::Integers, Stored::Half),
            (Products::Integers, Stored::Bytes),
        ]
        .map(|how| (blocks, tokens, many, how))
    });
    for (i, (blocks, tokens, many, (products, form))) in all.enumerate() {
        if some.is_some_and(|some: usize| some != i) {
            continue;
        }
        let mut stored = vec![f16::ZERO; (2 * blocks + 1) * capacity * dim];
        f32_to_f16(&values(stored.len(), 1), &mut stored);
        if form == Stored::Bytes {
            // Scales of an ordinary size, wherever a slot's rows begin; as codes they are as good as any.
            stored.fill(f16::from_f32(0.01));
        }
        // As in a pool.
        let stored = &stored[stored.as_ptr().align_offset(4096)..];
        let rows = values(tokens * group * dim, 2);
        let (cos, sin) = (values(tokens * dim / 2, 3), values(tokens * dim / 2, 4));
        let mut states = vec![OnlineSoftmax::default(); tokens * group];
        let mut sums = vec![0.0; rows.len()];
        let mut scratch = BlockScratch::default();
        let (mut lanes, mut side) = (QueryLanes::default(), ManyRows::default());
        lanes.load(&rows, dim, group, products);
        side.reset(dim, group, tokens);
        let queries = QueryRows {
            rows: &rows,
            dim,
            group,
            turn: Some((&cos, &sin)),
            offset: 64,
            window: None,
            cap: None,
            products,
        };
        let slot = |i: usize| {
            // Scattered, so that only what is asked for is fetched.
            let at = (i * 1007 % (2 * blocks)) * capacity * dim;
            &stored[at..at + capacity * dim]
        };
        let mut best = f64::MAX;
        for _ in 0..(200_000 / blocks / tokens).clamp(60, 2000)
            * if many { 30 } else { 1 }
            * if some.is_some() { 100 } else { 1 }
        {
            let clock = std::time::Instant::now();
            for i in 0..blocks {
                let next = (i + 1) % blocks;
                let form_of = |slot| match form {
                    Stored::Bytes => {
                        let (scales, codes) = bytes_of(slot, form).split_at(2 * capacity);
                        StoredRows::Bytes { codes, scales }
                    }
                    _ => StoredRows::F16(slot),
                };
                let block = KvBlock {
                    keys: form_of(slot(2 * i)),
                    values: form_of(slot(2 * i + 1)),
                    value_dim: dim,
                    at: 0,
                    filled: capacity,
                    next: [bytes_of(slot(2 * next), form), bytes_of(slot(2 * next + 1), form)],
                };
                if many {
                    side.attend_block(&lanes, 0, &queries, &block);
                } else {
                    attend_block(&queries, &block, &mut states, &mut sums, dim, &mut scratch);
                }
            }
            best = best.min(clock.elapsed().as_secs_f64() * 1e9 / blocks as f64);
        }
        let flops = 4 * tokens * group * capacity * dim;
        println!(
            "{products:?} {form:?} {blocks} blocks, {} rows: {best:.0} ns a block, {:.1} GFLOP/s, {:.1} GB/s",
            tokens * group,
            flops as f64 / best,
            (4 * capacity * dim) as f64 / best
        );
    }
}
