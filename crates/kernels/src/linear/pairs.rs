//! HOT PATH. Products with inputs in bf16 or f32, two inputs at a time: 32 features × up to 6 rows.
//!
//! Codes are small integers, which bf16 and f32 hold exactly: only the inputs are rounded. A group's sum of
//! products is scaled in f32 and added to the row's sum, group after group. Few rows read weights as they are stored; for many
//! a tile is brought into the form that products take, some groups at a time, so that it stays in L1. Both do the same
//! operations in the same order: of two inputs the second comes first, as `vdpbf16ps` has it, so that products of bf16 and
//! products of the same numbers in f32 are equal bit for bit.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::ActivationKind;
use super::k_source::{Format, StoredK, by_k_format};
use super::operands::{
    Floats, Product, Source, StoredCodes, StoredFloats, StoredHalves, StoredWords, Turned, Words,
};
use super::packed::{CodeFormat, GROUP, HALF, PAIRS, Packed, Stored, TILE};
use super::product::{Rows, Target};
use crate::simd::{Simd, WordTables, compiled};

/// Most rows of a register block.
pub(super) const ROWS: usize = 6;

/// Groups of a tile that are turned together: with f32 32 KiB.
const TURNED_GROUPS: usize = 8;

/// Bytes of a turned tile, and numbers for its scales and minimums.
pub(super) const TURNED_ROOM: (usize, usize) =
    (TURNED_GROUPS * PAIRS * 2 * 128, TURNED_GROUPS * 2 * TILE);

/// How the sum of a group joins the row's: one chain over all groups, a chain for each group, with a scale, with a minimum too.
const CHAIN: u8 = 0;
const SUM: u8 = 1;
const SCALE: u8 = 2;
const MIN: u8 = 3;

/// Groups of a tile: `groups` of the rows' begin with group `first` of the source.
#[derive(Clone, Copy)]
struct Span {
    first: usize,
    groups: usize,
}

/// Adds the products of R rows with N halves of a tile, from `half` on, to sums of `[rows, TILE]`.
///
/// # Safety
/// `source` has the groups of the span; `rows` and `sums` have R rows.
#[inline(always)]
unsafe fn block<
    S: Simd,
    P: Product<S>,
    Q: Source<S, P>,
    const R: usize,
    const N: usize,
    const HOW: u8,
>(
    (s, p): (S, P),
    (source, half): (Q, usize),
    span: Span,
    rows: &Rows<'_>,
    sums: *mut f32,
) {
    // SAFETY: groups, pairs, halves and rows exist by contract.
    unsafe {
        let mut total = [[s.zero(); N]; R];
        if span.first > 0 {
            for i in 0..R {
                for h in 0..N {
                    total[i][h] = s.load(sums.add(i * TILE + HALF * (half + h)));
                }
            }
        }
        for g in 0..span.groups {
            source.fetch(g);
            let own = span.first + g;
            let mut acc = if HOW == CHAIN { total } else { [[s.zero(); N]; R] };
            for pair in 0..PAIRS {
                let mut weights = [p.of_words(s, s.izero()); N];
                for h in 0..N {
                    weights[h] = source.pair(s, p, g, pair, half + h);
                }
                for i in 0..R {
                    let x = p.inputs(s, rows, i, own * GROUP + 2 * pair);
                    for h in 0..N {
                        acc[i][h] = p.dot(s, acc[i][h], weights[h], x);
                    }
                }
            }
            match HOW {
                CHAIN => total = acc,
                SUM => {
                    for i in 0..R {
                        for h in 0..N {
                            total[i][h] = s.add(total[i][h], acc[i][h]);
                        }
                    }
                }
                _ => {
                    for h in 0..N {
                        let scale = source.factor(s, g, 0, half + h);
                        for i in 0..R {
                            total[i][h] = s.fma(acc[i][h], scale, total[i][h]);
                        }
                        if HOW == MIN {
                            let min = source.factor(s, g, 1, half + h);
                            for i in 0..R {
                                let sum = s.splat(*rows.sums.add(i * rows.num_groups + own));
                                total[i][h] = s.fma(min, sum, total[i][h]);
                            }
                        }
                    }
                }
            }
        }
        for i in 0..R {
            for h in 0..N {
                s.store(sums.add(i * TILE + HALF * (half + h)), total[i][h]);
            }
        }
    }
}

/// All rows, some at a time; `sums`: `[rows, TILE]`.
///
/// # Safety
/// As [`block`], for all rows.
#[inline(always)]
unsafe fn all_rows<S: Simd, P: Product<S>, Q: Source<S, P>, const HOW: u8>(
    sp: (S, P),
    source: Q,
    span: Span,
    rows: &Rows<'_>,
    sums: *mut f32,
) {
    for (first, n) in rows.blocks(if S::WIDE { ROWS } else { 4 }) {
        let rows = &rows.part(first, n);
        // SAFETY: by contract.
        unsafe {
            let sums = sums.add(first * TILE);
            if S::WIDE {
                let from = (source, 0);
                match n {
                    1 => block::<S, P, Q, 1, 2, HOW>(sp, from, span, rows, sums),
                    2 => block::<S, P, Q, 2, 2, HOW>(sp, from, span, rows, sums),
                    3 => block::<S, P, Q, 3, 2, HOW>(sp, from, span, rows, sums),
                    4 => block::<S, P, Q, 4, 2, HOW>(sp, from, span, rows, sums),
                    5 => block::<S, P, Q, 5, 2, HOW>(sp, from, span, rows, sums),
                    _ => block::<S, P, Q, 6, 2, HOW>(sp, from, span, rows, sums),
                }
            } else {
                for half in 0..2 {
                    let from = (source, half);
                    match n {
                        1 => block::<S, P, Q, 1, 1, HOW>(sp, from, span, rows, sums),
                        2 => block::<S, P, Q, 2, 1, HOW>(sp, from, span, rows, sums),
                        3 => block::<S, P, Q, 3, 1, HOW>(sp, from, span, rows, sums),
                        _ => block::<S, P, Q, 4, 1, HOW>(sp, from, span, rows, sums),
                    }
                }
            }
        }
    }
}

/// A tile against rows: as it is if there are few, else some groups after the other, in the room for turned ones.
///
/// # Safety
/// As [`all_rows`], with all groups; `room`: [`TURNED_ROOM`].
#[inline(always)]
unsafe fn all_groups<S: Simd, P: Product<S>, Q: Source<S, P>, const HOW: u8>(
    (s, p): (S, P),
    source: Q,
    (weights, factors): (&mut [u8], &mut [f32]),
    rows: &Rows<'_>,
    sums: *mut f32,
) {
    let groups = rows.num_groups;
    // SAFETY: by contract.
    unsafe {
        if rows.num_rows <= ROWS {
            all_rows::<S, P, Q, HOW>((s, p), source, Span { first: 0, groups }, rows, sums);
            return;
        }
        let (weights, factors) = (weights.as_mut_ptr(), factors.as_mut_ptr());
        for first in (0..groups).step_by(TURNED_GROUPS) {
            let span = Span { first, groups: TURNED_GROUPS.min(groups - first) };
            for g in 0..span.groups {
                for pair in 0..PAIRS {
                    for half in 0..2 {
                        let to = weights.add(((g * PAIRS + pair) * 2 + half) * P::BYTES);
                        p.store(s, to, source.pair(s, p, first + g, pair, half));
                    }
                }
                for which in 0..if HOW >= SCALE { usize::from(HOW - 1) } else { 0 } {
                    for half in 0..2 {
                        let to = factors.add((g * 2 + which) * TILE + HALF * half);
                        s.store(to, source.factor(s, first + g, which, half));
                    }
                }
            }
            all_rows::<S, P, Turned, HOW>((s, p), Turned { weights, factors }, span, rows, sums);
        }
    }
}

#[inline(always)]
fn words_body<S: WordTables>(
    s: S,
    matrix: &Packed,
    tile: &[u8],
    room: (&mut [u8], &mut [f32]),
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    multiply_body(s, Words, matrix, tile, room, rows, out);
}

#[inline(always)]
fn floats_body<S: Simd>(
    s: S,
    matrix: &Packed,
    tile: &[u8],
    room: (&mut [u8], &mut [f32]),
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let rounds = matrix.inputs == ActivationKind::Bf16;
    multiply_body(s, Floats { rounds }, matrix, tile, room, rows, out);
}

/// `room`: [`TURNED_ROOM`], and after its numbers those of `[rows, TILE]` sums.
#[inline(always)]
fn multiply_body<S: Simd, P: Product<S>>(
    s: S,
    p: P,
    matrix: &Packed,
    tile: &[u8],
    (weights, numbers): (&mut [u8], &mut [f32]),
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    assert!(tile.len() >= matrix.tile_bytes() && matrix.num_groups == rows.num_groups, "a tile");
    assert!(weights.len() >= TURNED_ROOM.0, "room of {}", weights.len());
    let (factors, sums) = numbers.split_at_mut(TURNED_ROOM.1);
    assert!(sums.len() >= rows.num_rows * TILE, "sums of {} rows", rows.num_rows);
    let (room, sums, at) = ((weights, factors), sums.as_mut_ptr(), tile.as_ptr());
    // SAFETY: the asserts cover all groups of the tile, the room, and the rows' sums; `out` has the rows, as whoever made it says.
    unsafe {
        match matrix.stored {
            Stored::Bf16 => all_groups::<S, P, _, CHAIN>((s, p), StoredWords(at), room, rows, sums),
            Stored::F16 => all_groups::<S, P, _, SUM>((s, p), StoredHalves(at), room, rows, sums),
            Stored::F32 => all_groups::<S, P, _, SUM>((s, p), StoredFloats(at), room, rows, sums),
            Stored::Codes(format) => codes_body(s, p, format, at, room, rows, sums),
            Stored::K(format) => by_k_format!(format, |F| {
                let source = StoredK::<F>::new(at);
                match (F::SCALES, F::MIN) {
                    (1, true) => all_groups::<S, P, _, MIN>((s, p), source, room, rows, sums),
                    (1, false) => all_groups::<S, P, _, SCALE>((s, p), source, room, rows, sums),
                    _ => all_groups::<S, P, _, CHAIN>((s, p), source, room, rows, sums),
                }
            }),
        }
        for row in 0..rows.num_rows {
            let from = sums.add(row * TILE);
            let products = [[s.load(from), s.load(from.add(HALF))]];
            out.from(row).put_block(s, &products, 0);
        }
    }
}

/// # Safety
/// As [`all_groups`].
#[inline(always)]
unsafe fn codes_body<S: Simd, P: Product<S>>(
    s: S,
    p: P,
    format: CodeFormat,
    tile: *const u8,
    room: (&mut [u8], &mut [f32]),
    rows: &Rows<'_>,
    sums: *mut f32,
) {
    let (group_bytes, code_bytes) = (format.group_bytes(), format.code_bytes());
    let table = p.table(s, i32::from(format.lowest));
    let four = StoredCodes::<_, 4> { tile, group_bytes, code_bytes, table };
    let eight = StoredCodes::<_, 8> { tile, group_bytes, code_bytes, table };
    // SAFETY: by contract.
    unsafe {
        match (format.bits, format.has_min) {
            (4, false) => all_groups::<S, P, _, SCALE>((s, p), four, room, rows, sums),
            (4, true) => all_groups::<S, P, _, MIN>((s, p), four, room, rows, sums),
            (_, false) => all_groups::<S, P, _, SCALE>((s, p), eight, room, rows, sums),
            (_, true) => all_groups::<S, P, _, MIN>((s, p), eight, room, rows, sums),
        }
    }
}

compiled! {
    /// A tile against rows of inputs in bf16. `room`: [`TURNED_ROOM`], and after its numbers those of `[rows, TILE]` sums; `out` has
    /// the rows.
    pub(super) fn multiply_words(matrix: &Packed, tile: &[u8], room: (&mut [u8], &mut [f32]), rows: &Rows<'_>, out: &Target<'_>) = words_body
        for [Avx512Bf16];
}
compiled! {
    /// The same with inputs in f32.
    pub(super) fn multiply_floats(matrix: &Packed, tile: &[u8], room: (&mut [u8], &mut [f32]), rows: &Rows<'_>, out: &Target<'_>) = floats_body
        for [Avx512, Avx2, Sse2];
}
