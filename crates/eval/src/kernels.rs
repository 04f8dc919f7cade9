//! Speed of the kernels that a step is made of, against what this machine can do at most in the same run.

use std::time::Instant;

use kvasir_kernels::trellis::Layout;
use kvasir_kernels::{
    ActivationKind, Activations, CodeFormat, GroupCodes, Linear, Product, Threads, peak_operations,
    peak_read_bytes, rms_norm_rows,
};
use serde::Serialize;

use crate::percentiles::median;

/// Sizes of a model's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Tokens.
    pub vocab: usize,
}

/// What the machine can do, all threads together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peak {
    /// 10⁹ operations a second with f32; 0 where it was not measured.
    pub f32_gflops: f64,
    /// The same with bf16.
    pub bf16_gflops: f64,
    /// The same with bytes.
    pub int8_gops: f64,
    /// 10⁹ bytes a second read from memory.
    pub read_gb: f64,
}

/// One kernel at one size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kernel {
    /// What it is.
    pub name: String,
    /// Rows (tokens) of the batch.
    pub rows: usize,
    /// Median time of a call.
    pub microseconds: f64,
    /// 10⁹ operations a second.
    pub gflops: f64,
    /// 10⁹ bytes of weights or codes read a second.
    pub gb: f64,
    /// Of the peak of the products it uses; 0 where that was not measured.
    pub share_of_peak: f64,
    /// Of the peak of reading.
    pub share_of_read: f64,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Threads.
    pub threads: usize,
    /// The layers' sizes.
    pub sizes: Sizes,
    /// The machine.
    pub peak: Peak,
    /// The kernels.
    pub kernels: Vec<Kernel>,
}

/// Batches that are measured: one sequence, a few, many in decode, a prompt.
const ROWS: [usize; 5] = [1, 4, 32, 64, 512];
/// Rows of logits that one step needs at most.
const MOST_LOGIT_ROWS: usize = 64;
/// Bits of the trellis codes that are measured, all segments alike.
const TRELLIS_BITS: [u8; 3] = [2, 3, 4];
const TRELLIS_ROWS: usize = 4096;

/// Measures everything. `repetitions` calls each, after one to warm up; a kernel that takes less than 100 µs
/// is called several times in each. `progress` is told (done, of).
pub fn measure(
    threads: &Threads,
    sizes: Sizes,
    repetitions: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Report {
    let Sizes { hidden, ffn, vocab } = sizes;
    let layers =
        [("qkv", hidden, 2 * hidden), ("gate, up", hidden, 2 * ffn), ("down", ffn, hidden)];
    let q4 = Some(CodeFormat { lowest: 0, bits: 4, has_min: true });
    let q8 = Some(CodeFormat { lowest: -128, bits: 8, has_min: false });
    let (bf16, bytes) = (ActivationKind::Bf16, ActivationKind::Bytes);
    let formats = [
        ("q4 with minimum, inputs in bytes", q4, bytes),
        ("q8, inputs in bytes", q8, bytes),
        ("q4 with minimum", q4, bf16),
        ("q8", q8, bf16),
        ("bf16", None, bf16),
    ];
    let mut jobs = Vec::new();
    for format in formats {
        jobs.extend(layers.map(|(name, inputs, outputs)| (name, format, inputs, outputs, ROWS[4])));
    }
    jobs.push(("logits", formats[3], hidden, vocab, MOST_LOGIT_ROWS));
    let total = jobs.len() + TRELLIS_BITS.len() + 2;
    let peak = threads.run(|| {
        let operations = |product| peak_operations(product).unwrap_or(0.0) * 1e-9;
        Peak {
            f32_gflops: operations(Product::F32),
            bf16_gflops: operations(Product::Bf16),
            int8_gops: operations(Product::Int8),
            read_gb: peak_read_bytes() * 1e-9,
        }
    });
    progress(1, total);
    let or = |peak: f64, other: f64| if peak > 0.0 { peak } else { other };
    let mut kernels = Vec::new();
    for (name, (format_name, format, kind), inputs, outputs, most_rows) in jobs {
        let linear = linear(format, kind, inputs, outputs);
        let products = if kind == bytes { peak.int8_gops } else { peak.bf16_gflops };
        let products = or(products, peak.f32_gflops);
        for rows in ROWS.into_iter().filter(|rows| *rows <= most_rows) {
            let mut x = Activations::default();
            x.set(kind, &numbers(rows * inputs), inputs);
            let mut out = vec![0.0; rows * outputs];
            let seconds = time(repetitions, &mut || threads.run(|| linear.forward(&x, &mut out)));
            kernels.push(kernel(
                format!("{name} {outputs} x {inputs}, {format_name}"),
                rows,
                seconds,
                (2 * rows * inputs * outputs) as f64,
                linear.num_bytes() as f64,
                (products, peak.read_gb),
            ));
        }
        progress(1 + kernels.len() / ROWS.len(), total);
    }
    let (x, weight) = (numbers(512 * hidden), numbers(hidden));
    let mut out = vec![0.0; x.len()];
    let seconds = time(repetitions, &mut || rms_norm_rows(&x, &weight, 1e-5, &mut out));
    let operations = (4 * x.len()) as f64;
    let bytes = (4 * x.len()) as f64;
    let one = peak.f32_gflops / threads.count() as f64;
    let name = "RMS norm, one thread".to_owned();
    kernels.push(kernel(name, 512, seconds, operations, bytes, (one, peak.read_gb)));
    for (i, bits) in TRELLIS_BITS.into_iter().enumerate() {
        let Some(layout) = Layout::new(vec![bits; 12], vec![1.0; 12]) else { continue };
        let codes = vec![0x5a; TRELLIS_ROWS * layout.row_bytes()];
        let means = vec![0.0; layout.width()];
        let mut out = vec![0.0; 32 * layout.width()];
        let seconds = time(repetitions, &mut || {
            for codes in codes.chunks(32 * layout.row_bytes()) {
                layout.decode(codes, 32, 1.0, &means, 0, &mut out, layout.width());
            }
        });
        kernels.push(kernel(
            format!("trellis decode, {bits} bits, one thread"),
            TRELLIS_ROWS,
            seconds,
            (2 * TRELLIS_ROWS * layout.width()) as f64,
            codes.len() as f64,
            (one, peak.read_gb),
        ));
        progress(total - TRELLIS_BITS.len() + i + 1, total);
    }
    Report { threads: threads.count(), sizes, peak, kernels }
}

fn kernel(
    name: String,
    rows: usize,
    seconds: f64,
    operations: f64,
    bytes: f64,
    (peak, read): (f64, f64),
) -> Kernel {
    let (gflops, gb) = (operations / seconds * 1e-9, bytes / seconds * 1e-9);
    let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    Kernel {
        name,
        rows,
        microseconds: seconds * 1e6,
        gflops,
        gb,
        share_of_peak: share(gflops, peak),
        share_of_read: share(gb, read),
    }
}

/// Median seconds of a call.
fn time(repetitions: usize, call: &mut dyn FnMut()) -> f64 {
    let clock = Instant::now();
    call();
    let calls = (1e-4 / clock.elapsed().as_secs_f64().max(1e-9)).ceil().max(1.0) as usize;
    let runs: Vec<f64> = (0..repetitions.max(1))
        .map(|_| {
            let clock = Instant::now();
            (0..calls).for_each(|_| call());
            clock.elapsed().as_secs_f64() / calls as f64
        })
        .collect();
    median(&runs)
}

/// Numbers between -1 and 1, the same in every run.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect()
}

fn linear(
    format: Option<CodeFormat>,
    kind: ActivationKind,
    inputs: usize,
    outputs: usize,
) -> Linear {
    let coded = format.and_then(|format| {
        let fill = |row: usize, groups: &mut [GroupCodes]| {
            for (g, group) in groups.iter_mut().enumerate() {
                (group.scale, group.min) = (0.01, if format.has_min { -0.08 } else { 0.0 });
                group.codes = std::array::from_fn(|i| ((row + g + i) % 16) as i8 + format.lowest);
            }
            Ok::<(), ()>(())
        };
        Linear::from_codes((format, kind), None, inputs, outputs, fill).ok().flatten()
    });
    coded.unwrap_or_else(|| Linear::bf16(&numbers(inputs * outputs), None, inputs, outputs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_measured() {
        let mut last = (0, 0);
        let threads = Threads::new(1).unwrap();
        let sizes = Sizes { hidden: 64, ffn: 96, vocab: 160 };
        let report = measure(&threads, sizes, 1, &mut |done, total| last = (done, total));
        assert_eq!(last.0, last.1);
        // Three layers in five forms at five sizes, logits at four, the norm, three trellises.
        assert_eq!(report.kernels.len(), 3 * 5 * 5 + 4 + 1 + 3);
        assert!(report.kernels.iter().all(|k| k.microseconds > 0.0 && k.gflops > 0.0));
        assert!(report.peak.read_gb > 0.0);
    }
}
