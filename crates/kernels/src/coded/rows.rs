//! HOT PATH (prefill). Blocks of levels back into rows of channels.

use half::f16;

use crate::coded::basis::prepared;
use crate::coded::tile::{Buffer, Prepared, QuadRows, Quads, add_products, by_rows, part, widened};
use crate::simd::bytes::{BYTES, Bytes};
use crate::simd::{LANES, compiled};
use crate::trellis::SEGMENT;
use crate::{AlignedBytes, Isa, f16_to_f32};

/// Largest magnitude of a byte.
const MOST: f32 = 127.0;

/// A basis that levels are turned back with, as bytes.
#[derive(Debug)]
pub struct ByteRows {
    /// What `entries` are prepared for.
    isa: Isa,
    dim: usize,
    width: usize,
    /// `[heads, width / 4, dim, 4]`: entries over their channel's scale; [`prepared`].
    entries: AlignedBytes,
    /// What those make of levels that are 128 too large: `[heads, width / 16, dim]` of i32.
    offsets: AlignedBytes,
    /// By channel, what a byte times a level is worth: `[width]`.
    scales: Vec<f32>,
}

impl Default for ByteRows {
    fn default() -> Self {
        let (entries, offsets) = (AlignedBytes::zeroed(0), AlignedBytes::zeroed(0));
        Self { isa: Isa::best(), dim: 16, width: 0, entries, offsets, scales: Vec::new() }
    }
}

/// One block that is turned back.
#[derive(Debug, Clone, Copy)]
pub struct LevelBlock<'a> {
    /// Levels ([`crate::trellis::Layout::levels`]).
    pub levels: &'a [u8],
    /// What a level is worth, by segment and row of the block: `[segments, tokens]`.
    pub factors: &'a [f32],
    /// Rows of the block.
    pub tokens: usize,
    /// Segments that are taken in, from the first on.
    pub segments: usize,
    /// What all levels are multiplied with besides.
    pub gain: f32,
    /// What rows are added to: `[tokens, mean_stride]`, the head's channels first, or one row with
    /// stride 0.
    pub means: &'a [f32],
    /// See `means`.
    pub mean_stride: usize,
}

impl ByteRows {
    /// Takes in a basis: `[channels, coefficients]`, of as many channels as `weights`, in heads of `dim`
    /// channels, each to be multiplied with its weight.
    ///
    /// # Panics
    /// If the shapes do not fit, or `dim` is no multiple of 16.
    pub fn load(&mut self, dim: usize, basis: &[f16], weights: &[f32]) {
        self.load_on(Isa::best(), dim, basis, weights);
    }

    pub(super) fn load_on(&mut self, isa: Isa, dim: usize, basis: &[f16], weights: &[f32]) {
        let width = weights.len();
        assert!(dim.is_multiple_of(16) && width.is_multiple_of(dim), "heads of {dim} in {width}");
        assert!(basis.len() == width * width, "a basis of {} for {width} channels", basis.len());
        let mut entries = AlignedBytes::zeroed(width * width);
        if (self.dim, self.width) != (dim, width) {
            self.offsets = AlignedBytes::zeroed(4 * width * width / SEGMENT);
        }
        (self.isa, self.dim, self.width) = (isa, dim, width);
        self.scales.resize(width, 0.0);
        let mut row = vec![0.0; width];
        let channels = basis.chunks_exact(width).zip(weights).zip(&mut self.scales);
        for (channel, ((basis, weight), scale)) in channels.enumerate() {
            f16_to_f32(basis, &mut row);
            let most =
                row.iter().fold(0.0f32, |most, x| if x.abs() > most { x.abs() } else { most });
            *scale = weight * most / MOST;
            let inverse = if most > 0.0 { MOST / most } else { 0.0 };
            let (head, d) = (channel / dim, channel % dim);
            let entries = &mut entries.as_mut_slice()[head * dim * width..];
            let offsets = &mut self.offsets.as_mut_slice()[4 * head * dim * width / SEGMENT..];
            for (segment, row) in row.chunks_exact(SEGMENT).enumerate() {
                let mut sum = 0;
                for (k, row) in row.chunks_exact(4).enumerate() {
                    let at = ((segment * 4 + k) * dim + d) * 4;
                    for (entry, x) in entries[at..at + 4].iter_mut().zip(row) {
                        // Adding 1.5 · 2^23 rounds to an integer, which the low bits then hold.
                        let byte = (x * inverse + 12_582_912.0).to_bits() as i8;
                        *entry = byte as u8;
                        sum += i32::from(byte);
                    }
                }
                let at = 4 * (segment * dim + d);
                offsets[at..at + 4].copy_from_slice(&(-128 * sum).to_le_bytes());
            }
        }
        self.entries = prepared(isa, &entries);
    }

    /// Rows of one head: `out[t, d] = means[t, d] + gain · scales[d] · Σ factors[s, t] · (levels of row t ·
    /// entries of channel d, in segment s)`, `[tokens, dim]`.
    ///
    /// # Panics
    /// If a slice is shorter than its shape says, `tokens` is no multiple of 16 up to 64, or there is no such head or
    /// segment.
    pub fn turn_back(&self, head: usize, block: &LevelBlock<'_>, out: &mut [f32]) {
        let LevelBlock { levels, factors, tokens, segments, means, mean_stride, .. } = *block;
        let (dim, width) = (self.dim, self.width);
        assert!(
            tokens.is_multiple_of(16) && (16..=MAX_TOKENS).contains(&tokens),
            "{tokens} tokens"
        );
        assert!(width <= MAX_WIDTH, "{width} channels");
        assert!(segments * SEGMENT <= width && (head + 1) * dim <= width, "{segments}, {head}");
        assert!(levels.len() >= segments * SEGMENT * tokens, "levels: {}", levels.len());
        assert!(factors.len() >= segments * tokens, "factors: {}", factors.len());
        assert!(means.len() >= (tokens - 1) * mean_stride + dim, "means: {}", means.len());
        assert!(out.len() >= tokens * dim, "out: {}", out.len());
        turn_back(self.isa, self, head, block, out);
    }
}

/// Most rows of a block, and most of its channels.
const MAX_TOKENS: usize = 64;
const MAX_WIDTH: usize = 256;

/// Tokens turned back together where there are 32 vectors: with four vectors of channels, an integer and a floating sum
/// each.
const TOKENS: usize = 3;

compiled! {
    fn turn_back(rows: &ByteRows, head: usize, block: &LevelBlock<'_>, out: &mut [f32]) = body
        for [Avx512Vnni, Avx512, AvxVnni, Avx2];
}

#[inline(always)]
fn body<S: Bytes>(set: S, rows: &ByteRows, head: usize, block: &LevelBlock<'_>, out: &mut [f32]) {
    let (dim, tokens, width) = (rows.dim, block.tokens, rows.width);
    let mut wide = Buffer::<{ 2 * MAX_TOKENS * MAX_WIDTH }>::new();
    let all = block.segments * SEGMENT * tokens;
    // SAFETY: as many levels are there, and room for all of 64 tokens in 256 channels.
    let levels = unsafe {
        let levels = QuadRows { at: block.levels.as_ptr(), stride: 0 };
        widened::<S, false>(set, levels, 1, all, wide.start())
    };
    let entries = &rows.entries.as_slice()[head * dim * width / BYTES * S::PREPARED..];
    let offsets = &rows.offsets.as_slice()[4 * head * dim * width / SEGMENT..];
    let scales = &rows.scales[head * dim..(head + 1) * dim];
    assert!(entries.len() >= dim * width / BYTES * S::PREPARED && out.len() >= tokens * dim);
    let mut d = 0;
    while d < dim {
        let vectors = if S::WIDE && dim - d >= 4 * LANES { 4 } else { 1 };
        let mut t = 0;
        while t < tokens {
            let n = if vectors > 1 { TOKENS.min(tokens - t) } else { part(tokens - t, S::ROWS) };
            // SAFETY: tokens from `t` on and 16 · `vectors` channels from `d` on are in bounds.
            unsafe {
                let place = Place {
                    dim,
                    levels: QuadRows { at: levels.from::<S>(0, t).at, stride: S::QUAD },
                    entries: entries.as_ptr().add(d / LANES * S::PREPARED),
                    offsets: offsets.as_ptr().add(4 * d),
                    scales: scales.as_ptr().add(d),
                    factors: block.factors.as_ptr().add(t),
                    means: block.means.as_ptr().add(t * block.mean_stride + d),
                    out: out.as_mut_ptr().add(t * dim + d),
                };
                match (n, vectors) {
                    (3, 4) => tile::<S, 3, 4>(set, block, &place),
                    (2, 4) => tile::<S, 2, 4>(set, block, &place),
                    (_, 4) => tile::<S, 1, 4>(set, block, &place),
                    _ => narrow(set, n, block, &place),
                }
            }
            t += n;
        }
        d += LANES * vectors;
    }
}

/// 16 channels of `n` tokens.
///
/// # Safety
/// They must be there.
#[inline(always)]
unsafe fn narrow<S: Bytes>(set: S, n: usize, block: &LevelBlock<'_>, place: &Place) {
    #[inline(always)]
    unsafe fn one<S: Bytes, const R: usize>(set: S, block: &LevelBlock<'_>, place: &Place) {
        // SAFETY: by contract.
        unsafe { tile::<S, R, 1>(set, block, place) };
    }
    // SAFETY: by contract.
    unsafe { by_rows!(n, S, one(set, block, place)) };
}

/// A tile's first token and channel.
struct Place {
    dim: usize,
    levels: QuadRows,
    entries: *const u8,
    offsets: *const u8,
    scales: *const f32,
    factors: *const f32,
    means: *const f32,
    out: *mut f32,
}

/// 16 channels to a vector, four coefficients to a lane.
///
/// # Safety
/// `R` tokens and 16 `C` channels must be there.
#[inline(always)]
unsafe fn tile<S: Bytes, const R: usize, const C: usize>(
    set: S,
    block: &LevelBlock<'_>,
    place: &Place,
) {
    let (dim, tokens) = (place.dim, block.tokens);
    // SAFETY: by contract.
    unsafe {
        let mut all = [[set.zero(); C]; R];
        for segment in 0..block.segments {
            let mut begin = [set.izero(); C];
            for (c, begin) in begin.iter_mut().enumerate() {
                *begin = set.iload(place.offsets.add(4 * segment * dim + BYTES * c));
            }
            let mut sums = [begin; R];
            for k in 4 * segment..4 * segment + SEGMENT / 4 {
                let entries = place.entries.add(k * dim / LANES * S::PREPARED);
                let rows =
                    QuadRows { at: place.levels.at.add(k * tokens * S::QUAD), ..place.levels };
                let vectors = Prepared { at: entries, step: 0 };
                let product = Quads::<_, false> { rows, vectors };
                sums = add_products::<S, _, R, C, 1>(set, product, 0, sums);
            }
            for (r, (all, sums)) in all.iter_mut().zip(sums).enumerate() {
                let factor = set.splat(*place.factors.add(segment * tokens + r));
                for (all, sum) in all.iter_mut().zip(sums) {
                    *all = set.fused(set.from_int(sum), factor, *all);
                }
            }
        }
        let gain = set.splat(block.gain);
        for (r, all) in all.into_iter().enumerate() {
            for (c, all) in all.into_iter().enumerate() {
                let scale = set.mul(gain, set.load(place.scales.add(LANES * c)));
                let mean = set.load(place.means.add(r * block.mean_stride + LANES * c));
                set.store(place.out.add(r * dim + LANES * c), set.fused(all, scale, mean));
            }
        }
    }
}
