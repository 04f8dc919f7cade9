//! HOT PATH. The optimal codes of a segment: a search for the shortest closed path through the trellis,
//! by sums of 16-bit integers, so that every instruction set finds the same and 32 rows fit beside each
//! other in a register.
//!
//! Coefficients and levels are integers. The cost of a step is the square of its distance over 2^15 (3
//! and 4 bits: of twice the distance), of which the low two bits give way to the state that the path
//! came from: the least of several sums then names its predecessor. Sums saturate, but not that of the
//! best path: every other step, what all have in common is taken off.

use super::ROWS;
use crate::simd::bytes::Words;
use crate::trellis::{STEP, tables};

/// States between windows: the two bits that neighbours share.
pub(super) const STATES: usize = 4;

/// The bits of a cost that name a state.
pub(super) const TAG: u16 = 3;

/// Integers in a step of the levels: coefficients of 4.8 times a segment's factor are in range.
const SCALE: i16 = 204;

/// What coefficients over their factor are multiples of, its reciprocal.
pub(super) const UNIT: f32 = SCALE as f32 / STEP;

/// Coefficients beyond this count as this.
pub(super) const MOST: f32 = i16::MAX as f32;

/// Windows between two states, at most.
const CHOICES: usize = 4;

/// What the search looks up, for one width.
#[repr(C, align(64))]
pub(super) struct Tables {
    /// Levels between two states, ascending, each as often as there are lanes:
    /// `[from · 4 + to][level]`.
    pub(super) levels: [[[i16; ROWS]; CHOICES]; STATES * STATES],
    /// Middles between them: largest coefficients that are nearest to the lower one.
    pub(super) middles: [[[i16; ROWS]; CHOICES - 1]; STATES * STATES],
    /// Middles by the states that they lie between: `[level][from · 4 + to]`.
    pub(super) middles_of: [Words; CHOICES - 1],
    /// Codes: `[level · 16 + from · 4 + to]`.
    pub(super) codes: Words,
}

pub(super) static TABLES_1: Tables = tables::<1, 8>(&tables::LEVELS_1);
pub(super) static TABLES_2: Tables = tables::<2, 16>(&tables::LEVELS_2);
pub(super) static TABLES_3: Tables = tables::<3, 32>(&tables::LEVELS_3);
pub(super) static TABLES_4: Tables = tables::<4, 64>(&tables::LEVELS_4);

/// Windows that lead from one state to another.
pub(super) const fn choices<const BITS: usize>() -> usize {
    if BITS > 2 { 1 << (BITS - 2) } else { 1 }
}

/// Whether a window leads from one state to another: a window's low two bits are the state it leaves, its
/// high two bits the state it enters, and with one bit these overlap.
pub(super) const fn leads<const BITS: usize>(from: usize, to: usize) -> bool {
    BITS > 1 || from >> 1 == to & 1
}

const fn tables<const BITS: usize, const N: usize>(levels: &[i8; N]) -> Tables {
    let mut out = Tables {
        levels: [[[0; ROWS]; CHOICES]; STATES * STATES],
        middles: [[[i16::MAX; ROWS]; CHOICES - 1]; STATES * STATES],
        middles_of: [Words::new([0; 64]); CHOICES - 1],
        codes: Words::new([0; 64]),
    };
    let mut middles_of = [[i16::MAX; 64]; CHOICES - 1];
    let mut codes = [0; STATES * STATES * CHOICES];
    let mut pair = 0;
    while pair < STATES * STATES {
        let (from, to) = (pair / STATES, pair % STATES);
        // Windows in order of their levels.
        let mut windows = [0; CHOICES];
        let mut found = 0;
        while leads::<BITS>(from, to) && found < choices::<BITS>() {
            let window = from | found << 2 | to << (if BITS > 1 { BITS } else { 1 });
            let mut at = found;
            while at > 0 && levels[windows[at - 1]] > levels[window] {
                windows[at] = windows[at - 1];
                at -= 1;
            }
            windows[at] = window;
            found += 1;
        }
        let mut r = 0;
        while r < found {
            let level = levels[windows[r]] as i16 * SCALE;
            codes[r * STATES * STATES + pair] = (windows[r] % (1 << BITS)) as i16;
            out.levels[pair][r] = [level; ROWS];
            if r > 0 {
                let below = levels[windows[r - 1]] as i16 * SCALE;
                let middle = ((below as i32 + level as i32) >> 1) as i16;
                out.middles[pair][r - 1] = [middle; ROWS];
                middles_of[r - 1][pair] = middle;
            }
            r += 1;
        }
        pair += 1;
    }
    out.codes = Words::new(codes);
    let mut r = 0;
    while r < CHOICES - 1 {
        out.middles_of[r] = Words::new(middles_of[r]);
        r += 1;
    }
    out
}
