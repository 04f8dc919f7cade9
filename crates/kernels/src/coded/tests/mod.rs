use super::basis::{MOST, TILE, column, factor_column, shift, word};
use super::fold::byte_factor;
use super::queries::rotate_to_bytes_on;
use super::scores::add_scores_on;
use super::softmax::soft_weights_on;
use super::values::add_values_on;
use super::*;
use crate::trellis::{Boosts, Layout, SEGMENT};
use crate::{Isa, OnlineSoftmax};

mod blocks;

/// An LCG.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    /// Around 0, of about unit size.
    fn number(&mut self) -> f32 {
        let sum: f64 = (0..4).map(|_| self.bits() as f64 / (1u64 << 31) as f64 - 0.5).sum();
        (sum * 1.7) as f32
    }

    fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.bits() as u8).collect()
    }
}

/// A layout of all widths of codes, and a block of random bytes in it, without its headers.
fn block(segments: usize, tokens: usize, random: &mut Random) -> (Layout, Vec<u8>) {
    let bits = (0..segments).map(|i| [3, 6, 0, 4, 1, 5, 2][i % 7]).collect();
    let Some(layout) = Layout::new(bits, vec![1.0; segments]) else { panic!("a layout") };
    let mut slot = random.bytes(layout.slot_bytes(tokens));
    slot[..2 * tokens].fill(0);
    (layout, slot)
}

/// Level of a coefficient by the definition.
fn levels(layout: &Layout, slot: &[u8], tokens: usize) -> impl Fn(usize, usize) -> i32 {
    let mut levels = vec![0; layout.width() * tokens];
    layout.levels_on(Isa::BASELINE, slot, tokens, layout.bits().len(), &mut levels);
    move |t, c| i32::from(levels[(c / 4 * tokens + t) * 4 + c % 4]) - 128
}

/// `(head_dim, heads)`.
const SHAPES: [(usize, usize); 5] = [(64, 3), (256, 1), (48, 2), (16, 5), (128, 2)];

/// A basis of no particular structure whose columns have unit length.
fn basis(width: usize, random: &mut Random) -> Vec<f32> {
    random.numbers(width * width).iter().map(|x| x / (width as f32).sqrt()).collect()
}

struct Folded {
    bytes: Vec<i8>,
    offsets: Vec<i32>,
    scales: Vec<f32>,
}

fn fold(
    basis: &ByteBasis,
    head: usize,
    segments: usize,
    queries: &[u8],
    slow: &[u8],
    worth: &[f32],
) -> Folded {
    let rows = worth.len();
    let mut folded = Folded {
        bytes: vec![99; rows * basis.stride()],
        offsets: vec![99; rows * basis.stride() / 4],
        scales: vec![99.0; rows],
    };
    let Folded { bytes, offsets, scales } = &mut folded;
    let scratch = &mut FoldScratch::default();
    let mut out = ByteQueries { bytes, offsets, scales, scratch, runs: (rows, rows) };
    basis.fold(head, segments, queries, slow, worth, &mut out);
    folded
}

/// `a · b / 2^15`, rounded.
fn times_fraction(a: i16, b: i16) -> i16 {
    ((i32::from(a) * i32::from(b) + (1 << 14)) >> 15) as i16
}

/// The definition of [`fold`]. `basis`: one made for the baseline, whose columns are words.
fn defined_fold(
    basis: &ByteBasis,
    head: usize,
    segments: usize,
    queries: &[u8],
    worth: &[f32],
) -> Folded {
    let (dim, head) = (basis.dim, &basis.heads[head]);
    let tiles = (segments * SEGMENT).div_ceil(TILE);
    let (mut bytes, mut offsets) = (vec![], vec![]);
    let mut scales = vec![];
    for (query, worth) in queries.chunks_exact(dim).zip(worth) {
        let mut folded = vec![0i16; tiles * TILE];
        for tile in 0..tiles {
            for place in 0..TILE {
                let product = |(d, q): (usize, &u8)| {
                    // Even channels of 16 columns, then odd ones.
                    let vector = (tile * dim / 4 + d / 4) * TILE / 16 + place / 16;
                    let at = 64 * vector + 32 * (d % 2) + 2 * (place % 16) + d % 4 / 2;
                    (i32::from(*q) - 128) * i32::from(word(&head.columns, at))
                };
                let sum: i32 = query.iter().enumerate().map(product).sum();
                let sum = (sum + (1 << shift(dim) >> 1)) >> shift(dim);
                folded[tile * TILE + column(place)] = sum.clamp(-32768, 32767) as i16;
            }
            for place in 0..TILE {
                let folded = &mut folded[tile * TILE + factor_column(place)];
                *folded = times_fraction(*folded, word(&head.factors, tile * TILE + place));
            }
        }
        folded[segments * SEGMENT..].fill(0);
        let most = folded.iter().map(|f| f.unsigned_abs()).max().unwrap_or(0);
        let factor = (MOST * 32768.0 / f32::from(most.max(128))) as i16;
        assert_eq!(factor, byte_factor(most));
        let row: Vec<i8> =
            folded.iter().map(|f| times_fraction(*f, factor).clamp(-128, 127) as i8).collect();
        for segment in row.chunks_exact(SEGMENT) {
            let sum: i32 = segment.iter().map(|b| i32::from(*b)).sum();
            offsets.extend([-128 * sum; 4]);
        }
        bytes.extend(row);
        bytes.resize(bytes.len().next_multiple_of(basis.stride), 99);
        offsets.resize(bytes.len() / 4, 99);
        scales.push(worth * basis.worth(head, factor));
    }
    Folded { bytes, offsets, scales }
}

#[test]
fn folded_queries_are_close_and_equal_on_every_isa() {
    for (dim, heads) in SHAPES {
        let (width, tokens, rows) = (dim * heads, 32, 7);
        let mut random = Random(1);
        let entries = basis(width, &mut random);
        let means = random.numbers(tokens * width);
        let on = |isa| ByteBasis::new_on(isa, dim, tokens, dim / 4, (width, &entries), &means);
        let (baseline, on_each) = (on(Isa::BASELINE), Isa::available().into_iter().map(on));
        let on_each: Vec<ByteBasis> = on_each.collect();
        let queries = random.numbers(rows * dim);
        let angles = random.numbers(dim / 2);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let worth: Vec<f32> = queries.chunks_exact(dim).map(|q| largest_pair(q) / 127.0).collect();
        let rotated: Vec<f32> = (0..rows * dim)
            .map(|i| {
                let (row, d, half) = (i / dim * dim, i % dim, dim / 2);
                let (a, b) = (queries[row + d % half], queries[row + d % half + half]);
                let (c, s) = (cos[d % half], sin[d % half]);
                if d < half { a * c - b * s } else { b * c + a * s }
            })
            .collect();
        let in_steps = queries.iter().zip(0..).map(|(q, i): (_, usize)| q * FINE / worth[i / dim]);
        let in_steps: Vec<f32> = in_steps.collect();
        let mut seen: Option<(Vec<u8>, Vec<i16>)> = None;
        for isa in Isa::available() {
            let (mut bytes, mut fine) = (vec![0; rows * dim], vec![0; rows * dim]);
            let turn = Some((&cos[..], &sin[..]));
            rotate_to_bytes_on(isa, &in_steps, dim, turn, &mut bytes, &mut fine);
            for (i, x) in rotated.iter().enumerate() {
                let w = worth[i / dim];
                assert!(((f32::from(bytes[i]) - 128.0) * w - x).abs() <= 0.51 * w);
                assert!((f32::from(fine[i]) * w / 256.0 - x).abs() <= 0.51 * w / 256.0);
            }
            let seen = seen.get_or_insert((bytes.clone(), fine.clone()));
            assert_eq!(*seen, (bytes, fine), "{isa}");
        }
        let Some((bytes, fine)) = seen else { panic!("no instruction set") };
        for head in 0..heads {
            for segments in [1, width / SEGMENT / 2 + 1, width / SEGMENT] {
                let reference = defined_fold(&baseline, head, segments, &bytes, &worth);
                for coded in &on_each {
                    let folded = fold(coded, head, segments, &bytes, &bytes, &worth);
                    assert_eq!(folded.bytes, reference.bytes, "{} {dim} {segments}", coded.isa);
                    assert_eq!(folded.offsets, reference.offsets);
                    assert_eq!(folded.scales, reference.scales);
                }
                for bytes in reference.bytes.chunks_exact(baseline.stride()) {
                    let tiles = (segments * SEGMENT).next_multiple_of(TILE);
                    assert!(bytes[segments * SEGMENT..tiles].iter().all(|b| *b == 0));
                    assert!(bytes[tiles..].iter().all(|b| *b == 99));
                }
                for row in 0..rows {
                    let exact: Vec<f32> = (0..segments * SEGMENT)
                        .map(|c| {
                            let q = rotated[row * dim..][..dim].iter().enumerate();
                            q.map(|(d, q)| q * entries[(head * dim + d) * width + c]).sum()
                        })
                        .collect();
                    let got = &reference.bytes[row * baseline.stride()..];
                    let scale = reference.scales[row];
                    let errors = exact.iter().zip(got);
                    let error: f32 = errors.map(|(e, g)| (e - f32::from(*g) * scale).powi(2)).sum();
                    let energy: f32 = exact.iter().map(|e| e * e).sum();
                    assert!(error < 6e-4 * energy, "{dim}, {segments}: {}", error / energy);
                }
            }
            let mut expected: Option<Vec<f32>> = None;
            for coded in &on_each {
                let (stride, isa) = (tokens + 3, coded.isa);
                let mut out = vec![f32::NAN; rows * stride];
                coded.mean_scores(head, &fine, &worth, &mut out, stride);
                for (i, got) in out.iter().enumerate() {
                    let (row, t) = (i / stride, i % stride);
                    if t >= tokens {
                        assert!(got.is_nan());
                        continue;
                    }
                    let q = &rotated[row * dim..][..dim];
                    let mean = &means[t * width + head * dim..][..dim];
                    let exact: f32 = q.iter().zip(mean).map(|(q, m)| q * m).sum();
                    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
                    let bound = 3e-4 * norm(q) * norm(mean);
                    assert!((got - exact).abs() < bound, "{got} {exact} {bound}");
                }
                out.retain(|x| !x.is_nan());
                let expected = expected.get_or_insert_with(|| out.clone());
                assert_eq!(*expected, out, "{isa}");
            }
        }
    }
}

#[test]
fn runs_of_queries_go_to_their_places() {
    let mut random = Random(9);
    let entries = basis(64, &mut random);
    let (queries, slow) = (random.bytes(9 * 64), random.bytes(3 * 64));
    let worth = [0.5, 1.0, 2.0];
    for isa in Isa::available() {
        let coded = ByteBasis::new_on(isa, 64, 16, 20, (64, &entries), &[0.0; 64]);
        let Folded { mut bytes, mut offsets, mut scales } =
            Folded { bytes: vec![99; 13 * 64], offsets: vec![99; 13 * 16], scales: vec![99.0; 13] };
        let mut out = ByteQueries {
            bytes: &mut bytes,
            offsets: &mut offsets,
            scales: &mut scales,
            scratch: &mut FoldScratch::default(),
            runs: (3, 5),
        };
        coded.fold(0, 4, &queries, &slow, &worth, &mut out);
        for run in 0..3 {
            let queries = &queries[run * 3 * 64..][..3 * 64];
            // Pairs from 20 on are those of the slow queries.
            let mixed: Vec<u8> =
                (0..3 * 64).map(|i| if i % 32 < 20 { queries[i] } else { slow[i] }).collect();
            let alone = fold(&coded, 0, 4, &mixed, &mixed, &worth);
            assert_eq!(alone.bytes, bytes[run * 5 * 64..][..3 * 64]);
            assert_eq!(alone.offsets, offsets[run * 5 * 16..][..3 * 16]);
            assert_eq!(alone.scales, scales[run * 5..][..3]);
        }
        assert!(offsets[48..80].iter().all(|t| *t == 99));
    }
}

#[test]
fn queries_without_size_fold_to_nothing() {
    let mut random = Random(7);
    let entries = basis(64, &mut random);
    for isa in Isa::available() {
        let coded = ByteBasis::new_on(isa, 64, 16, 20, (64, &entries), &[0.0; 64]);
        let (mut bytes, mut fine) = (vec![9; 64], vec![9; 64]);
        rotate_to_bytes_on(isa, &[0.0; 64], 64, None, &mut bytes, &mut fine);
        let folded = fold(&coded, 0, 4, &bytes, &bytes, &[0.0]);
        assert!(folded.bytes[..TILE].iter().all(|b| *b == 0));
        assert_eq!((folded.offsets[0], folded.scales[0]), (0, 0.0));
        let mut out = [f32::NAN; 16];
        coded.mean_scores(0, &fine, &[1.0], &mut out, 16);
        assert_eq!(out, [0.0; 16], "no mean");
    }
}
