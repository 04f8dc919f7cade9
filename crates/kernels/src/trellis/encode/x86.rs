//! HOT PATH. 32 rows of a segment side by side, a coefficient of all of them in one register.

// Lanes and states are indexed; iterators would hide that. Closures do not go through iterators, which do
// not have the instruction set.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::paths::{self, MOST, STATES, TAG, choices, leads};
use super::{ROWS, Segment, plain};
use crate::trellis::SEGMENT;

/// A coefficient of all rows; the order of rows is [`row_of_lane`]'s.
type Lanes = __m512i;

/// The row that a 16-bit lane belongs to.
const fn row_of_lane(lane: usize) -> usize {
    lane / 2 + ROWS / 2 * (lane % 2)
}

/// See [`super::encode_segment`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn encode_segment(bits: u8, segment: &Segment<'_>, codes: &mut [u8]) {
    match bits {
        1 => closed_paths::<1>(segment, &paths::TABLES_1, codes),
        2 => closed_paths::<2>(segment, &paths::TABLES_2, codes),
        3 => closed_paths::<3>(segment, &paths::TABLES_3, codes),
        4 => closed_paths::<4>(segment, &paths::TABLES_4, codes),
        5 => nearest::<5>(segment, &plain::TABLES_5, codes),
        _ => nearest::<6>(segment, &plain::TABLES_6, codes),
    }
}

/// A register from a table.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load(table: &[i16; 32]) -> __m512i {
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
}

/// The number that the low bits of each index name.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn lookup(table: &[i16; 64], indices: __m512i) -> __m512i {
    let [low, high] = table.as_chunks::<32>().0 else { return indices };
    _mm512_permutex2var_epi16(load(low), indices, load(high))
}

/// Coefficients as multiples of the tables' unit: [`super::rounded`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn rounded(segment: &Segment<'_>, most: f32) -> [Lanes; SEGMENT] {
    let most = _mm512_set1_ps(most);
    let least = _mm512_sub_ps(_mm512_setzero_ps(), most);
    let last = segment.inverses.len() - 1;
    let row = |t: usize| {
        // Rows that are not there repeat the last.
        let t = t.min(last);
        let z = &segment.z[t * segment.stride..][..SEGMENT];
        // SAFETY: 16 numbers.
        let z = unsafe { _mm512_loadu_ps(z.as_ptr()) };
        // Neither NaN nor infinite.
        let finite = !_mm512_fpclass_ps_mask::<0x99>(z);
        let z = _mm512_maskz_mul_ps(finite, z, _mm512_set1_ps(segment.inverses[t]));
        _mm512_cvtps_epi32(_mm512_max_ps(least, _mm512_min_ps(most, z)))
    };
    let mut lanes = [_mm512_setzero_si512(); SEGMENT];
    for (t, lanes) in lanes.iter_mut().enumerate() {
        let (low, high) = (row(t), row(t + ROWS / 2));
        *lanes = _mm512_mask_blend_epi16(0xAAAA_AAAA, low, _mm512_slli_epi32::<16>(high));
    }
    transposed(&lanes)
}

/// Of a matrix of 16 × 16 32-bit numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transposed(rows: &[__m512i; 16]) -> [__m512i; 16] {
    let zero = _mm512_setzero_si512();
    // Within lanes of 128 bits: pairs of rows, then fours of rows.
    let mut pairs = [zero; 16];
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // fours[4 i + c]: column 4 l + c of rows 4 i to 4 i + 3, in lane l.
    let mut fours = [zero; 16];
    for i in 0..4 {
        for half in 0..2 {
            let (a, b) = (pairs[4 * i + half], pairs[4 * i + 2 + half]);
            fours[4 * i + 2 * half] = _mm512_unpacklo_epi64(a, b);
            fours[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
        }
    }
    // Lanes: a 4 × 4 matrix for each c.
    let mut out = [zero; 16];
    for c in 0..4 {
        let [a, b, d, e] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
        let (ab_even, ab_odd) =
            (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xDD>(a, b));
        let (de_even, de_odd) =
            (_mm512_shuffle_i32x4::<0x88>(d, e), _mm512_shuffle_i32x4::<0xDD>(d, e));
        out[c] = _mm512_shuffle_i32x4::<0x88>(ab_even, de_even);
        out[8 + c] = _mm512_shuffle_i32x4::<0xDD>(ab_even, de_even);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(ab_odd, de_odd);
        out[12 + c] = _mm512_shuffle_i32x4::<0xDD>(ab_odd, de_odd);
    }
    out
}

/// Codes of the coefficients of all rows, put together.
struct Words<const BITS: usize>([[u16; ROWS]; BITS]);

impl<const BITS: usize> Words<BITS> {
    /// `codes`: below 2^BITS, by coefficient.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new(codes: &[Lanes; SEGMENT]) -> Self {
        let mut words = [_mm512_setzero_si512(); BITS];
        for (j, codes) in codes.iter().enumerate() {
            let (word, at) = (BITS * j / 16, BITS * j % 16);
            let low = _mm512_sll_epi16(*codes, _mm_cvtsi32_si128(at as i32));
            words[word] = _mm512_or_si512(words[word], low);
            if at + BITS > 16 {
                let high = _mm512_srl_epi16(*codes, _mm_cvtsi32_si128(16 - at as i32));
                words[word + 1] = _mm512_or_si512(words[word + 1], high);
            }
        }
        let mut out = [[0; ROWS]; BITS];
        for (out, word) in out.iter_mut().zip(words) {
            // SAFETY: 64 bytes.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), word) };
        }
        Self(out)
    }

    /// Row after row.
    #[inline]
    fn write(&self, codes: &mut [u8]) {
        let (pieces, _) = codes.as_chunks_mut::<2>();
        for lane in 0..ROWS {
            let row = row_of_lane(lane);
            if let Some(row) = pieces.get_mut(row * BITS..(row + 1) * BITS) {
                for (piece, words) in row.iter_mut().zip(&self.0) {
                    *piece = words[lane].to_le_bytes();
                }
            }
        }
    }
}

/// [`plain::codes`] of all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn nearest<const BITS: usize>(segment: &Segment<'_>, tables: &plain::Tables, codes: &mut [u8]) {
    let one = _mm512_set1_epi16(1);
    let mut found = rounded(segment, tables.most);
    for lanes in &mut found {
        let v = *lanes;
        let cell = _mm512_srli_epi16::<{ plain::CELL_SHIFT }>(v);
        let mut code = lookup(&tables.codes, cell);
        for edges in &tables.edges {
            let beyond = _mm512_cmpgt_epi16_mask(v, lookup(edges, cell));
            code = _mm512_mask_add_epi16(code, beyond, code, one);
        }
        *lanes = code;
    }
    Words::<BITS>::new(&found).write(codes);
}

/// [`paths::codes`] of all rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn closed_paths<const BITS: usize>(
    segment: &Segment<'_>,
    tables: &paths::Tables,
    codes: &mut [u8],
) {
    let v = rounded(segment, MOST);
    let tag = _mm512_set1_epi16(TAG as i16);
    let mut states = [tag; STATES];
    for (s, lanes) in states.iter_mut().enumerate() {
        *lanes = _mm512_set1_epi16(s as i16);
    }
    // `cost & !TAG | state`
    let tagged =
        |cost: Lanes, state: usize| _mm512_ternarylogic_epi32::<0xAC>(tag, cost, states[state]);

    let zero = _mm512_setzero_si512();
    // [coefficient][state][start]; 16 KiB, which take a while to clear.
    let mut all = [MaybeUninit::<[[Lanes; STATES]; STATES]>::uninit(); SEGMENT];
    let mut before = [[_mm512_set1_epi16(-1); STATES]; STATES];
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
                    let mut level = load(&levels[0]);
                    for r in 1..choices::<BITS>() {
                        let middle = load(&tables.middles[pair][r - 1]);
                        let beyond = _mm512_cmpgt_epi16_mask(v[j], middle);
                        level = _mm512_mask_mov_epi16(level, beyond, load(&levels[r]));
                    }
                    let mut distance = _mm512_subs_epi16(v[j], level);
                    if BITS > 2 {
                        distance = _mm512_adds_epi16(distance, distance);
                    }
                    let square = _mm512_mulhrs_epi16(distance, distance);
                    steps[from][to] = _mm512_andnot_si512(tag, square);
                }
            }
        }
        let mut after = [[zero; STATES]; STATES];
        for start in 0..STATES {
            let mut costs = [zero; STATES];
            for from in 0..STATES {
                costs[from] = tagged(before[from][start], from);
            }
            for to in 0..STATES {
                let path = |from: usize| _mm512_adds_epu16(costs[from], steps[from][to]);
                after[to][start] = if BITS == 1 {
                    let from = 2 * (to % 2);
                    _mm512_min_epu16(path(from), path(from + 1))
                } else {
                    _mm512_min_epu16(
                        _mm512_min_epu16(path(0), path(1)),
                        _mm512_min_epu16(path(2), path(3)),
                    )
                };
            }
        }
        all[j].write(after);
        before = after;
        if j % 2 == 1 {
            let mut least = before[0][0];
            for cost in before.as_flattened() {
                least = _mm512_min_epu16(least, *cost);
            }
            let least = _mm512_andnot_si512(tag, least);
            for cost in before.as_flattened_mut() {
                *cost = _mm512_sub_epi16(*cost, least);
            }
        }
    }

    let mut closed = tagged(before[0][0], 0);
    for s in 1..STATES {
        closed = _mm512_min_epu16(closed, tagged(before[s][s], s));
    }
    // States as two bits of each lane.
    let bits =
        |x: Lanes| [_mm512_test_epi16_mask(x, states[1]), _mm512_test_epi16_mask(x, states[2])];
    let select = |[low, high]: [__mmask32; 2], of: [Lanes; STATES]| {
        _mm512_mask_blend_epi16(
            high,
            _mm512_mask_blend_epi16(low, of[0], of[1]),
            _mm512_mask_blend_epi16(low, of[2], of[3]),
        )
    };
    let start = bits(closed);
    let (mut to, mut to_bits) = (_mm512_and_si512(closed, tag), start);
    let mut found = [zero; SEGMENT];
    for j in (0..SEGMENT).rev() {
        let mut of_start = [zero; STATES];
        // SAFETY: written above, as all are.
        let costs = unsafe { all[j].assume_init_ref() };
        for (of_start, costs) in of_start.iter_mut().zip(costs) {
            *of_start = select(start, *costs);
        }
        let from = _mm512_and_si512(select(to_bits, of_start), tag);
        let pair = _mm512_or_si512(_mm512_slli_epi16::<2>(from), to);
        found[j] = if BITS > 2 {
            let mut window = pair;
            for middles in &tables.middles_of[..choices::<BITS>() - 1] {
                let middle = _mm512_permutexvar_epi16(pair, load(middles));
                let beyond = _mm512_cmpgt_epi16_mask(v[j], middle);
                window = _mm512_mask_add_epi16(window, beyond, window, _mm512_set1_epi16(16));
            }
            lookup(&tables.codes, window)
        } else {
            _mm512_and_si512(from, _mm512_set1_epi16((1 << BITS) - 1))
        };
        (to, to_bits) = (from, bits(from));
    }
    Words::<BITS>::new(&found).write(codes);
}
