use super::basis::{MOST, TILE, column, factor_column, shift, word};
use super::fold::byte_factor;
use super::queries::rotate_to_bytes_on;
use super::scores::add_scores_on;
use super::softmax::soft_weights_on;
use super::values::add_values_on;
use super::*;
use crate::trellis::{Boosts, Layout, SEGMENT};
use crate::{Isa, OnlineSoftmax};

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

#[test]
fn scores_are_scaled_sums_on_every_isa() {
    let mut random = Random(3);
    for (segments, tokens, rows) in [(12, 32, 9), (16, 64, 4), (3, 16, 23), (1, 48, 1)] {
        let width = segments * SEGMENT;
        let (layout, slot) = block(segments, tokens, &mut random);
        let (level, stride) = (levels(&layout, &slot, tokens), width + 16);
        let queries: Vec<i8> = random.bytes(rows * stride).iter().map(|b| *b as i8).collect();
        let (scales, factors) = (random.numbers(rows), random.numbers(segments * tokens));
        let of_segment = |bytes: &[i8]| {
            let sum: i32 = bytes.iter().map(|b| i32::from(*b)).sum();
            [-128 * sum; 4]
        };
        let offsets: Vec<i32> = queries.chunks_exact(SEGMENT).flat_map(of_segment).collect();
        let before = random.numbers(rows * (tokens + 1));
        let s = Scores {
            layout: &layout,
            slot: &slot,
            factors: &factors,
            tokens,
            segments,
            queries: &queries,
            stride,
            offsets: &offsets,
            scales: &scales,
        };
        let run = |isa| {
            let mut out = before.clone();
            add_scores_on(isa, &s, &mut out, tokens + 1);
            out
        };
        let reference = run(Isa::BASELINE);
        for row in 0..rows {
            for t in 0..tokens {
                let (mut exact, mut size) = (0.0f64, 0.0f64);
                for c in 0..width {
                    let factor = f64::from(factors[c / SEGMENT * tokens + t] * scales[row]);
                    let product =
                        f64::from(level(t, c)) * f64::from(queries[row * stride + c]) * factor;
                    (exact, size) = (exact + product, size + product.abs());
                }
                let at = row * (tokens + 1) + t;
                exact += f64::from(before[at]);
                assert!((f64::from(reference[at]) - exact).abs() < 1e-6 * size + 1e-5);
            }
        }
        for isa in Isa::available() {
            assert_eq!(run(isa), reference, "{isa} {segments} {tokens} {rows}");
        }
    }
}

#[test]
fn values_are_weighted_sums_on_every_isa() {
    let mut random = Random(5);
    for (segments, tokens, count, rows) in [(12, 32, 4, 9), (16, 64, 2, 4), (4, 16, 3, 20)] {
        let (width, stride) = (segments * SEGMENT, count * tokens + 4);
        let blocks: Vec<_> = (0..count)
            .map(|_| {
                let (layout, mut slot) = block(segments, tokens, &mut random);
                // Some rows with boosts, some of them of segments without bits.
                slot[tokens..2 * tokens].copy_from_slice(&random.bytes(tokens));
                let (mut factors, mut boosts) = (vec![0.0; tokens], Boosts::default());
                layout.row_factors(&slot, &mut factors, &mut boosts);
                (layout, slot, boosts)
            })
            .collect();
        let level: Vec<_> =
            blocks.iter().map(|(layout, slot, _)| levels(layout, slot, tokens)).collect();
        let blocks: Vec<ValueBlock<'_>> = (blocks.iter())
            .map(|(layout, slot, boosts)| ValueBlock { layout, slot, boosts })
            .collect();
        let (numbers, bytes) = (random.numbers(rows * stride), random.bytes(rows * stride));
        let scales = random.numbers(rows);
        let before = random.numbers(rows * (width + 5));
        let weights = Weights { weights: &numbers, bytes: &bytes, scales: &scales, stride };
        let run = |isa| {
            let mut sums = before.clone();
            add_values_on(isa, &weights, &blocks, tokens, segments, &mut sums, width + 5);
            sums
        };
        let reference = run(Isa::BASELINE);
        for (i, got) in reference.iter().enumerate() {
            let (row, c) = (i / (width + 5), i % (width + 5));
            let (mut exact, mut size) = (0.0f64, 1.0f64);
            for t in (0..count * tokens).filter(|_| c < width) {
                let (block, t) = (t / tokens, t % tokens);
                let at = row * stride + block * tokens + t;
                let mut weight = f64::from(bytes[at]) * f64::from(scales[row]);
                let boosts = blocks[block].boosts;
                if boosts.rows(c / SEGMENT) >> t & 1 == 1 {
                    weight += f64::from(numbers[at]) * f64::from(boosts.factor(t) - 1.0);
                }
                let product = weight * f64::from(level[block](t, c));
                (exact, size) = (exact + product, size + product.abs());
            }
            assert!((f64::from(*got) - exact - f64::from(before[i])).abs() < 1e-5 * size);
        }
        for isa in Isa::available() {
            assert_eq!(run(isa), reference, "{isa} {segments} {tokens} {rows}");
        }
    }
}

#[test]
fn weights_are_those_of_the_softmax() {
    let (rows, tokens, stride) = (5, 48, 50);
    let mut random = Random(13);
    let factors: Vec<f32> = random.numbers(tokens).iter().map(|x| x.abs() + 0.1).collect();
    let tiles: Vec<Vec<f32>> =
        (0..3).map(|_| random.numbers(rows * stride).iter().map(|x| 6.0 * x).collect()).collect();
    for isa in Isa::available() {
        let mut states = vec![OnlineSoftmax::default(); rows];
        let (mut bytes, mut scales) = (vec![0; rows * stride], vec![0.0; rows]);
        // Columns: the weighted sum of the factors by bytes, and the mass.
        let mut sums = vec![0.0; rows * 2];
        for tile in &tiles {
            let mut scores = tile.clone();
            let mut all = Rows {
                scores: &mut scores,
                bytes: &mut bytes,
                scales: &mut scales,
                stride,
                states: &mut states,
                sums: &mut sums,
                sums_stride: 2,
                mass: 1,
            };
            soft_weights_on(isa, tokens, &factors, &mut all);
            for row in 0..rows {
                let scores = &scores[row * stride..][..tokens];
                for (byte, weight) in bytes[row * stride..].iter().zip(scores) {
                    let error = (f32::from(*byte) * scales[row] - weight).abs();
                    assert!(error <= 0.501 * scales[row]);
                    sums[row * 2] += f32::from(*byte) * scales[row];
                }
            }
        }
        for row in 0..rows {
            let of_tile = |tile: &Vec<f32>| tile[row * stride..][..tokens].to_vec();
            let scores: Vec<f32> = tiles.iter().flat_map(of_tile).collect();
            let max = scores.iter().copied().fold(f32::MIN, f32::max);
            let p = scores.iter().map(|s| f64::from(s - max).exp());
            let mass: f64 = p.clone().sum();
            let weighted: f64 = p.zip(factors.iter().cycle()).map(|(p, f)| p * f64::from(*f)).sum();
            let normaliser = f64::from(states[row].normaliser());
            assert!((normaliser * mass - 1.0).abs() < 1e-5);
            assert!((f64::from(sums[row * 2 + 1]) / mass - 1.0).abs() < 1e-5);
            assert!((f64::from(sums[row * 2]) / weighted - 1.0).abs() < 5e-3, "{isa}");
        }
    }
}

#[test]
fn rows_turned_back_are_close_and_equal_on_every_isa() {
    for (dim, heads) in SHAPES {
        let (width, tokens) = (dim * heads, 32);
        let mut random = Random(21);
        let entries = basis(width, &mut random);
        let weights: Vec<f32> = random.numbers(width).iter().map(|x| x.abs() + 0.5).collect();
        let narrow: Vec<half::f16> = entries.iter().map(|x| half::f16::from_f32(*x)).collect();
        let levels = random.bytes(width * tokens);
        let factors = random.numbers(width / SEGMENT * tokens);
        let means = random.numbers(tokens * width);
        for segments in [1, width / SEGMENT] {
            for head in 0..heads {
                let block = LevelBlock {
                    levels: &levels,
                    factors: &factors,
                    tokens,
                    segments,
                    gain: 0.7,
                    means: &means[head * dim..],
                    mean_stride: width,
                };
                let run = |isa| {
                    let (mut rows, mut out) = (ByteRows::default(), vec![f32::NAN; tokens * dim]);
                    rows.load_on(isa, dim, &narrow, &weights);
                    rows.turn_back(head, &block, &mut out);
                    out
                };
                let got = run(Isa::BASELINE);
                let (mut error, mut energy) = (0.0, 0.0);
                for (i, got) in got.iter().enumerate() {
                    let (t, channel) = (i / dim, head * dim + i % dim);
                    let mut exact = 0.0;
                    for c in 0..segments * SEGMENT {
                        let level = f32::from(levels[(c / 4 * tokens + t) * 4 + c % 4]) - 128.0;
                        let factor = factors[c / SEGMENT * tokens + t];
                        exact += level * factor * entries[channel * width + c];
                    }
                    exact *= 0.7 * weights[channel];
                    energy += exact * exact;
                    error += (got - means[t * width + channel] - exact).powi(2);
                }
                assert!(error < 2e-4 * energy, "{dim}, {segments}: {}", error / energy);
                for isa in Isa::available() {
                    assert_eq!(run(isa), got, "{isa} {dim} {segments}");
                }
            }
        }
    }
}

/// `cargo test --release -p kvasir-kernels coded::tests::speed -- --ignored --nocapture`: microseconds that
/// nine query rows of three heads of 64 channels take a block of 32 tokens at 3 bits, four blocks at a
/// time, by part.
#[test]
#[ignore = "prints times"]
fn speed() {
    let (dim, heads, group, tokens, count) = (64, 3, 3, 32, 4);
    let (width, rows, stride) = (192, 9, 128);
    let mut random = Random(1);
    let coded = ByteBasis::new(
        dim,
        tokens,
        20,
        (width, &basis(width, &mut random)),
        &random.numbers(32 * width),
    );
    let bits = [5, 4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2];
    let Some(layout) = Layout::new(bits.to_vec(), vec![1.0; 12]) else { panic!("a layout") };
    let slots: Vec<Vec<u8>> = (0..count)
        .map(|_| {
            let mut slot = random.bytes(layout.slot_bytes(tokens));
            for header in &mut slot[tokens..2 * tokens] {
                // Seven of ten rows are boosted.
                *header = (*header % 12) | (u8::from(*header % 10 < 7) << 4);
            }
            slot
        })
        .collect();
    let queries: Vec<f32> = random.numbers(group * dim).iter().map(|q| q * 8000.0).collect();
    let angles: Vec<f32> = random.numbers(dim / 2);
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    let mut bytes = vec![0; heads * count * group * dim];
    let mut fine = vec![0; heads * count * group * dim];
    let mut folded = Folded {
        bytes: vec![0; count * rows * width],
        offsets: vec![0; count * rows * width / 4],
        scales: vec![0.0; count * rows],
    };
    let mut scratch = FoldScratch::default();
    let mut scores = vec![0.0; rows * stride];
    let (mut rounded, mut scales) = (vec![0; rows * stride], vec![0.0; rows]);
    let mut sums = vec![0.0; rows * 272];
    let mut states = vec![OnlineSoftmax::default(); rows];
    let mut boosts = vec![Boosts::default(); count];
    let mut factors = vec![0.0; count * tokens];
    let mut by_segment = vec![0.0; 12 * tokens];
    let mut best = [f64::INFINITY; 8];
    for _ in 0..3000 {
        let mut part = 0;
        let mut clock = std::time::Instant::now();
        let mut lap = || {
            best[part] = best[part].min(clock.elapsed().as_secs_f64());
            part += 1;
            clock = std::time::Instant::now();
        };
        for i in 0..heads * count {
            let at = i * group * dim..(i + 1) * group * dim;
            let turn = Some((&cos[..], &sin[..]));
            rotate_to_bytes(&queries, dim, turn, &mut bytes[at.clone()], &mut fine[at]);
        }
        lap();
        for head in 0..heads {
            for i in 0..count {
                let at = (head * count + i) * group * dim;
                let out = &mut scores[head * group * stride + i * tokens..];
                coded.mean_scores(head, &fine[at..], &[1e-3; 3], out, stride);
            }
        }
        lap();
        for head in 0..heads {
            let mut out = ByteQueries {
                bytes: &mut folded.bytes[head * group * width..],
                offsets: &mut folded.offsets[head * group * width / 4..],
                scales: &mut folded.scales[head * group..],
                scratch: &mut scratch,
                runs: (group, rows),
            };
            let queries = &bytes[head * count * group * dim..][..count * group * dim];
            let slow = &queries[..group * dim];
            coded.fold(head, 12, queries, slow, &[1e-3; 3], &mut out);
        }
        lap();
        for (i, slot) in slots.iter().enumerate() {
            let factors = &mut factors[i * tokens..][..tokens];
            layout.row_factors(slot, factors, &mut boosts[i]);
            layout.segment_factors(factors, &boosts[i], 12, &mut by_segment);
        }
        lap();
        for (i, slot) in slots.iter().enumerate() {
            let s = Scores {
                layout: &layout,
                slot,
                factors: &by_segment,
                tokens,
                segments: 12,
                queries: &folded.bytes[i * rows * width..],
                stride: width,
                offsets: &folded.offsets[i * rows * width / 4..],
                scales: &folded.scales[i * rows..][..rows],
            };
            add_scores(&s, &mut scores[i * tokens..], stride);
        }
        lap();
        let mut soft = Rows {
            scores: &mut scores,
            bytes: &mut rounded,
            scales: &mut scales,
            stride,
            states: &mut states,
            sums: &mut sums,
            sums_stride: 272,
            mass: 271,
        };
        soft_weights(count * tokens, &factors, &mut soft);
        lap();
        let weights = Weights { weights: &scores, bytes: &rounded, scales: &scales, stride };
        let blocks: Vec<ValueBlock<'_>> = slots
            .iter()
            .zip(&boosts)
            .map(|(slot, boosts)| ValueBlock { layout: &layout, slot, boosts })
            .collect();
        add_values(&weights, &blocks, tokens, 12, &mut sums, 272);
        lap();
        let none = Boosts::default();
        let blocks: Vec<ValueBlock<'_>> =
            slots.iter().map(|slot| ValueBlock { layout: &layout, slot, boosts: &none }).collect();
        add_values(&weights, &blocks, tokens, 12, &mut sums, 272);
        lap();
        states.fill(OnlineSoftmax::default());
    }
    let names =
        ["rotate", "means", "fold", "factors", "scores", "softmax", "values", "without boosts"];
    for (name, best) in names.iter().zip(best) {
        println!("{name}: {:.3}", best * 1e6 / count as f64);
    }
    println!("all: {:.3}", best[..7].iter().sum::<f64>() * 1e6 / count as f64);
}
