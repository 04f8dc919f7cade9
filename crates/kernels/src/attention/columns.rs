//! HOT PATH (recipes that choose tokens). How much attention a block's tokens are paid: sums over query rows of
//! finished softmax weights. The weights of a row are known when its last block was seen, so scores are
//! computed once more, a block at a time; no matrix of them ever exists.

use super::{BlockScratch, KvBlock, Pass, Plan, QueryRows, passes, weigh};
use crate::isa::Isa;
use crate::softmax::OnlineSoftmax;

/// Adds what each token of a block gets of the attention of the query rows, whose softmax over all blocks is finished:
/// `columns[t] += Σ_rows weight(row, t)`. Weights are those of [`super::attend_block`], as its products
/// give them; a token's sum is one chain over the rows in order. Values are not read. `states`: one a row; `columns`:
/// `[filled]`.
///
/// # Panics
/// If a slice is shorter than its shape says.
pub fn add_columns(
    queries: &QueryRows<'_>,
    block: &KvBlock<'_>,
    states: &[OnlineSoftmax],
    columns: &mut [f32],
    scratch: &mut BlockScratch,
) {
    add_columns_on(Isa::best(), queries, block, states, columns, scratch);
}

fn add_columns_on(
    isa: Isa,
    queries: &QueryRows<'_>,
    block: &KvBlock<'_>,
    states: &[OnlineSoftmax],
    columns: &mut [f32],
    scratch: &mut BlockScratch,
) {
    let (rows, filled) = (queries.num(), block.filled);
    if rows == 0 || filled == 0 {
        return;
    }
    assert!(states.len() >= rows && columns.len() >= filled, "{} columns", columns.len());
    let columns = &mut columns[..filled];
    let plan = Plan::new(isa, queries, block);
    passes(
        isa,
        &plan,
        queries,
        block,
        &mut scratch.passes,
        |Pass { first, part, visible, scores }| {
            let states = &states[first..first + part.n];
            weigh::add_weights(isa, &part, visible, scores, states, columns);
        },
    );
}

#[cfg(test)]
mod tests {
    use super::super::{Products, StoredRows, attend_block_on};
    use super::*;
    use crate::convert::f32_to_f16;
    use crate::gemm::tests::values;
    use half::f16;

    /// Two blocks of `filled` tokens; columns against weights that were computed one by one in f64.
    fn check(
        isa: Isa,
        (dim, tokens, filled): (usize, usize, usize),
        window: Option<usize>,
        half: bool,
    ) {
        let (group, capacity, offset) = (3, 32, 40);
        let rows = values(tokens * group * dim, 1);
        let (cos, sin) = (vec![0.6; tokens * dim / 2], vec![0.8; tokens * dim / 2]);
        let wide: Vec<Vec<f32>> = (0..2)
            .map(|block| {
                let mut halves = vec![f16::ZERO; capacity * dim];
                f32_to_f16(&values(capacity * dim, 5 + block), &mut halves);
                halves.iter().map(|x| x.to_f32()).collect()
            })
            .collect();
        let halves: Vec<Vec<f16>> =
            wide.iter().map(|w| w.iter().map(|x| f16::from_f32(*x)).collect()).collect();
        let queries = |block: usize| QueryRows {
            rows: &rows,
            dim,
            group,
            turn: Some((&cos, &sin)),
            offset: offset - 32 * block,
            window,
            cap: None,
            products: Products::F32,
        };
        let stored = |block: usize| KvBlock {
            keys: if half {
                StoredRows::F16(&halves[block])
            } else {
                StoredRows::F32(&wide[block])
            },
            values: StoredRows::F32(&wide[block]),
            value_dim: dim,
            at: 0,
            filled,
            next: [&[]; 2],
        };
        let mut states = vec![OnlineSoftmax::default(); tokens * group];
        let mut sums = vec![0.0; tokens * group * dim];
        let mut scratch = BlockScratch::default();
        for block in 0..2 {
            attend_block_on(
                isa,
                &queries(block),
                &stored(block),
                &mut states,
                &mut sums,
                dim,
                &mut scratch,
            );
        }
        let mut columns = vec![0.0; 2 * filled];
        for (block, columns) in columns.chunks_exact_mut(filled).enumerate() {
            add_columns_on(isa, &queries(block), &stored(block), &states, columns, &mut scratch);
        }
        let mut expected = vec![0.0f64; 2 * filled];
        for (i, row) in rows.chunks_exact(dim).enumerate() {
            let pairs = dim / 2;
            let turned = |c: usize| {
                let (a, b) = (f64::from(row[c % pairs]), f64::from(row[c % pairs + pairs]));
                if c < pairs { a * 0.6 - b * 0.8 } else { b * 0.6 + a * 0.8 }
            };
            let mut weights = vec![0.0f64; 2 * filled];
            for (t, weight) in weights.iter_mut().enumerate() {
                let (block, t) = (t / filled, t % filled);
                let end = offset - 32 * block + i / group + 1;
                if t < end && window.is_none_or(|w| t + w >= end) {
                    let key = &wide[block][t * dim..];
                    *weight = (0..dim).map(|c| turned(c) * f64::from(key[c])).sum::<f64>().exp();
                }
            }
            let sum: f64 = weights.iter().sum();
            expected.iter_mut().zip(&weights).for_each(|(e, w)| *e += w / sum);
        }
        for (t, (column, expected)) in columns.iter().zip(&expected).enumerate() {
            assert!((f64::from(*column) - expected).abs() < 2e-5, "{isa} {t}: {column} {expected}");
        }
        let total: f64 = columns.iter().map(|c| f64::from(*c)).sum();
        assert!((total - (tokens * group) as f64).abs() < 1e-3, "{total}");
    }

    #[test]
    fn columns_are_sums_of_softmax_weights() {
        for isa in Isa::available() {
            for shape in [(64, 1, 32), (64, 9, 32), (32, 2, 17), (16, 5, 1)] {
                for half in [false, true] {
                    check(isa, shape, None, half);
                    check(isa, shape, Some(20), half);
                }
            }
        }
    }
}
