//! Scores, weights and values of coded blocks, and rows turned back.

use super::*;

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
