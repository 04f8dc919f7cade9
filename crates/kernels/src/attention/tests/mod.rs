use super::*;
use crate::convert::f32_to_f16;
use crate::gemm::tests::values;
use crate::isa::Set;

mod speed;

/// One call's operands.
struct Case {
    dim: usize,
    tokens: usize,
    group: usize,
    capacity: usize,
    filled: usize,
    offset: usize,
    window: Option<usize>,
    cap: Option<f32>,
    turned: bool,
    stored: Stored,
    products: Products,
}

/// What rows are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    Half,
    Single,
    Bytes,
}

/// Rows in every form, those beyond the filled ones of anything.
pub(super) struct Rows {
    halves: Vec<f16>,
    wide: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Rows {
    /// `filled` rows of `dim` channels, in half precision and as bytes, and `more` behind them.
    pub(super) fn new(filled: usize, more: usize, dim: usize, seed: u64) -> Self {
        let plain = values(filled * dim, seed);
        let mut halves = vec![f16::NAN; (filled + more) * dim];
        f32_to_f16(&plain, &mut halves[..filled * dim]);
        let wide = halves.iter().map(|x| x.to_f32()).collect();
        let (mut codes, mut scales) = (vec![7; (filled + more) * dim], vec![]);
        for (row, codes) in plain.chunks(dim).zip(codes.chunks_mut(dim)) {
            for (i, (x, codes)) in
                row.chunks(BYTE_GROUP).zip(codes.chunks_mut(BYTE_GROUP)).enumerate()
            {
                let scale = f16::from_f32((i + 1) as f32 / 127.0);
                scales.extend(scale.to_le_bytes());
                for (code, x) in codes.iter_mut().zip(x) {
                    *code = (x / scale.to_f32()).round() as i8 as u8;
                }
            }
        }
        scales.resize(2 * (filled + more) * dim.div_ceil(BYTE_GROUP), 0xff);
        Self { halves, wide, codes, scales }
    }

    pub(super) fn get(&self, stored: Stored) -> StoredRows<'_> {
        match stored {
            Stored::Half => StoredRows::F16(&self.halves),
            Stored::Single => StoredRows::F32(&self.wide),
            Stored::Bytes => StoredRows::Bytes { codes: &self.codes, scales: &self.scales },
        }
    }

    /// The numbers that are stored.
    fn exact(&self, stored: Stored, dim: usize) -> Vec<f64> {
        let half = |pair: &[u8]| f16::from_le_bytes([pair[0], pair[1]]).to_f64();
        let scales: Vec<f64> = self.scales.chunks(2).map(half).collect();
        let groups = dim.div_ceil(BYTE_GROUP);
        let of = |(i, x): (usize, &f16)| match stored {
            Stored::Half | Stored::Single => x.to_f64(),
            Stored::Bytes => {
                f64::from(self.codes[i] as i8) * scales[i / dim * groups + i % dim / BYTE_GROUP]
            }
        };
        self.halves.iter().enumerate().map(of).collect()
    }
}

impl Default for Case {
    fn default() -> Self {
        Self {
            dim: 64,
            tokens: 1,
            group: 3,
            capacity: 32,
            filled: 32,
            offset: 40,
            window: None,
            cap: None,
            turned: true,
            stored: Stored::Half,
            products: Products::F32,
        }
    }
}

type Output = (Vec<(f32, f32)>, Vec<f32>);

/// Two blocks one after the other, for query tokens `some`.
fn run(isa: Isa, case: &Case, some: std::ops::Range<usize>) -> Output {
    let &Case { dim, tokens, group, capacity, filled, offset, window, cap, turned, .. } = case;
    let rows = values(tokens * group * dim, 1);
    let (cos, sin) = (values(tokens * dim / 2, 2), values(tokens * dim / 2, 3));
    let stride = dim + 3;
    let n = some.len() * group;
    let mut states = vec![OnlineSoftmax::default(); n];
    let mut sums = vec![0.0; n * stride];
    let mut scratch = BlockScratch::default();
    for block in 0..2 {
        // Stands for another kind of sums, relative to the same maximum: of a token with score 0.
        for (row, state) in sums.chunks_mut(stride).zip(&states) {
            row[dim] = f32::exp(-state.max);
        }
        let rows_of =
            |part| Rows::new(filled, capacity - filled, dim, (4 + 2 * block + part) as u64);
        let (keys, values) = (rows_of(0), rows_of(1));
        let at = some.start * dim / 2;
        let queries = QueryRows {
            rows: &rows[some.start * group * dim..some.end * group * dim],
            dim,
            group,
            turn: turned.then_some((&cos[at..], &sin[at..])),
            offset: offset + some.start,
            window,
            cap,
            products: case.products,
        };
        let block = KvBlock {
            keys: keys.get(case.stored),
            values: values.get(case.stored),
            value_dim: dim,
            at: 0,
            filled,
            next: [&[0; 100], &[]],
        };
        attend_block_on(isa, &queries, &block, &mut states, &mut sums, stride, &mut scratch);
    }
    for (row, state) in
        sums.chunks(stride).zip(&states).filter(|(row, _)| (1e-30..1e30).contains(&row[dim]))
    {
        assert!((row[dim] * f32::exp(state.max) - 1.0).abs() < 1e-5);
    }
    let sums = sums.chunks(stride).flat_map(|row| row[..dim].to_vec()).collect();
    (states.iter().map(|s| (s.max, s.sum)).collect(), sums)
}

/// Normalised output by the definition, in f64, with operands rounded as products of the case round them; but
/// not weights.
fn exact(isa: Isa, case: &Case) -> Vec<f64> {
    let rounds = Numbers::of(isa, case.products, case.dim.is_multiple_of(LANES)) == Numbers::Pairs;
    let round = |x: f64| if rounds { half::bf16::from_f32(x as f32).to_f64() } else { x };
    let &Case { dim, tokens, group, filled, offset, window, cap, turned, stored, .. } = case;
    let rows = values(tokens * group * dim, 1);
    let (cos, sin) = (values(tokens * dim / 2, 2), values(tokens * dim / 2, 3));
    let f64s = |x: &[f32]| x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
    let halves = |seed| -> Vec<f64> {
        Rows::new(filled, 0, dim, seed).exact(stored, dim).into_iter().map(round).collect()
    };
    let mut out = Vec::new();
    for (row, query) in rows.chunks(dim).enumerate() {
        let token = row / group;
        let mut query = f64s(query);
        for i in (0..dim / 2).filter(|_| turned) {
            let at = token * dim / 2 + i;
            let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
            let (a, b) = (query[i], query[i + dim / 2]);
            (query[i], query[i + dim / 2]) = (a * c - b * s, b * c + a * s);
        }
        query.iter_mut().for_each(|q| *q = round(*q));
        let end = offset + token + 1;
        let seen = window.map_or(0, |w| end.saturating_sub(w))..end;
        let (mut sum, mut mixed) = (0.0, vec![0.0; dim]);
        for block in 0..2 {
            let (keys, values) = (halves(4 + 2 * block), halves(5 + 2 * block));
            for t in (0..filled).filter(|t| seen.contains(t)) {
                let key = &keys[t * dim..(t + 1) * dim];
                let score: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                let cap = cap.map(f64::from);
                let weight = cap.map_or(score, |c| c * (score / c).tanh()).exp();
                sum += weight;
                for (m, v) in mixed.iter_mut().zip(&values[t * dim..]) {
                    *m += weight * v;
                }
            }
        }
        out.extend(mixed.iter().map(|m| if sum > 0.0 { m / sum } else { 0.0 }));
    }
    out
}

fn cases(isa: Isa) -> Vec<Case> {
    let base = Case::default;
    let cases = vec![
        base(),
        Case { group: 1, filled: 5, ..base() },
        Case { group: 8, offset: 3, ..base() },
        Case { group: 11, filled: 20, ..base() },
        Case { tokens: 70, offset: 0, ..base() },
        Case { tokens: 70, offset: 0, window: Some(9), ..base() },
        Case { tokens: 5, offset: 20, cap: Some(2.0), ..base() },
        Case { tokens: 9, turned: false, ..base() },
        Case { tokens: 9, offset: 60, window: Some(3), ..base() },
        Case { dim: 48, tokens: 7, capacity: 64, filled: 49, ..base() },
        Case { dim: 128, group: 7, capacity: 16, filled: 16, ..base() },
        Case { dim: 256, group: 4, ..base() },
        Case { dim: 20, tokens: 3, ..base() },
        Case { tokens: 4, capacity: 24, filled: 19, ..base() },
        Case { dim: 36, tokens: 2, capacity: 80, filled: 75, offset: 100, ..base() },
        Case { tokens: 6, capacity: 96, filled: 90, offset: 120, window: Some(77), ..base() },
    ];
    let of = |products, stored| cases.iter().map(move |case| Case { products, stored, ..*case });
    let floats = [Products::F32, Products::Bf16].into_iter().flat_map(|products| {
        [Stored::Half, Stored::Single].into_iter().flat_map(move |stored| of(products, stored))
    });
    let integers = [Stored::Half, Stored::Single, Stored::Bytes]
        .into_iter()
        .flat_map(|stored| of(Products::Integers, stored))
        .filter(|case| {
            case.filled <= 64 && case.dim.is_multiple_of(LANES) && numbers::has_integers(isa)
        });
    floats.chain(integers).collect()
}

#[test]
fn equals_the_definition_on_every_isa() {
    for isa in Isa::available() {
        for (i, case) in cases(isa).iter().enumerate() {
            let (states, sums) = run(isa, case, 0..case.tokens);
            let exact = exact(isa, case);
            for (j, (got, exact)) in sums.iter().zip(&exact).enumerate() {
                let (_, sum) = states[j / case.dim];
                let got = if sum > 0.0 { f64::from(got / sum) } else { 0.0 };
                let most = match Numbers::of(isa, case.products, case.dim.is_multiple_of(LANES)) {
                    Numbers::Single => 2e-5,
                    Numbers::Pairs => 2e-3,
                    // Operands as well are rounded here.
                    Numbers::Integers => 3e-5 * case.dim.max(100) as f64,
                };
                assert!((got - exact).abs() < most, "{isa} case {i} at {j}: {got}, not {exact}");
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_the_batch_or_on_storage() {
    for isa in Isa::available() {
        for (i, case) in cases(isa).iter().enumerate() {
            let (states, sums) = run(isa, case, 0..case.tokens);
            let all = (case.group, case.group * case.dim);
            let same = match case.stored {
                Stored::Bytes => vec![Stored::Bytes],
                _ => vec![Stored::Half, Stored::Single],
            };
            for stored in same {
                for token in 0..case.tokens {
                    let (state, sum) = run(isa, &Case { stored, ..*case }, token..token + 1);
                    assert_eq!(state, states[token * all.0..][..all.0], "{isa} case {i}: {token}");
                    assert_eq!(sum, sums[token * all.1..][..all.1], "{isa} case {i}: {token}");
                }
            }
        }
    }
}

#[test]
fn fused_paths_agree_bit_for_bit() {
    let exact = |case: &Case| case.products == Products::F32;
    let fused = Isa::available().into_iter().filter(|isa| isa.has(Set::Avx2));
    for isa in fused {
        for (i, case) in cases(isa).into_iter().filter(exact).enumerate() {
            let (all, case) = (0..case.tokens, &case);
            let expected = run(Isa::best(), case, all.clone());
            assert_eq!(run(isa, case, all), expected, "{isa} case {i}");
        }
    }
}

/// Products of pairs are exact in f32, so that arrays need no FMA to give the same bits.
#[test]
fn pairs_are_alike_on_all_sets() {
    let (dim, n, tokens) = (48, 5, 32);
    let mut halves = vec![f16::ZERO; tokens * dim];
    f32_to_f16(&values(tokens * dim, 3), &mut halves);
    let wide: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
    let (rows, begin) = (values(n * dim, 4), values(n * dim, 5));
    let part = Part { dim, n, tokens, vectors: (0, 2), from: 2, to: 28 };
    let factors = [0.5; ROWS];
    let by = score::Turn { first: 0, group: 1, angles: None };
    let on = |isa: Isa, stored: bool, rows_of: StoredRows<'_>| {
        let mut turned = vec![0.0; n * dim / 2];
        score::turn(isa, Numbers::Pairs, &rows, dim, by, &factors, &mut turned);
        let shape = (tokens, dim);
        let (mut keys, mut mixed) = (vec![0.0; dim / 2 * tokens], vec![0.0; tokens / 2 * dim]);
        tile::transpose(isa, true, rows_of, shape, tokens, &mut keys);
        tile::widen(isa, true, rows_of, shape, &mut mixed);
        let (keys, mixed) = match stored {
            true => (score::Keys::Stored(&halves, &[]), mix::Values::Stored(&halves, &[])),
            false => (score::Keys::Tile(&keys), mix::Values::Tile(&mixed, dim, &[])),
        };
        let mut scores = vec![0.0; n * tokens];
        score::score(isa, Numbers::Pairs, &part, keys, (&[], &factors), &turned, &mut scores);
        let first = scores.clone();
        // Weights that no set rounds differently.
        let ones = half::bf16::from_f32(0.75).to_bits();
        scores.fill(f32::from_bits(u32::from(ones) << 16 | u32::from(ones)));
        let mut sums = begin.clone();
        let by = (&factors, &factors);
        mix::mix(isa, Numbers::Pairs, &part, &scores, by, mixed, &mut sums, dim);
        (first, sums)
    };
    let expected = on(Isa::BASELINE, false, StoredRows::F16(&halves));
    let exact: f32 = rows[..dim].iter().zip(&wide).map(|(a, b)| a * b).sum();
    assert!((expected.0[0] - exact).abs() < 0.05, "{} {exact}", expected.0[0]);
    for isa in [Isa::BASELINE, Isa::best()] {
        for (stored, rows) in [
            (true, StoredRows::F16(&halves)),
            (false, StoredRows::F16(&halves)),
            (false, StoredRows::F32(&wide)),
        ] {
            assert_eq!(on(isa, stored, rows), expected, "{isa} {stored}");
        }
    }
}

#[test]
fn exp2_is_accurate() {
    for i in 0..=130_000 {
        let x = -i as f32 * 1e-3;
        let exact = f64::from(x).exp2();
        let got = weigh::exp2_of_one(x);
        assert!((f64::from(got) - exact).abs() <= exact * 2e-7 + 1.2e-38, "2^{x}: {got}");
    }
    assert_eq!(weigh::exp2_of_one(0.0), 1.0);
    assert_eq!(weigh::exp2_of_one(f32::NEG_INFINITY), 0.0);
    assert!(weigh::exp2_of_one(f32::NAN).is_nan());
}

#[test]
fn merging_gives_the_whole() {
    let dim = 8;
    let state = |max: f32, sum: f32| OnlineSoftmax { max, sum };
    let mut states = [OnlineSoftmax::default(); 2];
    let mut sums = vec![0.0; 2 * dim];
    let first = values(2 * dim, 1);
    let seen = [state(1.5, 2.25), OnlineSoftmax::default()];
    merge_rows(&mut states, &mut sums, &seen, &first, dim);
    // The second row has seen nothing: whatever its sums are, they do not count.
    assert_eq!((states[0].max, states[0].sum), (1.5, 2.25));
    assert_eq!((states[1].max, states[1].sum), (f32::NEG_INFINITY, 0.0));
    assert_eq!(sums[..dim], first[..dim]);
    let second = values(2 * dim, 2);
    merge_rows(&mut states, &mut sums, &[state(2.5, 1.0), state(0.5, 3.0)], &second, dim);
    let factor = (-1.0f64).exp();
    assert!((f64::from(states[0].sum) - (2.25 * factor + 1.0)).abs() < 1e-6);
    for d in 0..dim {
        let exact = f64::from(first[d]) * factor + f64::from(second[d]);
        assert!((f64::from(sums[d]) - exact).abs() < 1e-6);
        assert_eq!(sums[dim + d], second[dim + d]);
    }
}

/// Values of another width, somewhere in a row of sums: the same bits as their parts alone, and what stands around them is
/// brought to the new maximum.
#[test]
fn values_may_have_another_width_and_place() {
    let (dim, value_dim, at, stride, rows, tokens) = (32, 96, 40, 150, 6, 32);
    let wave =
        |n: usize, by: f32| -> Vec<f32> { (0..n).map(|i| ((i as f32 + 1.0) * by).sin()).collect() };
    let halves = |x: Vec<f32>| -> Vec<f16> { x.into_iter().map(f16::from_f32).collect() };
    let q = wave(rows * dim, 0.37);
    let (keys, values) = (halves(wave(tokens * dim, 0.11)), halves(wave(tokens * value_dim, 0.23)));
    let integers = |(isa, products): &(Isa, Products)| {
        *products != Products::Integers || numbers::has_integers(*isa)
    };
    let all = Isa::available().into_iter().flat_map(|isa| {
        [Products::F32, Products::Bf16, Products::Integers].map(|products| (isa, products))
    });
    for (isa, products) in all.filter(integers) {
        let queries = QueryRows {
            rows: &q,
            dim,
            group: rows,
            turn: None,
            offset: 40,
            window: None,
            cap: None,
            products,
        };
        let run = |values: &[f16], value_dim: usize, at: usize, stride: usize| {
            let mut states = vec![OnlineSoftmax { max: -3.0, sum: 2.0 }; rows];
            let mut sums = vec![1.0; rows * stride];
            let mut scratch = BlockScratch::default();
            let (keys, values) = (StoredRows::F16(&keys), StoredRows::F16(values));
            let block = KvBlock { keys, values, value_dim, at, filled: tokens, next: [&[]; 2] };
            attend_block_on(isa, &queries, &block, &mut states, &mut sums, stride, &mut scratch);
            sums
        };
        let all = run(&values, value_dim, at, stride);
        for first in (0..value_dim).step_by(dim) {
            let part: Vec<f16> = values
                .chunks_exact(value_dim)
                .flat_map(|row| row[first..first + dim].to_vec())
                .collect();
            let part = run(&part, dim, 0, dim);
            for (all, part) in all.chunks_exact(stride).zip(part.chunks_exact(dim)) {
                let all = &all[at + first..at + first + dim];
                if Numbers::of(isa, products, true) == Numbers::Integers {
                    // The whole row of values is rounded by its largest.
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() < 2e-3;
                    assert!(all.iter().zip(part).all(near), "{isa} {first}: {all:?} {part:?}");
                } else {
                    assert_eq!(all, part, "{isa} {products:?} {first}");
                }
            }
        }
        for row in all.chunks_exact(stride) {
            let beside: Vec<f32> =
                row[..at].iter().chain(&row[at + value_dim..]).copied().collect();
            assert!(
                beside.iter().all(|x| *x == beside[0]) && beside[0] < 1.0,
                "{isa} {products:?}"
            );
        }
    }
}

/// The largest sums that products of integers can have: all keys as large as they get, a query whose channels add up to the most
/// when it is turned, weights all alike.
#[test]
fn no_sum_of_integers_leaves_32_bits() {
    for isa in Isa::available().into_iter().filter(|isa| numbers::has_integers(*isa)) {
        for (dim, one) in [(16, 0.01f32), (64, 0.01), (256, 0.01), (512, 0.001)] {
            let (half, tokens) = (dim / 2, 64);
            let row: Vec<f32> = (0..dim).map(|c| if c < half { one } else { 0.0 }).collect();
            let angles = vec![std::f32::consts::FRAC_1_SQRT_2; half];
            let queries = QueryRows {
                rows: &row,
                dim,
                group: 1,
                turn: Some((&angles, &angles)),
                offset: tokens,
                window: None,
                cap: None,
                products: Products::Integers,
            };
            for sign in [1.0, -1.0] {
                let rows = vec![sign; tokens * dim];
                let block = KvBlock {
                    keys: StoredRows::F32(&rows),
                    values: StoredRows::F32(&rows),
                    value_dim: dim,
                    at: 0,
                    filled: tokens,
                    next: [&[]; 2],
                };
                let (mut state, mut sums) = ([OnlineSoftmax::default()], vec![0.0; dim]);
                let mut scratch = BlockScratch::default();
                attend_block_on(isa, &queries, &block, &mut state, &mut sums, dim, &mut scratch);
                let score = sign * one * dim as f32 * std::f32::consts::FRAC_1_SQRT_2;
                assert!(
                    (state[0].max / score - 1.0).abs() < 4e-3,
                    "{isa} {dim}: {} {score}",
                    state[0].max
                );
                assert_eq!(state[0].sum, tokens as f32, "{isa} {dim}");
                let mean = |x: &f32| x / tokens as f32 * sign;
                assert!(sums.iter().all(|x| (mean(x) - 1.0).abs() < 1e-3), "{isa} {dim}: {sums:?}");
            }
        }
    }
}

/// A row of bytes with one large scale keeps what its other channels are.
#[test]
fn small_scales_of_a_row_of_bytes_stay() {
    let (dim, tokens) = (4 * BYTE_GROUP, 32);
    let scales = [1.0, 0.01, 0.001, 0.25].map(f16::from_f32);
    let bytes: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let bytes = bytes.repeat(tokens);
    let codes = vec![100u8; tokens * dim];
    for isa in Isa::available().into_iter().filter(|isa| numbers::has_integers(*isa)) {
        for (at, scale) in scales.iter().enumerate() {
            // It looks at one of the groups.
            let mut row = vec![0.0; dim];
            row[at * BYTE_GROUP] = 0.5;
            let queries = QueryRows {
                rows: &row,
                dim,
                group: 1,
                turn: None,
                offset: tokens,
                window: None,
                cap: None,
                products: Products::Integers,
            };
            let stored = StoredRows::Bytes { codes: &codes, scales: &bytes };
            let block = KvBlock {
                keys: stored,
                values: stored,
                value_dim: dim,
                at: 0,
                filled: tokens,
                next: [&[]; 2],
            };
            let (mut state, mut sums) = ([OnlineSoftmax::default()], vec![0.0; dim]);
            let mut scratch = BlockScratch::default();
            attend_block_on(isa, &queries, &block, &mut state, &mut sums, dim, &mut scratch);
            let score = 50.0 * scale.to_f32();
            assert!((state[0].max / score - 1.0).abs() < 0.02, "{isa}: {} {score}", state[0].max);
            for (sums, scale) in sums.chunks(BYTE_GROUP).zip(&scales) {
                let value = 100.0 * scale.to_f32();
                let near = |sum: &f32| (sum / state[0].sum / value - 1.0).abs() < 0.02;
                assert!(sums.iter().all(near), "{isa}: {sums:?}, not {value}");
            }
        }
    }
}
