//! `cargo bench -p kvasir-cache`: a block of 32 tokens of 64 channels through every codec that needs no
//! statistics (those of joint recipes are measured as trellis codes, in kernels).
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvasir_cache::codec::{Codec, Int8, KiviKeys, KiviValues, RawF16, RawF32};

const TOKENS: usize = 32;
const DIM: usize = 64;

fn codecs(c: &mut Criterion) {
    let all: [(&str, &dyn Codec); 7] = [
        ("f16", &RawF16),
        ("f32", &RawF32),
        ("int8", &Int8),
        ("kivi4 keys", &KiviKeys::<4>),
        ("kivi4 values", &KiviValues::<4>),
        ("kivi2 keys", &KiviKeys::<2>),
        ("kivi2 values", &KiviValues::<2>),
    ];
    let rows: Vec<f32> =
        (0..TOKENS * DIM).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
    for name in ["encode", "decode"] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(rows.len() as u64));
        for (codec_name, codec) in all {
            let mut slot = vec![0; codec.slot_bytes(TOKENS, DIM)];
            codec.encode(&rows, DIM, &mut slot);
            let mut out = vec![0.0; rows.len()];
            group.bench_function(BenchmarkId::from_parameter(codec_name), |b| {
                b.iter(|| match name {
                    "encode" => codec.encode(&rows, DIM, &mut slot),
                    _ => codec.decode(&slot, TOKENS, DIM, &mut out),
                });
            });
        }
    }
}

criterion_group!(benches, codecs);
criterion_main!(benches);
