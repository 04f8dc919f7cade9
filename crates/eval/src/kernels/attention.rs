//! Attention over blocks: as they are stored, and in the basis of joint codes.

use half::f16;
use kvasir_kernels::coded::{
    ByteBasis, ByteQueries, FoldScratch, Rows, Scores, ValueBlock, Weights, add_scores, add_values,
    soft_weights,
};
use kvasir_kernels::trellis::{Boosts, Layout};
use kvasir_kernels::{
    BlockScratch, KvBlock, ManyRows, OnlineSoftmax, Product, Products, QueryLanes, QueryRows,
    StoredRows, attend_block, expand_bytes, f32_to_f16, has_integers,
};

use super::{Bench, Work, numbers};

/// SmolLM2's: channels of a head, heads, query rows of a head.
const DIM: usize = 64;
const HEADS: usize = 3;
const GROUP: usize = 3;
/// Tokens of a block, and blocks of a context.
const TOKENS: usize = 32;
const BLOCKS: usize = 32;
/// Query tokens that prompts take through blocks together.
const PROMPT_TOKENS: usize = 64;
const WIDTH: usize = DIM * HEADS;
/// Bits of the segments of joint3.
const BITS: [u8; 12] = [5, 4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2];

pub(super) fn measure(bench: &mut Bench<'_>) {
    for (what, tokens) in [("decode", 1), ("prompt", PROMPT_TOKENS)] {
        for products in [Products::Bf16, Products::F32, Products::Integers] {
            plain(bench, what, tokens, products);
        }
    }
    let (codes, scales) = (vec![3u8; BLOCKS * TOKENS * DIM], vec![0u8; 2 * BLOCKS * TOKENS]);
    let mut rows = vec![f16::ZERO; codes.len()];
    let work = Work { rows: TOKENS, operations: 0.0, bytes: codes.len() as f64, product: None };
    bench.time("int8 blocks to f16", &work, &mut || expand_bytes(&codes, &scales, DIM, &mut rows));
    coded(bench);
}

/// A context in f16, or in bytes for products of integers.
fn plain(bench: &mut Bench<'_>, what: &str, tokens: usize, products: Products) {
    let in_bytes = products == Products::Integers;
    if in_bytes && !has_integers(DIM) {
        return;
    }
    let mut stored = vec![f16::ZERO; 2 * BLOCKS * TOKENS * DIM];
    f32_to_f16(&numbers(stored.len()), &mut stored);
    let scales = f16::from_f32(0.01).to_le_bytes().repeat(TOKENS);
    let codes: Vec<u8> = (0..stored.len()).map(|i| (i * 151 % 251) as u8).collect();
    let rows = numbers(tokens * GROUP * DIM);
    let (cos, sin) = (numbers(tokens * DIM / 2), numbers(tokens * DIM / 2));
    let mut states = vec![OnlineSoftmax::default(); tokens * GROUP];
    let mut sums = vec![0.0; rows.len()];
    let mut scratch = BlockScratch::default();
    let (mut lanes, mut many) = (QueryLanes::default(), ManyRows::default());
    lanes.load(&rows, DIM, GROUP, products);
    many.reset(DIM, GROUP, tokens);
    let queries = QueryRows {
        rows: &rows,
        dim: DIM,
        group: GROUP,
        turn: Some((&cos, &sin)),
        offset: 2 * TOKENS,
        window: None,
        cap: None,
        products,
    };
    let name = match products {
        Products::Integers => "integers",
        Products::Bf16 => "bf16 where it is fast",
        Products::F32 => "f32",
    };
    let work = Work {
        rows: tokens * GROUP,
        operations: (4 * tokens * GROUP * TOKENS * BLOCKS * DIM) as f64,
        bytes: if in_bytes {
            (codes.len() + 2 * BLOCKS * scales.len()) as f64
        } else {
            (2 * stored.len()) as f64
        },
        product: match products {
            Products::Integers => None,
            Products::Bf16 if bench.peak.bf16 > bench.peak.f32 => Some(Product::Bf16),
            Products::Bf16 | Products::F32 => Some(Product::F32),
        },
    };
    let stored_as = if in_bytes { "int8" } else { "f16" };
    let what = format!("attention over {stored_as} ({what}), products of {name}");
    let part = |at: usize| {
        let part = at * TOKENS * DIM..(at + 1) * TOKENS * DIM;
        match in_bytes {
            true => StoredRows::Bytes { codes: &codes[part], scales: &scales },
            false => StoredRows::F16(&stored[part]),
        }
    };
    bench.time(&what, &work, &mut || {
        for block in 0..BLOCKS {
            let block = KvBlock {
                keys: part(2 * block),
                values: part(2 * block + 1),
                value_dim: DIM,
                at: 0,
                filled: TOKENS,
                next: [&[], &[]],
            };
            if QueryLanes::pay(DIM, tokens) {
                many.attend_block(&lanes, 0, &queries, &block);
            } else {
                attend_block(&queries, &block, &mut states, &mut sums, DIM, &mut scratch);
            }
        }
    });
}

/// Parts of attention over four blocks of joint codes, for one token of all heads.
fn coded(bench: &mut Bench<'_>) {
    const COUNT: usize = 4;
    const ROWS: usize = HEADS * GROUP;
    let segments = BITS.len();
    let Some(layout) = Layout::new(BITS.to_vec(), vec![1.0; segments]) else { return };
    let mut slot = vec![0; layout.slot_bytes(TOKENS)];
    layout.encode(&numbers(TOKENS * WIDTH), &mut slot);
    let basis = ByteBasis::new(DIM, TOKENS, 20, (WIDTH, &numbers(WIDTH * WIDTH)), &numbers(WIDTH));

    let queries: Vec<u8> = (0..COUNT * GROUP * DIM).map(|i| (i * 37 % 251) as u8).collect();
    let stride = basis.stride();
    let mut bytes = vec![0i8; COUNT * GROUP * stride];
    let mut offsets = vec![0; COUNT * GROUP * stride / 4];
    let mut scales = vec![0.0; COUNT * GROUP];
    let mut scratch = FoldScratch::default();
    let work = |rows: usize, products: usize| Work {
        rows,
        operations: 2.0 * products as f64,
        bytes: (COUNT * slot.len()) as f64,
        product: Some(Product::Bytes),
    };
    let folding = work(COUNT * GROUP, COUNT * GROUP * DIM * WIDTH);
    bench.time("fold queries into a basis (a head, 4 blocks)", &folding, &mut || {
        let mut out = ByteQueries {
            bytes: &mut bytes,
            offsets: &mut offsets,
            scales: &mut scales,
            scratch: &mut scratch,
            runs: (GROUP, GROUP),
        };
        basis.fold(0, segments, &queries, &queries[..GROUP * DIM], &[1.0; GROUP], &mut out);
    });

    let mut boosts = Boosts::default();
    let (mut factors, mut by_segment) = (vec![0.0; TOKENS], vec![0.0; segments * TOKENS]);
    layout.row_factors(&slot, &mut factors, &mut boosts);
    layout.segment_factors(&factors, &boosts, segments, &mut by_segment);
    let (folded, offsets) = (vec![3i8; ROWS * stride], vec![0; ROWS * stride / 4]);
    let scales = vec![1e-3; ROWS];
    let mut scores = vec![0.0; ROWS * COUNT * TOKENS];
    let products = ROWS * COUNT * TOKENS * WIDTH;
    bench.time("scores of joint codes (9 rows, 4 blocks)", &work(ROWS, products), &mut || {
        for i in 0..COUNT {
            let block = Scores {
                layout: &layout,
                slot: &slot,
                factors: &by_segment,
                tokens: TOKENS,
                segments,
                queries: &folded,
                stride,
                offsets: &offsets,
                scales: &scales,
            };
            add_scores(&block, &mut scores[i * TOKENS..], COUNT * TOKENS);
        }
    });

    let (mut rounded, mut worth) = (vec![0; scores.len()], vec![0.0; ROWS]);
    let mut states = vec![OnlineSoftmax::default(); ROWS];
    let mut sums = vec![0.0; ROWS * (WIDTH + 16)];
    let all_factors = vec![1.0; COUNT * TOKENS];
    let softening =
        Work { rows: ROWS, operations: 0.0, bytes: (4 * scores.len()) as f64, product: None };
    bench.time("softmax of coded scores", &softening, &mut || {
        let mut rows = Rows {
            scores: &mut scores,
            bytes: &mut rounded,
            scales: &mut worth,
            stride: COUNT * TOKENS,
            states: &mut states,
            sums: &mut sums,
            sums_stride: WIDTH + 16,
            mass: WIDTH,
        };
        soft_weights(COUNT * TOKENS, &all_factors, &mut rows);
    });

    let blocks = [ValueBlock { layout: &layout, slot: &slot, boosts: &boosts }; COUNT];
    bench.time("values of joint codes (9 rows, 4 blocks)", &work(ROWS, products), &mut || {
        let weights =
            Weights { weights: &scores, bytes: &rounded, scales: &worth, stride: COUNT * TOKENS };
        add_values(&weights, &blocks, TOKENS, segments, &mut sums, WIDTH + 16);
    });
}
