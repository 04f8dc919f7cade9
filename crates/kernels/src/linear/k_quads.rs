//! HOT PATH. Products of codes of K types with inputs in bytes: 32 features × up to 4 rows.
//!
//! As `quads.rs`, with these differences: scales and minimums are products of a byte and a number, exact in f32; where there is a scale for 16
//! inputs it takes the place of the group's; minimums meet sums of inputs in f32, so nothing but inputs is rounded. Sums over 16 inputs are
//! integers, of which only those of codes of four bits fit what one instruction joins.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use super::k_packed::KFormat;
use super::k_source::{Format, StoredK, by_k_format};
use super::packed::{GROUP, HALF, QUADS, TILE};
use super::product::{Rows, Target, by_rows};
use super::quads::{ROWS, STEP_QUADS};
use crate::simd::{Simd, compiled};

/// Where the codes of a tile, its scales and minimums come from.
trait Source<S: Simd, F: Format>: Copy {
    /// Whether a code is a byte already.
    const TURNED: bool;

    /// # Safety
    /// There is such a group.
    unsafe fn quad(self, s: S, group: usize, quad: usize, half: usize) -> S::I;

    /// Scales (`what` 0) or minimums (1) of a group, or of its half `which`.
    ///
    /// # Safety
    /// There is such a group, and the format has them.
    unsafe fn number(self, s: S, group: usize, what: (usize, usize), half: usize) -> S::F;

    /// Fetches what will be needed some groups later.
    fn fetch(self, group: usize);
}

impl<S: Simd, F: Format> Source<S, F> for StoredK<F> {
    const TURNED: bool = false;

    #[inline(always)]
    unsafe fn quad(self, s: S, group: usize, quad: usize, half: usize) -> S::I {
        // SAFETY: by contract.
        unsafe { StoredK::quad(self, s, group, quad, half) }
    }

    #[inline(always)]
    unsafe fn number(self, s: S, group: usize, what: (usize, usize), half: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { StoredK::number(self, s, group, what, half) }
    }

    #[inline(always)]
    fn fetch(self, group: usize) {
        self.fetch_group(group);
    }
}

/// A tile whose codes are bytes, `[groups, quads, halves]` vectors, and whose numbers are f32.
#[derive(Clone, Copy)]
struct Turned {
    codes: *const u8,
    numbers: *const f32, // [groups, scales and minimums, TILE]
}

/// Scales and minimums of a group.
const fn numbers_of<F: Format>() -> usize {
    F::SCALES * if F::MIN { 2 } else { 1 }
}

impl<S: Simd, F: Format> Source<S, F> for Turned {
    const TURNED: bool = true;

    #[inline(always)]
    unsafe fn quad(self, s: S, group: usize, quad: usize, half: usize) -> S::I {
        // SAFETY: by contract.
        unsafe { s.iload(self.codes.add(((group * QUADS + quad) * 2 + half) * 64)) }
    }

    #[inline(always)]
    unsafe fn number(self, s: S, group: usize, (what, which): (usize, usize), half: usize) -> S::F {
        let at = group * numbers_of::<F>() + what * F::SCALES + which;
        // SAFETY: by contract.
        unsafe { s.load(self.numbers.add(at * TILE + HALF * half)) }
    }

    #[inline(always)]
    fn fetch(self, _group: usize) {}
}

/// Sums of products over half `step` of group `g`, R rows with N halves of a tile, as 32-bit integers, of codes from the lowest; four bits:
/// as [`Simd::dot_codes`] leaves them.
///
/// # Safety
/// As [`block`], and there is such a group.
#[inline(always)]
unsafe fn half_group<S: Simd, F: Format, Q: Source<S, F>, const R: usize, const N: usize>(
    s: S,
    (source, half): (Q, usize),
    rows: &Rows<'_>,
    (g, step): (usize, usize),
) -> [[S::I; N]; R] {
    let mut total = [[s.izero(); N]; R];
    // SAFETY: quads, halves and rows exist by contract.
    unsafe {
        for i in 0..R {
            let header = &*rows.headers.add(i * rows.num_groups + g);
            // Bytes that fill theirs are multiplied with a sign where instructions have none for them.
            if F::SHIFT > 0 && (F::WIDTH < 8 || S::SUMS_AS_STORED) {
                total[i] = [s.isplat(header.minus[step] << F::SHIFT); N];
            }
        }
        let x = rows.bytes.add(g * GROUP);
        // As many as 16 bits can sum.
        let quads = if F::WIDTH == 6 { 2 } else { STEP_QUADS };
        for part in 0..STEP_QUADS / quads {
            let whole = S::SUMS_AS_STORED || F::WIDTH == 8;
            let mut sums = if whole { total } else { [[s.izero(); N]; R] };
            // Compilers that know how many there are keep more than there are registers for.
            let known = if S::WIDE { S::SUMS_AS_STORED } else { R == 1 };
            let pairs = if known { quads / 2 } else { rows.step_quads * quads / (2 * STEP_QUADS) };
            for pair in 0..pairs {
                for e in 0..2 {
                    let quad = step * STEP_QUADS + part * quads + 2 * pair + e;
                    let mut codes = [s.izero(); N];
                    for h in 0..N {
                        codes[h] = source.quad(s, g, quad, half + h);
                    }
                    for i in 0..R {
                        let x = x.add(i * rows.stride + 4 * quad);
                        let x = s.isplat(x.cast::<i32>().read_unaligned());
                        for h in 0..N {
                            sums[i][h] = match F::WIDTH {
                                8 => s.dot_bytes(sums[i][h], s.bytes(codes[h]), x),
                                _ => s.dot_codes(sums[i][h], codes[h], x),
                            };
                        }
                    }
                }
            }
            for i in 0..R {
                for h in 0..N {
                    total[i][h] = if whole || F::WIDTH == 4 {
                        sums[i][h]
                    } else {
                        s.add_codes(total[i][h], sums[i][h])
                    };
                }
            }
        }
    }
    total
}

/// Adds the products of group `g` to the sums of R rows with N halves of a tile, from `half` on.
///
/// # Safety
/// As [`block`], and there is such a group.
#[inline(always)]
unsafe fn add_group<S: Simd, F: Format, Q: Source<S, F>, const R: usize, const N: usize>(
    s: S,
    from: (Q, usize),
    rows: &Rows<'_>,
    g: usize,
    sums: &mut [[S::F; N]; R],
) {
    let (source, half) = from;
    // SAFETY: by contract.
    unsafe {
        let first = half_group::<S, F, Q, R, N>(s, from, rows, (g, 0));
        let last = half_group::<S, F, Q, R, N>(s, from, rows, (g, 1));
        let products = [first, last];
        let header = |i: usize| &*rows.headers.add(i * rows.num_groups + g);
        if F::SCALES == 1 {
            for h in 0..N {
                let scale = source.number(s, g, (0, 0), half + h);
                for i in 0..R {
                    let steps = &header(i).steps;
                    let [first, last] = [first[i][h], last[i][h]];
                    let sum = if F::WIDTH == 4 {
                        s.from_int(s.join_codes(first, last, steps, s.izero()))
                    } else {
                        let [a, b] = steps.each().map(|step| s.splat(step as f32));
                        s.fma(s.from_int(last), b, s.mul(s.from_int(first), a))
                    };
                    sums[i][h] = s.fma(sum, scale, sums[i][h]);
                }
            }
        } else {
            for (step, products) in products.into_iter().enumerate() {
                for h in 0..N {
                    let scale = source.number(s, g, (0, step), half + h);
                    for i in 0..R {
                        let worth = s.splat(header(i).steps.each()[step] as f32);
                        let sum = s.mul(s.from_int(products[i][h]), scale);
                        sums[i][h] = s.fma(sum, worth, sums[i][h]);
                    }
                }
            }
        }
        for which in 0..if F::MIN { F::SCALES } else { 0 } {
            for h in 0..N {
                let min = source.number(s, g, (1, which), half + h);
                for i in 0..R {
                    let header = header(i);
                    let minus = match F::SCALES {
                        1 => header.last,
                        _ => header.minus[which] * header.steps.each()[which],
                    };
                    sums[i][h] = s.fma(min, s.splat(-(minus as f32)), sums[i][h]);
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
    F: Format,
    Q: Source<S, F>,
    const R: usize,
    const N: usize,
    const PARTS: usize,
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
                add_group::<S, F, Q, R, N>(s, (source, half + part * N), rows, g, &mut all[part]);
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
unsafe fn all_rows<S: Simd, F: Format, Q: Source<S, F>>(
    s: S,
    source: Q,
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    for (first, n) in rows.blocks(ROWS) {
        let (rows, out) = (&rows.part(first, n), &out.from(first));
        macro_rules! block_of {
            ($from:expr, $r:literal, $n:literal, $parts:literal) => {
                block::<S, F, Q, $r, $n, $parts>(s, $from, rows, out)
            };
        }
        // SAFETY: by contract.
        unsafe {
            by_rows!(S::WIDE, Q::TURNED, n, source, block_of);
        }
    }
}

#[inline(always)]
fn stored_body<S: Simd>(s: S, format: KFormat, tile: &[u8], rows: &Rows<'_>, out: &Target<'_>) {
    assert!(tile.len() >= format.tile_bytes(rows.num_groups), "a tile of {}", tile.len());
    let tile = tile.as_ptr();
    // SAFETY: the tile has all groups of the rows; `out` has the rows, as whoever made it says.
    by_k_format!(format, |F| unsafe {
        all_rows::<S, F, _>(s, StoredK::<F>::new(tile), rows, out);
    });
}

compiled! {
    /// A tile as it is stored against few rows. `out` has the rows.
    pub(super) fn multiply_stored(format: KFormat, tile: &[u8], rows: &Rows<'_>, out: &Target<'_>) = stored_body
        for [Avx512Bf16, Avx512Vnni, Avx512, AvxVnni, Avx2, Sse2];
}

/// Room that a tile needs when it is turned: bytes of codes, and numbers for scales and minimums.
pub(super) fn turned_room(format: KFormat, groups: usize) -> (usize, usize) {
    let numbers = format.scales() * (1 + usize::from(format.has_min()));
    (groups * TILE * GROUP, groups * numbers * TILE)
}

#[inline(always)]
fn turned_body<S: Simd>(
    s: S,
    format: KFormat,
    tile: &[u8],
    (codes, numbers): (&mut [u8], &mut [f32]),
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let groups = rows.num_groups;
    assert!(tile.len() >= format.tile_bytes(groups), "a tile of {}", tile.len());
    let room = turned_room(format, groups);
    assert!(codes.len() >= room.0 && numbers.len() >= room.1, "{groups} groups");
    let (codes, numbers) = (codes.as_mut_ptr(), numbers.as_mut_ptr());
    let tile = tile.as_ptr();
    // SAFETY: the asserts cover all groups, in the tile and in the room for what is turned; `out` has the rows, as whoever made
    // it says.
    by_k_format!(format, |F| unsafe {
        let stored = StoredK::<F>::new(tile);
        for g in 0..groups {
            for h in 0..2 {
                for quad in 0..QUADS {
                    s.istore(
                        codes.add(((g * QUADS + quad) * 2 + h) * 64),
                        stored.quad(s, g, quad, h),
                    );
                }
                for what in 0..if F::MIN { 2 } else { 1 } {
                    for which in 0..F::SCALES {
                        let n = g * numbers_of::<F>() + what * F::SCALES + which;
                        let to = numbers.add(n * TILE + HALF * h);
                        s.store(to, stored.number(s, g, (what, which), h));
                    }
                }
            }
        }
        all_rows::<S, F, _>(s, Turned { codes, numbers }, rows, out);
    });
}

compiled! {
    /// A tile against many rows: turned first, into the room given ([`turned_room`]). `out` has the rows.
    pub(super) fn multiply_turned(format: KFormat, tile: &[u8], room: (&mut [u8], &mut [f32]), rows: &Rows<'_>, out: &Target<'_>) = turned_body
        for [Avx512Bf16, Avx512Vnni, Avx512, AvxVnni, Avx2, Sse2];
}
