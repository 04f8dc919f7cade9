//! `cargo bench -p kvasir-kernels`: kernels on one thread.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvasir_kernels::trellis::Layout;
use kvasir_kernels::{
    ActivationKind, Activations, CodeFormat, GroupCodes, Linear, argmax, rms_norm,
};

const INPUTS: usize = 576;
const OUTPUTS: usize = 1536;

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect()
}

fn coded(format: CodeFormat) -> Option<Linear> {
    let fill = |row: usize, _: usize, groups: &mut [GroupCodes]| {
        for (g, group) in groups.iter_mut().enumerate() {
            group.scale = 0.01;
            group.codes = std::array::from_fn(|i| ((row + g + i) % 16) as i8 + format.lowest);
        }
    };
    let fill = |_: std::ops::Range<usize>| Ok::<_, ()>(fill);
    Linear::from_codes((format, ActivationKind::Bf16), None, INPUTS, OUTPUTS, fill).ok().flatten()
}

fn linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear 1536 x 576");
    let layers = [
        ("q4", coded(CodeFormat { lowest: 0, bits: 4, has_min: true })),
        ("q8", coded(CodeFormat { lowest: -128, bits: 8, has_min: false })),
        (
            "bf16",
            Some(Linear::bf16(
                ActivationKind::Bf16,
                &numbers(INPUTS * OUTPUTS),
                None,
                INPUTS,
                OUTPUTS,
            )),
        ),
        ("f32", Some(Linear::new(&numbers(INPUTS * OUTPUTS), None, INPUTS, OUTPUTS))),
    ];
    for (name, linear) in layers {
        let Some(linear) = linear else { continue };
        for rows in [1, 8, 64, 512] {
            let mut x = Activations::default();
            x.set(linear.activation_kind(), &numbers(rows * INPUTS), INPUTS);
            let mut out = vec![0.0; rows * OUTPUTS];
            group.throughput(Throughput::Elements((2 * rows * INPUTS * OUTPUTS) as u64));
            group.bench_function(BenchmarkId::new(name, rows), |b| {
                b.iter(|| linear.forward(&x, &mut out));
            });
        }
    }
}

fn rows(c: &mut Criterion) {
    let (x, weight) = (numbers(INPUTS), numbers(INPUTS));
    let mut out = vec![0.0; INPUTS];
    c.bench_function("RMS norm of 576", |b| b.iter(|| rms_norm(&x, &weight, 1e-5, &mut out)));
    let mut inputs = Activations::default();
    let many = numbers(64 * INPUTS);
    c.bench_function("64 rows of 576 normed and rounded", |b| {
        b.iter(|| inputs.set_normed(ActivationKind::Bf16, &many, &weight, 1e-5));
    });
    let logits = numbers(49152);
    c.bench_function("argmax of 49152", |b| b.iter(|| argmax(&logits)));
}

fn trellis(c: &mut Criterion) {
    let mut group = c.benchmark_group("trellis, 32 rows of 192");
    for bits in 1..=6 {
        let Some(layout) = Layout::new(vec![bits; 12], vec![1.0; 12]) else { continue };
        let z = numbers(32 * 192);
        let mut codes = vec![0; 32 * layout.row_bytes()];
        group.throughput(Throughput::Elements(z.len() as u64));
        group.bench_function(BenchmarkId::new("encode", bits), |b| {
            b.iter(|| layout.encode(&z, &mut codes));
        });
        let (means, mut out) = (vec![0.0; 192], vec![0.0; z.len()]);
        group.bench_function(BenchmarkId::new("decode", bits), |b| {
            b.iter(|| layout.decode(&codes, 32, 1.0, &means, 0, &mut out, 192));
        });
    }
}

criterion_group!(benches, linear, rows, trellis);
criterion_main!(benches);
