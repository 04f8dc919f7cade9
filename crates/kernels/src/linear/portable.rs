//! HOT PATH on processors without bf16 products. The same sums from f32 weights: a tile of codes is turned
//! to f32 once, 32 features side by side, and met by a few rows at a time. The compiler vectorises it for
//! AVX2, AVX-512 and NEON.

use half::{bf16, f16};

use super::packed::{CodeFormat, GROUP, HALF, PAIRS, TILE};
use super::product::{Block, Rows};
use crate::isa::{Isa, dispatch, mul_add};

/// Weights of a group of a turned tile: `[GROUP, TILE]`.
pub(super) const GROUP_WEIGHTS: usize = GROUP * TILE;

/// Turns a tile (`None`: bf16). `weights`: `[groups, GROUP, TILE]`; `scales`: `[groups, 2, TILE]`.
pub(super) fn turn_tile(
    format: Option<CodeFormat>,
    tile: &[u8],
    weights: &mut [f32],
    scales: &mut [f32],
) {
    turn(format, tile, weights, scales);
}

/// A turned tile against rows. `scales` is read if `format` has codes.
pub(super) fn multiply(
    isa: Isa,
    format: Option<CodeFormat>,
    weights: &[f32],
    scales: &[f32],
    rows: &Rows<'_>,
    out: &mut Block,
) {
    multiply_one_isa_on(isa, format, weights, scales, rows, out);
}

dispatch! {
    fn turn / turn_on(format: Option<CodeFormat>, tile: &[u8], weights: &mut [f32], scales: &mut [f32]) = turn_body;
}

dispatch! {
    #[allow(dead_code)]
    fn multiply_one_isa / multiply_one_isa_on(format: Option<CodeFormat>, weights: &[f32], scales: &[f32], rows: &Rows<'_>, out: &mut Block) = multiply_body;
}

#[inline(always)]
fn turn_body<const FMA: bool>(
    format: Option<CodeFormat>,
    tile: &[u8],
    weights: &mut [f32],
    scales: &mut [f32],
) {
    let group_bytes = format.map_or(2 * TILE * GROUP, CodeFormat::group_bytes);
    let groups = tile.chunks_exact(group_bytes).zip(weights.chunks_exact_mut(GROUP_WEIGHTS));
    for (g, (bytes, weights)) in groups.enumerate() {
        let (registers, _) = bytes.as_chunks::<64>();
        for half in 0..2 {
            match format {
                None => {
                    for pair in 0..PAIRS {
                        let words = words(&registers[2 * pair + half]);
                        put(weights, pair, half, |e, f| {
                            f32::from_bits(if e == 0 { words[f] << 16 } else { words[f] & HIGH })
                        });
                    }
                }
                Some(format) if format.bits == 4 => {
                    for pair in 0..PAIRS {
                        let words = words(&registers[4 * half + pair / 4]);
                        put(weights, pair, half, |e, f| {
                            let code = (words[f] >> (16 * e + 4 * (pair % 4))) & 15;
                            (code as i32 + i32::from(format.lowest)) as f32
                        });
                    }
                }
                Some(_) => {
                    for pair in 0..PAIRS {
                        let words = words(&registers[8 * half + pair / 2]);
                        put(weights, pair, half, |e, f| {
                            let shifted = words[f] << (24 - 16 * e - 8 * (pair % 2));
                            (shifted as i32 >> 24) as f32
                        });
                    }
                }
            }
        }
        if let Some(format) = format {
            let scales = &mut scales[g * 2 * TILE..(g + 1) * 2 * TILE];
            let (stored, _) = bytes[format.code_bytes()..].as_chunks::<2>();
            let mut halves = [f16::ZERO; 2 * TILE];
            for (half, bytes) in halves.iter_mut().zip(stored) {
                *half = f16::from_le_bytes(*bytes);
            }
            crate::f16_to_f32(&halves, scales);
        }
    }
}

/// The second input of a pair in a word of bf16.
const HIGH: u32 = 0xffff_0000;

/// A register as words: one for each feature of a half, with both inputs of its pairs.
#[inline(always)]
fn words(register: &[u8; 64]) -> [u32; HALF] {
    let (bytes, _) = register.as_chunks::<4>();
    std::array::from_fn(|f| u32::from_le_bytes(bytes[f]))
}

/// Writes the weights of a pair of inputs, `weight(input of the pair, feature of the half)`.
#[inline(always)]
fn put(weights: &mut [f32], pair: usize, half: usize, weight: impl Fn(usize, usize) -> f32) {
    for e in 0..2 {
        let at = (2 * pair + e) * TILE + half * HALF;
        for (f, out) in weights[at..at + HALF].iter_mut().enumerate() {
            *out = weight(e, f);
        }
    }
}

#[inline(always)]
fn multiply_body<const FMA: bool>(
    format: Option<CodeFormat>,
    weights: &[f32],
    scales: &[f32],
    rows: &Rows<'_>,
    out: &mut Block,
) {
    for (i, out) in out.iter_mut().enumerate().take(rows.num_rows) {
        let (x, sums) = rows.row(i);
        let mut total = [0.0f32; TILE];
        let groups = x.as_chunks::<GROUP>().0.iter().zip(weights.chunks_exact(GROUP_WEIGHTS));
        for (g, (x, weights)) in groups.enumerate() {
            let mut acc = if format.is_some() { [0.0; TILE] } else { total };
            for (x, weights) in x.iter().zip(weights.as_chunks::<TILE>().0) {
                let x = bf16::from_bits(*x).to_f32();
                for (acc, w) in acc.iter_mut().zip(weights) {
                    *acc = mul_add::<FMA>(x, *w, *acc);
                }
            }
            let Some(format) = format else {
                total = acc;
                continue;
            };
            let (scale, min) = scales[g * 2 * TILE..(g + 1) * 2 * TILE].split_at(TILE);
            for f in 0..TILE {
                total[f] = mul_add::<FMA>(acc[f], scale[f], total[f]);
                if format.has_min {
                    total[f] = mul_add::<FMA>(min[f], sums[g], total[f]);
                }
            }
        }
        *out = total;
    }
}
