//! HOT PATH. Folded queries against the levels of a block's keys.

use crate::Isa;
use crate::coded::tile::{Buffer, Prepared, QuadRows, Quads, add_products, by_rows, part, widened};
use crate::simd::bytes::{BYTES, Bytes};
use crate::simd::{LANES, compiled};
use crate::trellis::levels::{KeyLevels, key_levels, with_bits};
use crate::trellis::{Layout, segment_bytes};

/// Bytes of a segment in a row.
const SEGMENT: usize = crate::trellis::SEGMENT;

/// Query rows against one block.
#[derive(Debug, Clone, Copy)]
pub struct Scores<'a> {
    /// How the block is stored.
    pub layout: &'a Layout,
    /// The block.
    pub slot: &'a [u8],
    /// What a level is worth, by segment and row of the block: `[segments, tokens]`.
    pub factors: &'a [f32],
    /// Rows of the block.
    pub tokens: usize,
    /// Segments that are taken in, from the first on.
    pub segments: usize,
    /// Folded queries: `[rows, stride]`.
    pub queries: &'a [i8],
    /// See `queries`.
    pub stride: usize,
    /// What the queries' bytes make of levels that are 128 too large, by segment: `[rows, stride / 4]`,
    /// four times the same for each segment.
    pub offsets: &'a [i32],
    /// What a byte is worth, by query: `[rows]`.
    pub scales: &'a [f32],
}

/// `out[i, t] += scales[i] · Σ factors[s, t] · (query i · levels of row t in segment s)`, `[rows,
/// tokens]` with stride `out_stride`.
///
/// # Panics
/// If `tokens` is no multiple of 16, or a slice is shorter than its shape says.
pub fn add_scores(s: &Scores<'_>, out: &mut [f32], out_stride: usize) {
    add_scores_on(Isa::best(), s, out, out_stride);
}

pub(super) fn add_scores_on(isa: Isa, s: &Scores<'_>, out: &mut [f32], out_stride: usize) {
    let rows = s.scales.len();
    if rows == 0 {
        return;
    }
    let width = s.segments * SEGMENT;
    assert!(s.tokens.is_multiple_of(16), "{} tokens", s.tokens);
    assert!(s.slot.len() == s.layout.slot_bytes(s.tokens), "slot: {}", s.slot.len());
    assert!(s.segments <= s.layout.bits().len(), "{} segments", s.segments);
    assert!(s.factors.len() >= s.segments * s.tokens, "factors: {}", s.factors.len());
    assert!(
        s.stride >= width && s.queries.len() >= rows * s.stride,
        "queries: {}",
        s.queries.len()
    );
    assert!(s.offsets.len() >= rows * s.stride / 4, "offsets: {}", s.offsets.len());
    assert!(out_stride >= s.tokens, "stride {out_stride}");
    assert!(out.len() >= (rows - 1) * out_stride + s.tokens, "out: {}", out.len());
    add_scores_checked(isa, s, out, out_stride);
}

compiled! {
    fn add_scores_checked(s: &Scores<'_>, out: &mut [f32], out_stride: usize) = body
        for [Avx512Icl, Avx512Vnni, Avx512, AvxVnni, Avx2];
}

/// Query rows whose bytes are widened together.
const ROWS: usize = 18;

/// Quads of a row, and of a segment.
const MOST_QUADS: usize = 64;
const QUADS: usize = SEGMENT / 4;

#[inline(always)]
fn body<S: Bytes>(set: S, s: &Scores<'_>, out: &mut [f32], out_stride: usize) {
    let (rows, width) = (s.scales.len(), s.segments * SEGMENT);
    let mut wide = Buffer::<{ 8 * ROWS * MOST_QUADS }>::new();
    let mut levels = Buffer::<{ 2 * BYTES * MOST_QUADS }>::new();
    assert!(width <= 4 * MOST_QUADS);
    for first in (0..rows).step_by(ROWS) {
        let n = ROWS.min(rows - first);
        // SAFETY: rows `first .. first + n` are there, and 16 tokens from each multiple of 16 on.
        unsafe {
            let at = s.queries.as_ptr().add(first * s.stride).cast();
            let queries = QuadRows { at, stride: s.stride };
            let queries = widened::<S, true>(set, queries, n, width, wide.start());
            for t in (0..s.tokens).step_by(LANES) {
                unpack(set, s, t, levels.start());
                let mut row = 0;
                while row < n {
                    let taken = part(n - row, S::ROWS);
                    let at = Place { row: first + row, t, levels: levels.start() };
                    let out = out.as_mut_ptr().add(at.row * out_stride + t);
                    by_rows!(
                        taken,
                        S,
                        tile(set, s, &at, queries.from::<S>(row, 0), out, out_stride)
                    );
                    row += taken;
                }
            }
        }
    }
}

/// The first of some rows, and of 16 tokens.
struct Place {
    row: usize,
    t: usize,
    /// The tokens' levels, where they are not looked up when they are used: `[segments, 4]` vectors.
    levels: *const u8,
}

/// Levels of 16 tokens, unless they are looked up when they are used.
///
/// # Safety
/// Tokens from `t` on must be there, and room for a vector for each quad.
#[inline(always)]
unsafe fn unpack<S: Bytes>(set: S, s: &Scores<'_>, t: usize, to: *mut u8) {
    if S::PERMUTES {
        return;
    }
    for (segment, (bits, _, offset)) in s.layout.segments(s.tokens).take(s.segments).enumerate() {
        if bits == 0 {
            continue;
        }
        // SAFETY: the segment is in the slot; the rest by contract.
        unsafe {
            let codes = s.slot.as_ptr().add(offset + t * segment_bytes(bits));
            let levels = with_bits!(bits, key_levels::<S>(set, codes));
            for (k, levels) in levels.into_iter().enumerate() {
                let to = to.add((segment * QUADS + k) * S::PREPARED);
                set.store_quads(to, set.quad_u(levels));
            }
        }
    }
}

/// 16 tokens to a vector, four coefficients to a lane: no sum runs across lanes.
///
/// # Safety
/// `R` rows and 16 tokens must be there.
#[inline(always)]
unsafe fn tile<S: Bytes, const R: usize>(
    set: S,
    s: &Scores<'_>,
    at: &Place,
    queries: QuadRows,
    out: *mut f32,
    out_stride: usize,
) {
    let mut all = [set.zero(); R];
    // SAFETY: segments are within slot, factors and queries, as `add_scores_on` asserts; rows and
    // tokens by contract.
    unsafe {
        let offsets = s.offsets.as_ptr().add(at.row * s.stride / 4);
        for (segment, (bits, _, offset)) in s.layout.segments(s.tokens).take(s.segments).enumerate()
        {
            if bits == 0 {
                continue;
            }
            let mut sums = [[set.izero()]; R];
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = [set.isplat(*offsets.add((r * s.stride + segment * SEGMENT) / 4))];
            }
            let rows = queries.from::<S>(0, segment * QUADS);
            if S::PERMUTES {
                let codes = s.slot.as_ptr().add(offset + at.t * segment_bytes(bits));
                sums = with_bits!(bits, looked_up::<S, R>(set, codes, rows, sums));
            } else {
                let levels = at.levels.add(segment * QUADS * S::PREPARED);
                let vectors = Prepared { at: levels, step: 1 };
                let product = Quads::<_, true> { rows, vectors };
                sums = add_products::<S, _, R, 1, QUADS>(set, product, 0, sums);
            }
            let factors = set.load(s.factors.as_ptr().add(segment * s.tokens + at.t));
            for (all, [sum]) in all.iter_mut().zip(sums) {
                *all = set.fused(set.from_int(sum), factors, *all);
            }
        }
        for (r, all) in all.into_iter().enumerate() {
            let out = out.add(r * out_stride);
            let scale = set.splat(*s.scales.as_ptr().add(at.row + r));
            set.store(out, set.fused(all, scale, set.load(out)));
        }
    }
}

/// Sums with products of one segment's levels, looked up here.
///
/// # Safety
/// `codes`: of 16 tokens; `rows`: a segment of `R` rows.
#[inline(always)]
unsafe fn looked_up<S: Bytes, const BITS: usize, const R: usize>(
    set: S,
    codes: *const u8,
    rows: QuadRows,
    sums: [[S::I; 1]; R],
) -> [[S::I; 1]; R] {
    // SAFETY: by contract.
    unsafe {
        let product = Quads::<_, true> { rows, vectors: KeyLevels::<S, BITS>::new(set, codes) };
        add_products::<S, _, R, 1, QUADS>(set, product, 0, sums)
    }
}
