//! HOT PATH. Products of bf16 by tiles of AMX: 32 features × up to 32 rows × a group of 32 inputs at a time.
//!
//! Weights are rounded to bf16, inputs too, and a row's sum is one chain over the groups, in the order of tiles
//! ([`crate::simd::amx`]), however few rows there are: no other instruction has that order. Codes become bf16
//! (`scale · code + min`, rounded) some groups at a time, so that they stay in L1. What that rounding costs is a fraction of what bytes
//! as inputs cost (docs/measurements.md).
//!
//! Weights lie feature by feature, since the 16 values that a group's codes can have are one vector of a feature. So sums
//! are `[features, rows]`, and are transposed when all groups are there.

#![allow(clippy::needless_range_loop)]

use half::f16;

use super::ActivationKind;
use super::packed::{CodeFormat, GROUP, HALF, PAIRS, Packed, Stored, TILE};
use super::product::{Rows, Target};
use crate::isa::{Isa, Set};
use crate::simd::amx::{self, Amx};
use crate::simd::{L1, Lanes, compiled, prefetch};

/// Rows of a block of inputs.
pub(super) const BLOCK: usize = amx::ROWS;

/// Columns of each block of some rows: where there is but one, its rows.
pub(super) fn columns(rows: usize) -> usize {
    rows.min(BLOCK)
}

/// Most groups of a tile that are turned together: 16 KiB.
const SPAN: usize = 8;
/// The same for few rows: beside what is fetched meanwhile more would not stay in L1.
const FEW_SPAN: usize = 4;

/// Words of a group of a tile.
const GROUP_WORDS: usize = TILE * GROUP;

/// Sums of a block of rows: those of both halves.
const BLOCK_SUMS: usize = 2 * amx::SUMS;

/// Bytes of room that a tile needs for some rows: turned weights, then sums.
pub(super) fn room(rows: usize) -> usize {
    2 * SPAN * GROUP_WORDS + 4 * rows.div_ceil(BLOCK) * BLOCK_SUMS
}

compiled! {
    /// Rounds a group of some rows, `stride` apart, to the words of a block of so many columns: `[16 pairs, columns, 2]`. Columns beyond the
    /// rows become anything.
    ///
    /// # Panics
    /// If a slice is shorter.
    pub(super) fn round_group(x: &[f32], stride: usize, rows: usize, columns: usize, out: &mut [f32]) = round_body
        for [Avx512Bf16, Avx512, Avx2, Sse2];
}

#[inline(always)]
fn round_body<S: Lanes>(
    s: S,
    x: &[f32],
    stride: usize,
    rows: usize,
    columns: usize,
    out: &mut [f32],
) {
    assert!((1..=columns).contains(&rows) && columns <= BLOCK);
    assert!(x.len() >= (rows - 1) * stride + GROUP && out.len() >= PAIRS * columns);
    let mut words = [[0u16; GROUP]; BLOCK];
    // SAFETY: the asserts cover the rows of `x` and all of `out`.
    unsafe {
        for row in 0..rows {
            for half in 0..2 {
                let v = s.round_bf16(s.load(x.as_ptr().add(row * stride + HALF * half)));
                s.store_low_halves(words[row].as_mut_ptr().add(HALF * half), v);
            }
        }
        let (words, out) = (words.as_ptr(), out.as_mut_ptr());
        if columns == 1 {
            s.istore(out.cast(), s.iload(words.cast()));
            return;
        }
        for pair in (0..PAIRS).step_by(4) {
            let pairs = s.words4(words.cast::<u32>().add(pair), PAIRS, rows);
            for c in 0..4 {
                s.store_first(out.add((pair + c) * columns), s.from_bits(pairs[c]), columns);
            }
        }
    }
}

/// The upper half of a number, rounded to the nearest, ties away from 0: two instructions, where ties to even are three.
fn near(x: f32) -> u16 {
    (x.to_bits().wrapping_add(0x8000) >> 16) as u16
}

/// Turns a group of codes into bf16, `[TILE, GROUP]`.
type Turn = unsafe fn(CodeFormat, *const u8, *mut u16);

/// The definition of [`Turn`].
///
/// # Safety
/// A group of the format is readable, and [`GROUP_WORDS`] are writable.
unsafe fn turn_one_by_one(format: CodeFormat, group: *const u8, out: *mut u16) {
    // SAFETY: by contract.
    let (group, out) = unsafe {
        let group = std::slice::from_raw_parts(group, format.group_bytes());
        (group, std::slice::from_raw_parts_mut(out, GROUP_WORDS))
    };
    let (codes, factors) = group.split_at(format.code_bytes());
    let factor = |i: usize| f16::from_le_bytes([factors[2 * i], factors[2 * i + 1]]).to_f32();
    for (f, out) in out.chunks_exact_mut(GROUP).enumerate() {
        let (scale, min) = (factor(f), if format.has_min { factor(TILE + f) } else { 0.0 });
        for (k, out) in out.iter_mut().enumerate() {
            let code = if format.bits == 4 {
                i16::from(codes[f / 2 * GROUP + k] >> (4 * (f % 2)) & 15) + i16::from(format.lowest)
            } else {
                i16::from(codes[f * GROUP + k] as i8)
            };
            // The product is exact, so that it does not matter whether both are one instruction.
            *out = near(f32::from(code) * scale + min);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{CodeFormat, GROUP, HALF, TILE};

    /// Scales and minimums of a group of a tile, in f32.
    #[repr(align(64))]
    struct Factors([[f32; TILE]; 2]);

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    unsafe fn factors(format: CodeFormat, group: *const u8) -> Factors {
        let mut factors = Factors([[0.0; TILE]; 2]);
        for which in 0..1 + usize::from(format.has_min) {
            for half in 0..2 {
                // SAFETY: scales and minimums follow the codes.
                unsafe {
                    let at = group.add(format.code_bytes() + 2 * (which * TILE + HALF * half));
                    let numbers = _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()));
                    _mm512_store_ps(factors.0[which].as_mut_ptr().add(HALF * half), numbers);
                }
            }
        }
        factors
    }

    /// See [`super::Turn`]: codes of 4 bits. What they can be is a table of 16 numbers for each feature, whose upper halves are looked up.
    ///
    /// # Safety
    /// As there.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,fma,f16c")]
    pub(super) unsafe fn turn_nibbles(format: CodeFormat, group: *const u8, out: *mut u16) {
        // SAFETY: by contract.
        unsafe {
            let Factors([scales, mins]) = factors(format, group);
            let numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let lowest = _mm512_set1_epi32(i32::from(format.lowest));
            let numbers = _mm512_cvtepi32_ps(_mm512_add_epi32(numbers, lowest));
            let (round, one) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi16(1));
            let top = _mm512_set1_epi16(i16::MIN);
            for f in (0..TILE).step_by(2) {
                let (scale, min) = (_mm512_set1_ps(scales[f]), _mm512_set1_ps(mins[f]));
                let first = _mm512_castps_si512(_mm512_fmadd_ps(numbers, scale, min));
                let (scale, min) = (_mm512_set1_ps(scales[f + 1]), _mm512_set1_ps(mins[f + 1]));
                let second = _mm512_castps_si512(_mm512_fmadd_ps(numbers, scale, min));
                let first = _mm512_add_epi32(first, round);
                let second = _mm512_add_epi32(second, round);
                // In the low five bits of a word 2 · code + 1; the others do not count.
                let codes =
                    _mm512_cvtepu8_epi16(_mm256_loadu_si256(group.add(f / 2 * GROUP).cast()));
                let low = _mm512_shldi_epi16::<1>(codes, top);
                let high = _mm512_or_si512(_mm512_srli_epi16::<3>(codes), one);
                let out = out.add(f * GROUP).cast::<__m512i>();
                _mm512_storeu_si512(out, _mm512_permutexvar_epi16(low, first));
                _mm512_storeu_si512(out.add(1), _mm512_permutexvar_epi16(high, second));
            }
        }
    }

    /// See [`super::Turn`]: codes of 8 bits.
    ///
    /// # Safety
    /// As there.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
    pub(super) unsafe fn turn_bytes(format: CodeFormat, group: *const u8, out: *mut u16) {
        // SAFETY: by contract.
        unsafe {
            let Factors([scales, mins]) = factors(format, group);
            let round = _mm512_set1_epi32(0x8000);
            // Upper halves of two vectors.
            let upper: [u16; GROUP] = std::array::from_fn(|i| 2 * i as u16 + 1);
            let upper = _mm512_loadu_si512(upper.as_ptr().cast());
            for f in 0..TILE {
                let (scale, min) = (_mm512_set1_ps(scales[f]), _mm512_set1_ps(mins[f]));
                let at = group.add(f * GROUP);
                let first = _mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()));
                let second = _mm512_cvtepi8_epi32(_mm_loadu_si128(at.add(HALF).cast()));
                let first = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), scale, min);
                let second = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), scale, min);
                let first = _mm512_add_epi32(_mm512_castps_si512(first), round);
                let second = _mm512_add_epi32(_mm512_castps_si512(second), round);
                let words = _mm512_permutex2var_epi16(first, upper, second);
                _mm512_storeu_si512(out.add(f * GROUP).cast(), words);
            }
        }
    }
}

fn turn_of(isa: Isa, format: CodeFormat) -> Turn {
    #[cfg(target_arch = "x86_64")]
    if isa.has(Set::Avx512Icl) && format.bits == 4 {
        return avx512::turn_nibbles;
    } else if isa.has(Set::Avx512) && format.bits == 8 {
        return avx512::turn_bytes;
    }
    let _ = (isa, format);
    turn_one_by_one
}

/// What multiplies tiles, or `None` where the definition does.
pub(super) struct Unit(Option<Amx>);

impl Unit {
    /// For some rows of inputs of a kind; of others than tiles none.
    pub(super) fn new(isa: Isa, kind: ActivationKind, rows: usize) -> Self {
        let tiles = kind == ActivationKind::Tiles && isa.has(Set::Amx) && rows > 0;
        // SAFETY: an `Isa` names only sets that the processor has.
        Self(tiles.then(|| unsafe { Amx::new(columns(rows)) }))
    }
}

/// Adds the products of some groups with all rows to `sums`: `[blocks, halves, 16 features, 16 rows]`, as [`Amx::add_products`] has
/// it. `weights`: `[groups, TILE, GROUP]`; the first of them is group `first` of the rows.
///
/// # Safety
/// All that is there, and the unit is for as many rows.
#[inline(always)]
unsafe fn add_products(
    Unit(amx): &Unit,
    weights: *const u16,
    (first, groups): (usize, usize),
    rows: &Rows<'_>,
    sums: *mut f32,
) {
    let (blocks, columns) = (rows.num_rows.div_ceil(BLOCK), rows.columns);
    let block = |i: usize| {
        let inputs = rows.bits.wrapping_add((i * rows.num_groups + first) * GROUP * columns);
        (inputs, sums.wrapping_add(i * BLOCK_SUMS))
    };
    let pairs = if amx.is_some() { blocks / 2 } else { 0 };
    let begin = first == 0;
    // SAFETY: by contract.
    unsafe {
        if let Some(amx) = amx {
            for i in 0..pairs {
                let [(x, sums), (more_x, more_sums)] = [block(2 * i), block(2 * i + 1)];
                amx.add_products_of_two(weights, [x, more_x], groups, [sums, more_sums], begin);
            }
        }
        for i in 2 * pairs..blocks {
            let (inputs, sums) = block(i);
            if let Some(amx) = amx {
                amx.add_products(weights, inputs, groups, sums, begin);
                continue;
            }
            for part in 0..2 * groups {
                let (group, half) = (part / 2, part % 2);
                let words = |from: *const u16, n| std::slice::from_raw_parts(from, n);
                let weights = words(weights.add(part * amx::WORDS), amx::WORDS);
                let inputs = words(inputs.add(group * GROUP * columns), GROUP * columns);
                let sums = std::slice::from_raw_parts_mut(sums.add(half * amx::SUMS), amx::SUMS);
                if begin && group == 0 {
                    sums.fill(0.0);
                }
                amx::add_products(weights, inputs, columns, sums);
            }
        }
    }
}

#[inline(always)]
fn multiply_body<S: Lanes>(
    s: S,
    (isa, unit): (Isa, &Unit),
    matrix: &Packed,
    tile: &[u8],
    room: &mut [u8],
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let (groups, n) = (rows.num_groups, rows.num_rows);
    assert!(tile.len() >= matrix.tile_bytes() && matrix.num_groups == groups, "a tile");
    assert!(room.len() >= self::room(n) && n > 0, "room of {} for {n} rows", room.len());
    let (weights, sums) = room[..self::room(n)].split_at_mut(2 * SPAN * GROUP_WORDS);
    let (weights, sums) = (weights.as_mut_ptr().cast::<u16>(), sums.as_mut_ptr().cast::<f32>());
    // What lies in a row's own order; others are 16 rows of a block.
    let alone = unit.0.as_ref().is_some_and(|amx| amx.rows() == 1);
    // SAFETY: the asserts cover all groups of the tile, the room, and the sums of all blocks; `out` has the rows, as whoever made it says.
    unsafe {
        match matrix.stored {
            Stored::Codes(format) => {
                let turn = turn_of(isa, format);
                let most = if n <= 2 * BLOCK { FEW_SPAN } else { SPAN };
                for first in (0..groups).step_by(most) {
                    let span = (first, most.min(groups - first));
                    for g in 0..span.1 {
                        let group = tile.as_ptr().add((first + g) * format.group_bytes());
                        prefetch::<L1>(group, format.group_bytes());
                        turn(format, group, weights.add(g * GROUP_WORDS));
                    }
                    add_products(unit, weights, span, rows, sums);
                }
            }
            // Weights in f32 take inputs in f32.
            Stored::K(_) | Stored::Bf16 | Stored::F16 | Stored::F32 => {
                // Few rows read weights once, as they come.
                let most = if n <= 2 * BLOCK { groups } else { SPAN };
                for first in (0..groups).step_by(most) {
                    let span = (first, most.min(groups - first));
                    let weights = tile.as_ptr().cast::<u16>().add(first * GROUP_WORDS);
                    add_products(unit, weights, span, rows, sums);
                }
            }
        }
        for row in (0..n).step_by(4) {
            let sums = sums.add(row / BLOCK * BLOCK_SUMS);
            let mut products = [[s.zero(); 2]; 4];
            for half in 0..2 {
                let sums = sums.add(half * amx::SUMS);
                if alone {
                    products[0][half] = s.load(sums);
                    continue;
                }
                let columns = s.words4(sums.add(row % BLOCK).cast(), BLOCK, HALF);
                for c in 0..4 {
                    products[c][half] = s.from_bits(columns[c]);
                }
            }
            for c in 0..4.min(n - row) {
                out.from(row + c).put_block(s, &[products[c]], 0);
            }
        }
    }
}

compiled! {
    /// A tile against rows of inputs in blocks. `room`: [`room`] bytes; `out` has the rows.
    pub(super) fn multiply(on: (Isa, &Unit), matrix: &Packed, tile: &[u8], room: &mut [u8], rows: &Rows<'_>, out: &Target<'_>) = multiply_body
        for [Avx512, Avx2, Sse2];
}
