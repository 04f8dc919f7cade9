//! A step of decode takes no memory from the allocator once its buffers have grown.
#![allow(clippy::unwrap_used, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kvasir_cache::{BatchSlice, Recipe};
use kvasir_model::testkit::tiny_model;
use kvasir_model::{CacheOptions, ForwardBatch, Runner, Threads};

/// Counts what all threads ask for.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SEQUENCES: usize = 5;
const PROMPT: usize = 40;
/// Steps in a row without an allocation that show that buffers have grown.
const QUIET_STEPS: usize = 20;
const MOST_STEPS: usize = 200;

/// One test in this file: another one's allocations would count.
#[test]
fn a_step_allocates_nothing() {
    let model = tiny_model(1);
    for (recipe, threads) in [(Recipe::F16, 1), (Recipe::F16, 3), (Recipe::F32, 2)] {
        let mut runner = Runner::new(Threads::new(threads).unwrap());
        let mut cache = model.new_cache(CacheOptions::of(recipe)).unwrap();
        let ids: Vec<_> = (0..SEQUENCES).map(|_| cache.add_sequence(None).unwrap()).collect();
        let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 7 % 256).collect();
        for id in &ids {
            cache.reserve(*id, PROMPT).unwrap();
            let slices = [BatchSlice { sequence: *id, row: 0, start: 0, len: PROMPT }];
            let batch = ForwardBatch { tokens: &prompt, slices: &slices };
            model.forward(batch, &mut cache, &mut runner).unwrap();
            cache.commit(*id, &prompt).unwrap();
        }
        let rows: Vec<usize> = (0..SEQUENCES).collect();
        let mut logits = Vec::new();
        let mut counts: Vec<usize> = Vec::new();
        // Each thread's own buffers grow with its first task, which may come late on a busy machine.
        let quiet = |counts: &[usize]| counts.iter().rev().take_while(|n| **n == 0).count();
        let mut step = 0;
        while quiet(&counts) < QUIET_STEPS && step < MOST_STEPS {
            let start = PROMPT + step;
            let tokens = [step as u32; SEQUENCES];
            let slices: [_; SEQUENCES] =
                std::array::from_fn(|row| BatchSlice { sequence: ids[row], row, start, len: 1 });
            ids.iter().for_each(|id| cache.reserve(*id, 1).unwrap());
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let batch = ForwardBatch { tokens: &tokens, slices: &slices };
            model.forward(batch, &mut cache, &mut runner).unwrap();
            model.logits(&rows, &mut runner, &mut logits);
            counts.push(ALLOCATIONS.load(Ordering::Relaxed) - before);
            ids.iter().for_each(|id| cache.commit(*id, &tokens[..1]).unwrap());
            step += 1;
        }
        assert_eq!(quiet(&counts), QUIET_STEPS, "{recipe}, {threads} threads: {counts:?}");
        assert!(counts[0] > 0, "nothing was counted: {counts:?}");
    }
}
