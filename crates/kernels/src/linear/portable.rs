//! HOT PATH on processors without products of bf16 or of bytes. The same sums from f32 weights: a tile of codes is turned
//! to f32 once, 32 features side by side, and met by a few rows at a time. The compiler vectorises it for
//! AVX2, AVX-512 and NEON.

use half::{bf16, f16};

use super::activations::ActivationKind;
use super::bytes::{GroupHeader, STEP_GROUP};
use super::packed::{CodeFormat, GROUP, HALF, PAIRS, Packed, QUADS, TILE};
use super::product::{Block, Rows};
use crate::isa::{Isa, dispatch, mul_add};

/// Weights of a group of a turned tile: `[GROUP, TILE]`.
pub(super) const GROUP_WEIGHTS: usize = GROUP * TILE;

/// Turns a tile of a matrix. `weights`: `[groups, GROUP, TILE]`; `scales`: `[groups, 2, TILE]`.
pub(super) fn turn_tile(matrix: &Packed, tile: &[u8], weights: &mut [f32], scales: &mut [f32]) {
    turn(matrix.codes, matrix.inputs, tile, weights, scales);
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
    fn turn / turn_on(format: Option<CodeFormat>, inputs: ActivationKind, tile: &[u8], weights: &mut [f32], scales: &mut [f32]) = turn_body;
}

dispatch! {
    #[allow(dead_code)]
    fn multiply_one_isa / multiply_one_isa_on(format: Option<CodeFormat>, weights: &[f32], scales: &[f32], rows: &Rows<'_>, out: &mut Block) = multiply_body;
}

#[inline(always)]
fn turn_body<const FMA: bool>(
    format: Option<CodeFormat>,
    inputs: ActivationKind,
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
                Some(format) if inputs == ActivationKind::Bytes => {
                    turn_quads(format, registers, half, weights);
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

/// Turns the quads of half a group.
#[inline(always)]
fn turn_quads(format: CodeFormat, registers: &[[u8; 64]], half: usize, weights: &mut [f32]) {
    let four = format.bits == 4;
    let (mask, lowest) = (if four { 15 } else { 255 }, i32::from(format.lowest));
    for quad in 0..QUADS {
        let (register, shift) = if four { (quad / 2, 4 * (quad % 2)) } else { (quad, 0) };
        let words = words(&registers[2 * register + half]);
        for e in 0..4 {
            let at = (4 * quad + e) * TILE + half * HALF;
            for (f, out) in weights[at..at + HALF].iter_mut().enumerate() {
                *out = (((words[f] >> (8 * e + shift)) & mask) as i32 + lowest) as f32;
            }
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
        let (inputs, row) = rows.row(i);
        let groups = row * rows.num_groups..(row + 1) * rows.num_groups;
        let elements = groups.start * GROUP..groups.end * GROUP;
        if let Some(format) = format.filter(|_| inputs.is(ActivationKind::Bytes)) {
            let pairs = rows.num_groups.next_multiple_of(2);
            let x = Bytes {
                groups: inputs.bytes[elements].as_chunks().0,
                headers: &inputs.headers[groups],
                sums: &inputs.byte_sums[row * pairs..(row + 1) * pairs],
                unit: inputs.units[row],
            };
            *out = multiply_bytes::<FMA>(format, weights, scales, &x);
            continue;
        }
        let (bits, _) = inputs.bits[elements].as_chunks::<GROUP>();
        let sums = &inputs.sums[groups];
        let mut total = [0.0f32; TILE];
        let turned = weights.chunks_exact(GROUP_WEIGHTS).zip(bits).zip(sums);
        for (g, ((weights, bits), sum)) in turned.enumerate() {
            let mut acc = if format.is_some() { [0.0; TILE] } else { total };
            let (weights, _) = weights.as_chunks::<TILE>();
            for (bits, weights) in bits.iter().zip(weights) {
                let x = bf16::from_bits(*bits).to_f32();
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
                    total[f] = mul_add::<FMA>(min[f], *sum, total[f]);
                }
            }
        }
        *out = total;
    }
}

/// A row of inputs as bytes.
struct Bytes<'a> {
    groups: &'a [[i8; GROUP]],
    headers: &'a [GroupHeader],
    sums: &'a [u16],
    unit: f32,
}

/// What `vpdpbusd`, `vpdpwssd` and `vdpbf16ps` give, in this order; all integers are below 2²⁴ until steps come in.
#[inline(always)]
fn multiply_bytes<const FMA: bool>(
    format: CodeFormat,
    weights: &[f32],
    scales: &[f32],
    x: &Bytes<'_>,
) -> [f32; TILE] {
    let mut total = [0.0f32; TILE];
    let scales_of = |g: usize| scales[g * 2 * TILE..(g + 1) * 2 * TILE].split_at(TILE);
    for (g, weights) in weights.chunks_exact(GROUP_WEIGHTS).enumerate().take(x.groups.len()) {
        let (weights, _) = weights.as_chunks::<TILE>();
        let halves: [[f32; TILE]; 2] = std::array::from_fn(|s| {
            let part = s * STEP_GROUP..(s + 1) * STEP_GROUP;
            let mut sums = [0.0f32; TILE];
            for (x, weights) in x.groups[g][part.clone()].iter().zip(&weights[part]) {
                for (sum, w) in sums.iter_mut().zip(weights) {
                    *sum = mul_add::<FMA>(f32::from(*x), *w, *sum);
                }
            }
            sums
        });
        let steps = x.headers[g].steps;
        let (scale, _) = scales_of(g);
        for f in 0..TILE {
            let sum = if format.bits == 4 {
                let [a, b] = [0, 1].map(|s| halves[s][f] as i32 * i32::from(steps[s]));
                (a + b) as f32
            } else {
                let [a, b] = steps.map(f32::from);
                mul_add::<FMA>(halves[1][f], b, halves[0][f] * a)
            };
            total[f] = mul_add::<FMA>(sum, scale[f], total[f]);
        }
        let last = g + 1 == x.groups.len();
        if format.has_min && (g % 2 == 1 || last) {
            // The second of a pair comes first.
            for g in (g - g % 2..=g).rev() {
                let ((_, min), sum) = (scales_of(g), bf16::from_bits(x.sums[g]).to_f32());
                for (total, min) in total.iter_mut().zip(min) {
                    *total = mul_add::<FMA>(bf16::from_f32(*min).to_f32(), sum, *total);
                }
            }
        }
    }
    total.map(|total| total * x.unit)
}
