//! `kvasir bench kernels`, by itself: it changes which instruction sets all threads of the program use.

#![allow(clippy::unwrap_used)]

use kvasir_eval::kernels::{SetReport, Sizes, measure};
use kvasir_kernels::{Isa, Threads};

#[test]
fn every_kernel_is_measured_on_every_set() {
    let mut last = (0, 0);
    let threads = Threads::new(1).unwrap();
    let sizes = Sizes { hidden: 64, ffn: 96, vocab: 160 };
    let (sets, before) = (Isa::available(), Isa::best());
    let report = measure(&threads, &sets, sizes, 1, &mut |done, total| last = (done, total));
    assert_eq!((last.0, Isa::best()), (last.1, before));
    assert_eq!(report.sets.len(), sets.len());
    let names = |set: &SetReport| set.kernels.iter().map(|k| k.name.clone()).collect::<Vec<_>>();
    let tiles = |name: &String| name.starts_with("linear") && name.ends_with("inputs bf16 tiles");
    for set in &report.sets {
        let mut all = names(&report.sets[0]);
        // Only AMX has them.
        all.retain(|name| !tiles(name) || set.peak.tiles > 0.0);
        // Sets from AVX2 on have them.
        all.retain(|name| !name.ends_with("integers") || set.isa != "baseline");
        assert_eq!(names(set), all, "{}", set.isa);
        assert!(set.kernels.iter().all(|k| k.microseconds > 0.0 && k.gb > 0.0), "{}", set.isa);
        assert!(set.peak.f32 > 0.0 && set.peak.codes > 0.0, "{}", set.isa);
    }
    for family in ["linear", "attention", "scores", "values", "fold", "encode", "RoPE", "norm"] {
        assert!(names(&report.sets[0]).iter().any(|name| name.contains(family)), "{family}");
    }
    assert!(report.read_gb > 0.0);
}
