//! HOT PATH. Plain codes: the nearest level's.

use crate::simd::bytes::Words;
use crate::trellis::{STEP, tables};

/// Cells by the high bits of a coefficient: fewer than two levels' middles fall into one, or three with
/// 6 bits.
pub(super) const CELLS: usize = 64;
pub(super) const CELL_SHIFT: u32 = 10;

/// What 5 and 6 bits look up.
#[repr(C, align(64))]
pub(super) struct Tables {
    /// Codes of the lowest coefficient of a cell.
    pub(super) codes: Words,
    /// Middles between levels in a cell: coefficients beyond them have the next code.
    pub(super) edges: [Words; 2],
    /// As [`super::paths::UNIT`].
    pub(super) unit: f32,
    /// The outermost level.
    pub(super) most: f32,
}

pub(super) static TABLES_5: Tables = tables(&tables::LEVELS_5, 303);
pub(super) static TABLES_6: Tables = tables(&tables::LEVELS_6, 262);

const fn tables<const N: usize>(levels: &[i8; N], scale: i16) -> Tables {
    let (mut codes, mut edges) = ([0; CELLS], [[i16::MAX; CELLS]; 2]);
    let mut cell = 0;
    while cell < CELLS {
        let lowest = ((cell << CELL_SHIFT) as u16) as i16 as i32;
        let mut within = 0;
        let mut i = 0;
        while i + 1 < N {
            let edge = ((levels[i] as i32 + levels[i + 1] as i32) * scale as i32) >> 1;
            if lowest > edge {
                codes[cell] += 1;
            } else if lowest + (1 << CELL_SHIFT) - 1 > edge {
                // More than fit would not compile.
                edges[within][cell] = edge as i16;
                within += 1;
            }
            i += 1;
        }
        cell += 1;
    }
    Tables {
        codes: Words::new(codes),
        edges: [Words::new(edges[0]), Words::new(edges[1])],
        unit: scale as f32 / STEP,
        most: (levels[N - 1] as i16 * scale) as f32,
    }
}
