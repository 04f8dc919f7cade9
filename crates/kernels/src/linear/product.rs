//! HOT PATH. One tile of a matrix against rows of inputs, by the best path the processor has.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::activations::Activations;
use super::packed::{GROUP, Packed, TILE};
use super::portable;
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::AlignedBytes;
use crate::isa::Isa;

/// Rows of a register block: 6 × 2 sums of a group, as many of all groups, weights and an input fill 27 of
/// 32 registers.
pub(super) const ROWS: usize = 6;

/// Outputs of a register block.
pub(super) type Block = [[f32; TILE]; ROWS];

/// Up to [`ROWS`] rows of rounded inputs.
pub(super) struct Rows<'a> {
    pub(super) num_rows: usize,
    pub(super) num_groups: usize,
    /// Inputs from one row to the next.
    pub(super) stride: usize,
    /// bf16, `[num_rows, num_groups · GROUP]`.
    pub(super) bits: *const u16,
    /// `[num_rows, num_groups]`.
    pub(super) sums: *const f32,
    of: PhantomData<&'a Activations>,
}

impl<'a> Rows<'a> {
    fn new(x: &'a Activations, rows: Range<usize>) -> Self {
        let (groups, stride) = (x.num_groups, x.num_groups * GROUP);
        let bits = &x.bits[rows.start * stride..rows.end * stride];
        let sums = &x.sums[rows.start * groups..rows.end * groups];
        Self {
            num_rows: rows.len(),
            num_groups: groups,
            stride,
            bits: bits.as_ptr(),
            sums: sums.as_ptr(),
            of: PhantomData,
        }
    }

    /// One row and its sums.
    pub(super) fn row(&self, i: usize) -> (&'a [u16], &'a [f32]) {
        assert!(i < self.num_rows);
        // SAFETY: `new` took both from slices of `num_rows` rows that live as long.
        unsafe {
            let bits = std::slice::from_raw_parts(self.bits.add(i * self.stride), self.stride);
            let sums = self.sums.add(i * self.num_groups);
            (bits, std::slice::from_raw_parts(sums, self.num_groups))
        }
    }
}

/// What products run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// bf16 products.
    #[cfg(target_arch = "x86_64")]
    Bf16,
    /// f32 products.
    Portable(Isa),
}

impl Path {
    #[inline]
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if Isa::best() == Isa::Avx512 && std::is_x86_feature_detected!("avx512bf16") {
            return Self::Bf16;
        }
        Self::Portable(Isa::best())
    }

    /// Every path this processor can run, best first: for tests that compare them.
    #[cfg(test)]
    pub(super) fn available() -> Vec<Self> {
        let mut paths: Vec<Self> = Isa::available().into_iter().map(Self::Portable).collect();
        paths.insert(0, Self::best());
        paths
    }
}

/// A tile made ready for many rows.
#[derive(Default)]
struct Turned {
    weights: Option<AlignedBytes>,
    plain: Vec<f32>,
    scales: Vec<f32>,
}

thread_local! {
    /// Two: a gate and its up projection are met by the same rows at the same time. With room for what they
    /// give.
    static TURNED: RefCell<([Turned; 2], [Block; 2])> = RefCell::default();
}

/// Calls `each(first row, rows, products)` for up to [`ROWS`] rows at a time with the products of
/// one tile of each matrix. `WAYS` is 1 or 2.
pub(super) fn multiply_tile<const WAYS: usize>(
    path: Path,
    matrices: [&Packed; WAYS],
    tile: usize,
    x: &Activations,
    rows: Range<usize>,
    mut each: impl FnMut(usize, usize, &mut [Block; WAYS]),
) {
    const { assert!(WAYS <= 2) };
    TURNED.with_borrow_mut(|(turned, products)| {
        let few = rows.len() <= ROWS;
        let Some(products) = products.first_chunk_mut::<WAYS>() else { return };
        for (matrix, turned) in matrices.iter().zip(&mut *turned) {
            turned.prepare(path, matrix, tile, few);
        }
        // Blocks of nearly equal size: one of two rows would wait for its own sums.
        let blocks = rows.len().div_ceil(ROWS);
        for i in 0..blocks {
            let first = rows.start + i * rows.len() / blocks;
            let end = rows.start + (i + 1) * rows.len() / blocks;
            let block = Rows::new(x, first..end);
            for ((matrix, turned), out) in matrices.iter().zip(&*turned).zip(&mut *products) {
                turned.multiply(path, matrix, tile, few, &block, out);
            }
            each(first, end - first, products);
        }
    });
}

impl Turned {
    /// Turns a tile, if its path reads turned ones.
    fn prepare(&mut self, path: Path, matrix: &Packed, tile: usize, few: bool) {
        let (groups, bytes) = (matrix.num_groups, matrix.tile(tile));
        let grow = |v: &mut Vec<f32>, len: usize| {
            if v.len() < len {
                v.resize(len, 0.0);
            }
        };
        match path {
            #[cfg(target_arch = "x86_64")]
            Path::Bf16 => {
                let Some(format) = matrix.codes.filter(|_| !few) else { return };
                let len = groups * 2 * TILE * GROUP;
                if self.weights.as_ref().is_none_or(|w| w.len() < len) {
                    self.weights = Some(AlignedBytes::zeroed(len));
                }
                grow(&mut self.scales, groups * 2 * TILE);
                let Some(weights) = &mut self.weights else { return };
                // SAFETY: the path says that the processor can; lengths as made above.
                unsafe {
                    let (weights, scales) = (weights.as_mut_slice(), &mut self.scales);
                    x86::turn_tile(format, bytes, &mut weights[..len], scales);
                }
            }
            Path::Portable(_) => {
                grow(&mut self.plain, groups * portable::GROUP_WEIGHTS);
                grow(&mut self.scales, groups * 2 * TILE);
                portable::turn_tile(matrix.codes, bytes, &mut self.plain, &mut self.scales);
            }
        }
    }

    fn multiply(
        &self,
        path: Path,
        matrix: &Packed,
        tile: usize,
        few: bool,
        rows: &Rows<'_>,
        out: &mut Block,
    ) {
        assert_eq!(matrix.num_groups, rows.num_groups, "groups of inputs");
        match path {
            #[cfg(target_arch = "x86_64")]
            Path::Bf16 => match (&self.weights, matrix.codes) {
                (Some(weights), Some(format)) if !few => {
                    let (weights, min) = (weights.as_slice(), format.has_min);
                    // SAFETY: the path says that the processor can; `prepare` turned this tile, and the
                    // number of groups is the rows'.
                    unsafe { x86::multiply_turned(min, weights, &self.scales, rows, out) }
                }
                // SAFETY: as above; a matrix's tiles are whole and aligned.
                _ => unsafe { x86::multiply_stored(matrix.codes, matrix.tile(tile), rows, out) },
            },
            Path::Portable(isa) => {
                portable::multiply(isa, matrix.codes, &self.plain, &self.scales, rows, out);
            }
        }
    }
}
