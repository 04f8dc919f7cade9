//! HOT PATH (recipes that choose tokens). How much attention a block's tokens are paid: sums over query rows of
//! finished softmax weights. The weights of a row are known when its last block was seen, so scores are
//! computed once more, a block at a time; no matrix of them ever exists.

use super::exp2::exp2;
use super::tile;
use super::{BlockScratch, KvBlock, LANES, Part, QueryRows, ROWS, score, turn_rows};
use crate::elementwise::soft_cap;
use crate::isa::{Isa, dispatch_on, mul_add};
use crate::softmax::OnlineSoftmax;

dispatch_on! {
    /// `columns[t] += Σ_i e^(scores[i, t] − max_i) / sum_i` over the tokens that row i sees, in order of rows.
    fn add_weights_on(part: &Part, visible: &[(usize, usize); ROWS], scores: &[f32], states: &[OnlineSoftmax], columns: &mut [f32]) = add_weights_body;
}

#[inline(always)]
fn add_weights_body<const FMA: bool>(
    part: &Part,
    visible: &[(usize, usize); ROWS],
    scores: &[f32],
    states: &[OnlineSoftmax],
    columns: &mut [f32],
) {
    let &Part { n, tokens, .. } = part;
    for (i, state) in states.iter().enumerate().take(n) {
        let (from, to) = visible[i];
        let (row, share) = (&scores[i * tokens..(i + 1) * tokens], state.normaliser());
        for (column, score) in columns[from..to].iter_mut().zip(&row[from..to]) {
            let weight = exp2::<FMA>((score - state.max) * std::f32::consts::LOG2_E);
            *column = mul_add::<FMA>(weight, share, *column);
        }
    }
}

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
    let (dim, rows, filled) = (queries.dim, queries.num(), block.filled);
    if rows == 0 || filled == 0 {
        return;
    }
    let isa = super::check(isa, queries, block);
    assert!(states.len() >= rows && columns.len() >= filled, "{} columns", columns.len());
    let tokens = filled.next_multiple_of(LANES);
    scratch.begin(dim, tokens);
    let plan = tile::Plan::for_keys(isa, queries, block);
    tile::prepare(isa, &plan, block, dim, scratch);
    for first in (0..rows).step_by(ROWS) {
        let n = ROWS.min(rows - first);
        let visible = queries.visible(first, n, filled);
        let (from, to) = (visible[0].0, visible[n - 1].1);
        if from >= to {
            continue;
        }
        let vectors = (from / LANES, to.div_ceil(LANES));
        turn_rows(isa, &plan, queries, (first, n), scratch);
        let part = Part { dim, n, tokens, vectors, from, to };
        score(isa, &plan, &part, block, scratch);
        let scores = &mut scratch.scores.as_mut_slice()[..n * tokens];
        if let Some(cap) = queries.cap {
            for row in scores.chunks_exact_mut(tokens) {
                soft_cap(&mut row[vectors.0 * LANES..vectors.1 * LANES], cap);
            }
        }
        add_weights_on(isa, &part, &visible, scores, &states[first..first + n], columns);
    }
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
