use super::super::numbers::has_integers;
use super::super::tests::{Rows, Stored};
use super::super::{BlockScratch, Products, attend_block_on};
use super::*;
use crate::gemm::tests::values;

struct Case {
    shape: Shape,
    filled: usize,
    /// Position of the first query less that of the first block's first token.
    start: usize,
    window: Option<usize>,
    cap: Option<f32>,
    turned: bool,
}

fn cases() -> Vec<Case> {
    let shape = Shape { dim: 64, group: 3, tokens: 64 };
    let base = || Case { shape, filled: 32, start: 64, window: None, cap: None, turned: true };
    vec![
        base(),
        Case { start: 0, ..base() },
        Case { start: 16, window: Some(9), ..base() },
        Case { start: 33, window: Some(40), cap: Some(2.0), ..base() },
        Case { shape: Shape { tokens: 41, ..shape }, start: 7, filled: 19, ..base() },
        Case { shape: Shape { group: 1, ..shape }, start: 3, turned: false, ..base() },
        Case { shape: Shape { dim: 48, group: 8, tokens: 9 }, start: 40, filled: 49, ..base() },
        Case { shape: Shape { dim: 128, group: 2, tokens: 33 }, start: 1, filled: 64, ..base() },
    ]
}

/// Three blocks, of which the last ones are seen by some tokens only: every row gets the bits that it gets alone.
fn check(isa: Isa, case: &Case, stored: Stored, products: Products) {
    let &Case { shape, filled, start, window, cap, turned } = case;
    let Shape { dim, group, tokens } = shape;
    let rows = values(tokens * group * dim, 1);
    let distances = tokens + start;
    let (cos, sin) = (values(distances * dim / 2, 2), values(distances * dim / 2, 3));
    let mut states = vec![OnlineSoftmax::default(); tokens * group];
    let mut sums = vec![0.0; rows.len()];
    let (mut lanes, mut many) = (QueryLanes::default(), ManyRows::default());
    lanes.load_on(isa, &rows, dim, group, products);
    // What an earlier job left.
    many.sums.resize(shape.floats());
    many.sums.as_mut_slice().fill(f32::NAN);
    many.reset(dim, group, tokens);
    let mut scratch = BlockScratch::default();
    for block in 0..3 {
        let rows_of = |part| Rows::new(filled, 3, dim, (4 + 2 * block + part) as u64);
        let (own_keys, own_values) = (rows_of(0), rows_of(1));
        let p = block as usize * filled;
        let first = p.saturating_sub(start);
        let end = window.map_or(tokens, |w| tokens.min((p + filled + w - 1).saturating_sub(start)));
        if first >= end {
            continue;
        }
        let distance = start + first - p;
        let at = distance * dim / 2;
        let kv = KvBlock {
            keys: own_keys.get(stored),
            values: own_values.get(stored),
            value_dim: dim,
            at: 0,
            filled,
            next: [&[0; 100], &[]],
        };
        let own = first * group..end * group;
        let queries = QueryRows {
            rows: &rows[own.start * dim..own.end * dim],
            dim,
            group,
            turn: turned.then_some((&cos[at..], &sin[at..])),
            offset: distance,
            window,
            cap,
            products,
        };
        many.attend_block_on(isa, &lanes, first, &queries, &kv);
        let (states, sums) = (&mut states[own.clone()], &mut sums[own.start * dim..]);
        attend_block_on(isa, &queries, &kv, states, sums, dim, &mut scratch);
    }
    let mut side = vec![OnlineSoftmax::default(); tokens * group];
    let mut beside = vec![0.0; rows.len()];
    many.finish_on(isa, &mut side, &mut beside);
    for (i, (a, b)) in states.iter().zip(&side).enumerate() {
        assert_eq!((a.max, a.sum), (b.max, b.sum), "{isa} {shape:?} {products:?} row {i}");
    }
    assert!(sums == beside, "{isa} {shape:?} {products:?} {stored:?}");
}

#[test]
fn rows_get_the_bits_that_they_get_alone() {
    for isa in Isa::available() {
        for case in cases() {
            let has = has_integers(isa);
            for products in [Products::F32, Products::Bf16, Products::Integers] {
                if products != Products::Integers || has {
                    check(isa, &case, Stored::Half, products);
                    check(isa, &case, Stored::Single, products);
                }
            }
            if has {
                check(isa, &case, Stored::Bytes, Products::Integers);
            }
        }
    }
}
