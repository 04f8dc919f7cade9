//! HOT PATH. Products of codes with inputs in bytes, four inputs at a time: 32 features × up to 4 rows.
//!
//! Codes are counted from the lowest of the format, so that they have no sign; what that adds is a multiple
//! of the sum of the inputs. Sums over the halves of a group are integers, exact. Those of
//! 4-bit codes fit 16 bits: one instruction puts the halves together, times their steps (or two, where there is no VNNI); 8-bit
//! ones need two in f32. A group's sum is scaled and added to the row's, group after group; minimums follow for two groups at a
//! time, as products of bf16. The unit of the row comes last. All that is in the same order whether a tile was turned before
//! or is turned on the way, and gives the same bits on every set with FMA.
//!
//! With VNNI, products of bytes and f32 arithmetic share two of the four vector units, so what counts is how many others there are of
//! that kind: 10.5 instructions for 8 products of codes. Without it a product is two instructions, and joining two more.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::bytes::STEPS;
use super::packed::{CodeFormat, GROUP, HALF, QUADS, TILE};
use super::product::{Rows, Target, by_rows};
use crate::simd::{L2, Simd, compiled, prefetch};

/// Most rows of a register block: with 32 registers sums over two halves and all of it of 4 × 2 vectors, weights and an input
/// fill 27; with 16 there is one vector of two registers, and sums of rows wait in L1.
pub(super) const ROWS: usize = 4;

/// Quads of inputs that share a step.
pub(super) const STEP_QUADS: usize = QUADS / STEPS;

/// Where the codes of a tile, its scales and minimums come from.
trait Source<S: Simd>: Copy {
    /// Whether a code is a byte already.
    const TURNED: bool;

    /// Codes of a quad of inputs and half of the features, from the lowest one.
    ///
    /// # Safety
    /// There is such a group.
    unsafe fn quad(self, s: S, group: usize, quad: usize, half: usize) -> S::I;

    /// # Safety
    /// There is such a group.
    unsafe fn scale(self, s: S, group: usize, half: usize) -> S::F;

    /// Minimums of groups 2 `pair` and 2 `pair` + 1 in bf16, in the low and the high halves of lanes; 0 for one that is not there.
    ///
    /// # Safety
    /// The first group is there, and the format has minimums.
    unsafe fn mins(self, s: S, pair: usize, half: usize) -> S::I;

    /// Fetches what will be needed some groups later.
    fn fetch(self, group: usize);
}

/// A tile as it is stored.
#[derive(Clone, Copy)]
struct Stored<const BITS: usize> {
    tile: *const u8,
    group_bytes: usize,
    code_bytes: usize,
    groups: usize,
}

impl<S: Simd, const BITS: usize> Source<S> for Stored<BITS> {
    const TURNED: bool = false;

    #[inline(always)]
    unsafe fn quad(self, s: S, group: usize, quad: usize, half: usize) -> S::I {
        // SAFETY: registers of a group are inside it.
        unsafe {
            let group = self.tile.add(group * self.group_bytes);
            if BITS == 8 {
                return s.iload(group.add(128 * quad + 64 * half));
            }
            let both = s.iload(group.add(128 * (quad / 2) + 64 * half));
            let codes = if quad % 2 == 1 { s.shr16(both, 4) } else { both };
            s.and(codes, s.isplat(0x0f0f_0f0f))
        }
    }

    #[inline(always)]
    unsafe fn scale(self, s: S, group: usize, half: usize) -> S::F {
        let at = group * self.group_bytes + self.code_bytes + 2 * HALF * half;
        // SAFETY: scales follow the codes.
        unsafe { s.load_f16(self.tile.add(at).cast()) }
    }

    #[inline(always)]
    unsafe fn mins(self, s: S, pair: usize, half: usize) -> S::I {
        let at = |group| group * self.group_bytes + self.code_bytes + 2 * (TILE + HALF * half);
        // SAFETY: minimums follow the scales.
        unsafe {
            let first = s.round_bf16(s.load_f16(self.tile.add(at(2 * pair)).cast()));
            if 2 * pair + 1 == self.groups {
                return first;
            }
            let last = s.round_bf16(s.load_f16(self.tile.add(at(2 * pair + 1)).cast()));
            s.or(first, s.shl(last, 16))
        }
    }

    #[inline(always)]
    fn fetch(self, group: usize) {
        prefetch::<L2>(self.tile.wrapping_add(group * self.group_bytes), self.group_bytes);
    }
}

/// A tile whose codes are bytes, `[groups, quads, halves]` vectors, and whose scales are f32.
#[derive(Clone, Copy)]
struct Turned {
    codes: *const u8,
    /// From one group to the next.
    group_bytes: usize,
    scales: *const f32, // [groups, TILE]
    mins: *const f32,   // [⌈groups / 2⌉, TILE], pairs of bf16
}

impl<S: Simd> Source<S> for Turned {
    const TURNED: bool = true;

    #[inline(always)]
    unsafe fn quad(self, s: S, group: usize, quad: usize, half: usize) -> S::I {
        // SAFETY: by contract.
        unsafe { s.iload(self.codes.add(group * self.group_bytes + 128 * quad + 64 * half)) }
    }

    #[inline(always)]
    unsafe fn scale(self, s: S, group: usize, half: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { s.load(self.scales.add(group * TILE + HALF * half)) }
    }

    #[inline(always)]
    unsafe fn mins(self, s: S, pair: usize, half: usize) -> S::I {
        // SAFETY: by contract.
        unsafe { s.iload(self.mins.add(pair * TILE + HALF * half).cast()) }
    }

    #[inline(always)]
    fn fetch(self, _group: usize) {}
}

/// What products depend on: bits of a code, whether groups have a minimum, and the bits that the lowest code is shifted by, −(1 << shift),
/// or 0.
struct Format<const BITS: usize, const MIN: bool, const SHIFT: u32>;

/// Adds products over pairs `begin .. end` of quads of half of group `g`, R rows with N halves of a tile.
///
/// # Safety
/// As [`block`], and there is such a group.
#[inline(always)]
unsafe fn half_group<S: Simd, Q: Source<S>, const R: usize, const N: usize, const BITS: usize>(
    s: S,
    (source, half): (Q, usize),
    rows: &Rows<'_>,
    (g, step): (usize, usize),
    (begin, end): (usize, usize),
    mut sums: [[S::I; N]; R],
) -> [[S::I; N]; R] {
    // SAFETY: quads, halves and rows exist by contract.
    unsafe {
        let x = rows.bytes.add(g * GROUP);
        for pair in step * STEP_QUADS / 2 + begin..step * STEP_QUADS / 2 + end {
            for quad in [2 * pair, 2 * pair + 1] {
                let mut codes = [s.izero(); N];
                let mut bytes = [s.bytes(s.izero()); N];
                for h in 0..N {
                    codes[h] = source.quad(s, g, quad, half + h);
                    bytes[h] = s.bytes(codes[h]);
                }
                for i in 0..R {
                    let x = x.add(i * rows.stride + 4 * quad);
                    let x = s.isplat(x.cast::<i32>().read_unaligned());
                    for h in 0..N {
                        sums[i][h] = if BITS == 4 {
                            s.dot_codes(sums[i][h], codes[h], x)
                        } else {
                            s.dot_bytes(sums[i][h], bytes[h], x)
                        };
                    }
                }
            }
        }
    }
    sums
}

/// Adds the products of group `g` to the sums of R rows with N halves of a tile, from `half` on.
///
/// # Safety
/// As [`block`], and there is such a group.
#[inline(always)]
unsafe fn add_group<
    S: Simd,
    Q: Source<S>,
    const R: usize,
    const N: usize,
    const BITS: usize,
    const MIN: bool,
    const SHIFT: u32,
>(
    s: S,
    from: (Q, usize),
    rows: &Rows<'_>,
    g: usize,
    sums: &mut [[S::F; N]; R],
) {
    let (source, half) = from;
    // SAFETY: by contract.
    unsafe {
        let headers = rows.headers.add(g);
        let mut begin = [[[s.izero(); N]; R]; STEPS];
        if BITS == 8 && S::SUMS_AS_STORED {
            for i in 0..R {
                let minus = (*headers.add(i * rows.num_groups)).minus;
                for step in 0..STEPS {
                    begin[step][i] = [s.isplat(minus[step] << SHIFT); N];
                }
            }
        }
        let [mut first, mut last] = begin;
        if S::WIDE && S::SUMS_AS_STORED && BITS == 4 && Q::TURNED {
            // In turn, so that products wait less for those before them.
            for pair in [(0, 1), (1, 2)] {
                first = half_group::<S, Q, R, N, BITS>(s, from, rows, (g, 0), pair, first);
                last = half_group::<S, Q, R, N, BITS>(s, from, rows, (g, 1), pair, last);
            }
        } else {
            // Compilers that know how many there are look so far ahead that they keep more than there are registers for.
            let known = if S::WIDE { S::SUMS_AS_STORED } else { R == 1 };
            let pairs = (0, if known { STEP_QUADS / 2 } else { rows.step_quads / 2 });
            first = half_group::<S, Q, R, N, BITS>(s, from, rows, (g, 0), pairs, first);
            last = half_group::<S, Q, R, N, BITS>(s, from, rows, (g, 1), pairs, last);
        }
        let mut scale = [s.zero(); N];
        for h in 0..N {
            scale[h] = source.scale(s, g, half + h);
        }
        for i in 0..R {
            let header = &*headers.add(i * rows.num_groups);
            if BITS == 4 {
                let begin = if SHIFT > 0 { s.isplat(header.last << SHIFT) } else { s.izero() };
                for h in 0..N {
                    let sum = s.join_codes(first[i][h], last[i][h], &header.steps, begin);
                    sums[i][h] = s.fma(s.from_int(sum), scale[h], sums[i][h]);
                }
            } else {
                let [first_step, last_step] = header.steps.each();
                let steps = [s.splat(first_step as f32), s.splat(last_step as f32)];
                for h in 0..N {
                    let sum = s.mul(s.from_int(first[i][h]), steps[0]);
                    let sum = s.fma(s.from_int(last[i][h]), steps[1], sum);
                    sums[i][h] = s.fma(sum, scale[h], sums[i][h]);
                }
            }
        }
        if MIN && (g % 2 == 1 || g + 1 == rows.num_groups) {
            let mut mins = [s.pairs(s.izero()); N];
            for h in 0..N {
                mins[h] = s.pairs(source.mins(s, g / 2, half + h));
            }
            for i in 0..R {
                let at = i * rows.num_groups.next_multiple_of(2) + g / 2 * 2;
                let both = rows.byte_sums.add(at).cast::<i32>().read_unaligned();
                let both = s.pairs(s.isplat(both));
                for h in 0..N {
                    sums[i][h] = s.dot_pairs(sums[i][h], mins[h], both);
                }
            }
        }
    }
}

/// R rows against PARTS times N halves of a tile, from `half` on, N at a time in each group: where there are registers for one half, a tile is read once
/// all the same.
///
/// # Safety
/// `source` has as many groups as `rows`; `rows` and `out` have R rows.
#[inline(always)]
unsafe fn block<
    S: Simd,
    Q: Source<S>,
    const R: usize,
    const N: usize,
    const PARTS: usize,
    const BITS: usize,
    const MIN: bool,
    const SHIFT: u32,
>(
    s: S,
    (source, half): (Q, usize),
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let mut all = [[[s.zero(); N]; R]; PARTS];
    // SAFETY: groups, halves and rows exist by contract.
    unsafe {
        for g in 0..rows.num_groups {
            source.fetch(g);
            for part in 0..PARTS {
                add_group::<S, Q, R, N, BITS, MIN, SHIFT>(
                    s,
                    (source, half + part * N),
                    rows,
                    g,
                    &mut all[part],
                );
            }
        }
        for part in 0..PARTS {
            for i in 0..R {
                let unit = s.splat(*rows.units.add(i));
                for h in 0..N {
                    all[part][i][h] = s.mul(all[part][i][h], unit);
                }
            }
            out.put_block(s, &all[part], half + part * N);
        }
    }
}

/// Rows against a tile, some at a time.
///
/// # Safety
/// As [`block`], for all rows.
#[inline(always)]
unsafe fn all_rows<S: Simd, Q: Source<S>, const BITS: usize, const MIN: bool, const SHIFT: u32>(
    s: S,
    _format: Format<BITS, MIN, SHIFT>,
    source: Q,
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    for (first, n) in rows.blocks(ROWS) {
        let (rows, out) = (&rows.part(first, n), &out.from(first));
        macro_rules! block_of {
            ($from:expr, $r:literal, $n:literal, $parts:literal) => {
                block::<S, Q, $r, $n, $parts, BITS, MIN, SHIFT>(s, $from, rows, out)
            };
        }
        // SAFETY: by contract.
        unsafe {
            by_rows!(S::WIDE, Q::TURNED, n, source, block_of);
        }
    }
}

/// Calls [`all_rows`] for what a format is like.
macro_rules! by_format {
    ($s:expr, $format:expr, $rows:expr, $out:expr, |$bits:ident| $source:expr) => {{
        let format = $format;
        macro_rules! with {
            ($bits_value:literal, $min:literal, $shift:literal) => {{
                const $bits: usize = $bits_value;
                all_rows($s, Format::<$bits_value, $min, $shift>, $source, $rows, $out)
            }};
        }
        match (format.bits, format.lowest != 0, format.has_min) {
            (4, false, true) => with!(4, true, 0),
            (4, false, false) => with!(4, false, 0),
            (4, true, true) => with!(4, true, 3),
            (4, true, false) => with!(4, false, 3),
            (_, _, true) => with!(8, true, 7),
            (_, _, false) => with!(8, false, 7),
        }
    }};
}

#[inline(always)]
fn stored_body<S: Simd>(s: S, format: CodeFormat, tile: &[u8], rows: &Rows<'_>, out: &Target<'_>) {
    let (group_bytes, code_bytes, groups) =
        (format.group_bytes(), format.code_bytes(), rows.num_groups);
    assert!(tile.len() >= groups * group_bytes, "a tile of {}", tile.len());
    let tile = tile.as_ptr();
    // SAFETY: the tile has all groups of the rows; `out` has the rows, as whoever made it says.
    unsafe {
        by_format!(s, format, rows, out, |BITS| Stored::<BITS> {
            tile,
            group_bytes,
            code_bytes,
            groups
        });
    }
}

compiled! {
    /// A tile as it is stored against few rows. `out` has the rows, and the format counts from its lowest code.
    pub(super) fn multiply_stored(format: CodeFormat, tile: &[u8], rows: &Rows<'_>, out: &Target<'_>) = stored_body
        for [Avx512Bf16, Avx512Vnni, Avx512, AvxVnni, Avx2, Sse2];
}

/// Room that a tile needs when it is turned: bytes of codes, and numbers for scales and minimums.
pub(super) fn turned_room(format: CodeFormat, groups: usize) -> (usize, usize) {
    // Codes of 8 bits are read where they are stored.
    let codes = if format.bits == 4 { groups * TILE * GROUP } else { 0 };
    (codes, (groups + groups.div_ceil(2)) * TILE)
}

#[inline(always)]
fn turned_body<S: Simd>(
    s: S,
    format: CodeFormat,
    tile: &[u8],
    (codes, scales): (&mut [u8], &mut [f32]),
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let (groups, group_bytes) = (rows.num_groups, format.group_bytes());
    assert!(tile.len() >= groups * group_bytes, "a tile of {}", tile.len());
    let room = turned_room(format, groups);
    assert!(codes.len() >= room.0 && scales.len() >= room.1, "{groups} groups");
    let (scales, mins) = scales.split_at_mut(groups * TILE);
    let (codes, scales, mins) = (codes.as_mut_ptr(), scales.as_mut_ptr(), mins.as_mut_ptr());
    let (tile, code_bytes) = (tile.as_ptr(), format.code_bytes());
    let stored = Stored::<4> { tile, group_bytes, code_bytes, groups };
    // SAFETY: the asserts cover all groups, in the tile and in the room for what is turned; `out` has the rows, as whoever made
    // it says.
    unsafe {
        for g in 0..groups {
            for h in 0..2 {
                for quad in 0..if format.bits == 4 { QUADS } else { 0 } {
                    let to = codes.add(g * TILE * GROUP + 128 * quad + 64 * h);
                    s.istore(to, stored.quad(s, g, quad, h));
                }
                s.store(scales.add(g * TILE + HALF * h), stored.scale(s, g, h));
            }
        }
        for pair in 0..if format.has_min { groups.div_ceil(2) } else { 0 } {
            for h in 0..2 {
                s.istore(mins.add(pair * TILE + HALF * h).cast(), stored.mins(s, pair, h));
            }
        }
        let turned = if format.bits == 4 {
            Turned { codes, group_bytes: TILE * GROUP, scales, mins }
        } else {
            Turned { codes: tile, group_bytes, scales, mins }
        };
        by_format!(s, format, rows, out, |_BITS| turned);
    }
}

compiled! {
    /// A tile against many rows: turned first, into the room given ([`turned_room`]). `out` has the rows, and the format counts from
    /// its lowest code.
    pub(super) fn multiply_turned(format: CodeFormat, tile: &[u8], room: (&mut [u8], &mut [f32]), rows: &Rows<'_>, out: &Target<'_>) = turned_body
        for [Avx512Bf16, Avx512Vnni, Avx512, AvxVnni, Avx2, Sse2];
}
