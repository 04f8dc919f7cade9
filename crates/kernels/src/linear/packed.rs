//! How weights lie in memory.
//!
//! Rows of the matrix (output features) are put into tiles of [`TILE`]; a tile's bytes follow each other
//! group by group in the order in which products read them, so that a small batch streams through memory
//! once, forwards. A vector register holds a *half*: some neighbouring inputs of 16 features, as products take
//! them. Where inputs are bf16 that is two (lane `2 f + e` of 16 bits is feature `f`, input `e` of the pair),
//! where they are bytes four (lane `4 f + e` of 8 bits is input `e` of the quad). Weights in f32 fill a register with one
//! input; of a pair the second comes first, as products take them.
//!
//! | storage | a group of 32 inputs of a tile |
//! |---|---|
//! | 4 bits, pairs | 2 halves × 4 registers; nibble s of register z is pair `4 z + s`; then 32 scales, 32 minimums (f16) |
//! | 8 bits, pairs | 2 halves × 8 registers; byte s of register z is pair `2 z + s`; then the same |
//! | 4 bits, quads | 4 registers × 2 halves; nibble s of register z is quad `2 z + s`; then the same |
//! | 8 bits, quads | 8 quads × 2 halves, as steps from the lowest code; then the same |
//! | bf16 | 16 pairs × 2 halves × 1 register |
//! | f16 | 16 pairs × 2 halves × 2 half registers, the second input first |
//! | f32 | 16 pairs × 2 halves × 2 registers |
//! | 4 bits, tiles | 16 pairs of features × 32 inputs: nibble s of a byte is feature s of the pair; then 32 scales, 32 minimums |
//! | 8 bits, tiles | 32 features × 32 inputs; then the same |
//! | bf16, tiles | 32 features × 32 inputs |
//!
//! Minimums are left out where a format has none.

use std::ops::Range;

use half::f16;

use super::ActivationKind;
use super::k_packed::{KFormat, KGroup};
use super::k_source::{Format, by_k_format};
use super::pack::{self, CodeLayout, Unpacked};

use crate::{AlignedBytes, Arena};

/// Features of a tile.
pub(super) const TILE: usize = 32;
/// Inputs that share a scale.
pub const GROUP: usize = 32;
/// Pairs of a group.
pub(super) const PAIRS: usize = GROUP / 2;
/// Inputs of a group in quads.
pub(super) const QUADS: usize = GROUP / 4;
/// Features of half a tile: the lanes of a register of f32.
pub(super) const HALF: usize = TILE / 2;

/// Codes of a group of [`GROUP`] weights of one row: weight i is `scale · codes[i] + min`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupCodes {
    /// Factor of the codes.
    pub scale: f32,
    /// Added to every weight; 0 in formats without.
    pub min: f32,
    /// Integers within the format's range.
    pub codes: [i8; GROUP],
}

impl Default for GroupCodes {
    fn default() -> Self {
        Self { scale: 0.0, min: 0.0, codes: [0; GROUP] }
    }
}

/// What the codes of a matrix are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeFormat {
    /// The smallest code; 4-bit codes go from here to 15 above. 8-bit codes are -128 to 127.
    pub lowest: i8,
    /// 4 or 8.
    pub bits: u8,
    /// Whether groups have a minimum.
    pub has_min: bool,
}

impl CodeFormat {
    /// Bytes of the codes of a group of a tile.
    pub(super) fn code_bytes(self) -> usize {
        TILE * GROUP * usize::from(self.bits) / 8
    }

    /// Whether there are products of such codes with inputs of a kind: with bytes not for every lowest code.
    pub fn takes(self, inputs: ActivationKind) -> bool {
        inputs != ActivationKind::Bytes
            || matches!((self.bits, self.lowest), (4, 0 | -8) | (8, -128))
    }

    /// Bytes of a group of a tile.
    pub(super) fn group_bytes(self) -> usize {
        self.code_bytes() + 2 * TILE * (1 + usize::from(self.has_min))
    }
}

/// What weights are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    Codes(CodeFormat),
    /// Superblocks of codes, laid out as `k_packed.rs` says.
    K(KFormat),
    Bf16,
    F16,
    F32,
}

impl Stored {
    /// Bytes of a tile of so many groups.
    fn tile_bytes(self, groups: usize) -> usize {
        match self {
            Self::Codes(format) => groups * format.group_bytes(),
            Self::K(format) => format.tile_bytes(groups),
            Self::Bf16 | Self::F16 => groups * 2 * TILE * GROUP,
            Self::F32 => groups * 4 * TILE * GROUP,
        }
    }
}

/// A matrix in tiles.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) bytes: AlignedBytes,
    pub(super) stored: Stored,
    /// The form of inputs that it is laid out for.
    pub(super) inputs: ActivationKind,
    /// Groups of inputs of a row, the last filled up with zeros.
    pub(super) num_groups: usize,
}

/// Weights of all models.
static WEIGHTS: Arena = Arena::new();

impl Packed {
    fn new(
        stored: Stored,
        inputs: ActivationKind,
        (in_features, out_features): (usize, usize),
    ) -> Self {
        let bytes = WEIGHTS.zeroed(Self::num_bytes(stored, (in_features, out_features)));
        Self { bytes, stored, inputs, num_groups: in_features.div_ceil(GROUP) }
    }

    /// Bytes of a matrix of a shape.
    pub(super) fn num_bytes(stored: Stored, (in_features, out_features): (usize, usize)) -> usize {
        out_features.div_ceil(TILE) * stored.tile_bytes(in_features.div_ceil(GROUP))
    }

    /// Rows of numbers, as they are or rounded (`stored`: [`Stored::F32`], [`Stored::F16`] or [`Stored::Bf16`]); see [`Self::fill`].
    pub(super) fn from_floats<E: Send, R: Fn(usize, usize, &mut [f32])>(
        stored: Stored,
        inputs: ActivationKind,
        (in_features, out_features): (usize, usize),
        open: impl Fn(Range<usize>) -> Result<R, E> + Sync,
    ) -> Result<Self, E> {
        let mut packed = Self::new(stored, inputs, (in_features, out_features));
        let put = |tile: &mut [u8], at: (usize, usize), weights: &[f32]| {
            match stored {
                Stored::F32 => pack::put_f32(tile, at, weights),
                Stored::F16 => pack::put_f16(tile, at, weights),
                _ => pack::put_bf16(inputs, tile, at, weights),
            }
            true
        };
        match packed.fill((out_features, in_features, 1), open, put) {
            Err(Unpacked::Source(error)) => Err(error),
            Ok(()) | Err(Unpacked::Unfit) => Ok(packed),
        }
    }

    /// Takes codes as they are, scales and minimums rounded to f16; see [`Self::fill`].
    /// `None` if a scale or minimum is too large or too small for f16.
    pub(super) fn from_codes<E: Send, R: Fn(usize, usize, &mut [GroupCodes])>(
        format: CodeFormat,
        inputs: ActivationKind,
        (in_features, out_features): (usize, usize),
        open: impl Fn(Range<usize>) -> Result<R, E> + Sync,
    ) -> Result<Option<Self>, E> {
        let mut packed = Self::new(Stored::Codes(format), inputs, (in_features, out_features));
        let put = |tile: &mut [u8], (f, first): (usize, usize), groups: &[GroupCodes]| {
            let tile = tile.chunks_exact_mut(format.group_bytes()).skip(first);
            groups.iter().zip(tile).all(|(group, bytes)| {
                put_group(format, inputs, f, group, bytes);
                is_f16(group.scale) && is_f16(group.min)
            })
        };
        match packed.fill((out_features, packed.num_groups, GROUP), open, put) {
            Ok(()) => Ok(Some(packed)),
            Err(Unpacked::Unfit) => Ok(None),
            Err(Unpacked::Source(error)) => Err(error),
        }
    }

    /// Takes codes of a K type as they are; see [`Self::fill`]. `None` if a group's number is none.
    pub(super) fn from_k<E: Send, R: Fn(usize, usize, &mut [KGroup])>(
        format: KFormat,
        inputs: ActivationKind,
        (in_features, out_features): (usize, usize),
        open: impl Fn(Range<usize>) -> Result<R, E> + Sync,
    ) -> Result<Option<Self>, E> {
        let mut packed = Self::new(Stored::K(format), inputs, (in_features, out_features));
        let put_groups: PutGroups = by_k_format!(format, |F| put_groups::<F>);
        let put = |tile: &mut [u8], at: (usize, usize), groups: &[KGroup]| {
            put_groups(tile, at, groups);
            groups.iter().all(|group| !group.d.is_nan())
        };
        match packed.fill((out_features, packed.num_groups, GROUP), open, put) {
            Ok(()) => Ok(Some(packed)),
            Err(Unpacked::Unfit) => Ok(None),
            Err(Unpacked::Source(error)) => Err(error),
        }
    }

    pub(super) fn tile_bytes(&self) -> usize {
        self.stored.tile_bytes(self.num_groups)
    }

    /// One tile.
    pub(super) fn tile(&self, tile: usize) -> &[u8] {
        let len = self.tile_bytes();
        &self.bytes.as_slice()[tile * len..(tile + 1) * len]
    }

    /// One row as f32. `out`: `[in_features]`.
    pub(super) fn row_into(&self, row: usize, out: &mut [f32]) {
        let (tile, f) = (self.tile(row / TILE), row % TILE);
        let format = match self.stored {
            Stored::Codes(format) => format,
            Stored::K(format) => return format.row_into(tile, f, out),
            Stored::Bf16 => return pack::read_bf16(self.inputs, tile, f, out),
            Stored::F16 => return pack::read_f16(tile, f, out),
            Stored::F32 => return pack::read_f32(tile, f, out),
        };
        for (out, bytes) in out.chunks_mut(GROUP).zip(tile.chunks_exact(format.group_bytes())) {
            let (scale, min) = (read_scale(format, bytes, 0, f), read_scale(format, bytes, 1, f));
            let codes = read_codes(format, self.inputs, bytes, f);
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = scale * f32::from(code) + min);
        }
    }
}

/// Puts groups of a feature into a tile, from some group on.
type PutGroups = fn(&mut [u8], (usize, usize), &[KGroup]);

/// A copy for each format: compilers then know what is where.
fn put_groups<F: Format>(tile: &mut [u8], (f, first): (usize, usize), groups: &[KGroup]) {
    (first..).zip(groups).for_each(|(g, group)| F::FORMAT.put(tile, (f, g), group));
}

/// Whether f16 holds a number to the precision of f16.
fn is_f16(x: f32) -> bool {
    x == 0.0 || (x.abs() >= f16::MIN_POSITIVE.to_f32() && x.abs() <= f16::MAX.to_f32())
        // What an f16 held before stays what it was, small or not.
        || f16::from_f32(x).to_f32() == x
}

fn put_group(
    format: CodeFormat,
    inputs: ActivationKind,
    f: usize,
    group: &GroupCodes,
    bytes: &mut [u8],
) {
    // Where codes are not steps from the lowest one they have a sign.
    let lowest = if has_steps(format, inputs) { format.lowest } else { 0 };
    let mask = if format.bits == 4 { 15 } else { 255 };
    let codes = group.codes.map(|code| code.wrapping_sub(lowest) as u8 & mask);
    CodeLayout::of(inputs).put(format.bits, bytes, f, &codes);
    let scales = format.code_bytes() + 2 * f;
    bytes[scales..scales + 2].copy_from_slice(&f16::from_f32(group.scale).to_le_bytes());
    if format.has_min {
        let mins = scales + 2 * TILE;
        bytes[mins..mins + 2].copy_from_slice(&f16::from_f32(group.min).to_le_bytes());
    }
}

/// Whether codes are stored as steps from the lowest one.
fn has_steps(format: CodeFormat, inputs: ActivationKind) -> bool {
    format.bits == 4 || inputs == ActivationKind::Bytes
}

/// Codes of feature `f` of a group.
fn read_codes(format: CodeFormat, inputs: ActivationKind, bytes: &[u8], f: usize) -> [i16; GROUP] {
    let codes = CodeLayout::of(inputs).read(format.bits, bytes, f);
    match has_steps(format, inputs) {
        true => codes.map(|code| i16::from(code) + i16::from(format.lowest)),
        false => codes.map(|code| i16::from(code as i8)),
    }
}

/// Scale (`which` 0) or minimum (1) of feature `f` of a group.
fn read_scale(format: CodeFormat, bytes: &[u8], which: usize, f: usize) -> f32 {
    if which == 1 && !format.has_min {
        return 0.0;
    }
    let at = format.code_bytes() + 2 * (which * TILE + f);
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}
