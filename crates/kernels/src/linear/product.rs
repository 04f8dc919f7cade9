//! HOT PATH. One tile of a matrix against rows of inputs, by the best path the processor has.

use std::cell::RefCell;
use std::ops::Range;

use super::activations::{ActivationKind, Activations};
use super::bytes::GroupHeader;
use super::packed::{GROUP, Packed, TILE};
use super::portable;
#[cfg(target_arch = "x86_64")]
use super::x86::{pairs, quads};
use crate::AlignedBytes;
use crate::isa::{Isa, Set};

/// Most rows of any register block: 6 × 2 sums of a group, as many of all groups, weights and an input fill 27 of
/// 32 registers.
pub(super) const ROWS: usize = 6;

/// Outputs of a register block.
pub(super) type Block = [[f32; TILE]; ROWS];

/// Rows of rounded inputs.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) num_rows: usize,
    pub(super) num_groups: usize,
    /// Inputs from one row to the next.
    pub(super) stride: usize,
    /// bf16, `[num_rows, num_groups · GROUP]`, if inputs are that.
    pub(super) bits: *const u16,
    /// Their sums, `[num_rows, num_groups]`.
    pub(super) sums: *const f32,
    /// Bytes, `[num_rows, num_groups · GROUP]`, if inputs are that.
    pub(super) bytes: *const i8,
    /// `[num_rows, num_groups]`.
    pub(super) headers: *const GroupHeader,
    /// Sums of groups of bytes as bf16, `[num_rows, num_groups, rounded up to pairs]`.
    pub(super) byte_sums: *const u16,
    /// `[num_rows]`.
    pub(super) units: *const f32,
    x: &'a Activations,
    first: usize,
}

impl<'a> Rows<'a> {
    /// # Panics
    /// If `x` has fewer rows.
    fn new(x: &'a Activations, rows: Range<usize>) -> Self {
        assert!(rows.end <= x.rows, "rows {rows:?} of {}", x.rows);
        let groups = x.num_groups;
        let all = Self {
            num_rows: x.rows,
            num_groups: groups,
            stride: groups * GROUP,
            bits: x.bits.as_ptr(),
            sums: x.sums.as_ptr(),
            bytes: x.bytes.as_ptr(),
            headers: x.headers.as_ptr(),
            byte_sums: x.byte_sums.as_ptr(),
            units: x.units.as_ptr(),
            x,
            first: 0,
        };
        all.part(rows.start, rows.len())
    }

    /// `num_rows` of the rows, from `first` on.
    #[inline(always)]
    pub(super) fn part(&self, first: usize, num_rows: usize) -> Self {
        debug_assert!(first + num_rows <= self.num_rows);
        let groups = first * self.num_groups;
        Self {
            num_rows,
            bits: self.bits.wrapping_add(first * self.stride),
            sums: self.sums.wrapping_add(groups),
            bytes: self.bytes.wrapping_add(first * self.stride),
            headers: self.headers.wrapping_add(groups),
            byte_sums: self.byte_sums.wrapping_add(first * self.num_groups.next_multiple_of(2)),
            units: self.units.wrapping_add(first),
            first: self.first + first,
            ..*self
        }
    }

    /// Blocks of at most `most` rows, as (first, rows), nearly equal in size: one of two rows would wait for its
    /// own sums.
    #[inline(always)]
    pub(super) fn blocks(&self, most: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n, blocks) = (self.num_rows, self.num_rows.div_ceil(most));
        (0..blocks).map(move |i| {
            let first = i * n / blocks;
            (first, (i + 1) * n / blocks - first)
        })
    }

    /// The inputs, and the number of a row among them.
    pub(super) fn row(&self, i: usize) -> (&'a Activations, usize) {
        (self.x, self.first + i)
    }
}

/// Where the products of a tile go: a row of features for each row of inputs.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    /// First feature of the first row.
    pub(super) start: *mut f32,
    /// From one row to the next.
    pub(super) stride: usize,
    /// Features that are written, at most [`TILE`].
    pub(super) features: usize,
    /// `[features]`
    pub(super) bias: Option<&'a [f32]>,
    /// Whether products are added to what is there.
    pub(super) add: bool,
}

impl Target<'_> {
    /// From some row on.
    #[inline(always)]
    pub(super) fn from(&self, row: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.stride), ..*self }
    }

    /// Puts the products of a row.
    ///
    /// # Safety
    /// The row is inside what `start` points to, and nobody else's.
    pub(super) unsafe fn put(&self, row: usize, products: &[f32; TILE]) {
        // SAFETY: by contract.
        let out = unsafe {
            std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.features)
        };
        for (f, (out, product)) in out.iter_mut().zip(products).enumerate() {
            let sum = product + self.bias.map_or(0.0, |bias| bias[f]);
            *out = if self.add { *out + sum } else { sum };
        }
    }
}

/// What products run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Products of bf16 in AVX-512.
    #[cfg(target_arch = "x86_64")]
    Bf16,
    /// Products of bytes in AVX-512 (and of bf16: minimums).
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
        if Isa::best().has(Set::Avx512) {
            match kind {
                ActivationKind::Bf16
                    if Isa::best().has(Set::Avx512Bf16) && Isa::best().has(Set::Avx512Icl) =>
                {
                    return Self::Bf16;
                }
                ActivationKind::Bytes if Isa::best().has(Set::Avx512Bf16) =>
                {
                    return Self::Vnni;
                }
                _ => {}
            }
        }
        Self::Portable(Isa::best())
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
    static TURNED: RefCell<Turned> = RefCell::default();
}

/// Puts the products of one tile of a matrix with some rows.
///
/// # Safety
/// `target` is as many rows that nobody else has.
pub(super) unsafe fn multiply_tile(
    path: Path,
    matrix: &Packed,
    tile: usize,
    x: &Activations,
    rows: Range<usize>,
    target: &Target<'_>,
) {
    let rows = Rows::new(x, rows);
    assert_eq!(matrix.num_groups, rows.num_groups, "groups of inputs");
    TURNED.with_borrow_mut(|turned| {
        // SAFETY: by contract.
        unsafe { turned.multiply(path, matrix, matrix.tile(tile), &rows, target) }
    });
}

impl Turned {
    /// Room for a tile's weights and scales.
    fn room(&mut self, weights: usize, scales: usize) -> Option<(&mut [u8], &mut [f32])> {
        if self.weights.as_ref().is_none_or(|w| w.len() < weights) {
            self.weights = Some(AlignedBytes::zeroed(weights));
        }
        if self.scales.len() < scales {
            self.scales.resize(scales, 0.0);
        }
        let own = self.weights.as_mut()?.as_mut_slice();
        Some((&mut own[..weights], &mut self.scales[..scales]))
    }

    /// # Safety
    /// As [`multiply_tile`].
    unsafe fn multiply(
        &mut self,
        path: Path,
        matrix: &Packed,
        tile: &[u8],
        rows: &Rows<'_>,
        target: &Target<'_>,
    ) {
        let groups = matrix.num_groups;
        // SAFETY of all blocks: the path says that the processor can; a matrix's own tiles are whole and aligned, and
        // lengths of turned ones are as made here; the number of groups is the rows'; the target is by contract.
        match (path, matrix.codes) {
            #[cfg(target_arch = "x86_64")]
            (Path::Bf16, Some(format)) if rows.num_rows > ROWS => {
                let room = self.room(groups * pairs::GROUP_BYTES, groups * 2 * TILE);
                let Some((weights, scales)) = room else { return };
                // SAFETY: see above.
                unsafe {
                    pairs::turn_tile(format, tile, weights, scales);
                    pairs::multiply_turned(format.has_min, weights, scales, rows, target);
                }
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: see above.
            (Path::Bf16, format) => unsafe { pairs::multiply_stored(format, tile, rows, target) },
            #[cfg(target_arch = "x86_64")]
            (Path::Vnni, Some(format)) if rows.num_rows > quads::ROWS => {
                let room = self.room(groups * quads::GROUP_BYTES, quads::num_scales(groups));
                let Some((weights, scales)) = room else { return };
                // SAFETY: see above.
                unsafe {
                    quads::turn_tile(format, tile, weights, scales);
                    quads::multiply_turned(format, weights, scales, rows, target);
                }
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: see above.
            (Path::Vnni, Some(format)) => unsafe {
                quads::multiply_stored(format, tile, rows, target);
            },
            // Only codes take bytes.
            #[cfg(target_arch = "x86_64")]
            (Path::Vnni, None) => {}
            (Path::Portable(isa), format) => {
                let plain = groups * portable::GROUP_WEIGHTS;
                if self.plain.len() < plain {
                    self.plain.resize(plain, 0.0);
                }
                if self.scales.len() < groups * 2 * TILE {
                    self.scales.resize(groups * 2 * TILE, 0.0);
                }
                portable::turn_tile(matrix, tile, &mut self.plain, &mut self.scales);
                let mut block = Block::default();
                for (first, n) in rows.blocks(ROWS) {
                    let rows = rows.part(first, n);
                    let (plain, scales) = (&self.plain, &self.scales);
                    portable::multiply(isa, format, plain, scales, &rows, &mut block);
                    for (row, products) in block[..n].iter().enumerate() {
                        // SAFETY: by contract.
                        unsafe { target.put(first + row, products) };
                    }
                }
            }
        }
    }
}
