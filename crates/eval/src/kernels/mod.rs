//! Speed of the kernels that a step is made of, on every instruction set, against what the machine can do at most in the same run.
//!
//! A kernel is a call that is timed (`Bench::time`); `linear`, `attention` and `rows` have one function for each family.

mod attention;
mod linear;
mod rows;

use std::time::Instant;

use kvasir_kernels::{Isa, Product, Threads, peak_operations, peak_read_bytes};
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

/// What the machine can do with a set, all threads together, in 10⁹ operations a second; 0 where the set has no such products.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peak {
    /// With f32.
    pub f32: f64,
    /// With bf16.
    pub bf16: f64,
    /// With codes of 4 bits and bytes.
    pub codes: f64,
    /// With bytes.
    pub bytes: f64,
    /// With tiles of bf16.
    pub tiles: f64,
}

impl Peak {
    fn of(self, product: Product) -> f64 {
        match product {
            Product::F32 => self.f32,
            Product::Bf16 => self.bf16,
            Product::Codes => self.codes,
            Product::Bytes => self.bytes,
            Product::Tiles => self.tiles,
        }
    }
}

/// One kernel at one size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kernel {
    /// What it is.
    pub name: String,
    /// Rows (tokens) of the batch.
    pub rows: usize,
    /// Threads that computed.
    pub threads: usize,
    /// Median time of a call.
    pub microseconds: f64,
    /// 10⁹ operations a second.
    pub gflops: f64,
    /// 10⁹ bytes of weights, codes or rows read a second.
    pub gb: f64,
    /// Of the peak of the products it uses on as many threads; 0 where it has none, or that was not measured.
    pub share_of_peak: f64,
    /// Of the peak of reading from memory; above 1 for what stays in caches.
    pub share_of_read: f64,
}

/// The kernels on one set, or on all sets together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SetReport {
    /// The set.
    pub isa: String,
    /// What the machine can do with it.
    pub peak: Peak,
    /// The kernels.
    pub kernels: Vec<Kernel>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Threads.
    pub threads: usize,
    /// The layers' sizes.
    pub sizes: Sizes,
    /// 10⁹ bytes a second read from memory.
    pub read_gb: f64,
    /// By instruction set.
    pub sets: Vec<SetReport>,
}

/// Measures everything on each of the sets. `repetitions` calls each, after one to warm up; a kernel that takes less than 100 µs
/// is called several times in each. `progress` is told (done, of).
pub fn measure(
    threads: &Threads,
    sets: &[Isa],
    sizes: Sizes,
    repetitions: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Report {
    let families = [linear::measure, attention::measure, rows::measure];
    let (before, total) = (Isa::best(), sets.len() * families.len());
    let read_gb = threads.run(peak_read_bytes) * 1e-9;
    let mut done = 0;
    let sets = sets
        .iter()
        .map(|isa| {
            isa.make_best();
            let operations =
                |product| threads.run(|| peak_operations(*isa, product)).unwrap_or(0.0) * 1e-9;
            let peak = Peak {
                f32: operations(Product::F32),
                bf16: operations(Product::Bf16),
                codes: operations(Product::Codes),
                bytes: operations(Product::Bytes),
                tiles: operations(Product::Tiles),
            };
            let mut bench =
                Bench { threads, sizes, repetitions, peak, read_gb, kernels: Vec::new() };
            for family in families {
                family(&mut bench);
                done += 1;
                progress(done, total);
            }
            SetReport { isa: isa.to_string(), peak, kernels: bench.kernels }
        })
        .collect();
    before.make_best();
    Report { threads: threads.count(), sizes, read_gb, sets }
}

/// What is measured on one set.
struct Bench<'a> {
    threads: &'a Threads,
    sizes: Sizes,
    repetitions: usize,
    peak: Peak,
    read_gb: f64,
    kernels: Vec<Kernel>,
}

/// What one call does.
struct Work {
    rows: usize,
    operations: f64,
    bytes: f64,
    /// What its products are of.
    product: Option<Product>,
}

impl Bench<'_> {
    /// A kernel on all threads.
    fn time_all(&mut self, name: String, work: &Work, call: &mut (dyn FnMut() + Send)) {
        let threads = self.threads;
        self.put(name, work, threads.count(), &mut || threads.run(&mut *call));
    }

    /// A kernel on this thread.
    fn time(&mut self, name: &str, work: &Work, call: &mut dyn FnMut()) {
        self.put(name.to_owned(), work, 1, call);
    }

    fn put(&mut self, name: String, work: &Work, threads: usize, call: &mut dyn FnMut()) {
        let seconds = seconds(self.repetitions, call);
        let (gflops, gb) = (work.operations / seconds * 1e-9, work.bytes / seconds * 1e-9);
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let peak = work.product.map_or(0.0, |product| self.peak.of(product));
        let peak = peak * threads as f64 / self.threads.count() as f64;
        self.kernels.push(Kernel {
            name,
            rows: work.rows,
            threads,
            microseconds: seconds * 1e6,
            gflops,
            gb,
            share_of_peak: share(gflops, peak),
            share_of_read: share(gb, self.read_gb),
        });
    }
}

/// Median seconds of a call.
fn seconds(repetitions: usize, call: &mut dyn FnMut()) -> f64 {
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
