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
//! | f32 | 16 pairs × 2 halves × 2 registers |
//! | 4 bits, tiles | 16 pairs of features × 32 inputs: nibble s of a byte is feature s of the pair; then 32 scales, 32 minimums |
//! | 8 bits, tiles | 32 features × 32 inputs; then the same |
//! | bf16, tiles | 32 features × 32 inputs |
//!
//! Minimums are left out where a format has none.

use half::{bf16, f16};

use super::ActivationKind;
use super::k_packed::{KFormat, KGroup};

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
    F32,
}

impl Stored {
    /// Bytes of a tile of so many groups.
    fn tile_bytes(self, groups: usize) -> usize {
        match self {
            Self::Codes(format) => groups * format.group_bytes(),
            Self::K(format) => format.tile_bytes(groups),
            Self::Bf16 => groups * 2 * TILE * GROUP,
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
        let num_groups = in_features.div_ceil(GROUP);
        let tiles = out_features.div_ceil(TILE);
        let bytes = WEIGHTS.zeroed(tiles * stored.tile_bytes(num_groups));
        Self { bytes, stored, inputs, num_groups }
    }

    /// Rows as they are, or rounded to bf16 (`stored`). `rows`: `[out_features, in_features]`.
    pub(super) fn from_rows(
        stored: Stored,
        inputs: ActivationKind,
        rows: &[f32],
        (in_features, out_features): (usize, usize),
    ) -> Self {
        let mut packed = Self::new(stored, inputs, (in_features, out_features));
        let tile_bytes = packed.tile_bytes();
        for (row, weights) in rows.chunks_exact(in_features).enumerate() {
            let (tile, f) = (row / TILE, row % TILE);
            let tile = &mut packed.bytes.as_mut_slice()[tile * tile_bytes..][..tile_bytes];
            for (k, weight) in weights.iter().enumerate() {
                if stored == Stored::F32 {
                    let at = f32_at(f, k);
                    tile[at..at + 4].copy_from_slice(&weight.to_le_bytes());
                } else {
                    let at = bf16_at(inputs, f, k);
                    tile[at..at + 2].copy_from_slice(&bf16::from_f32(*weight).to_le_bytes());
                }
            }
        }
        packed
    }

    /// Takes codes as they are, scales and minimums rounded to f16. `groups(row, out)` fills a row's.
    /// `None` if a scale or minimum is too large or too small for f16.
    pub(super) fn from_codes<E>(
        format: CodeFormat,
        inputs: ActivationKind,
        (in_features, out_features): (usize, usize),
        mut groups: impl FnMut(usize, &mut [GroupCodes]) -> Result<(), E>,
    ) -> Result<Option<Self>, E> {
        let mut packed = Self::new(Stored::Codes(format), inputs, (in_features, out_features));
        let tile_bytes = packed.tile_bytes();
        let mut row_groups = vec![GroupCodes::default(); packed.num_groups];
        for row in 0..out_features {
            groups(row, &mut row_groups)?;
            let (tile, f) = (row / TILE, row % TILE);
            let tile = &mut packed.bytes.as_mut_slice()[tile * tile_bytes..][..tile_bytes];
            for (group, bytes) in row_groups.iter().zip(tile.chunks_exact_mut(format.group_bytes()))
            {
                if !is_f16(group.scale) || !is_f16(group.min) {
                    return Ok(None);
                }
                put_group(format, inputs, f, group, bytes);
            }
        }
        Ok(Some(packed))
    }

    /// Takes codes of a K type as they are. `groups(row, out)` fills a row's.
    pub(super) fn from_k<E>(
        format: KFormat,
        inputs: ActivationKind,
        (in_features, out_features): (usize, usize),
        mut groups: impl FnMut(usize, &mut [KGroup]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut packed = Self::new(Stored::K(format), inputs, (in_features, out_features));
        let tile_bytes = packed.tile_bytes();
        let mut row_groups = vec![KGroup::default(); packed.num_groups];
        for row in 0..out_features {
            groups(row, &mut row_groups)?;
            let (tile, f) = (row / TILE, row % TILE);
            let tile = &mut packed.bytes.as_mut_slice()[tile * tile_bytes..][..tile_bytes];
            row_groups.iter().enumerate().for_each(|(g, group)| format.put(tile, (f, g), group));
        }
        Ok(packed)
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
            Stored::Bf16 => {
                for (k, out) in out.iter_mut().enumerate() {
                    let at = bf16_at(self.inputs, f, k);
                    *out = bf16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
                }
                return;
            }
            Stored::F32 => {
                for (k, out) in out.iter_mut().enumerate() {
                    let [a, b, c, d] = [0, 1, 2, 3].map(|i| tile[f32_at(f, k) + i]);
                    *out = f32::from_le_bytes([a, b, c, d]);
                }
                return;
            }
        };
        for (out, bytes) in out.chunks_mut(GROUP).zip(tile.chunks_exact(format.group_bytes())) {
            let (scale, min) = (read_scale(format, bytes, 0, f), read_scale(format, bytes, 1, f));
            for (k, out) in out.iter_mut().enumerate() {
                *out = scale * f32::from(read_code(format, self.inputs, bytes, f, k)) + min;
            }
        }
    }
}

/// Whether f16 holds a number to the precision of f16.
fn is_f16(x: f32) -> bool {
    x == 0.0 || (x.abs() >= f16::MIN_POSITIVE.to_f32() && x.abs() <= f16::MAX.to_f32())
        // What an f16 held before stays what it was, small or not.
        || f16::from_f32(x).to_f32() == x
}

/// Where feature `f`, input `k` of a bf16 tile is.
fn bf16_at(inputs: ActivationKind, f: usize, k: usize) -> usize {
    if inputs == ActivationKind::Tiles {
        return 2 * ((k / GROUP * TILE + f) * GROUP + k % GROUP);
    }
    let (half, lane) = (f / HALF, 2 * (f % HALF) + k % 2);
    2 * (((k / 2) * 2 + half) * TILE + lane)
}

/// Where feature `f`, input `k` of an f32 tile is.
fn f32_at(f: usize, k: usize) -> usize {
    let (half, second) = (f / HALF, 1 - k % 2);
    4 * ((((k / 2) * 2 + half) * 2 + second) * HALF + f % HALF)
}

/// Byte and shift of feature `f`, input `k` (below [`GROUP`]) in a group's codes.
fn code_at(bits: u8, inputs: ActivationKind, f: usize, k: usize) -> (usize, u32) {
    let half = f / HALF;
    if inputs == ActivationKind::Tiles {
        return match bits {
            4 => (f / 2 * GROUP + k, 4 * (f % 2) as u32),
            _ => (f * GROUP + k, 0),
        };
    }
    if inputs == ActivationKind::Bytes {
        let (quad, lane) = (k / 4, 4 * (f % HALF) + k % 4);
        return match bits {
            4 => (64 * (2 * (quad / 2) + half) + lane, 4 * (quad % 2) as u32),
            _ => (64 * (2 * quad + half) + lane, 0),
        };
    }
    let (lane, pair) = (2 * (f % HALF) + k % 2, k / 2);
    // Codes of a 16-bit lane.
    let in_lane = 16 / usize::from(bits);
    let registers = PAIRS / in_lane;
    let bit = usize::from(bits) * (pair % in_lane);
    (64 * (half * registers + pair / in_lane) + 2 * lane + bit / 8, (bit % 8) as u32)
}

fn put_group(
    format: CodeFormat,
    inputs: ActivationKind,
    f: usize,
    group: &GroupCodes,
    bytes: &mut [u8],
) {
    let mask = if format.bits == 4 { 15 } else { 255 };
    let steps = format.bits == 4 || inputs == ActivationKind::Bytes;
    for (k, code) in group.codes.iter().enumerate() {
        let (at, shift) = code_at(format.bits, inputs, f, k);
        let stored = if steps { code.wrapping_sub(format.lowest) } else { *code };
        bytes[at] |= (stored as u8 & mask) << shift;
    }
    let scales = format.code_bytes() + 2 * f;
    bytes[scales..scales + 2].copy_from_slice(&f16::from_f32(group.scale).to_le_bytes());
    if format.has_min {
        let mins = scales + 2 * TILE;
        bytes[mins..mins + 2].copy_from_slice(&f16::from_f32(group.min).to_le_bytes());
    }
}

/// Code of feature `f`, input `k` of a group.
fn read_code(format: CodeFormat, inputs: ActivationKind, bytes: &[u8], f: usize, k: usize) -> i16 {
    let (at, shift) = code_at(format.bits, inputs, f, k);
    match (format.bits, inputs) {
        (4, _) => i16::from((bytes[at] >> shift) & 15) + i16::from(format.lowest),
        (_, ActivationKind::Bytes) => i16::from(bytes[at]) + i16::from(format.lowest),
        _ => i16::from(bytes[at] as i8),
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
