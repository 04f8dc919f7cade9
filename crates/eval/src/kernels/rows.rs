//! What is done to rows between products: norms, rotations, activations, roundings, codes of the cache.

use half::f16;
use kvasir_kernels::trellis::Layout;
use kvasir_kernels::{
    ActivationKind, Activations, OnlineSoftmax, RopeScaling, RopeTable, argmax, f16_to_f32,
    f32_to_f16, gelu, rms_norm_rows, rotate,
};

use super::{Bench, Work, numbers};

/// Rows of a prompt that pass.
const ROWS: usize = 128;
/// Bits of the trellis codes that are measured, all segments alike.
const TRELLIS_BITS: [u8; 3] = [2, 3, 4];
/// Rows of a block, and coefficients of a row: a layer of SmolLM2.
const BLOCK: usize = 32;
const COEFFICIENTS: usize = 192;

/// Work that counts bytes only.
fn moved(rows: usize, bytes: usize) -> Work {
    Work { rows, operations: 0.0, bytes: bytes as f64, product: None }
}

pub(super) fn measure(bench: &mut Bench<'_>) {
    let hidden = bench.sizes.hidden;
    let n = ROWS * hidden;
    let (x, weight) = (numbers(n), numbers(hidden));
    let mut out = vec![0.0; n];
    bench.time("RMS norm", &moved(ROWS, 4 * n), &mut || rms_norm_rows(&x, &weight, 1e-5, &mut out));
    let kinds =
        [ActivationKind::Bytes, ActivationKind::Tiles, ActivationKind::Bf16, ActivationKind::F32];
    for kind in kinds {
        let mut inputs = Activations::default();
        bench.time(&format!("norm and inputs to {kind}"), &moved(ROWS, 4 * n), &mut || {
            inputs.set_normed(kind, &x, &weight, 1e-5);
        });
    }
    let table = RopeTable::new(64, 10_000.0, &RopeScaling::None, 64);
    let mut heads = numbers(ROWS * 64);
    bench.time("RoPE of heads of 64", &moved(ROWS, 4 * heads.len()), &mut || {
        for (i, head) in heads.chunks_exact_mut(64).enumerate() {
            let (cos, sin) = table.at(i % 64);
            rotate(head, cos, sin);
        }
    });
    let (mut scores, mut sums) = (numbers(n), [0.0; 64]);
    bench.time("softmax of rows", &moved(ROWS, 4 * n), &mut || {
        for row in scores.chunks_exact_mut(hidden) {
            OnlineSoftmax::default().push(row, &mut sums);
        }
    });
    let mut gates = numbers(n);
    bench.time("activation (GELU)", &moved(ROWS, 4 * n), &mut || gelu(&mut gates));
    let (mut halves, mut floats) = (vec![f16::ZERO; n], vec![0.0; n]);
    bench.time("conversion f32 to f16", &moved(ROWS, 4 * n), &mut || f32_to_f16(&x, &mut halves));
    bench.time("conversion f16 to f32", &moved(ROWS, 2 * n), &mut || {
        f16_to_f32(&halves, &mut floats);
    });
    let logits = numbers(bench.sizes.vocab);
    bench.time("argmax of logits", &moved(1, 4 * logits.len()), &mut || {
        std::hint::black_box(argmax(&logits));
    });
    for bits in TRELLIS_BITS {
        let segments = COEFFICIENTS / 16;
        let Some(layout) = Layout::new(vec![bits; segments], vec![1.0; segments]) else { continue };
        let z = numbers(BLOCK * COEFFICIENTS);
        let mut codes = vec![0; BLOCK * layout.row_bytes()];
        let work = moved(BLOCK, 4 * z.len());
        bench.time(&format!("trellis encode, {bits} bits"), &work, &mut || {
            layout.encode(&z, &mut codes);
        });
        let (means, mut rows) = (vec![0.0; COEFFICIENTS], vec![0.0; z.len()]);
        let work = moved(BLOCK, codes.len());
        bench.time(&format!("trellis decode, {bits} bits"), &work, &mut || {
            layout.decode(&codes, BLOCK, 1.0, &means, 0, &mut rows, COEFFICIENTS);
        });
    }
}
