//! HOT PATH. 32 rows of a segment side by side, a coefficient of all of them in one vector.

// Lanes and states are indexed; iterators would hide that. Closures do not go through iterators, which do
// not have the instruction set.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;

use super::paths::{self, MOST, STATES, TAG, choices, leads};
use super::{ROWS, Segment, definition, plain};
use crate::simd::bytes::{BYTES, Bytes};
use crate::simd::compiled;
use crate::trellis::SEGMENT;

/// The row that a 16-bit lane belongs to.
const fn row_of_lane(lane: usize) -> usize {
    lane / 2 + ROWS / 2 * (lane % 2)
}

compiled! {
    /// See [`super::encode_segment`].
    pub(super) fn encode_segment(bits: u8, segment: &Segment<'_>, codes: &mut [u8]) = encode_body
        for [Avx512, Avx2];
}

#[inline(always)]
fn encode_body<S: Bytes>(set: S, bits: u8, segment: &Segment<'_>, codes: &mut [u8]) {
    if !S::VECTORS {
        return definition::encode_segment(bits, segment, codes);
    }
    match bits {
        1 => closed_paths::<S, 1>(set, segment, &paths::TABLES_1, codes),
        2 => closed_paths::<S, 2>(set, segment, &paths::TABLES_2, codes),
        3 => closed_paths::<S, 3>(set, segment, &paths::TABLES_3, codes),
        4 => closed_paths::<S, 4>(set, segment, &paths::TABLES_4, codes),
        5 => nearest::<S, 5>(set, segment, &plain::TABLES_5, codes),
        _ => nearest::<S, 6>(set, segment, &plain::TABLES_6, codes),
    }
}

#[inline(always)]
fn load<S: Bytes>(set: S, lanes: &[i16; ROWS]) -> S::I {
    // SAFETY: 64 bytes.
    unsafe { set.iload(lanes.as_ptr().cast()) }
}

/// A row's coefficients as multiples of the tables' unit: [`super::rounded`].
#[inline(always)]
fn rounded_row<S: Bytes>(set: S, segment: &Segment<'_>, t: usize, most: f32) -> S::I {
    // Rows that are not there repeat the last.
    let t = t.min(segment.inverses.len() - 1);
    let z = &segment.z[t * segment.stride..][..SEGMENT];
    // SAFETY: 16 numbers.
    let z = unsafe { set.load(z.as_ptr()) };
    // Neither NaN nor infinite.
    let magnitude = set.from_bits(set.and(set.bits(z), set.isplat(i32::MAX)));
    let z = set.select(set.lt(magnitude, set.splat(f32::INFINITY)), z, set.zero());
    let z = set.mul(z, set.splat(segment.inverses[t]));
    set.to_int(set.max(set.splat(-most), set.min(set.splat(most), z)))
}

/// Coefficients of all rows; the order of rows is [`row_of_lane`]'s.
#[inline(always)]
fn rounded<S: Bytes>(set: S, segment: &Segment<'_>, most: f32) -> [S::I; SEGMENT] {
    let mut lanes = [set.izero(); SEGMENT];
    let to: *mut u8 = lanes.as_mut_ptr().cast();
    // Rows 4 i to 4 i + 3 and those 16 after them.
    for i in 0..4 {
        let mut rows = [set.izero(); 4];
        for (r, row) in rows.iter_mut().enumerate() {
            let low = rounded_row(set, segment, 4 * i + r, most);
            let high = rounded_row(set, segment, 4 * i + r + ROWS / 2, most);
            *row = set.merge(set.isplat(0xffff), low, set.shl(high, 16));
        }
        // In quarter l of vector c, coefficient 4 l + c of these rows.
        let [a, b, c, d] = rows;
        let low = [set.zip32::<false>(a, b), set.zip32::<false>(c, d)];
        let high = [set.zip32::<true>(a, b), set.zip32::<true>(c, d)];
        let fours = [
            set.zip64::<false>(low[0], low[1]),
            set.zip64::<true>(low[0], low[1]),
            set.zip64::<false>(high[0], high[1]),
            set.zip64::<true>(high[0], high[1]),
        ];
        for (c, four) in fours.into_iter().enumerate() {
            // SAFETY: a quarter of each of four of the 16 vectors.
            unsafe { set.store_quarters(to.add(BYTES * c + 16 * i), 4 * BYTES, four) };
        }
    }
    lanes
}

/// Writes codes of the coefficients of all rows (below 2^BITS), put together, row after row.
#[inline(always)]
fn write<S: Bytes, const BITS: usize>(set: S, found: &[S::I; SEGMENT], codes: &mut [u8]) {
    let mut words = [set.izero(); BITS];
    for j in 0..SEGMENT {
        let (word, at) = (BITS * j / 16, BITS * j % 16);
        words[word] = set.or(words[word], set.shl16(found[j], at as u32));
        if at + BITS > 16 {
            words[word + 1] = set.or(words[word + 1], set.shr16(found[j], 16 - at as u32));
        }
    }
    let mut all = [[0u16; ROWS]; BITS];
    for (all, word) in all.iter_mut().zip(words) {
        // SAFETY: 64 bytes.
        unsafe { set.istore(all.as_mut_ptr().cast(), word) };
    }
    let (pieces, _) = codes.as_chunks_mut::<2>();
    for lane in 0..ROWS {
        let row = row_of_lane(lane);
        if let Some(row) = pieces.get_mut(row * BITS..(row + 1) * BITS) {
            for (piece, words) in row.iter_mut().zip(&all) {
                *piece = words[lane].to_le_bytes();
            }
        }
    }
}

/// Codes of the levels that are nearest, of all rows.
#[inline(always)]
fn nearest<S: Bytes, const BITS: usize>(
    set: S,
    segment: &Segment<'_>,
    tables: &plain::Tables,
    codes: &mut [u8],
) {
    let one = set.splat16(1);
    let mut found = rounded(set, segment, tables.most);
    for j in 0..SEGMENT {
        let v = found[j];
        let cell = set.shr16(v, plain::CELL_SHIFT);
        let mut code = set.look_up16::<{ plain::CELLS }>(&tables.codes, cell);
        for edges in &tables.edges {
            let beyond = set.gt16(v, set.look_up16::<{ plain::CELLS }>(edges, cell));
            code = set.select16(beyond, set.add16(code, one), code);
        }
        found[j] = code;
    }
    write::<S, BITS>(set, &found, codes);
}

/// `cost & !TAG | state`.
#[inline(always)]
fn tagged<S: Bytes>(set: S, cost: S::I, state: usize) -> S::I {
    set.merge(set.splat16(TAG as i16), set.splat16(state as i16), cost)
}

/// The one of four that two bits of each lane name.
#[inline(always)]
fn select<S: Bytes>(set: S, [low, high]: [S::W; 2], of: [S::I; STATES]) -> S::I {
    let [a, b, c, d] = of;
    set.select16(high, set.select16(low, d, c), set.select16(low, b, a))
}

/// States as two bits of each lane.
#[inline(always)]
fn bits<S: Bytes>(set: S, states: S::I) -> [S::W; 2] {
    [set.has16(states, 1), set.has16(states, 2)]
}

/// The cheapest closed paths of all rows: see [`paths`].
#[inline(always)]
fn closed_paths<S: Bytes, const BITS: usize>(
    set: S,
    segment: &Segment<'_>,
    tables: &paths::Tables,
    codes: &mut [u8],
) {
    let v = rounded(set, segment, MOST);
    let (zero, tag) = (set.izero(), set.splat16(TAG as i16));
    let cost_bits = set.splat16(!TAG as i16);
    // [coefficient][state][start]; 16 KiB, which take a while to clear.
    let mut all = [MaybeUninit::<[[S::I; STATES]; STATES]>::uninit(); SEGMENT];
    let mut before = [[set.splat16(-1); STATES]; STATES];
    for start in 0..STATES {
        before[start][start] = zero;
    }
    for j in 0..SEGMENT {
        let mut steps = [[zero; STATES]; STATES];
        for from in 0..STATES {
            for to in 0..STATES {
                if leads::<BITS>(from, to) {
                    let pair = from * STATES + to;
                    let levels = &tables.levels[pair];
                    let mut level = load(set, &levels[0]);
                    for r in 1..choices::<BITS>() {
                        let middle = load(set, &tables.middles[pair][r - 1]);
                        let beyond = set.gt16(v[j], middle);
                        level = set.select16(beyond, load(set, &levels[r]), level);
                    }
                    let mut distance = set.subs16(v[j], level);
                    if BITS > 2 {
                        distance = set.adds16(distance, distance);
                    }
                    let square = set.mulhrs16(distance, distance);
                    steps[from][to] = set.and(square, cost_bits);
                }
            }
        }
        let mut after = [[zero; STATES]; STATES];
        for start in 0..STATES {
            let mut costs = [zero; STATES];
            for from in 0..STATES {
                costs[from] = tagged(set, before[from][start], from);
            }
            for to in 0..STATES {
                // With one bit, only two lead there.
                let first = if BITS == 1 { 2 * (to % 2) } else { 0 };
                let mut path = [zero; STATES];
                for (i, path) in path.iter_mut().enumerate() {
                    let from = (first + i) % STATES;
                    *path = set.adds16_u(costs[from], steps[from][to]);
                }
                let mut least = set.min16_u(path[0], path[1]);
                if BITS > 1 {
                    least = set.min16_u(least, set.min16_u(path[2], path[3]));
                }
                after[to][start] = least;
            }
        }
        all[j].write(after);
        before = after;
        if j % 2 == 1 {
            let mut least = before[0][0];
            for cost in before.as_flattened() {
                least = set.min16_u(least, *cost);
            }
            let least = set.and(least, cost_bits);
            for cost in before.as_flattened_mut() {
                *cost = set.sub16(*cost, least);
            }
        }
    }

    let mut closed = tagged(set, before[0][0], 0);
    for s in 1..STATES {
        closed = set.min16_u(closed, tagged(set, before[s][s], s));
    }
    let start = bits(set, closed);
    let (mut to, mut to_bits) = (set.and(closed, tag), start);
    let mut found = [zero; SEGMENT];
    for j in (0..SEGMENT).rev() {
        let mut of_start = [zero; STATES];
        // SAFETY: written above, as all are.
        let costs = unsafe { all[j].assume_init_ref() };
        for (of_start, costs) in of_start.iter_mut().zip(costs) {
            *of_start = select(set, start, *costs);
        }
        let from = set.and(select(set, to_bits, of_start), tag);
        let pair = set.or(set.shl16(from, 2), to);
        found[j] = if BITS > 2 {
            let mut window = pair;
            for middles in &tables.middles_of[..choices::<BITS>() - 1] {
                let beyond = set.gt16(v[j], set.look_up16::<16>(middles, pair));
                window = set.select16(beyond, set.add16(window, set.splat16(16)), window);
            }
            set.look_up16::<64>(&tables.codes, window)
        } else {
            set.and(from, set.splat16((1 << BITS) - 1))
        };
        (to, to_bits) = (from, bits(set, from));
    }
    write::<S, BITS>(set, &found, codes);
}
