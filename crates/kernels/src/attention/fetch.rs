//! Fetching what is read next.

use crate::simd::tile::Meanwhile;

/// Lines that are asked for at once: a core waits for some 16 at a time, and then for one of them before the next.
const BURST: usize = 10;

/// What is read next, by the stage that fetches it. Memory answers slowly and many at a time, so each stage asks for a part: loops line
/// by line, others for a burst before they begin. What is needed first is asked for first.
#[derive(Clone, Copy, Default)]
pub(super) struct Ahead<'a> {
    /// While keys, and values before them, become integers.
    pub(super) whole: [&'a [u8]; 2],
    /// Before queries are turned.
    pub(super) turn: &'a [u8],
    /// With products of keys.
    pub(super) keys: &'a [u8],
    /// Before scores become weights.
    pub(super) weigh: &'a [u8],
    /// With products of values.
    pub(super) values: &'a [u8],
    /// Before the next block is looked up.
    pub(super) end: &'a [u8],
}

impl<'a> Ahead<'a> {
    /// Keys and values that are read next, for a block whose keys and values are made integers first, or are not.
    pub(super) fn new([keys, values]: [&'a [u8]; 2], whole: bool) -> Self {
        let part = |bytes: &'a [u8], lines: usize| bytes.split_at(bytes.len().min(64 * lines));
        if whole {
            // Values are looked at first.
            let (first, values) = part(values, values.len().div_ceil(64) * 2 / 5);
            let (turn, second) = part(values, values.len().div_ceil(64) / 3);
            let (weigh, keys) = part(keys, BURST);
            let (end, keys) = part(keys, BURST / 2);
            let (score, mix) = part(keys, keys.len().div_ceil(64) / 2);
            return Self { whole: [second, first], turn, keys: score, weigh, values: mix, end };
        }
        let (turn, keys) = part(keys, BURST);
        let (weigh, values) = part(values, BURST);
        let (end, values) = part(values, BURST);
        Self { whole: [&[]; 2], turn, keys, weigh, values, end }
    }
}

/// Asks for all of it.
pub(super) fn fetch(bytes: &[u8]) {
    Fetch::new(bytes, 1).step();
}

/// Cache lines to fetch, some at every step: into L2, which takes twice as many at a time as L1 (12 and 22 GB/s
/// here), and leaves L1 to the block in hand.
pub(super) struct Fetch {
    at: *const i8,
    lines: usize,
    per_step: usize,
}

impl Fetch {
    pub(super) fn new(bytes: &[u8], steps: usize) -> Self {
        let lines = bytes.len().div_ceil(64);
        Self { at: bytes.as_ptr().cast(), lines, per_step: lines.div_ceil(steps.max(1)) }
    }
}

impl Meanwhile for Fetch {
    #[inline(always)]
    fn step(&mut self) {
        let now = self.per_step.min(self.lines);
        for _ in 0..now {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a hint, which reads nothing; the instruction is part of x86-64.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T1>(self.at);
            }
            self.at = self.at.wrapping_add(64);
        }
        self.lines -= now;
    }
}
