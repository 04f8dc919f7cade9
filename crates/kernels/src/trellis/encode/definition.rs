//! HOT PATH (processors without AVX2). Codes of one row by the definition, which those of 32 rows side by side are
//! compared with.

use super::paths::{self, STATES, TAG, choices, leads};
use super::{Segment, plain};
use crate::trellis::{SEGMENT, segment_bytes};

/// See [`super::encode_segment`].
pub(super) fn encode_segment(bits: u8, segment: &Segment<'_>, codes: &mut [u8]) {
    let bytes = segment_bytes(bits);
    let rows = segment.z.chunks(segment.stride).zip(segment.inverses);
    for ((z, inverse), codes) in rows.zip(codes.chunks_exact_mut(bytes)) {
        let word = row_codes(bits, z, *inverse);
        codes.copy_from_slice(&word.to_le_bytes()[..bytes]);
    }
}

/// The codes of one row of a segment.
pub(in crate::trellis) fn row_codes(bits: u8, z: &[f32], inverse: f32) -> u128 {
    let rounded =
        |most: f32| -> [i16; SEGMENT] { std::array::from_fn(|j| rounded(z[j], inverse, most)) };
    let path = |tables: &paths::Tables, codes: fn(&[i16; SEGMENT], &paths::Tables) -> u64| {
        u128::from(codes(&rounded(paths::MOST), tables))
    };
    match bits {
        1 => path(&paths::TABLES_1, path_codes::<1>),
        2 => path(&paths::TABLES_2, path_codes::<2>),
        3 => path(&paths::TABLES_3, path_codes::<3>),
        4 => path(&paths::TABLES_4, path_codes::<4>),
        5 => plain_codes::<5>(&rounded(plain::TABLES_5.most), &plain::TABLES_5),
        _ => plain_codes::<6>(&rounded(plain::TABLES_6.most), &plain::TABLES_6),
    }
}

/// A coefficient as codes are found for it. Zero if it is no number.
fn rounded(z: f32, inverse: f32, most: f32) -> i16 {
    let z = if z.is_finite() { z } else { 0.0 };
    (z * inverse).clamp(-most, most).round_ties_even() as i16
}

/// A cost without its low bits, which name a state instead.
#[inline(always)]
fn tagged(cost: u16, state: usize) -> u16 {
    cost & !TAG | state as u16
}

/// The codes of a segment, from bit 0 of the result on. `v`: coefficients in [`Tables::unit`]s. The
/// definition.
fn path_codes<const BITS: usize>(v: &[i16; SEGMENT], tables: &paths::Tables) -> u64 {
    // The nearest level between two states.
    let rank = |v: i16, pair: usize| {
        tables.middles_of[..choices::<BITS>() - 1]
            .iter()
            .filter(|middles| v > middles.words[pair])
            .count()
    };
    // The cheapest paths to each state from each start, and where they came from last.
    let mut paths = [[[0u16; STATES]; STATES]; SEGMENT]; // [coefficient][state][start]
    let mut before = [[u16::MAX; STATES]; STATES];
    for (start, costs) in before.iter_mut().enumerate() {
        costs[start] = 0;
    }
    for j in 0..SEGMENT {
        let steps: [u16; STATES * STATES] = std::array::from_fn(|pair| {
            let level = tables.levels[pair][rank(v[j], pair)][0];
            let distance = v[j].saturating_sub(level);
            let distance = if BITS > 2 { distance.saturating_add(distance) } else { distance };
            ((i32::from(distance).pow(2) + (1 << 14)) >> 15) as u16 & !TAG
        });
        let after = &mut paths[j];
        for to in 0..STATES {
            for start in 0..STATES {
                after[to][start] = (0..STATES)
                    .filter(|from| leads::<BITS>(*from, to))
                    .map(|from| {
                        tagged(before[from][start], from).saturating_add(steps[from * STATES + to])
                    })
                    .fold(u16::MAX, u16::min);
            }
        }
        before = *after;
        if j % 2 == 1 {
            let least = before.iter().flatten().fold(u16::MAX, |least, cost| least.min(*cost));
            before.iter_mut().flatten().for_each(|cost| *cost -= least & !TAG);
        }
    }
    let closed = (0..STATES).map(|s| tagged(before[s][s], s)).fold(u16::MAX, u16::min);
    let start = usize::from(closed & TAG);

    let mut word = 0;
    let mut to = start;
    for j in (0..SEGMENT).rev() {
        let from = usize::from(paths[j][to][start] & TAG);
        let pair = from * STATES + to;
        let code = tables.codes.words[rank(v[j], pair) * STATES * STATES + pair];
        word |= (code as u64) << (BITS * j);
        to = from;
    }
    word
}

/// The codes of a segment, from bit 0 of the result on. `v`: as above. The
/// definition.
fn plain_codes<const BITS: usize>(v: &[i16; SEGMENT], tables: &plain::Tables) -> u128 {
    let mut word = 0;
    for (j, v) in v.iter().enumerate() {
        let cell = usize::from(*v as u16 >> plain::CELL_SHIFT);
        let beyond = tables.edges.iter().filter(|edges| *v > edges.words[cell]).count();
        word |= (tables.codes.words[cell] as u128 + beyond as u128) << (BITS * j);
    }
    word
}
