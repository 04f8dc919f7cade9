//! HOT PATH. Weighted sums of coded values.

use crate::Isa;
use crate::coded::tile::{Buffer, Prepared, QuadRows, Quads, add_products, by_rows, part, widened};
use crate::simd::bytes::{BYTES, Bytes};
use crate::simd::compiled;
use crate::trellis::levels::{ValueLevels, value_levels, with_bits};
use crate::trellis::{Boosts, Layout, SEGMENT, segment_bytes};

/// One block of values.
#[derive(Debug, Clone, Copy)]
pub struct ValueBlock<'a> {
    /// How it is stored.
    pub layout: &'a Layout,
    /// The block.
    pub slot: &'a [u8],
    /// Boosts of its rows ([`Layout::row_factors`]).
    pub boosts: &'a Boosts,
}

/// Weights of some blocks' tokens, block after block, factors of rows taken in.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// `[rows, stride]`.
    pub weights: &'a [f32],
    /// The same, rounded. `[rows, stride]`.
    pub bytes: &'a [u8],
    /// What a byte is worth: `[rows]`.
    pub scales: &'a [f32],
    /// See `weights` and `bytes`.
    pub stride: usize,
}

/// `sums[i] += Σ weights[i, t] · levels of token t`, over the first `segments` segments of blocks of
/// `tokens` tokens each, levels multiplied with their boosts: `[rows, ..]` with stride `stride`. Boosts
/// meet the weights as they are, all else their bytes.
///
/// # Panics
/// If `tokens` is no multiple of 16 up to 64, there are more than eight blocks, or a slice is shorter than its shape
/// says.
pub fn add_values(
    weights: &Weights<'_>,
    blocks: &[ValueBlock<'_>],
    tokens: usize,
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    add_values_on(Isa::best(), weights, blocks, tokens, segments, sums, stride);
}

pub(super) fn add_values_on(
    isa: Isa,
    weights: &Weights<'_>,
    blocks: &[ValueBlock<'_>],
    tokens: usize,
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    let rows = weights.scales.len();
    if rows == 0 || blocks.is_empty() || segments == 0 {
        return;
    }
    let width = segments * SEGMENT;
    assert!(tokens.is_multiple_of(16) && tokens <= 64, "{tokens} tokens a block");
    assert!(blocks.len() <= MAX_BLOCKS, "{} blocks", blocks.len());
    assert!(weights.stride >= blocks.len() * tokens, "weights: {}", weights.stride);
    assert!(weights.bytes.len() >= rows * weights.stride, "bytes: {}", weights.bytes.len());
    assert!(weights.weights.len() >= rows * weights.stride, "weights: {}", weights.weights.len());
    assert!(stride >= width && sums.len() >= (rows - 1) * stride + width, "sums: {}", sums.len());
    for block in blocks {
        assert!(block.slot.len() == block.layout.slot_bytes(tokens), "slot: {}", block.slot.len());
        assert!(block.layout.bits().len() >= segments, "{segments} segments");
        let beyond = |s: usize| block.boosts.rows(s).checked_shr(tokens as u32).unwrap_or(0) != 0;
        assert!(!(0..segments).any(beyond), "boosts beyond {tokens} rows");
    }
    add_values_checked(isa, weights, blocks, tokens, segments, sums, stride);
}

compiled! {
    fn add_values_checked(
        weights: &Weights<'_>,
        blocks: &[ValueBlock<'_>],
        tokens: usize,
        segments: usize,
        sums: &mut [f32],
        stride: usize,
    ) = body for [Avx512Icl, Avx512Vnni, Avx512, AvxVnni, Avx2];
}

/// Most blocks at once, and most quads of their tokens.
const MAX_BLOCKS: usize = 8;
const MAX_QUADS: usize = 16 * MAX_BLOCKS;

/// Rows whose weights are widened together.
const ROWS: usize = 18;

#[inline(always)]
fn body<S: Bytes>(
    set: S,
    weights: &Weights<'_>,
    blocks: &[ValueBlock<'_>],
    tokens: usize,
    segments: usize,
    sums: &mut [f32],
    stride: usize,
) {
    let mut wide = Buffer::<{ 8 * ROWS * MAX_QUADS }>::new();
    let mut levels = Buffer::<{ 2 * BYTES * MAX_QUADS }>::new();
    let rows = weights.scales.len();
    for first in (0..rows).step_by(ROWS) {
        let n = ROWS.min(rows - first);
        let at = weights.bytes[first * weights.stride..].as_ptr();
        let bytes = QuadRows { at, stride: weights.stride };
        // SAFETY: rows `first .. first + n` are there, and have a weight for each token.
        let bytes =
            unsafe { widened::<S, false>(set, bytes, n, blocks.len() * tokens, wide.start()) };
        // Where the segment's codes begin, in every block.
        let mut codes = [std::ptr::null(); MAX_BLOCKS];
        for (codes, block) in codes.iter_mut().zip(blocks) {
            let begin = block.layout.segments(tokens).next().map_or(0, |(_, _, offset)| offset);
            *codes = block.slot[begin..].as_ptr();
        }
        for segment in 0..segments {
            let mut row = 0;
            // SAFETY: the rows and the segment are in bounds.
            unsafe {
                let at = Place { segment, tokens, codes: &codes, levels: levels.start() };
                unpack(set, blocks, &at, levels.start());
                while row < n {
                    let taken = part(n - row, S::ROWS);
                    let own = first + row;
                    let out = sums.as_mut_ptr().add(own * stride + segment * SEGMENT);
                    by_rows!(
                        taken,
                        S,
                        tile(set, weights, own, bytes.from::<S>(row, 0), blocks, &at, out, stride)
                    );
                    row += taken;
                }
            }
            for (codes, block) in codes.iter_mut().zip(blocks) {
                *codes = codes.wrapping_add(tokens * segment_bytes(block.layout.bits()[segment]));
            }
        }
    }
}

/// A segment of some blocks.
struct Place<'a> {
    segment: usize,
    tokens: usize,
    /// Where its codes begin, by block.
    codes: &'a [*const u8; MAX_BLOCKS],
    /// Its levels, where they are not looked up when they are used: a vector for four tokens.
    levels: *const u8,
}

impl Place<'_> {
    /// Quads of a block.
    #[inline(always)]
    fn quads(&self) -> usize {
        self.tokens / 4
    }
}

/// Levels of a segment, unless they are looked up when they are used.
///
/// # Safety
/// The segment must be there, and room for a vector for each quad of tokens.
#[inline(always)]
unsafe fn unpack<S: Bytes>(set: S, blocks: &[ValueBlock<'_>], at: &Place<'_>, to: *mut u8) {
    if S::PERMUTES {
        return;
    }
    let mut bytes = Buffer::<{ 4 * BYTES }>::new();
    for (i, block) in blocks.iter().enumerate() {
        let bits = block.layout.bits()[at.segment];
        if bits == 0 {
            continue;
        }
        for quad in (0..at.quads()).step_by(4) {
            // SAFETY: by contract; headers lie before codes.
            unsafe {
                let codes = at.codes[i].add(4 * quad * segment_bytes(bits));
                let to = to.add((i * at.quads() + quad) * S::PREPARED);
                if S::PREPARED == BYTES {
                    with_bits!(bits, value_levels::<S>(set, codes, to));
                    continue;
                }
                with_bits!(bits, value_levels::<S>(set, codes, bytes.start()));
                for q in 0..4 {
                    let levels = set.quad_i(set.iload(bytes.start().add(BYTES * q)));
                    set.store_quads(to.add(q * S::PREPARED), levels);
                }
            }
        }
    }
}

/// 16 coefficients to a vector, four tokens to a lane: no sum runs across lanes.
///
/// # Safety
/// `R` rows, the segment, and the rows of its boosts must be there.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn tile<S: Bytes, const R: usize>(
    set: S,
    weights: &Weights<'_>,
    row: usize,
    bytes: QuadRows,
    blocks: &[ValueBlock<'_>],
    at: &Place<'_>,
    out: *mut f32,
    stride: usize,
) {
    let quads = at.quads();
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[set.izero()]; R];
        for (i, block) in blocks.iter().enumerate() {
            let bits = block.layout.bits()[at.segment];
            let rows = bytes.from::<S>(0, i * quads);
            if bits == 0 {
                continue;
            }
            if S::PERMUTES {
                sums = with_bits!(bits, looked_up::<S, R>(set, at.codes[i], quads, rows, sums));
            } else {
                let levels = at.levels.add(i * quads * S::PREPARED);
                sums =
                    add_quads::<S, _, R>(set, Prepared { at: levels, step: 1 }, quads, rows, sums);
            }
        }
        let mut all = [set.zero(); R];
        for (r, (all, [sum])) in all.iter_mut().zip(sums).enumerate() {
            let scale = set.splat(*weights.scales.as_ptr().add(row + r));
            *all = set.fused(set.from_int(sum), scale, set.load(out.add(r * stride)));
        }
        for (i, block) in blocks.iter().enumerate() {
            let bits = block.layout.bits()[at.segment];
            let mut tokens = if bits == 0 { 0 } else { block.boosts.rows(at.segment) };
            let weights_of = weights.weights.as_ptr().add(row * weights.stride + i * at.tokens);
            while let Some(token) = Boosts::next(&mut tokens) {
                let level = if S::PERMUTES {
                    with_bits!(bits, level_of::<S>(set, at.codes[i], token))
                } else {
                    let quad = i * quads + token / 4;
                    set.load_byte(at.levels.add(quad * S::PREPARED), token % 4)
                };
                let factor = set.splat(block.boosts.factor(token) - 1.0);
                let level = set.mul(set.from_int(level), factor);
                for (r, all) in all.iter_mut().enumerate() {
                    let weight = set.splat(*weights_of.add(r * weights.stride + token));
                    *all = set.fused(weight, level, *all);
                }
            }
        }
        for (r, all) in all.into_iter().enumerate() {
            set.store(out.add(r * stride), all);
        }
    }
}

/// Sums with products of one block's levels, looked up here.
///
/// # Safety
/// `codes`: of 4 · `quads` tokens; `rows`: as many bytes of `R` rows.
#[inline(always)]
unsafe fn looked_up<S: Bytes, const BITS: usize, const R: usize>(
    set: S,
    codes: *const u8,
    quads: usize,
    rows: QuadRows,
    sums: [[S::I; 1]; R],
) -> [[S::I; 1]; R] {
    // SAFETY: by contract.
    unsafe { add_quads(set, ValueLevels::<S, BITS>::new(set, codes), quads, rows, sums) }
}

/// # Safety
/// `quads` vectors, and as many quads of `R` rows, must be there.
#[inline(always)]
unsafe fn add_quads<S: Bytes, V: crate::coded::tile::Vectors<S>, const R: usize>(
    set: S,
    vectors: V,
    quads: usize,
    rows: QuadRows,
    mut sums: [[S::I; 1]; R],
) -> [[S::I; 1]; R] {
    let product = Quads::<_, false> { rows, vectors };
    for quad in (0..quads).step_by(4) {
        // SAFETY: by contract; there are multiples of four.
        sums = unsafe { add_products::<S, _, R, 1, 4>(set, product, quad, sums) };
    }
    sums
}

/// Levels of one token.
///
/// # Safety
/// Its codes must be there.
#[inline(always)]
unsafe fn level_of<S: Bytes, const BITS: usize>(set: S, codes: *const u8, token: usize) -> S::I {
    // SAFETY: by contract.
    let quad = unsafe { ValueLevels::<S, BITS>::new(set, codes).levels(token / 4) };
    set.sar(set.shl(quad, 24 - 8 * (token % 4) as u32), 24)
}
