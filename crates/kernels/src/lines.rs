//! Buffers of floats that kernels keep from call to call.

use half::f16;

use crate::simd::LANES;

/// Floats that begin on a cache line.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    lines: Vec<Line>,
}

/// One cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

impl Lines {
    /// Makes room for `len` floats; keeps what was there.
    pub(crate) fn resize(&mut self, len: usize) {
        let lines = len.div_ceil(LANES);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0.0; LANES]));
        }
    }

    #[inline]
    pub(crate) fn as_slice(&self) -> &[f32] {
        // SAFETY: `Line` is `LANES` floats without padding, so `lines` owns this many initialised ones.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * LANES) }
    }

    /// The same as numbers of 16 bits, twice as many.
    #[inline]
    pub(crate) fn as_halves(&self) -> &[f16] {
        let len = 2 * self.lines.len() * LANES;
        // SAFETY: as in `as_slice`; all bits are numbers of 16 bits.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), len) }
    }

    #[inline]
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        let len = self.lines.len() * LANES;
        // SAFETY: as in `as_slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}
