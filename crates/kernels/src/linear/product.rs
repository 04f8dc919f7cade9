//! HOT PATH. One tile of a matrix against rows of inputs, by the best path the processor has.

use std::cell::RefCell;
use std::ops::Range;

use super::activations::{ActivationKind, Activations, STEPS};
use super::packed::{GROUP, Packed, TILE};
use super::portable;
#[cfg(target_arch = "x86_64")]
use super::x86::{pairs, quads};
use crate::AlignedBytes;
use crate::isa::Isa;

/// Most rows of any register block: 6 × 2 sums of a group, as many of all groups, weights and an input fill 27 of
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
    /// bf16, `[num_rows, num_groups · GROUP]`, if inputs are that.
    pub(super) bits: *const u16,
    /// Bytes, likewise.
    pub(super) bytes: *const i8,
    /// What bytes are worth: `[num_rows, num_groups · STEPS]`.
    pub(super) scales: *const f32,
    /// `[num_rows, num_groups]`.
    pub(super) sums: *const f32,
    /// `[num_rows, num_groups · STEPS]`, if inputs are bytes.
    pub(super) minus: *const i32,
    x: &'a Activations,
    first: usize,
}

impl<'a> Rows<'a> {
    fn new(x: &'a Activations, rows: Range<usize>) -> Self {
        let (groups, stride) = (x.num_groups, x.num_groups * GROUP);
        let all = |per_row: usize| rows.start * per_row..rows.end * per_row;
        let bytes = x.is(ActivationKind::Bytes);
        let own = if bytes { 0..0 } else { all(stride) };
        let (own_bytes, own_steps) =
            if bytes { (all(stride), all(groups * STEPS)) } else { (0..0, 0..0) };
        Self {
            num_rows: rows.len(),
            num_groups: groups,
            stride,
            bits: x.bits[own].as_ptr(),
            bytes: x.bytes[own_bytes].as_ptr(),
            scales: x.scales[own_steps.clone()].as_ptr(),
            sums: x.sums[all(groups)].as_ptr(),
            minus: x.minus[own_steps].as_ptr(),
            x,
            first: rows.start,
        }
    }

    /// The inputs, and the number of a row among them.
    pub(super) fn row(&self, i: usize) -> (&'a Activations, usize) {
        (self.x, self.first + i)
    }
}

/// What products run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Products of bf16 in AVX-512.
    #[cfg(target_arch = "x86_64")]
    Bf16,
    /// Products of bytes in AVX-512.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// Products of f32.
    Portable(Isa),
}

impl Path {
    /// The best path for some form of inputs.
    #[inline]
    pub(super) fn best(kind: ActivationKind) -> Self {
        #[cfg(target_arch = "x86_64")]
        if Isa::best() == Isa::Avx512 {
            match kind {
                ActivationKind::Bf16
                    if std::is_x86_feature_detected!("avx512bf16")
                        && std::is_x86_feature_detected!("avx512vbmi") =>
                {
                    return Self::Bf16;
                }
                ActivationKind::Bytes if std::is_x86_feature_detected!("avx512vnni") => {
                    return Self::Vnni;
                }
                _ => {}
            }
        }
        Self::Portable(Isa::best())
    }

    /// Most rows of a register block.
    fn rows(self) -> usize {
        match self {
            // 4 × 2 sums over a scale, over a group and over all, and weights fill 26 of 32 registers.
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => 4,
            _ => ROWS,
        }
    }

    /// Every path this processor can run, best first: for tests that compare them.
    #[cfg(test)]
    pub(super) fn available(kind: ActivationKind) -> Vec<Self> {
        let mut paths: Vec<Self> = Isa::available().into_iter().map(Self::Portable).collect();
        paths.insert(0, Self::best(kind));
        paths.dedup();
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
        let most = path.rows();
        let few = rows.len() <= most;
        let Some(products) = products.first_chunk_mut::<WAYS>() else { return };
        for (matrix, turned) in matrices.iter().zip(&mut *turned) {
            turned.prepare(path, matrix, tile, few);
        }
        // Blocks of nearly equal size: one of two rows would wait for its own sums.
        let blocks = rows.len().div_ceil(most);
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
            Path::Bf16 | Path::Vnni => {
                let Some(format) = matrix.codes.filter(|_| !few) else { return };
                let pairs = path == Path::Bf16;
                let len = groups * if pairs { pairs::GROUP_BYTES } else { quads::GROUP_BYTES };
                if self.weights.as_ref().is_none_or(|w| w.len() < len) {
                    self.weights = Some(AlignedBytes::zeroed(len));
                }
                grow(&mut self.scales, groups * 2 * TILE);
                let Some(weights) = &mut self.weights else { return };
                let (weights, scales) = (&mut weights.as_mut_slice()[..len], &mut self.scales);
                // SAFETY: the path says that the processor can; lengths as made above.
                unsafe {
                    if pairs {
                        pairs::turn_tile(format, bytes, weights, scales);
                    } else {
                        quads::turn_tile(format, bytes, weights, scales);
                    }
                }
            }
            Path::Portable(_) => {
                grow(&mut self.plain, groups * portable::GROUP_WEIGHTS);
                grow(&mut self.scales, groups * 2 * TILE);
                portable::turn_tile(matrix, bytes, &mut self.plain, &mut self.scales);
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
        let turned = self.weights.as_ref().zip(matrix.codes).filter(|_| !few);
        match path {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the path says that the processor can; `prepare` turned this tile, a matrix's own are
            // whole and aligned, and the number of groups is the rows'.
            Path::Bf16 => unsafe {
                match turned {
                    Some((weights, format)) => {
                        let (weights, min) = (weights.as_slice(), format.has_min);
                        pairs::multiply_turned(min, weights, &self.scales, rows, out);
                    }
                    None => pairs::multiply_stored(matrix.codes, matrix.tile(tile), rows, out),
                }
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Path::Vnni => unsafe {
                match (turned, matrix.codes) {
                    (Some((weights, format)), _) => {
                        let weights = weights.as_slice();
                        quads::multiply_turned(format, weights, &self.scales, rows, out);
                    }
                    (None, Some(format)) => {
                        quads::multiply_stored(format, matrix.tile(tile), rows, out);
                    }
                    // Only codes take bytes.
                    (None, None) => {}
                }
            },
            Path::Portable(isa) => {
                portable::multiply(isa, matrix.codes, &self.plain, &self.scales, rows, out);
            }
        }
    }
}
