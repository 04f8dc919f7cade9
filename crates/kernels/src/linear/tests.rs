use half::{bf16, f16};

use super::packed::PAIRS;
use super::tiles::{BLOCK, columns};
use super::*;
use crate::Threads;
use crate::gemm::tests::values;
use crate::isa::Set;

/// A matrix of random codes, and its weights as f32.
fn coded(
    (format, inputs): (CodeFormat, ActivationKind),
    k: usize,
    n: usize,
    seed: u64,
) -> (Linear, Vec<f32>) {
    let random = values(n * k, seed);
    let scales = values(2 * n * k / GROUP, seed + 1);
    let span = if format.bits == 4 { 16.0 } else { 256.0 };
    let groups = |row: usize, first: usize, out: &mut [GroupCodes]| {
        for (g, group) in (first..).zip(out) {
            let at = row * k / GROUP + g;
            group.scale = f16::from_f32(scales[2 * at] * 0.1).to_f32();
            group.min =
                if format.has_min { f16::from_f32(scales[2 * at + 1]).to_f32() } else { 0.0 };
            for (i, code) in group.codes.iter_mut().enumerate() {
                let unit = (random[at * GROUP + i] + 1.0) / 2.0;
                let code_from_lowest = (unit * span).min(span - 1.0) as i16;
                *code = (code_from_lowest + i16::from(format.lowest)) as i8;
            }
        }
    };
    let open = |_: Range<usize>| Ok::<_, ()>(groups);
    let linear = Linear::from_codes((format, inputs), None, k, n, open).unwrap().unwrap();
    let mut rows = vec![0.0; n * k];
    for (row, weights) in rows.chunks_exact_mut(k).enumerate() {
        let mut codes = vec![GroupCodes::default(); k / GROUP];
        groups(row, 0, &mut codes);
        for (group, weights) in codes.iter().zip(weights.chunks_exact_mut(GROUP)) {
            for (w, code) in weights.iter_mut().zip(group.codes) {
                *w = group.scale * f32::from(code) + group.min;
            }
        }
    }
    (linear, rows)
}

/// A matrix of random codes of a K type with the largest scales that it may have, and its weights as f32.
fn k_coded(
    (format, inputs): (KFormat, ActivationKind),
    k: usize,
    n: usize,
    seed: u64,
) -> (Linear, Vec<f32>) {
    let random = values(n * k, seed);
    let numbers = values(n * k / 16, seed + 1);
    // From -1 to 1, to an integer from `low` on.
    let integer = |unit: f32, low: i32, span: i32| {
        (low + ((unit + 1.0) / 2.0 * span as f32).min(span as f32 - 1.0) as i32) as i8
    };
    let groups = |row: usize, first: usize, out: &mut [KGroup]| {
        for (g, group) in (first..).zip(out) {
            let block = format.block_inputs();
            // The same in all of a superblock.
            let first = (row * k + g * GROUP / block * block) / 16;
            group.d = f16::from_f32(numbers[first] * 0.001);
            group.min =
                f16::from_f32(if format.has_min() { numbers[first + 1] * 0.01 } else { 0.0 });
            let (low, span) = match format {
                KFormat::Q2 => (0, 16),
                KFormat::Q3 => (-32, 64),
                KFormat::Q4 | KFormat::Q5 => (0, 64),
                KFormat::Q6 => (-128, 256),
                KFormat::Iq4Xs => (-32, 64),
                KFormat::Q5_0 | KFormat::Q5_1 | KFormat::Iq4Nl | KFormat::Mxfp4 => (1, 1),
            };
            let number = |i: usize| numbers[(row * k / 16 + 2 * g + i) % numbers.len()];
            group.scales = [0, 1].map(|i| integer(number(i), low, span));
            group.mins = [2, 3].map(|i| integer(number(i), low, span));
            for (i, code) in group.codes.iter_mut().enumerate() {
                let unit = random[row * k + g * GROUP + i];
                *code = integer(unit, i32::from(format.lowest()), 1 << format.bits());
            }
        }
    };
    let open = |_: Range<usize>| Ok::<_, ()>(groups);
    let linear = Linear::from_k((format, inputs), None, k, n, open).unwrap().unwrap();
    let mut rows = vec![0.0; n * k];
    for (row, weights) in rows.chunks_exact_mut(k).enumerate() {
        let mut row_groups = vec![KGroup::default(); k / GROUP];
        groups(row, 0, &mut row_groups);
        for (group, weights) in row_groups.iter().zip(weights.chunks_exact_mut(GROUP)) {
            for (i, weight) in weights.iter_mut().enumerate() {
                let which = if format.scales() == 1 { 0 } else { i / 16 };
                let scale = group.d.to_f32() * f32::from(group.scales[which]);
                let code = group.codes[i];
                let worth = format.levels().map_or(code, |levels| levels[code as usize]);
                *weight = scale * f32::from(worth);
                if format.has_min() {
                    *weight += group.min.to_f32() * f32::from(group.mins[which]);
                }
            }
        }
    }
    (linear, rows)
}

const FORMATS: [CodeFormat; 4] = [
    CodeFormat { lowest: 0, bits: 4, has_min: true },
    CodeFormat { lowest: -8, bits: 4, has_min: false },
    CodeFormat { lowest: -128, bits: 8, has_min: false },
    CodeFormat { lowest: -128, bits: 8, has_min: true },
];

const KINDS: [ActivationKind; 4] =
    [ActivationKind::F32, ActivationKind::Bf16, ActivationKind::Bytes, ActivationKind::Tiles];

fn filled(x: &Activations) -> impl PartialEq + std::fmt::Debug {
    let floats = (&x.plain, &x.sums, &x.units);
    let words = (&x.bits, x.tiles.as_slice());
    (floats, words, &x.bytes, &x.headers, &x.byte_sums)
}

/// Every kind of layer of a shape, with its weights.
fn layers(k: usize, n: usize) -> Vec<(Linear, Vec<f32>)> {
    let plain = values(n * k, 90);
    let rounded: Vec<f32> = plain.iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
    let halves: Vec<f32> = plain.iter().map(|w| f16::from_f32(*w).to_f32()).collect();
    let half =
        |inputs| Linear::of_slice((FloatFormat::F16, inputs), &plain, Some(values(n, 91)), (k, n));
    let mut layers = vec![
        (half(ActivationKind::F32), halves.clone()),
        (half(ActivationKind::Bf16), halves),
        (Linear::new(&plain, Some(values(n, 91)), k, n), plain.clone()),
        (Linear::bf16(ActivationKind::Bf16, &plain, Some(values(n, 91)), k, n), rounded.clone()),
        (Linear::bf16(ActivationKind::F32, &plain, Some(values(n, 91)), k, n), rounded.clone()),
        (Linear::bf16(ActivationKind::Tiles, &plain, Some(values(n, 91)), k, n), rounded),
    ];
    if k.is_multiple_of(GROUP) {
        for inputs in KINDS {
            let formats = FORMATS.iter().zip(1..);
            layers.extend(formats.map(|(format, seed)| coded((*format, inputs), k, n, seed)));
        }
    }
    for inputs in KINDS.into_iter().filter(|kind| *kind != ActivationKind::Tiles) {
        let formats = KFormat::ALL.into_iter().zip(20..);
        let formats = formats.filter(|(format, _)| k.is_multiple_of(format.block_inputs()));
        layers.extend(formats.map(|(format, seed)| k_coded((format, inputs), k, n, seed)));
    }
    layers
}

/// A row as a layer should read it.
fn rounded(x: &Activations, row: usize) -> Vec<f64> {
    let inputs = 0..x.width;
    match x.kind() {
        ActivationKind::F32 | ActivationKind::Bf16 if !x.plain.is_empty() => {
            let plain = &x.plain[row * x.num_groups * GROUP..][inputs];
            plain.iter().map(|x| f64::from(*x)).collect()
        }
        ActivationKind::F32 | ActivationKind::Bf16 => {
            let bits = &x.bits[row * x.num_groups * GROUP..][inputs];
            bits.iter().map(|bits| f64::from(bf16::from_bits(*bits))).collect()
        }
        ActivationKind::Tiles => inputs
            .map(|i| {
                let columns = columns(x.rows);
                let group = row / BLOCK * x.num_groups + i / GROUP;
                let pair = (group * PAIRS + i % GROUP / 2) * columns + row % BLOCK;
                let pair = x.tiles.as_slice()[pair];
                f64::from(bf16::from_bits((pair.to_bits() >> (16 * (i % 2))) as u16))
            })
            .collect(),
        ActivationKind::Bytes => inputs
            .map(|i| {
                let at = row * x.num_groups * GROUP + i;
                let steps = x.headers[at / GROUP].steps.each();
                let step = f64::from(x.units[row]) * f64::from(steps[at % GROUP / (GROUP / 2)]);
                f64::from(x.bytes[at]) * step
            })
            .collect(),
    }
}

/// Rounded to bf16, ties away from 0.
fn near(w: f32) -> f32 {
    f32::from_bits(w.to_bits().wrapping_add(0x8000) & 0xffff_0000)
}

/// What a layer should give for a row, and a bound of its rounding.
fn exact(linear: &Linear, weights: &[f32], inputs: &Activations, row: usize) -> Vec<(f64, f64)> {
    let x = rounded(inputs, row);
    let bytes = inputs.is(ActivationKind::Bytes);
    weights
        .chunks_exact(x.len())
        .enumerate()
        .map(|(j, w)| {
            let tiles = inputs.is(ActivationKind::Tiles);
            let codes = matches!(linear.weight.stored, Stored::Codes(_));
            let rounds = match linear.weight.stored {
                Stored::K(k) => k.scales() == 2,
                stored => stored == Stored::F16,
            };
            let bf16_inputs = inputs.is(ActivationKind::Bf16);
            let weight = |w| match (tiles && codes, rounds && bf16_inputs) {
                (true, _) => near(w),
                (_, true) => bf16::from_f32(w).to_f32(),
                _ => w,
            };
            let products = w.iter().zip(&x).map(|(w, x)| x * f64::from(weight(*w)));
            let bias = linear.bias.as_ref().map_or(0.0, |b| f64::from(b[j]));
            let (sum, size) =
                products.fold((bias, bias.abs()), |(sum, size), p| (sum + p, size + p.abs()));
            // Minimums (at most 1 here) and the sums they are multiplied with are rounded to bf16.
            let sums = x.chunks(GROUP).map(|group| group.iter().sum::<f64>().abs());
            let mins = if bytes && codes { sums.sum::<f64>() / 250.0 } else { 0.0 };
            (sum, 1e-5 * size + mins)
        })
        .collect()
}

#[test]
fn rows_are_what_was_packed() {
    for (k, n) in [(64, 70), (37, 5), (96, 32), (512, 35)] {
        for (linear, weights) in layers(k, n) {
            let mut row = vec![0.0; k];
            for j in [0, n / 2, n - 1] {
                linear.row_into(j, &mut row);
                assert_eq!(row, weights[j * k..(j + 1) * k], "row {j} of {linear:?}");
            }
        }
    }
}

#[test]
fn every_path_gives_the_definition() {
    for (k, n, tokens) in [
        (64, 70, 1),
        (64, 33, 3),
        (96, 64, 7),
        (160, 96, 200),
        (37, 40, 8),
        (256, 70, 1),
        (512, 40, 3),
        (256, 33, 9),
    ] {
        let x = values(tokens * k, 7);
        for (linear, weights) in layers(k, n) {
            for path in Isa::available() {
                let mut inputs = Activations::default();
                inputs.fill(path, linear.activation_kind(), &x, k, None);
                let mut out = vec![1.0; tokens * n];
                forward_on(path, [&linear], &inputs, [&mut out], Put::Set);
                let mut added = vec![1.0; tokens * n];
                forward_on(path, [&linear], &inputs, [&mut added], Put::Add);
                for t in [0, tokens / 2, tokens - 1] {
                    let row = exact(&linear, &weights, &inputs, t);
                    for (j, (exact, bound)) in row.iter().enumerate() {
                        let (got, added) = (out[t * n + j], added[t * n + j]);
                        let error = (f64::from(got) - exact).abs();
                        assert!(
                            error <= *bound,
                            "{path} {} {k}x{n}, {j} of {t} of {tokens}: {got} {exact} {bound} {:?}",
                            linear.form(),
                            linear.weight.stored
                        );
                        assert!((added - got - 1.0).abs() <= 1e-5 + *bound as f32);
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_batch_or_the_threads() {
    let (k, n, tokens) = (256, 96, 395);
    let x = values(tokens * k, 3);
    let threads = Threads::new(3).unwrap();
    for (linear, _) in layers(k, n) {
        let kind = linear.activation_kind();
        for path in Isa::available() {
            let run = |rows: Range<usize>| {
                let mut inputs = Activations::default();
                inputs.fill(path, kind, &x[rows.start * k..rows.end * k], k, None);
                let mut out = vec![0.0; rows.len() * n];
                forward_on(path, [&linear], &inputs, [&mut out], Put::Set);
                out
            };
            let together = threads.run(|| run(0..tokens));
            for rows in [0..1, 190..197, 191..193, 5..11, 389..395, 0..100] {
                assert_eq!(run(rows.clone()), together[rows.start * n..rows.end * n], "{path}");
            }
        }
    }
}

#[test]
fn layers_of_one_input_are_what_each_is_alone() {
    let (k, tokens) = (64, 9);
    let x = values(tokens * k, 4);
    // Three that differ in how they are stored.
    let [a, b, c] = [(40, 0), (32, 2), (97, 5)].map(|(n, which)| {
        let mut layers = layers(k, n);
        layers.retain(|(layer, _)| layer.activation_kind() == ActivationKind::Bf16);
        layers.remove(which).0
    });
    let mut inputs = Activations::default();
    inputs.set(ActivationKind::Bf16, &x, k);
    let mut outs = [&a, &b, &c].map(|linear| vec![0.0; tokens * linear.out_features()]);
    let [oa, ob, oc] = &mut outs;
    forward_all([&a, &b, &c], &inputs, [oa, ob, oc]);
    for (linear, out) in [a, b, c].iter().zip(outs) {
        let mut alone = vec![0.0; out.len()];
        linear.forward(&inputs, &mut alone);
        assert_eq!(alone, out);
    }
}

#[test]
fn a_gate_and_its_up_projection_are_one_loop() {
    for (k, n, tokens) in [(64, 96, 9), (64, 70, 2)] {
        let x = values(tokens * k, 5);
        for ((gate, _), (up, _)) in layers(k, n).into_iter().zip(layers(k, n)) {
            let kind = gate.activation_kind();
            let mut inputs = Activations::default();
            inputs.set(kind, &x, k);
            let (mut gates, mut ups) = (vec![0.0; tokens * n], vec![0.0; tokens * n]);
            gate.forward(&inputs, &mut gates);
            up.forward(&inputs, &mut ups);
            gated(Activation::Silu, &mut gates, &ups);
            for kind in KINDS {
                let mut expected = Activations::default();
                expected.set(kind, &gates, n);
                let mut out = Activations::default();
                forward_gated(&gate, &up, Activation::Silu, &inputs, kind, &mut out);
                assert_eq!(filled(&out), filled(&expected));
            }
        }
    }
}

#[test]
fn norms_are_rounded_like_any_input() {
    let (k, tokens) = (70, 300);
    let (x, weight) = (values(tokens * k, 6), values(k, 8));
    let mut normed = vec![0.0; tokens * k];
    crate::rms_norm_rows(&x, &weight, 1e-5, &mut normed);
    for kind in KINDS {
        let (mut a, mut b) = (Activations::default(), Activations::default());
        a.set_normed(kind, &x, &weight, 1e-5);
        b.set(kind, &normed, k);
        assert_eq!(filled(&a), filled(&b));
    }
}

#[test]
fn scales_beyond_f16_are_not_taken() {
    for (scale, fits) in [(1e-3, true), (1e6, false), (1e-7, false), (0.0, true)] {
        let fill = |_: usize, _: usize, out: &mut [GroupCodes]| {
            out.fill(GroupCodes { scale, ..GroupCodes::default() });
        };
        let fill = |_: Range<usize>| Ok::<_, ()>(fill);
        let linear =
            Linear::from_codes((FORMATS[0], ActivationKind::Bf16), None, 32, 1, fill).unwrap();
        assert_eq!(linear.is_some(), fits, "{scale}");
    }
}

#[test]
fn sums_are_the_same_on_every_set() {
    let (k, n, tokens) = (96, 70, 13);
    let x = values(tokens * k, 11);
    for format in FORMATS {
        for kind in KINDS {
            let (linear, _) = coded((format, kind), k, n, 12);
            let run = |isa: Isa| {
                let mut inputs = Activations::default();
                inputs.fill(isa, kind, &x, k, None);
                let mut out = vec![0.0; tokens * n];
                forward_on(isa, [&linear], &inputs, [&mut out], Put::Set);
                out
            };
            // All that have multiply-add.
            let fused = Isa::available().into_iter().filter(|isa| isa.has(Set::Avx2));
            let all: Vec<_> = fused.map(run).collect();
            all.windows(2).for_each(|pair| assert_eq!(pair[0], pair[1], "{format:?} {kind:?}"));
        }
    }
}

#[test]
#[should_panic(expected = "inputs as Bf16")]
fn inputs_of_another_kind_are_refused() {
    let linear = Linear::bf16(ActivationKind::Bf16, &[0.0; 32], None, 32, 1);
    let mut inputs = Activations::default();
    inputs.set(ActivationKind::F32, &[0.0; 32], 32);
    linear.forward(&inputs, &mut [0.0]);
}

/// `cargo test --release -p kvasir-kernels linear_speed -- --ignored --nocapture`
#[test]
#[ignore = "prints times"]
fn linear_speed() {
    for threads in [1, 2] {
        let team = Threads::new(threads).unwrap();
        for (k, n) in [(576, 960), (576, 1536), (1536, 576), (576, 49152)] {
            for which in 0..14 {
                let name = [
                    "q4+min",
                    "q4",
                    "q8",
                    "q4+min bytes",
                    "q4 bytes",
                    "q8 bytes",
                    "q4+min f32",
                    "q8 f32",
                    "bf16",
                    "bf16 f32",
                    "f32",
                    "bf16 tiles",
                    "q4+min tiles",
                    "q8 tiles",
                ][which];
                if name.ends_with("tiles") && !Isa::best().has(Set::Amx) {
                    continue;
                }
                let plain = values(n * k, 90);
                let (linear, kind) = match which {
                    0..6 => (
                        coded((FORMATS[which % 3], KINDS[1 + which / 3]), k, n, 1).0,
                        KINDS[1 + which / 3],
                    ),
                    6 | 7 => (coded((FORMATS[2 * (which - 6)], KINDS[0]), k, n, 1).0, KINDS[0]),
                    8 | 9 => (Linear::bf16(KINDS[9 - which], &plain, None, k, n), KINDS[9 - which]),
                    10 => (Linear::new(&plain, None, k, n), KINDS[0]),
                    11 => (Linear::bf16(KINDS[3], &plain, None, k, n), KINDS[3]),
                    _ => (coded((FORMATS[2 * (which - 12)], KINDS[3]), k, n, 1).0, KINDS[3]),
                };
                for m in [1, 4, 32, 512] {
                    if n > 10_000 && m > 100 {
                        continue;
                    }
                    let x = values(m * k, 2);
                    let mut inputs = Activations::default();
                    inputs.set(kind, &x, k);
                    let mut out = vec![0.0; m * n];
                    let mut best = f64::MAX;
                    team.run(|| {
                        for _ in 0..20 {
                            let clock = std::time::Instant::now();
                            linear.forward(&inputs, &mut out);
                            best = best.min(clock.elapsed().as_secs_f64());
                        }
                    });
                    println!(
                        "{threads} threads {name} {k} -> {n}, {m} rows: {:.1} us, {:.0} GFLOP/s, {:.1} GB/s",
                        best * 1e6,
                        2e-9 * (m * n * k) as f64 / best,
                        1e-9 * linear.num_bytes() as f64 / best
                    );
                }
            }
        }
    }
}
