//! What samples are drawn with.

use crate::random::{SplitMix64, hash};

/// Random choices of one sample.
pub(super) struct Draw(SplitMix64);

impl Draw {
    /// Those of sample `index` of a task.
    pub(super) fn new(seed: u64, task: &str, index: usize) -> Self {
        let bytes = seed.to_le_bytes().into_iter().chain(task.bytes());
        let bytes = bytes.chain((index as u64).to_le_bytes());
        Self(SplitMix64::new(hash(0, bytes)))
    }

    /// Below `n`, which is not 0.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.0.next() % n as u64) as usize
    }

    /// From `low` to `high`, both included.
    pub(super) fn number(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// One of some.
    pub(super) fn one<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }

    /// `n` different ones of some, in any order; all of them if there are fewer.
    pub(super) fn some<'a, T: ?Sized>(&mut self, n: usize, of: &[&'a T]) -> Vec<&'a T> {
        let mut rest = of.to_vec();
        (0..n.min(of.len())).map(|_| rest.swap_remove(self.below(rest.len()))).collect()
    }

    /// `n` different numbers of as many digits.
    pub(super) fn codes(&mut self, n: usize, digits: u32) -> Vec<usize> {
        let mut codes: Vec<usize> = Vec::with_capacity(n);
        while codes.len() < n {
            let code = self.number(10usize.pow(digits - 1), 10usize.pow(digits) - 1);
            if !codes.contains(&code) {
                codes.push(code);
            }
        }
        codes
    }
}
