//! The basis of coded keys as bytes, and the products of queries with keys' means (hot).

use crate::coded::tile::{Halves, add_products};
use crate::simd::bytes::{BYTES, Bytes};
use crate::simd::{LANES, compiled};
use crate::trellis::SEGMENT;
use crate::{AlignedBytes, Isa};

/// Columns that are folded together; rows of folded queries are padded to whole tiles.
pub(super) const TILE: usize = 64;

/// Largest magnitude of a byte.
pub(super) const MOST: f32 = 127.0;

/// Steps of the fine query (16 bits) in one of the coarse query (8 bits).
pub const FINE: f32 = 256.0;

/// What the longest pair of a query is to be in steps of the fine query, for [`super::rotate_to_bytes`].
pub const LONGEST: f32 = FINE * MOST;

/// Most columns of a basis.
pub(super) const MAX_STRIDE: usize = 256;

/// A basis that queries are folded into, and the mean that keys have in it, as integers.
///
/// A key is `mean_j + B⁻¹ (factors ∘ levels)` in weighted channels, `j` its row in the block, with a factor
/// for each of its segments; a query that is divided by the channels' weights meets it in two products, one
/// with the mean and one, folded, with the levels.
#[derive(Debug)]
pub struct ByteBasis {
    /// What columns are prepared for.
    pub(super) isa: Isa,
    pub(super) dim: usize,
    /// Coefficients, padded to whole tiles.
    pub(super) stride: usize,
    pub(super) segments: usize,
    rows: usize,
    /// Pairs from this on are taken from the slow queries; a multiple of 4.
    pub(super) fast_pairs: usize,
    pub(super) heads: Vec<Head>,
}

/// What belongs to the channels of one head.
#[derive(Debug)]
pub(super) struct Head {
    /// `[tiles, dim / 4, 64 columns in the order of `column`, 4]`: entries over their column's factor; [`prepared`].
    pub(super) columns: AlignedBytes,
    /// Where folded sums begin, in the same order: what makes up for queries that are 128 too large, and
    /// half of what they lose. `[tiles, 64]` of i32.
    pub(super) begin: AlignedBytes,
    /// By column, in 2^15ths of `unit`: what a folded byte sum is worth, `[stride]` of i16.
    pub(super) factors: AlignedBytes,
    pub(super) unit: f32,
    /// `[dim / 2, rows, 2]` of i16; empty if the mean is zero.
    means: AlignedBytes,
    mean_unit: f32,
}

/// Column of a tile that stands at place `i` of its 64: sums are packed to bytes within 128-bit lanes.
pub(super) const fn column(i: usize) -> usize {
    let (sum, lane) = (i / 16, i % 16);
    16 * (lane / 4) + 4 * sum + lane % 4
}

/// Place `i` of a tile's factors: the order of sums that are packed to 16 bits.
pub(super) const fn factor_column(i: usize) -> usize {
    let (half, word) = (i / 32, i % 32);
    16 * (word / 8) + 8 * half + word % 8
}

fn put(words: &mut AlignedBytes, i: usize, value: i16) {
    words.as_mut_slice()[2 * i..2 * i + 2].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
pub(super) fn word(words: &AlignedBytes, i: usize) -> i16 {
    let bytes = words.as_slice();
    i16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])
}

impl ByteBasis {
    /// `basis`: `[channels, coefficients]`, both `width`, of a block whose heads have `dim` channels each;
    /// `means`: the mean of each row of a block (or one for all), in weighted channels: `[rows or 1,
    /// channels]`. Pairs of channels from `fast_pairs` on, about, turn so slowly that they may be turned
    /// for several blocks at once.
    ///
    /// # Panics
    /// If a slice does not have its shape, `dim` is no multiple of 16 or does not divide the width,
    /// `rows` is no multiple of 16, or blocks are wider than 256 channels.
    pub fn new(
        dim: usize,
        rows: usize,
        fast_pairs: usize,
        (width, basis): (usize, &[f32]),
        means: &[f32],
    ) -> Self {
        Self::new_on(Isa::best(), dim, rows, fast_pairs, (width, basis), means)
    }

    pub(super) fn new_on(
        isa: Isa,
        dim: usize,
        rows: usize,
        fast_pairs: usize,
        (width, basis): (usize, &[f32]),
        means: &[f32],
    ) -> Self {
        assert!(width <= MAX_STRIDE, "{width} channels");
        assert!(basis.len() == width * width, "a basis of {} for {width} channels", basis.len());
        assert!(dim.is_multiple_of(16) && width.is_multiple_of(dim), "heads of {dim} in {width}");
        assert!(rows.is_multiple_of(16), "{rows} rows");
        assert!(means.len() == width || means.len() == rows * width, "means: {}", means.len());
        let stride = width.next_multiple_of(TILE);
        let heads = (0..width / dim)
            .map(|head| {
                let channel = |d: usize| &basis[(head * dim + d) * width..][..width];
                let mean = |t: usize, d: usize| means[(t * width) % means.len() + head * dim + d];
                Head::new(isa, (dim, rows, width, stride), channel, mean)
            })
            .collect();
        let fast_pairs = fast_pairs.next_multiple_of(4).min(dim / 2);
        Self { isa, dim, stride, segments: width / SEGMENT, rows, fast_pairs, heads }
    }

    /// Bytes from one folded row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.dim
    }

    /// Segments of a row.
    pub fn segments(&self) -> usize {
        self.segments
    }

    /// Bytes it takes.
    pub fn num_bytes(&self) -> usize {
        let bytes = |h: &Head| h.columns.len() + h.begin.len() + h.factors.len() + h.means.len();
        self.heads.iter().map(bytes).sum()
    }

    /// Products of queries with the mean of every row of a block: `out[i, t] = scales[i] · query i ·
    /// mean t`, `[rows, block's rows]` with stride `out_stride`. `queries`: `[rows, dim]` fine queries
    /// as [`crate::coded::rotate_to_bytes`] writes them; `scales`: `[rows]`, what their coarse bytes are worth.
    ///
    /// # Panics
    /// If a slice is shorter than its shape says.
    pub fn mean_scores(
        &self,
        head: usize,
        queries: &[i16],
        scales: &[f32],
        out: &mut [f32],
        out_stride: usize,
    ) {
        let (rows, head) = (scales.len(), &self.heads[head]);
        assert!(queries.len() >= rows * self.dim, "queries: {} of {rows} rows", queries.len());
        assert!(out_stride >= self.rows, "stride {out_stride} for {}", self.rows);
        assert!(rows == 0 || out.len() >= (rows - 1) * out_stride + self.rows, "{}", out.len());
        if head.means.is_empty() {
            for out in out.chunks_mut(out_stride).take(rows) {
                out[..self.rows].fill(0.0);
            }
            return;
        }
        let unit = head.mean_unit / FINE;
        let means = head.means.as_slice();
        mean_scores(self.isa, (self.dim, self.rows), means, queries, scales, unit, out, out_stride);
    }
}

impl Head {
    fn new<'a>(
        isa: Isa,
        (dim, rows, width, stride): (usize, usize, usize, usize),
        channel: impl Fn(usize) -> &'a [f32],
        mean: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let most = |c: usize| (0..dim).fold(0.0f32, |most, d| most.max(channel(d)[c].abs()));
        let units: Vec<f32> = (0..width).map(|c| most(c) / MOST).collect();
        let unit = units.iter().fold(0.0f32, |a, b| a.max(*b)) * 32768.0 / 32767.0;
        let mut columns = AlignedBytes::zeroed(stride * dim);
        let mut begin = AlignedBytes::zeroed(4 * stride);
        let mut factors = AlignedBytes::zeroed(2 * stride);
        for tile in 0..stride / TILE {
            for place in 0..TILE {
                let c = tile * TILE + column(place);
                let mut sum = 0;
                for d in (0..dim).filter(|_| c < width && units[c] > 0.0) {
                    let byte = (channel(d)[c] / units[c]).round() as i8;
                    let at = ((tile * dim + d / 4 * 4) * TILE) + 4 * place + d % 4;
                    columns.as_mut_slice()[at] = byte as u8;
                    sum += i32::from(byte);
                }
                let at = 4 * (tile * TILE + place);
                let first = (1 << shift(dim) >> 1) - 128 * sum;
                begin.as_mut_slice()[at..at + 4].copy_from_slice(&first.to_le_bytes());
                let c = tile * TILE + factor_column(place);
                if c < width && unit > 0.0 {
                    let factor = (units[c] / unit * 32768.0).round();
                    put(&mut factors, tile * TILE + place, factor as i16);
                }
            }
        }
        // No sum of products may leave 32 bits: no pair of a fine query is longer than 32512.
        let squares = |t: usize| (0..dim).map(|d| f64::from(mean(t, d)).powi(2)).sum::<f64>();
        let norm = (0..rows).map(squares).fold(0.0, f64::max).sqrt();
        let room =
            2f64.powi(31) / (f64::from(FINE * MOST) * (dim as f64 / 2.0).sqrt()) - dim as f64;
        let (mut means, mut mean_unit) = (AlignedBytes::zeroed(0), 0.0);
        if norm > 0.0 {
            mean_unit = (norm / room) as f32;
            means = AlignedBytes::zeroed(2 * dim * rows);
            for t in 0..rows {
                for d in 0..dim {
                    let value = (mean(t, d) / mean_unit).round();
                    put(&mut means, (d / 2 * rows + t) * 2 + d % 2, value as i16);
                }
            }
        }
        Self { columns: prepared(isa, &columns), begin, factors, unit, means, mean_unit }
    }
}

/// Bytes with a sign as products take them: vector after vector, as [`Bytes::store_quads`] writes it.
pub(super) fn prepared(isa: Isa, bytes: &AlignedBytes) -> AlignedBytes {
    prepare(isa, bytes)
}

compiled! {
    fn prepare(bytes: &AlignedBytes) -> AlignedBytes = prepare_body
        for [Avx512Vnni, Avx512, AvxVnni, Avx2];
}

#[inline(always)]
fn prepare_body<S: Bytes>(set: S, bytes: &AlignedBytes) -> AlignedBytes {
    let vectors = bytes.len() / BYTES;
    let mut out = AlignedBytes::zeroed(vectors * S::PREPARED);
    for i in 0..vectors {
        // SAFETY: vector `i` of each.
        unsafe {
            let v = set.quad_i(set.iload(bytes.as_slice().as_ptr().add(i * BYTES)));
            set.store_quads(out.as_mut_slice().as_mut_ptr().add(i * S::PREPARED), v);
        }
    }
    out
}

/// Bits that a folded sum loses to fit 16: sums of `dim` products of bytes.
pub(super) fn shift(dim: usize) -> u32 {
    (dim.max(2) - 1).ilog2()
}

compiled! {
    /// See [`ByteBasis::mean_scores`]; `means`: `[dim / 2, tokens, 2]` words.
    #[allow(clippy::too_many_arguments)]
    fn mean_scores(
        shape: (usize, usize),
        means: &[u8],
        queries: &[i16],
        scales: &[f32],
        unit: f32,
        out: &mut [f32],
        out_stride: usize,
    ) = mean_scores_body for [Avx512Vnni, Avx512, AvxVnni, Avx2];
}

/// Rows that meet some tokens together.
const ROWS: usize = 6;

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn mean_scores_body<S: Bytes>(
    set: S,
    (dim, tokens): (usize, usize),
    means: &[u8],
    queries: &[i16],
    scales: &[f32],
    unit: f32,
    out: &mut [f32],
    out_stride: usize,
) {
    assert!(means.len() == 2 * dim * tokens);
    let rows = scales.len();
    let mut t = 0;
    while t < tokens {
        let vectors = if S::WIDE && tokens - t >= 2 * LANES { 2 } else { 1 };
        let mut row = 0;
        while row < rows {
            let n = ROWS.min(rows - row);
            // SAFETY: rows `row .. row + n` and columns `t .. t + 16 · vectors` are in bounds.
            unsafe {
                let tile = MeanTile {
                    products: Halves {
                        rows: queries.as_ptr().add(row * dim),
                        pairs: dim / 2,
                        vectors: means.as_ptr().add(4 * t),
                        step: 4 * tokens,
                    },
                    scales: scales.as_ptr().add(row),
                    unit,
                    out: out.as_mut_ptr().add(row * out_stride + t),
                    out_stride,
                };
                match (n, vectors) {
                    (6, 2) => tile.run::<S, 6, 2>(set),
                    (5, 2) => tile.run::<S, 5, 2>(set),
                    (4, 2) => tile.run::<S, 4, 2>(set),
                    (3, 2) => tile.run::<S, 3, 2>(set),
                    (2, 2) => tile.run::<S, 2, 2>(set),
                    (1, 2) => tile.run::<S, 1, 2>(set),
                    (6, _) => tile.run::<S, 6, 1>(set),
                    (5, _) => tile.run::<S, 5, 1>(set),
                    (4, _) => tile.run::<S, 4, 1>(set),
                    (3, _) => tile.run::<S, 3, 1>(set),
                    (2, _) => tile.run::<S, 2, 1>(set),
                    _ => tile.run::<S, 1, 1>(set),
                }
            }
            row += n;
        }
        t += LANES * vectors;
    }
}

/// Some rows against some tokens.
struct MeanTile {
    products: Halves,
    scales: *const f32,
    unit: f32,
    out: *mut f32,
    out_stride: usize,
}

impl MeanTile {
    /// # Safety
    /// `R` rows of queries, scales and outputs and 16 `N` tokens must be there.
    #[inline(always)]
    unsafe fn run<S: Bytes, const R: usize, const N: usize>(&self, set: S) {
        // SAFETY: by contract.
        unsafe {
            let mut sums = [[set.izero(); N]; R];
            for k in 0..self.products.pairs {
                sums = add_products::<S, _, R, N, 1>(set, self.products, k, sums);
            }
            for (r, sums) in sums.into_iter().enumerate() {
                let scale = set.splat(*self.scales.add(r) * self.unit);
                for (n, sum) in sums.into_iter().enumerate() {
                    let out = self.out.add(r * self.out_stride + LANES * n);
                    set.store(out, set.mul(set.from_int(sum), scale));
                }
            }
        }
    }
}
