use super::*;
use crate::isa::Isa;

/// Normal deviates by Box and Muller from an LCG.
struct Gaussian(u64);

impl Gaussian {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f32 {
        let (u, v) = (self.uniform(), self.uniform());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }

    fn row(&mut self, scales: &[f32]) -> Vec<f32> {
        scales.iter().flat_map(|s| [*s; SEGMENT]).map(|s| s * self.next()).collect()
    }
}

fn layout(bits: &[u8], scales: &[f32]) -> Layout {
    Layout::new(bits.to_vec(), scales.to_vec()).expect("valid")
}

/// A layout with every bit width.
fn mixture() -> Layout {
    layout(&[6, 5, 4, 4, 3, 2, 1, 0], &[20.0, 9.0, 5.0, 4.0, 2.5, 1.2, 0.7, 0.3])
}

fn decoded(layout: &Layout, rows: &[u8]) -> Vec<f32> {
    let n = rows.len() / layout.row_bytes();
    let mut out = vec![f32::NAN; n * layout.width()];
    layout.decode(rows, n, 1.0, &vec![0.0; layout.width()], 0, &mut out, layout.width());
    out
}

/// Row `t` of a block, as a block of its own.
fn row_of(layout: &Layout, slot: &[u8], t: usize) -> Vec<u8> {
    let rows = slot.len() / layout.row_bytes();
    let mut row = vec![slot[t], slot[rows + t]];
    for (bits, _, offset) in layout.segments(rows) {
        let bytes = segment_bytes(bits);
        row.extend(&slot[offset + t * bytes..][..bytes]);
    }
    row
}

fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// Encodes a block on every instruction set, checks that they agree, and returns it with its error.
fn encoded(layout: &Layout, z: &[f32]) -> (Vec<u8>, f64) {
    let bytes = layout.slot_bytes(z.len() / layout.width());
    let mut row = vec![0xA5; bytes];
    layout.encode_on(Isa::BASELINE, z, &mut row);
    for isa in Isa::available() {
        let mut other = vec![0x5A; bytes];
        layout.encode_on(isa, z, &mut other);
        assert_eq!(other, row, "{isa}");
    }
    let finite: Vec<f32> = z.iter().map(|z| if z.is_finite() { *z } else { 0.0 }).collect();
    let error = squared_error(&finite, &decoded(layout, &row));
    (row, error)
}

/// A segment's codes at a factor of 1, the same on every instruction set, as a row.
fn encoded_segment(bits: u8, z: &[f32]) -> Vec<u8> {
    let inverses = [encode::unit(bits)];
    let segment = encode::Segment { z, stride: SEGMENT, inverses: &inverses };
    let mut row = vec![0; HEADER_BYTES + segment_bytes(bits)];
    row[0] = 128;
    if bits > 0 {
        let word = encode::definition::row_codes(bits, z, inverses[0]);
        row[HEADER_BYTES..].copy_from_slice(&word.to_le_bytes()[..segment_bytes(bits)]);
    }
    for isa in Isa::available() {
        let mut codes = vec![0x5A; segment_bytes(bits)];
        encode::encode_segment(isa, bits, &segment, &mut codes);
        assert_eq!(codes, row[HEADER_BYTES..], "{isa}");
    }
    row
}

#[test]
fn layouts_are_checked() {
    assert!(Layout::new(vec![6; 16], vec![1.0; 16]).is_some());
    assert!(Layout::new(vec![6; 17], vec![1.0; 17]).is_none());
    assert!(Layout::new(vec![], vec![]).is_none());
    assert!(Layout::new(vec![7], vec![1.0]).is_none());
    assert!(Layout::new(vec![3], vec![1.0, 1.0]).is_none());
    for scale in [-1.0, f32::NAN, f32::INFINITY] {
        assert!(Layout::new(vec![3], vec![scale]).is_none());
    }
    let layout = mixture();
    assert_eq!(layout.width(), 128);
    assert_eq!(layout.row_bytes(), 2 + 2 * (6 + 5 + 4 + 4 + 3 + 2 + 1));
}

#[test]
fn scale_codes_are_eighths_of_octaves() {
    assert_eq!(ROW_SCALES[0], 0.0);
    for (c, scale) in ROW_SCALES.iter().enumerate().skip(1) {
        let exact = ((c as f32 - 128.0) / 8.0).exp2();
        assert!((scale / exact - 1.0).abs() < 1e-6, "{c}: {scale}");
    }
    for (e, boost) in BOOSTS.iter().enumerate() {
        let exact = (e as f32 / 2.0).exp2();
        assert!((boost / exact - 1.0).abs() < 1e-6, "{e}: {boost}");
    }
}

#[test]
fn codes_at_the_right_scale_reach_the_distortion() {
    for bits in 0..=MAX_BITS {
        let layout = layout(&[bits], &[1.0]);
        let mut random = Gaussian(7);
        let (mut error, segments) = (0.0, 8000);
        for _ in 0..segments {
            let z = random.row(&[1.0]);
            error += squared_error(&z, &decoded(&layout, &encoded_segment(bits, &z)));
        }
        let mean = error / (segments * SEGMENT) as f64;
        let want = f64::from(DISTORTION[usize::from(bits)]);
        assert!((mean / want - 1.0).abs() < 0.03, "{bits} bits: {mean}, expected {want}");
    }
}

#[test]
fn no_codes_beat_the_search() {
    // All 2^16 words of one bit, decoded by the definition.
    let layout = layout(&[1], &[1.0]);
    let mut random = Gaussian(3);
    for _ in 0..4 {
        let z = random.row(&[1.0]);
        let least = (0..=u16::MAX)
            .map(|word| {
                squared_error(&z, &decoded(&layout, &[128, 0, word as u8, (word >> 8) as u8]))
            })
            .fold(f64::INFINITY, f64::min);
        let found = squared_error(&z, &decoded(&layout, &encoded_segment(1, &z)));
        assert!(found < least * (1.0 + 1e-3), "{found}, but {least} is possible");
    }
}

#[test]
fn windows_follow_the_definition() {
    let tables: [&[i8]; 6] = [
        &tables::LEVELS_1,
        &tables::LEVELS_2,
        &tables::LEVELS_3,
        &tables::LEVELS_4,
        &tables::LEVELS_5,
        &tables::LEVELS_6,
    ];
    let mut random = Gaussian(5);
    for bits in 1..=6u32 {
        let (layout, table) = (layout(&[bits as u8], &[1.0]), tables[bits as usize - 1]);
        for _ in 0..50 {
            let mut bytes = [0; 16];
            for byte in &mut bytes[..2 * bits as usize] {
                *byte = (random.uniform() * 256.0) as u8;
            }
            let mut row = vec![128, 0];
            row.extend(&bytes[..2 * bits as usize]);
            let word = u128::from_le_bytes(bytes);
            // Plain codes do not reach the circle's end.
            let circle =
                |j: u32| word >> (bits * j) | word.checked_shl(16 * bits - bits * j).unwrap_or(0);
            let expected: Vec<f32> = (0..16)
                .map(|j| f32::from(table[circle(j) as usize % table.len()]) * STEP)
                .collect();
            for isa in Isa::available() {
                let mut out = [f32::NAN; 16];
                layout.decode_on(isa, &row, 1, 1.0, &[0.0; 16], 0, &mut out, 16);
                assert_eq!(out[..], expected, "{isa}, {bits} bits, {word:x}");
            }
        }
    }
}

#[test]
fn rows_reach_the_distortion_of_their_widths() {
    let layouts = (1..=MAX_BITS).map(|b| layout(&[b; 8], &[3.0; 8])).chain([mixture()]);
    for layout in layouts {
        let mut random = Gaussian(11);
        let mut error = 0.0;
        let rows = 500;
        for _ in 0..rows {
            error += encoded(&layout, &random.row(layout.scales())).1;
        }
        let segments = layout.bits().iter().zip(layout.scales());
        let want: f32 =
            segments.map(|(b, s)| s * s * DISTORTION[usize::from(*b)] * SEGMENT as f32).sum();
        let ratio = error / f64::from(want) / f64::from(rows);
        // A scale per row may do a little better than the one right for all.
        assert!((0.88..1.03).contains(&ratio), "{:?}: {ratio}", layout.bits());
    }
}

#[test]
fn rows_of_any_magnitude_are_normalised() {
    let layout = mixture();
    let z = Gaussian(2).row(layout.scales());
    let relative = |factor: f32| {
        let z: Vec<f32> = z.iter().map(|z| z * factor).collect();
        encoded(&layout, &z).1 / f64::from(factor).powi(2)
    };
    for factor in [1e-3, 0.1, 4.0, 300.0, 1e4] {
        let ratio = relative(factor) / relative(1.0);
        assert!((0.8..1.25).contains(&ratio), "{factor}: {ratio}");
    }
    // Out of the scale code's range, but not out of bounds.
    for factor in [1e-12, 1e9, 1e15] {
        assert!(relative(factor).is_finite());
    }
}

#[test]
fn zero_and_constant_rows() {
    let layout = mixture();
    let (row, error) = encoded(&layout, &[0.0; 128]);
    assert_eq!(error, 0.0);
    assert_eq!(decoded(&layout, &row), [0.0; 128]);

    let constant = [2.0; 128];
    let (_, error) = encoded(&layout, &constant);
    // The segment without bits costs 4 per coefficient; the others must cost less than that.
    assert!(error < 0.5 * 4.0 * 128.0, "{error}");
}

#[test]
fn layouts_without_bits_or_with_zero_scales_give_means() {
    for layout in [layout(&[0, 0], &[1.0, 2.0]), layout(&[4, 6], &[0.0, 0.0])] {
        let z = Gaussian(1).row(&[1.0, 1.0]);
        let (row, error) = encoded(&layout, &z);
        let energy: f64 = z.iter().map(|z| f64::from(*z).powi(2)).sum();
        assert!((error / energy - 1.0).abs() < 1e-5);
        let mut out = [0.0; 32];
        layout.decode(&row, 1, 1.0, &[5.0; 32], 0, &mut out, 32);
        assert_eq!(out, [5.0; 32]);
    }
}

#[test]
fn coefficients_that_are_not_finite_count_as_zero() {
    let layout = mixture();
    let mut z = Gaussian(4).row(layout.scales());
    for (i, bad) in [(3, f32::NAN), (20, f32::INFINITY), (70, f32::NEG_INFINITY), (120, f32::NAN)] {
        z[i] = 0.0;
        let clean = encoded(&layout, &z);
        z[i] = bad;
        assert_eq!(encoded(&layout, &z), clean);
        z[i] = 0.0;
    }
}

#[test]
fn an_outlying_segment_is_boosted() {
    let layout = layout(&[4; 8], &[1.0; 8]);
    let mut random = Gaussian(9);
    let (mut with, mut without) = (0.0, 0.0);
    for _ in 0..200 {
        let mut z = random.row(layout.scales());
        without += encoded(&layout, &z).1;
        z[3 * SEGMENT..4 * SEGMENT].iter_mut().for_each(|z| *z *= 20.0);
        let (row, error) = encoded(&layout, &z);
        assert_eq!(row[1] & 15, 3);
        assert!((6..=11).contains(&(row[1] >> 4)), "boost {}", row[1] >> 4);
        let others: f64 = {
            let mut out = decoded(&layout, &row);
            out[3 * SEGMENT..4 * SEGMENT].copy_from_slice(&z[3 * SEGMENT..4 * SEGMENT]);
            squared_error(&z, &out)
        };
        with += others * 8.0 / 7.0;
        // The boosted segment itself has the error of its own scale.
        assert!(error < 400.0 * 16.0 * 0.03 + 8.0 * 16.0 * 0.03, "{error}");
    }
    assert!(with < 1.1 * without, "the other segments: {with}, without an outlier {without}");
}

#[test]
fn decoding_adds_scaled_levels_to_means() {
    let layout = mixture();
    let (width, tokens) = (layout.width(), 37);
    let mut random = Gaussian(21);
    let mut z: Vec<f32> = (0..tokens).flat_map(|_| random.row(layout.scales())).collect();
    for t in 0..tokens {
        z[t * width + 16 * (t % 7)] *= 100.0;
    }
    let (rows, _) = encoded(&layout, &z);
    let plain = decoded(&layout, &rows);
    let (gain, mean_stride, out_stride) = (0.37, width + 5, width + 3);
    let means: Vec<f32> = (0..tokens * mean_stride).map(|_| random.next()).collect();
    for isa in Isa::available() {
        for (n, mean_stride) in
            [(1, 0), (5, mean_stride), (16, mean_stride), (tokens, 0), (tokens, mean_stride)]
        {
            let mut out = vec![f32::NAN; (n - 1) * out_stride + width];
            layout.decode_on(isa, &rows, n, gain, &means, mean_stride, &mut out, out_stride);
            for t in 0..n {
                for i in 0..out_stride.min(out.len() - t * out_stride) {
                    let got = out[t * out_stride + i];
                    if i >= width {
                        assert!(got.is_nan(), "{isa}: wrote between rows");
                        continue;
                    }
                    let want = means[t * mean_stride + i] + gain * plain[t * width + i];
                    let bound = 1e-6 * (1.0 + want.abs() + plain[t * width + i].abs());
                    assert!((got - want).abs() <= bound, "{isa} {n} [{t}, {i}]: {got}, {want}");
                }
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_neighbours() {
    let layout = mixture();
    let (width, bytes) = (layout.width(), layout.row_bytes());
    let mut random = Gaussian(31);
    let rows: Vec<u8> = (0..21 * bytes).map(|_| (random.uniform() * 256.0) as u8).collect();
    let means: Vec<f32> = (0..width).map(|_| random.next()).collect();
    for isa in Isa::available() {
        let mut all = vec![0.0; 21 * width];
        layout.decode_on(isa, &rows, 21, 0.5, &means, 0, &mut all, width);
        for t in 0..21 {
            let mut one = vec![0.0; width];
            let row = row_of(&layout, &rows, t);
            layout.decode_on(isa, &row, 1, 0.5, &means, 0, &mut one, width);
            let same = one.iter().zip(&all[t * width..]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{isa} row {t}");
        }
    }
}

#[test]
fn no_rows_decode_to_nothing() {
    mixture().decode(&[], 0, 1.0, &[], 0, &mut [], 128);
}

/// `cargo test --release -p kvasir-kernels trellis::tests::speed -- --ignored --nocapture`
#[test]
#[ignore = "prints times"]
fn speed() {
    let rows = 64;
    let layouts = (1..=MAX_BITS).map(|b| layout(&[b; 8], &[1.0; 8])).chain([mixture()]);
    for layout in layouts {
        let mut random = Gaussian(1);
        let z: Vec<f32> = (0..rows).flat_map(|_| random.row(layout.scales())).collect();
        let mut codes = vec![0; rows * layout.row_bytes()];
        let mut out = vec![0.0; rows * layout.width()];
        let means = vec![0.5; layout.width()];
        for isa in Isa::available() {
            let mut best = [f64::INFINITY; 2];
            for _ in 0..200 {
                let start = std::time::Instant::now();
                layout.encode_on(isa, &z, &mut codes);
                best[0] = best[0].min(start.elapsed().as_secs_f64());
                let start = std::time::Instant::now();
                for _ in 0..10 {
                    let out = std::hint::black_box(&mut out);
                    layout.decode_on(isa, &codes, rows, 1.0, &means, 0, out, layout.width());
                }
                best[1] = best[1].min(start.elapsed().as_secs_f64() / 10.0);
            }
            let [encode, decode] = best.map(|s| s * 1e9 / z.len() as f64);
            let bits = layout.bits();
            println!("{bits:?} {isa}: encode {encode:.2}, decode {decode:.3} ns per coefficient");
        }
    }
}

/// Levels are those of rows of numbers, on every instruction set.
#[test]
fn levels_are_what_rows_decode_to() {
    let layouts = [mixture(), layout(&[0, 3, 6], &[1.0; 3]), layout(&[2; 12], &[1.0; 12])];
    for layout in layouts {
        let (width, bytes) = (layout.width(), layout.row_bytes());
        for rows in [16, 32, 48, 64] {
            let mut random = Gaussian(41);
            let mut slot: Vec<u8> =
                (0..rows * bytes).map(|_| (random.uniform() * 256.0) as u8).collect();
            // Neither row scales nor boosts.
            slot[..rows].fill(128);
            slot[rows..2 * rows].fill(0);
            let unit = layout.scales().iter().flat_map(|s| [s * STEP; SEGMENT]);
            let unit: Vec<f32> = unit.collect();
            let plain = decoded(&layout, &slot);
            for isa in Isa::available() {
                for segments in [1, layout.used_segments(), layout.bits().len()] {
                    let mut out = vec![77; width * rows + 5];
                    layout.levels_on(isa, &slot, rows, segments, &mut out);
                    assert!(out[SEGMENT * segments * rows..].iter().all(|b| *b == 77));
                    for (t, c) in (0..rows).flat_map(|t| (0..16 * segments).map(move |c| (t, c))) {
                        let level = i32::from(out[(c / 4 * rows + t) * 4 + c % 4]) - 128;
                        let want = (plain[t * width + c] / unit[c]).round() as i32;
                        assert_eq!(level, want, "{isa} row {t}, coefficient {c}");
                    }
                }
            }
        }
    }
}

#[test]
fn factors_and_boosts_are_those_of_the_headers() {
    let layout = layout(&[3, 0, 4], &[1.5, 1.0, 0.3]);
    for rows in [16, 32, 64] {
        let mut random = Gaussian(2);
        let mut slot: Vec<u8> =
            (0..layout.slot_bytes(rows)).map(|_| (random.uniform() * 256.0) as u8).collect();
        (slot[3], slot[rows + 5], slot[rows + 6]) = (0, 0x02, 0x1F);
        for isa in Isa::available() {
            let (mut factors, mut boosts) = (vec![f32::NAN; rows], Boosts::default());
            layout.row_factors_on(isa, &slot, &mut factors, &mut boosts);
            let mut all = vec![f32::NAN; 3 * rows];
            layout.segment_factors_on(isa, &factors, &boosts, 3, &mut all);
            for (row, factor) in factors.iter().enumerate() {
                assert_eq!(*factor, ROW_SCALES[usize::from(slot[row])]);
                let header = slot[rows + row];
                assert_eq!(boosts.factor(row), BOOSTS[usize::from(header >> 4)]);
                for segment in 0..16 {
                    let boosted = header >= 16 && usize::from(header & 15) == segment;
                    assert_eq!(boosts.rows(segment) >> row & 1 == 1, boosted, "{isa}");
                    let boost = if boosted { boosts.factor(row) } else { 1.0 };
                    if segment < 3 {
                        let worth = STEP * layout.scales()[segment] * (factor * boost);
                        assert_eq!(all[segment * rows + row], worth, "{isa}");
                    }
                }
            }
            assert!((0..16).all(|s| boosts.rows(s) >> (rows - 1) <= 1));
        }
    }
}
