//! Linear layers, by the form of weights and of inputs.

use kvasir_kernels::{
    ActivationKind, Activations, CodeFormat, GroupCodes, KFormat, KGroup, Linear, Product,
};

use super::{Bench, Work, numbers};

/// Batches that are measured: one sequence, a few, many in decode, a prompt.
const ROWS: [usize; 4] = [1, 4, 32, 512];
/// Rows of logits that one step needs at most.
const MOST_LOGIT_ROWS: usize = 32;

/// What weights are held as.
#[derive(Clone, Copy)]
enum Weights {
    Codes(CodeFormat),
    K(KFormat),
    Bf16,
    F32,
}

const Q4: Weights = Weights::Codes(CodeFormat { lowest: 0, bits: 4, has_min: true });
const Q8: Weights = Weights::Codes(CodeFormat { lowest: -128, bits: 8, has_min: false });

pub(super) fn measure(bench: &mut Bench<'_>) {
    let sizes = bench.sizes;
    let gates = ("gate, up", sizes.hidden, 2 * sizes.ffn);
    let down = ("down", sizes.ffn, sizes.hidden);
    let (bytes, tiles) = (ActivationKind::Bytes, ActivationKind::Tiles);
    // Without tiles such products are those of a definition that nobody uses.
    let kinds = if bench.peak.tiles > 0.0 { &[bytes, tiles][..] } else { &[bytes] };
    for kind in kinds {
        for (weights, name) in [(Q4, "4 bits with minimum"), (Q8, "8 bits")] {
            for layer in [gates, down] {
                layer_of(bench, layer, (weights, name), *kind, ROWS[3]);
            }
        }
    }
    let k_types = [(KFormat::Q4, "Q4_K"), (KFormat::Q5, "Q5_K"), (KFormat::Q6, "Q6_K")];
    for (format, name) in k_types {
        // Whole superblocks.
        let inputs = sizes.hidden.next_multiple_of(format.block_inputs());
        let layer = ("gate, up", inputs, 2 * sizes.ffn);
        layer_of(bench, layer, (Weights::K(format), name), bytes, ROWS[3]);
    }
    if bench.peak.tiles > 0.0 {
        layer_of(bench, gates, (Weights::Bf16, "bf16"), tiles, ROWS[3]);
    }
    let logits = ("logits", sizes.hidden, sizes.vocab);
    layer_of(bench, logits, (Q4, "4 bits with minimum"), bytes, MOST_LOGIT_ROWS);
    for kind in [ActivationKind::Bf16, ActivationKind::F32] {
        layer_of(bench, gates, (Q4, "4 bits with minimum"), kind, ROWS[3]);
        layer_of(bench, gates, (Weights::Bf16, "bf16"), kind, ROWS[3]);
    }
    layer_of(bench, gates, (Weights::F32, "f32"), ActivationKind::F32, ROWS[3]);
}

fn layer_of(
    bench: &mut Bench<'_>,
    (layer, inputs, outputs): (&str, usize, usize),
    (weights, stored): (Weights, &str),
    kind: ActivationKind,
    most_rows: usize,
) {
    let linear = linear(weights, kind, inputs, outputs);
    let product = match (kind, weights) {
        (ActivationKind::Bytes, Weights::Codes(CodeFormat { bits: 4, .. }) | Weights::K(_)) => {
            Product::Codes
        }
        (ActivationKind::Bytes, _) => Product::Bytes,
        (ActivationKind::Tiles, _) => Product::Tiles,
        // Where there are no products of bf16, they are of f32.
        (ActivationKind::Bf16, _) if bench.peak.bf16 > 0.0 => Product::Bf16,
        _ => Product::F32,
    };
    for rows in ROWS.into_iter().filter(|rows| *rows <= most_rows) {
        let mut x = Activations::default();
        x.set(kind, &numbers(rows * inputs), inputs);
        let mut out = vec![0.0; rows * outputs];
        let name = format!("linear {layer} {outputs} x {inputs}, {stored}, inputs {kind}");
        let work = Work {
            rows,
            operations: (2 * rows * inputs * outputs) as f64,
            bytes: linear.num_bytes() as f64,
            product: Some(product),
        };
        bench.time_all(name, &work, &mut || linear.forward(&x, &mut out));
    }
}

fn linear(weights: Weights, kind: ActivationKind, inputs: usize, outputs: usize) -> Linear {
    let format = match weights {
        Weights::Codes(format) => format,
        Weights::K(format) => {
            let fill = |row: usize, _: usize, groups: &mut [KGroup]| {
                for (g, group) in groups.iter_mut().enumerate() {
                    (group.d, group.min) = (half::f16::from_f32(0.001), half::f16::from_f32(-0.01));
                    (group.scales, group.mins) = ([10; 2], [8; 2]);
                    group.codes =
                        std::array::from_fn(|i| ((row + g + i) % 16) as i8 + format.lowest());
                }
            };
            let fill = |_: std::ops::Range<usize>| Ok::<_, std::convert::Infallible>(fill);
            let coded = Linear::from_k((format, kind), None, inputs, outputs, fill).ok().flatten();
            return coded.unwrap_or_else(|| {
                Linear::bf16(kind, &numbers(inputs * outputs), None, inputs, outputs)
            });
        }
        Weights::Bf16 => {
            return Linear::bf16(kind, &numbers(inputs * outputs), None, inputs, outputs);
        }
        Weights::F32 => return Linear::new(&numbers(inputs * outputs), None, inputs, outputs),
    };
    let fill = |row: usize, _: usize, groups: &mut [GroupCodes]| {
        for (g, group) in groups.iter_mut().enumerate() {
            (group.scale, group.min) = (0.01, if format.has_min { -0.08 } else { 0.0 });
            group.codes = std::array::from_fn(|i| ((row + g + i) % 16) as i8 + format.lowest);
        }
    };
    let fill = |_: std::ops::Range<usize>| Ok::<_, ()>(fill);
    let coded = Linear::from_codes((format, kind), None, inputs, outputs, fill).ok().flatten();
    coded.unwrap_or_else(|| Linear::bf16(kind, &numbers(inputs * outputs), None, inputs, outputs))
}
