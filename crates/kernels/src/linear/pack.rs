//! Packing: rows of a file become tiles, some tiles at a time on every thread of the current rayon pool, so that beside what is
//! packed no more than a few MiB of what it was packed from is needed.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::ActivationKind;
use super::packed::{GROUP, HALF, Packed, QUADS, TILE};
use crate::f32_to_f16;

/// Inputs of 32 rows that are packed at a time: their part of a tile stays in L1.
const STRIP: usize = 1024;

/// Bytes of tiles for which rows are opened together.
const BATCH: usize = 1 << 20;

/// Why a matrix could not be packed.
pub(super) enum Unpacked<E> {
    /// Rows could not be read.
    Source(E),
    /// The layout cannot hold what they have.
    Unfit,
}

impl Packed {
    /// Puts rows into tiles, which have been zeros. A row has `width` elements of `per` inputs each. `open(rows)` makes rows readable, which
    /// `read(row, first, out)` then reads from element `first` on. `put(tile, (feature, first), elements)` puts them, or says that they do
    /// not fit.
    pub(super) fn fill<T, E, R>(
        &mut self,
        (out_features, width, per): (usize, usize, usize),
        open: impl Fn(Range<usize>) -> Result<R, E> + Sync,
        put: impl Fn(&mut [u8], (usize, usize), &[T]) -> bool + Sync,
    ) -> Result<(), Unpacked<E>>
    where
        T: Default + Clone,
        E: Send,
        R: Fn(usize, usize, &mut [T]),
    {
        let tile_bytes = self.tile_bytes();
        if tile_bytes == 0 || out_features == 0 {
            return Ok(());
        }
        let even = out_features.div_ceil(TILE).div_ceil(2 * rayon::current_num_threads());
        let batch = (BATCH / tile_bytes).min(even).max(1);
        let batches = self.bytes.as_mut_slice().par_chunks_mut(batch * tile_bytes).enumerate();
        batches.try_for_each(|(at, tiles)| {
            let first = at * batch * TILE;
            let rows = first..out_features.min(first + batch * TILE);
            let read = open(rows.clone()).map_err(Unpacked::Source)?;
            let mut strip = vec![T::default(); (STRIP / per).min(width)];
            for (tile, first) in tiles.chunks_exact_mut(tile_bytes).zip(rows.clone().step_by(TILE))
            {
                for from in (0..width).step_by(STRIP / per) {
                    let strip = &mut strip[..(STRIP / per).min(width - from)];
                    for row in first..rows.end.min(first + TILE) {
                        read(row, from, strip);
                        if !put(tile, (row - first, from), strip) {
                            return Err(Unpacked::Unfit);
                        }
                    }
                }
            }
            Ok(())
        })
    }
}

/// Codes of a group of a feature, unsigned.
pub(super) type Codes = [u8; GROUP];

/// Where codes of a kind lie in a group of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CodeLayout {
    /// Quads of inputs: see `packed.rs`.
    Quads,
    Pairs,
    Tiles,
}

impl CodeLayout {
    pub(super) fn of(inputs: ActivationKind) -> Self {
        match inputs {
            ActivationKind::Bytes => Self::Quads,
            ActivationKind::Bf16 | ActivationKind::F32 => Self::Pairs,
            ActivationKind::Tiles => Self::Tiles,
        }
    }

    /// Puts codes of 4 or 8 bits of feature `f` into a group.
    pub(super) fn put(self, bits: u8, bytes: &mut [u8], f: usize, codes: &Codes) {
        match (self, bits) {
            (Self::Quads, 4) => put_plane::<4>(bytes, f, codes, 0),
            (Self::Quads, _) => put_plane::<8>(bytes, f, codes, 0),
            (Self::Pairs, 4) => put_pairs::<4>(bytes, f, codes),
            (Self::Pairs, _) => put_pairs::<8>(bytes, f, codes),
            (Self::Tiles, 4) => {
                let pair = &mut bytes[f / 2 * GROUP..][..GROUP];
                pair.iter_mut().zip(codes).for_each(|(byte, code)| *byte |= code << (4 * (f % 2)));
            }
            (Self::Tiles, _) => bytes[f * GROUP..][..GROUP].copy_from_slice(codes),
        }
    }

    /// Reads them again.
    pub(super) fn read(self, bits: u8, bytes: &[u8], f: usize) -> Codes {
        let mut codes = [0; GROUP];
        match (self, bits) {
            (Self::Quads, 4) => read_plane::<4>(bytes, f, &mut codes, 0),
            (Self::Quads, _) => read_plane::<8>(bytes, f, &mut codes, 0),
            (Self::Pairs, 4) => read_pairs::<4>(bytes, f, &mut codes),
            (Self::Pairs, _) => read_pairs::<8>(bytes, f, &mut codes),
            (Self::Tiles, 4) => {
                let pair = &bytes[f / 2 * GROUP..][..GROUP];
                codes
                    .iter_mut()
                    .zip(pair)
                    .for_each(|(code, byte)| *code = byte >> (4 * (f % 2)) & 15);
            }
            (Self::Tiles, _) => codes.copy_from_slice(&bytes[f * GROUP..][..GROUP]),
        }
        codes
    }
}

/// The lowest `BITS` bits of every byte of a word.
const fn mask<const BITS: usize>() -> u32 {
    0x0101_0101 * ((1 << BITS) - 1)
}

/// The word of feature `f` in register `z` of a half: a register is 16 words.
fn word_at(z: usize, f: usize) -> usize {
    64 * (2 * z + f / HALF) + 4 * (f % HALF)
}

/// Puts `BITS` bits of the codes of a feature, from bit `below` on, into a plane: bits `BITS · s` of register z of a half are quad `8 / BITS · z + s`.
#[inline(always)]
pub(super) fn put_plane<const BITS: usize>(
    plane: &mut [u8],
    f: usize,
    codes: &Codes,
    below: usize,
) {
    let quads: [u32; QUADS] =
        std::array::from_fn(|q| u32::from_le_bytes(std::array::from_fn(|e| codes[4 * q + e])));
    for z in 0..BITS {
        let mut word = 0;
        for s in 0..8 / BITS {
            word |= ((quads[8 / BITS * z + s] >> below) & mask::<BITS>()) << (BITS * s);
        }
        let at = word_at(z, f);
        plane[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
}

/// Adds to codes what [`put_plane`] has put.
pub(super) fn read_plane<const BITS: usize>(
    plane: &[u8],
    f: usize,
    codes: &mut Codes,
    below: usize,
) {
    for z in 0..BITS {
        let at = word_at(z, f);
        let word = u32::from_le_bytes(std::array::from_fn(|e| plane[at + e]));
        for s in 0..8 / BITS {
            let quad = ((word >> (BITS * s)) & mask::<BITS>()) << below;
            let codes = &mut codes[4 * (8 / BITS * z + s)..][..4];
            codes.iter_mut().zip(quad.to_le_bytes()).for_each(|(code, bits)| *code |= bits);
        }
    }
}

/// The word of feature `f` in register `z` of its half's `BITS`, and the code at shift `BITS · s` of its lower or upper 16 bits.
fn pair_at<const BITS: usize>(z: usize, f: usize) -> (usize, impl Fn(usize, usize) -> usize) {
    let in_lane = 16 / BITS;
    (64 * (f / HALF * BITS + z) + 4 * (f % HALF), move |s, e| 2 * (in_lane * z + s) + e)
}

fn put_pairs<const BITS: usize>(bytes: &mut [u8], f: usize, codes: &Codes) {
    for z in 0..BITS {
        let (at, code) = pair_at::<BITS>(z, f);
        let mut word = 0;
        for s in 0..16 / BITS {
            for e in 0..2 {
                word |= u32::from(codes[code(s, e)]) << (16 * e + BITS * s);
            }
        }
        bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
}

fn read_pairs<const BITS: usize>(bytes: &[u8], f: usize, codes: &mut Codes) {
    for z in 0..BITS {
        let (at, code) = pair_at::<BITS>(z, f);
        let word = u32::from_le_bytes(std::array::from_fn(|e| bytes[at + e]));
        for s in 0..16 / BITS {
            for e in 0..2 {
                codes[code(s, e)] =
                    (word >> (16 * e + BITS * s)) as u8 & ((1u16 << BITS) - 1) as u8;
            }
        }
    }
}

/// Where feature `f`, input `k` of a bf16 tile is.
fn bf16_at(inputs: ActivationKind, f: usize, k: usize) -> usize {
    if inputs == ActivationKind::Tiles {
        return 2 * ((k / GROUP * TILE + f) * GROUP + k % GROUP);
    }
    let (half, lane) = (f / HALF, 2 * (f % HALF) + k % 2);
    2 * (((k / 2) * 2 + half) * TILE + lane)
}

/// Where feature `f`, input `k` of an f16 tile is.
fn f16_at(f: usize, k: usize) -> usize {
    let (half, second) = (f / HALF, 1 - k % 2);
    2 * ((((k / 2) * 2 + half) * 2 + second) * HALF + f % HALF)
}

/// Puts weights of feature `f` from input `first` on, rounded to bf16.
pub(super) fn put_bf16(
    inputs: ActivationKind,
    tile: &mut [u8],
    (f, first): (usize, usize),
    weights: &[f32],
) {
    for (k, weight) in (first..).zip(weights) {
        let at = bf16_at(inputs, f, k);
        tile[at..at + 2].copy_from_slice(&bf16::from_f32(*weight).to_le_bytes());
    }
}

/// Reads all weights of feature `f`.
pub(super) fn read_bf16(inputs: ActivationKind, tile: &[u8], f: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        let at = bf16_at(inputs, f, k);
        *out = bf16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
    }
}

/// As [`put_bf16`], rounded to f16.
pub(super) fn put_f16(tile: &mut [u8], (f, first): (usize, usize), weights: &[f32]) {
    // Some at once, for which there are instructions.
    const AT_ONCE: usize = 64;
    let mut words = [f16::ZERO; AT_ONCE];
    for (first, weights) in (first..).step_by(AT_ONCE).zip(weights.chunks(AT_ONCE)) {
        let words = &mut words[..weights.len()];
        f32_to_f16(weights, words);
        for (k, word) in (first..).zip(words) {
            let at = f16_at(f, k);
            tile[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// As [`read_bf16`].
pub(super) fn read_f16(tile: &[u8], f: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        let at = f16_at(f, k);
        *out = f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
    }
}

/// As [`put_bf16`], as they are.
pub(super) fn put_f32(tile: &mut [u8], (f, first): (usize, usize), weights: &[f32]) {
    for (k, weight) in (first..).zip(weights) {
        let at = 2 * f16_at(f, k);
        tile[at..at + 4].copy_from_slice(&weight.to_le_bytes());
    }
}

/// As [`read_bf16`].
pub(super) fn read_f32(tile: &[u8], f: usize, out: &mut [f32]) {
    for (k, out) in out.iter_mut().enumerate() {
        let at = 2 * f16_at(f, k);
        *out = f32::from_le_bytes(std::array::from_fn(|i| tile[at + i]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two features, so that one would overwrite the other if they shared a byte's bits.
    #[test]
    fn codes_are_read_as_they_were_put() {
        let layouts = [CodeLayout::Quads, CodeLayout::Pairs, CodeLayout::Tiles];
        for (layout, bits) in layouts.into_iter().flat_map(|l| [(l, 4), (l, 8)]) {
            let mut bytes = vec![0; TILE * GROUP * usize::from(bits) / 8];
            let codes = |f: usize| -> Codes {
                std::array::from_fn(|k| ((f * 37 + k * 11 + k * k) % (1 << bits)) as u8)
            };
            (0..TILE).for_each(|f| layout.put(bits, &mut bytes, f, &codes(f)));
            for f in 0..TILE {
                assert_eq!(layout.read(bits, &bytes, f), codes(f), "{layout:?}, {bits} bits");
            }
        }
    }

    /// As the table in `packed.rs` says.
    #[test]
    fn quads_and_pairs_are_where_products_look_for_them() {
        let mut codes = [0; GROUP];
        // Input 13: quad 3, its second; pair 6, its second.
        codes[13] = 9;
        let mut bytes = [0; TILE * GROUP];
        CodeLayout::Quads.put(4, &mut bytes[..512], 17, &codes);
        // Register 1 of the second half, upper nibble, feature 1.
        assert_eq!(bytes.iter().position(|b| *b != 0), Some(64 * 3 + 4 + 1));
        assert_eq!(bytes[64 * 3 + 5], 9 << 4);
        bytes.fill(0);
        CodeLayout::Pairs.put(8, &mut bytes, 17, &codes);
        // Register 3 of the second half, feature 1, the second of two words, its first byte.
        assert_eq!(bytes.iter().position(|b| *b != 0), Some(64 * (8 + 3) + 4 + 2));
    }
}
