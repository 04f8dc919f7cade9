//! HOT PATH. One tile of a matrix against rows of inputs: what rows and products look like, and which kernel meets them.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use super::activations::{ActivationKind, Activations};
use super::bytes::GroupHeader;
use super::packed::{GROUP, HALF, Packed, Stored, TILE};
use super::{k_quads, pairs, quads, tiles};
use crate::AlignedBytes;
use crate::isa::{Isa, Set};
use crate::simd::Simd;

/// Rows of rounded inputs.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) num_rows: usize,
    pub(super) num_groups: usize,
    /// Inputs from one row to the next.
    pub(super) stride: usize,
    /// [`quads::STEP_QUADS`], where the compiler is not to know it.
    pub(super) step_quads: usize,
    /// bf16, `[num_rows, num_groups · GROUP]`, if inputs are that ([`reads_words`]); in blocks, as [`Activations::tiles`], if they are for tiles.
    pub(super) bits: *const u16,
    /// Columns of a block, if inputs are for tiles.
    pub(super) columns: usize,
    /// f32, the same, if inputs are that, or bf16 that are read as f32.
    pub(super) plain: *const f32,
    /// Sums of groups of either, `[num_rows, num_groups]`.
    pub(super) sums: *const f32,
    /// Bytes, `[num_rows, num_groups · GROUP]`, if inputs are that.
    pub(super) bytes: *const i8,
    /// `[num_rows, num_groups]`.
    pub(super) headers: *const GroupHeader,
    /// Sums of groups of bytes as bf16, `[num_rows, num_groups, rounded up to pairs]`.
    pub(super) byte_sums: *const u16,
    /// `[num_rows]`.
    pub(super) units: *const f32,
    of: PhantomData<&'a Activations>,
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
            step_quads: quads::STEP_QUADS,
            bits: if x.is(ActivationKind::Tiles) {
                x.tiles.as_slice().as_ptr().cast()
            } else {
                x.bits.as_ptr()
            },
            columns: tiles::columns(x.rows),
            plain: x.plain.as_ptr(),
            sums: x.sums.as_ptr(),
            bytes: x.bytes.as_ptr(),
            headers: x.headers.as_ptr(),
            byte_sums: x.byte_sums.as_ptr(),
            units: x.units.as_ptr(),
            of: PhantomData,
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
            plain: self.plain.wrapping_add(first * self.stride),
            sums: self.sums.wrapping_add(groups),
            bytes: self.bytes.wrapping_add(first * self.stride),
            headers: self.headers.wrapping_add(groups),
            byte_sums: self.byte_sums.wrapping_add(first * self.num_groups.next_multiple_of(2)),
            units: self.units.wrapping_add(first),
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

    /// Puts R rows of N halves of a tile, from `half` on.
    ///
    /// # Safety
    /// The rows are inside what `start` points to, and nobody else's.
    #[inline(always)]
    pub(super) unsafe fn put_block<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        sums: &[[S::F; N]; R],
        half: usize,
    ) {
        for (i, sums) in sums.iter().enumerate() {
            for (h, sum) in sums.iter().enumerate() {
                let at = HALF * (half + h);
                let n = self.features.saturating_sub(at);
                let row = self.start.wrapping_add(i * self.stride + at);
                // SAFETY: the features of a row, and of its bias.
                unsafe {
                    // What nearly all are.
                    if n >= HALF && self.bias.is_none() {
                        let before = if self.add { s.load(row) } else { s.zero() };
                        s.store(row, s.add(before, *sum));
                    } else if n > 0 {
                        let mut sum = *sum;
                        if let Some(bias) = self.bias {
                            sum = s.add(sum, s.load_first(bias[at..].as_ptr(), n.min(HALF)));
                        }
                        if self.add {
                            sum = s.add(s.load_first(row, n.min(HALF)), sum);
                        }
                        s.store_first(row, sum, n.min(HALF));
                    }
                }
            }
        }
    }
}

/// Calls `$block!(from, R, N, PARTS)` for so many rows (1 to 4) of products with bytes: `from` is a source and the half of its tile to begin with, N halves are
/// multiplied at a time and PARTS times as many in each group.
macro_rules! by_rows {
    ($wide:expr, $turned:expr, $rows:expr, $source:expr, $block:ident) => {
        if $wide {
            match $rows {
                1 => $block!(($source, 0), 1, 2, 1),
                2 => $block!(($source, 0), 2, 2, 1),
                3 => $block!(($source, 0), 3, 2, 1),
                _ => $block!(($source, 0), 4, 2, 1),
            }
        } else if !$turned {
            // From memory: a tile is read once.
            match $rows {
                1 => $block!(($source, 0), 1, 2, 1),
                2 => $block!(($source, 0), 2, 1, 2),
                3 => $block!(($source, 0), 3, 1, 2),
                _ => $block!(($source, 0), 4, 1, 2),
            }
        } else {
            for half in 0..2 {
                match $rows {
                    1 => $block!(($source, half), 1, 1, 1),
                    2 => $block!(($source, half), 2, 1, 1),
                    3 => $block!(($source, half), 3, 1, 1),
                    _ => $block!(($source, half), 4, 1, 1),
                }
            }
        }
    };
}
pub(super) use by_rows;

/// Whether inputs in bf16 are read as such; elsewhere they are f32 that have been rounded.
#[inline]
pub(super) fn reads_words(isa: Isa) -> bool {
    isa.has(Set::Avx512Bf16)
}

/// A thread's room for a tile that is made ready for many rows.
#[derive(Default)]
struct Room {
    bytes: Option<AlignedBytes>,
    numbers: Vec<f32>,
}

impl Room {
    /// Of some bytes, and some numbers.
    fn of(&mut self, (bytes, numbers): (usize, usize)) -> (&mut [u8], &mut [f32]) {
        if self.bytes.as_ref().is_none_or(|own| own.len() < bytes) {
            self.bytes = Some(AlignedBytes::zeroed(bytes));
        }
        if self.numbers.len() < numbers {
            self.numbers.resize(numbers, 0.0);
        }
        let own = self.bytes.as_mut().map_or(&mut [][..], AlignedBytes::as_mut_slice);
        (own, &mut self.numbers)
    }
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// Puts the products of one tile of a matrix with some rows.
///
/// # Safety
/// `target` is as many rows that nobody else has.
pub(super) unsafe fn multiply_tile(
    (isa, unit): (Isa, &tiles::Unit),
    matrix: &Packed,
    tile: usize,
    x: &Activations,
    rows: Range<usize>,
    target: &Target<'_>,
) {
    let rows = Rows::new(x, rows);
    assert_eq!(matrix.num_groups, rows.num_groups, "groups of inputs");
    let tile = matrix.tile(tile);
    ROOM.with_borrow_mut(|room| match (matrix.inputs, matrix.stored) {
        (ActivationKind::Bytes, Stored::Codes(format)) => {
            if rows.num_rows > quads::ROWS {
                let room = room.of(quads::turned_room(format, matrix.num_groups));
                quads::multiply_turned(isa, format, tile, room, &rows, target);
            } else {
                quads::multiply_stored(isa, format, tile, &rows, target);
            }
        }
        (ActivationKind::Bytes, Stored::K(format)) => {
            if rows.num_rows > quads::ROWS {
                let room = room.of(k_quads::turned_room(format, matrix.num_groups));
                k_quads::multiply_turned(isa, format, tile, room, &rows, target);
            } else {
                k_quads::multiply_stored(isa, format, tile, &rows, target);
            }
        }
        // Only codes take bytes.
        (ActivationKind::Bytes, _) => {}
        (ActivationKind::Tiles, _) => {
            let (room, _) = room.of((tiles::room(rows.num_rows), 0));
            tiles::multiply(isa, (isa, unit), matrix, tile, room, &rows, target);
        }
        (kind, _) => {
            let (bytes, numbers) = pairs::TURNED_ROOM;
            let room = room.of((bytes, numbers + rows.num_rows * TILE));
            if kind == ActivationKind::Bf16 && reads_words(isa) {
                pairs::multiply_words(isa, matrix, tile, room, &rows, target);
            } else {
                pairs::multiply_floats(isa, matrix, tile, room, &rows, target);
            }
        }
    });
}
