//! HOT PATH (no allocation, locks or logging). Rows of coefficients to codes: choice of the row
//! scale and of the boost, then the optimal codes for them.
//!
//! Nothing here is fused or reordered, so every instruction set writes the same bytes.

// Lanes and states are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::tables::{self, GRAIN, REACH, SPREAD};
use super::{
    BOOSTS, HEADER_BYTES, Layout, MAX_BITS, MAX_SEGMENTS, ROW_SCALES, SEGMENT, scaled,
    segment_bytes,
};
use crate::isa::{Isa, dispatch};

const LEVELS_1: [f32; 8] = scaled(&tables::LEVELS_1);
const LEVELS_2: [f32; 16] = scaled(&tables::LEVELS_2);
const LEVELS_3: [f32; 32] = scaled(&tables::LEVELS_3);
const LEVELS_4: [f32; 64] = scaled(&tables::LEVELS_4);
const LEVELS_5: [f32; 32] = scaled(&tables::LEVELS_5);
const LEVELS_6: [f32; 64] = scaled(&tables::LEVELS_6);

/// Most bytes of a row.
const MAX_ROW_BYTES: usize = HEADER_BYTES + MAX_SEGMENTS * segment_bytes(MAX_BITS);

/// Row scales tried, as steps of the scale code from the root mean square.
const STEPS: [f32; 5] = [-2.575_4, 0.0, 3.028_1, 6.124_2, 9.1];

/// As [`STEPS`], where one segment has its own factor.
const BOOSTED_STEPS: [f32; 2] = [0.0, 3.028_1];

/// Normalised coefficients beyond this count as this: far out of every table, and its square still
/// leaves the other coefficients of the segment their precision.
const LIMIT: f32 = 64.0;

type Coefficients = [[f32; SEGMENT]; MAX_SEGMENTS];

impl Layout {
    /// Encodes a block: `z`: `[rows, width]` coefficients with their means removed; `slot`:
    /// [`Self::slot_bytes`] of as many rows, all of it overwritten. Returns the squared error in the
    /// units of `z`, for a gain of 1.
    ///
    /// NaN and infinities count as 0 and do not touch other coefficients. What a row becomes does not
    /// depend on the others.
    ///
    /// # Panics
    /// If `z` is not whole rows, or the slot has another length.
    pub fn encode(&self, z: &[f32], slot: &mut [u8]) -> f32 {
        self.encode_block_on(Isa::best(), z, slot)
    }

    pub(super) fn encode_block_on(&self, isa: Isa, z: &[f32], slot: &mut [u8]) -> f32 {
        let rows = z.len() / self.width();
        assert!(z.len() == rows * self.width(), "z: {} of rows of {}", z.len(), self.width());
        assert!(slot.len() == self.slot_bytes(rows), "slot: {} for {rows} rows", slot.len());
        let mut bytes = [0; MAX_ROW_BYTES];
        let mut error = 0.0;
        for (t, z) in z.chunks_exact(self.width()).enumerate() {
            let row = &mut bytes[..self.row_bytes];
            error += encode_on(isa, self, z, row);
            let (header, mut codes) = row.split_at(HEADER_BYTES);
            slot[t] = header[0];
            slot[rows + t] = header[1];
            for (bits, _, offset) in self.segments(rows) {
                let (own, others) = codes.split_at(segment_bytes(bits));
                slot[offset + t * own.len()..][..own.len()].copy_from_slice(own);
                codes = others;
            }
        }
        error
    }
}

dispatch! {
    // Callers have chosen the instruction set.
    #[allow(dead_code)]
    fn encode / encode_on(layout: &Layout, z: &[f32], row: &mut [u8]) -> f32 = encode_body;
}

#[inline(always)]
fn encode_body<const FMA: bool>(layout: &Layout, z: &[f32], row: &mut [u8]) -> f32 {
    let mut finite: Coefficients = [[0.0; SEGMENT]; MAX_SEGMENTS];
    for (segment, z) in finite.iter_mut().zip(z.as_chunks::<SEGMENT>().0) {
        for j in 0..SEGMENT {
            segment[j] = if z[j].is_finite() { z[j] } else { 0.0 };
        }
    }
    let header = choose_header(layout, &finite);
    row[0] = header.scale_code;
    row[1] = header.segment as u8 | header.boost << 4;

    let mut error = 0.0;
    let mut offset = HEADER_BYTES;
    for (i, (bits, scale)) in layout.bits.iter().zip(&layout.scales).enumerate() {
        let factor = scale * header.factor(i);
        let inverse = if factor > f32::MIN_POSITIVE { 1.0 / factor } else { 0.0 };
        let v: [f32; SEGMENT] =
            std::array::from_fn(|j| (finite[i][j] * inverse).clamp(-LIMIT, LIMIT));
        let codes = &mut row[offset..offset + segment_bytes(*bits)];
        let levels = encode_segment(*bits, &v, codes);
        for j in 0..SEGMENT {
            let d = finite[i][j] - factor * levels[j];
            error += d * d;
        }
        offset += codes.len();
    }
    error
}

/// Writes the best codes for normalised coefficients; returns their levels.
#[inline(always)]
pub(super) fn encode_segment(bits: u8, v: &[f32; SEGMENT], codes: &mut [u8]) -> [f32; SEGMENT] {
    match bits {
        0 => [0.0; SEGMENT],
        1 => encode_trellis::<1, 8, 1>(v, &LEVELS_1, &BRANCHES_1, codes),
        2 => encode_trellis::<2, 16, 1>(v, &LEVELS_2, &BRANCHES_2, codes),
        3 => encode_trellis::<3, 32, 2>(v, &LEVELS_3, &BRANCHES_3, codes),
        4 => encode_trellis::<4, 64, 4>(v, &LEVELS_4, &BRANCHES_4, codes),
        5 => encode_plain::<5, 32>(v, &LEVELS_5, codes),
        _ => encode_plain::<6, 64>(v, &LEVELS_6, codes),
    }
}

/// The first two bytes of a row.
#[derive(Debug, Clone, Copy)]
struct Header {
    scale_code: u8,
    segment: usize,
    boost: u8,
}

impl Header {
    const ZERO: Self = Self { scale_code: 0, segment: 0, boost: 0 };

    #[inline(always)]
    fn factor(self, i: usize) -> f32 {
        let boost = if i == self.segment { BOOSTS[usize::from(self.boost)] } else { 1.0 };
        ROW_SCALES[usize::from(self.scale_code)] * boost
    }
}

/// The scale code nearest to code 128 + `steps`.
#[inline(always)]
fn scale_code(steps: f32) -> u8 {
    (128.0 + steps).round().clamp(1.0, 255.0) as u8
}

/// The candidate with the least estimated error.
#[inline(always)]
fn choose_header(layout: &Layout, z: &Coefficients) -> Header {
    let num = layout.bits.len();
    // Magnitudes relative to the segments' scales, and their sums of squares.
    let mut x: Coefficients = [[0.0; SEGMENT]; MAX_SEGMENTS];
    let mut energies = [0.0f32; MAX_SEGMENTS];
    let mut used = 0;
    let mut total = 0.0;
    let mut most = 0;
    for i in 0..num {
        let scale = layout.scales[i];
        if layout.bits[i] == 0 || scale <= f32::MIN_POSITIVE {
            continue;
        }
        let inverse = 1.0 / scale;
        for j in 0..SEGMENT {
            // The limit keeps squares finite.
            x[i][j] = (z[i][j].abs() * inverse).min(1e12);
        }
        energies[i] = sum_of_squares(&x[i]);
        total += energies[i];
        used += 1;
        if energies[i] > energies[most] {
            most = i;
        }
    }
    if total <= 0.0 {
        return Header::ZERO;
    }

    let mut best = (Header::ZERO, estimate(layout, &x, Header::ZERO));
    let mut consider = |header: Header| {
        let error = estimate(layout, &x, header);
        if error < best.1 {
            best = (header, error);
        }
    };
    let all = 4.0 * (total / (used * SEGMENT) as f32).log2();
    for step in STEPS {
        consider(Header { scale_code: scale_code(all + step), segment: 0, boost: 0 });
    }
    if used > 1 {
        // The boosted segment must stay in reach of the row scale.
        let own = 4.0 * (energies[most] / SEGMENT as f32).log2();
        let rest_energy = (total - energies[most]).max(0.0) / ((used - 1) * SEGMENT) as f32;
        let rest = (4.0 * rest_energy.log2()).max(own - 60.0);
        for step in BOOSTED_STEPS {
            let code = scale_code(rest + step);
            let half_octaves = (own - (f32::from(code) - 128.0)) / 4.0;
            for boost in [half_octaves.floor(), half_octaves.ceil()] {
                if (1.0..=15.0).contains(&boost) {
                    consider(Header { scale_code: code, segment: most, boost: boost as u8 });
                }
            }
        }
    }
    best.0
}

/// Sum in a fixed order that vectorises.
#[inline(always)]
fn sum_of_squares(x: &[f32; SEGMENT]) -> f32 {
    let mut lanes = [0.0; 4];
    for j in 0..SEGMENT {
        lanes[j % 4] += x[j] * x[j];
    }
    (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
}

/// Squared error to expect, but for what no header changes (see [`GRAIN`]). `x`: magnitudes relative
/// to the segments' scales.
#[inline(always)]
fn estimate(layout: &Layout, x: &Coefficients, header: Header) -> f32 {
    let mut lanes = [0.0; SEGMENT];
    for (i, (bits, scale)) in layout.bits.iter().zip(&layout.scales).enumerate() {
        let bits = usize::from(*bits);
        let factor = header.factor(i);
        let weight = scale * scale;
        let square = factor * factor;
        let grain = square * GRAIN[bits];
        let spread = if square > 0.0 { SPREAD[bits] / square } else { 0.0 };
        let reach = factor * REACH[bits];
        for j in 0..SEGMENT {
            let within = x[i][j].min(reach);
            let beyond = x[i][j] - within;
            let fourth = (within * within) * (within * within);
            lanes[j] += weight * (grain + spread * fourth + beyond * beyond);
        }
    }
    lanes.iter().sum()
}

/// States between windows: the two bits that neighbours share.
const STATES: usize = 4;

/// Levels of the windows that lead from one state to another, by their remaining bits:
/// `[choice][from · 4 + to]`; infinite where there is none.
type Branches<const CHOICES: usize> = [[f32; STATES * STATES]; CHOICES];

const BRANCHES_1: Branches<1> = branches::<1, 8, 1>(&LEVELS_1);
const BRANCHES_2: Branches<1> = branches::<2, 16, 1>(&LEVELS_2);
const BRANCHES_3: Branches<2> = branches::<3, 32, 2>(&LEVELS_3);
const BRANCHES_4: Branches<4> = branches::<4, 64, 4>(&LEVELS_4);

/// A window's low two bits are the state it leaves, its high two bits the state it enters. With one
/// bit these overlap.
const fn branches<const BITS: usize, const N: usize, const CHOICES: usize>(
    levels: &[f32; N],
) -> Branches<CHOICES> {
    let mut table = [[f32::INFINITY; STATES * STATES]; CHOICES];
    let mut window = 0;
    while window < N {
        let (from, to) = (window % STATES, window >> BITS);
        let choice = (window >> 2) % CHOICES;
        table[choice][from * STATES + to] = levels[window];
        window += 1;
    }
    table
}

/// Writes the codes with the least squared distance to `v`; returns their levels.
///
/// For each of the four start states, a Viterbi search for the best path that ends where it began;
/// the four run side by side.
#[inline(always)]
fn encode_trellis<const BITS: usize, const N: usize, const CHOICES: usize>(
    v: &[f32; SEGMENT],
    levels: &[f32; N],
    branches: &Branches<CHOICES>,
    codes: &mut [u8],
) -> [f32; SEGMENT] {
    // [state][start]
    let mut costs = [[f32::INFINITY; STATES]; STATES];
    for start in 0..STATES {
        costs[start][start] = 0.0;
    }
    let mut previous = [[[0u32; STATES]; STATES]; SEGMENT];
    for j in 0..SEGMENT {
        let mut distances = [f32::INFINITY; STATES * STATES];
        for branch in branches {
            for (d, level) in distances.iter_mut().zip(branch) {
                *d = d.min((v[j] - level) * (v[j] - level));
            }
        }
        let before = costs;
        for to in 0..STATES {
            for start in 0..STATES {
                let path = |from: usize| before[from][start] + distances[from * STATES + to];
                let (p0, p1, p2, p3) = (path(0), path(1), path(2), path(3));
                let (low, low_from) = if p1 < p0 { (p1, 1) } else { (p0, 0) };
                let (high, high_from) = if p3 < p2 { (p3, 3) } else { (p2, 2) };
                let (cost, from) = if high < low { (high, high_from) } else { (low, low_from) };
                costs[to][start] = cost;
                previous[j][to][start] = from;
            }
        }
    }
    let mut start = 0;
    for s in 1..STATES {
        if costs[s][s] < costs[start][start] {
            start = s;
        }
    }

    let mut word = 0u64;
    let mut state = start;
    let mut chosen = [0.0; SEGMENT];
    for j in (0..SEGMENT).rev() {
        let from = previous[j][state][start] as usize % STATES;
        let mut choice = 0;
        let mut least = f32::INFINITY;
        for (c, branch) in branches.iter().enumerate() {
            let d = (v[j] - branch[from * STATES + state]).abs();
            if d < least {
                (choice, least) = (c, d);
            }
        }
        let window = if BITS == 1 { from | state << 1 } else { from | choice << 2 | state << BITS };
        chosen[j] = levels[window % N];
        word |= (window as u64 % (1 << BITS)) << (BITS * j);
        state = from;
    }
    codes.copy_from_slice(&word.to_le_bytes()[..2 * BITS]);
    chosen
}

/// Writes the nearest levels' codes; returns the levels.
#[inline(always)]
fn encode_plain<const BITS: usize, const N: usize>(
    v: &[f32; SEGMENT],
    levels: &[f32; N],
    codes: &mut [u8],
) -> [f32; SEGMENT] {
    let mut nearest = [0u32; SEGMENT];
    for pair in levels.windows(2) {
        let edge = 0.5 * (pair[0] + pair[1]);
        for j in 0..SEGMENT {
            nearest[j] += u32::from(v[j] > edge);
        }
    }
    let mut word = 0u128;
    for (j, code) in nearest.iter().enumerate() {
        word |= u128::from(*code) << (BITS * j);
    }
    codes.copy_from_slice(&word.to_le_bytes()[..2 * BITS]);
    nearest.map(|code| levels[code as usize % N])
}
