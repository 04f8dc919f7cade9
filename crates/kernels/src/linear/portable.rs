//! HOT PATH on processors without bf16 products. The same sums from f32 weights: a tile of codes is turned
//! to f32 once, 32 features side by side, and met by a few rows at a time. The compiler vectorises it for
//! AVX2, AVX-512 and NEON.

use half::bf16;

use super::packed::{CodeFormat, GROUP, PAIRS, TILE, read_scale};
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
        // A register: 32 lanes of two bytes; see `packed`.
        let word = |at: usize, lane: usize| {
            u16::from_le_bytes([bytes[at + 2 * lane], bytes[at + 2 * lane + 1]])
        };
        for half in 0..2 {
            for pair in 0..PAIRS {
                for f in 0..TILE / 2 {
                    for e in 0..2 {
                        let lane = 2 * f + e;
                        let weight = match format {
                            None => bf16::from_bits(word(64 * (2 * pair + half), lane)).to_f32(),
                            Some(format) if format.bits == 4 => {
                                let word = word(64 * (4 * half + pair / 4), lane);
                                let code = (word >> (4 * (pair % 4))) & 15;
                                f32::from(code as i16 + i16::from(format.lowest))
                            }
                            Some(_) => {
                                let word = word(64 * (8 * half + pair / 2), lane);
                                f32::from((word >> (8 * (pair % 2))) as u8 as i8)
                            }
                        };
                        weights[(2 * pair + e) * TILE + half * TILE / 2 + f] = weight;
                    }
                }
            }
        }
        if let Some(format) = format {
            let scales = &mut scales[g * 2 * TILE..(g + 1) * 2 * TILE];
            for (i, scale) in scales.iter_mut().enumerate() {
                *scale = read_scale(format, bytes, i / TILE, i % TILE);
            }
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
