//! HOT PATH. Plain codes: the nearest level's.

use crate::trellis::{SEGMENT, STEP, tables};

/// Cells by the high bits of a coefficient: fewer than two levels' middles fall into one, or three with
/// 6 bits.
pub(super) const CELLS: usize = 64;
pub(super) const CELL_SHIFT: u32 = 10;

/// What 5 and 6 bits look up.
#[repr(C, align(64))]
pub(super) struct Tables {
    /// Codes of the lowest coefficient of a cell.
    pub(super) codes: [i16; CELLS],
    /// Middles between levels in a cell: coefficients beyond them have the next code.
    pub(super) edges: [[i16; CELLS]; 2],
    /// As [`super::paths::UNIT`].
    pub(super) unit: f32,
    /// The outermost level.
    pub(super) most: f32,
}

pub(super) static TABLES_5: Tables = tables(&tables::LEVELS_5, 303);
pub(super) static TABLES_6: Tables = tables(&tables::LEVELS_6, 262);

const fn tables<const N: usize>(levels: &[i8; N], scale: i16) -> Tables {
    let mut out = Tables {
        codes: [0; CELLS],
        edges: [[i16::MAX; CELLS]; 2],
        unit: scale as f32 / STEP,
        most: (levels[N - 1] as i16 * scale) as f32,
    };
    let mut cell = 0;
    while cell < CELLS {
        let lowest = ((cell << CELL_SHIFT) as u16) as i16 as i32;
        let mut within = 0;
        let mut i = 0;
        while i + 1 < N {
            let edge = ((levels[i] as i32 + levels[i + 1] as i32) * scale as i32) >> 1;
            if lowest > edge {
                out.codes[cell] += 1;
            } else if lowest + (1 << CELL_SHIFT) - 1 > edge {
                // More than fit would not compile.
                out.edges[within][cell] = edge as i16;
                within += 1;
            }
            i += 1;
        }
        cell += 1;
    }
    out
}

/// The codes of a segment, from bit 0 of the result on. `v`: as for [`super::paths::codes`]. The
/// definition.
pub(super) fn codes<const BITS: usize>(v: &[i16; SEGMENT], tables: &Tables) -> u128 {
    let mut word = 0;
    for (j, v) in v.iter().enumerate() {
        let cell = usize::from(*v as u16 >> CELL_SHIFT);
        let beyond = tables.edges.iter().filter(|edges| *v > edges[cell]).count();
        word |= (tables.codes[cell] as u128 + beyond as u128) << (BITS * j);
    }
    word
}
