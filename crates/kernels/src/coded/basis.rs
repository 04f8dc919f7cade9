//! HOT PATH (but for [`ByteBasis::new`]). Queries into the basis of coded keys, as bytes.

use crate::AlignedBytes;
use crate::coded::ByteIsa;
use crate::trellis::SEGMENT;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Columns that are folded together; rows of folded queries are padded to whole tiles.
pub(super) const TILE: usize = 64;

/// Largest magnitude of a byte.
const MOST: f32 = 127.0;

/// Steps of the fine query (16 bits) in one of the coarse query (8 bits).
pub const FINE: f32 = 256.0;

/// What the longest pair of a query is to be in steps of the fine query, for [`rotate_to_bytes`].
pub const LONGEST: f32 = FINE * MOST;

/// A basis that queries are folded into, and the mean that keys have in it, as integers.
///
/// A key is `mean_j + B⁻¹ (factors ∘ levels)` in weighted channels, `j` its row in the block, with a factor
/// for each of its segments; a query that is divided by the channels' weights meets it in two products, one
/// with the mean and one, folded, with the levels.
#[derive(Debug)]
pub struct ByteBasis {
    dim: usize,
    /// Coefficients, padded to whole tiles.
    stride: usize,
    segments: usize,
    rows: usize,
    /// Pairs from this on are taken from the slow queries; a multiple of 4.
    fast_pairs: usize,
    heads: Vec<Head>,
}

/// What belongs to the channels of one head.
#[derive(Debug)]
struct Head {
    /// `[tiles, dim / 4, 64 columns in the order of `column`, 4]`: entries over their column's factor.
    columns: AlignedBytes,
    /// Where folded sums begin, in the same order: what makes up for queries that are 128 too large, and
    /// half of what they lose. `[tiles, 64]` of i32.
    begin: AlignedBytes,
    /// By column, in 2^15ths of `unit`: what a folded byte sum is worth, `[stride]` of i16.
    factors: AlignedBytes,
    unit: f32,
    /// `[dim / 2, rows, 2]` of i16; empty if the mean is zero.
    means: AlignedBytes,
    mean_unit: f32,
}

/// Queries folded into a basis: what [`ByteBasis::fold`] writes.
#[derive(Debug)]
pub struct ByteQueries<'a> {
    /// `[rows, stride]`.
    pub bytes: &'a mut [i8],
    /// What bytes make of levels that are 128 too large, see [`crate::coded::Scores::offsets`]: `[rows,
    /// stride / 4]`.
    pub offsets: &'a mut [i32],
    /// What a byte is worth: `[rows]`.
    pub scales: &'a mut [f32],
    /// Anything.
    pub scratch: &'a mut FoldScratch,
    /// Rows written one after the other, and the distance from one such run to the next.
    pub runs: (usize, usize),
}

/// Most columns of a basis.
const MAX_STRIDE: usize = 256;

/// Most rows of a run.
const MAX_RUN: usize = 16;

/// Rows that are folded together.
const FOLDED: usize = 6;

/// One thread's buffers for [`ByteBasis::fold`].
#[derive(Debug)]
#[repr(C, align(64))]
pub struct FoldScratch {
    /// Folded rows before they are bytes.
    words: [i16; FOLDED * MAX_STRIDE],
    /// Sums over slow pairs.
    slow: [i32; MAX_RUN * MAX_STRIDE],
}

impl Default for FoldScratch {
    fn default() -> Self {
        Self { words: [0; FOLDED * MAX_STRIDE], slow: [0; MAX_RUN * MAX_STRIDE] }
    }
}

impl ByteQueries<'_> {
    /// Where query `i` goes.
    fn row(&self, i: usize) -> usize {
        i / self.runs.0 * self.runs.1 + i % self.runs.0
    }
}

/// Column of a tile that stands at place `i` of its 64: sums are packed to bytes within 128-bit lanes.
const fn column(i: usize) -> usize {
    let (sum, lane) = (i / 16, i % 16);
    16 * (lane / 4) + 4 * sum + lane % 4
}

/// Place `i` of a tile's factors: the order of sums that are packed to 16 bits.
const fn factor_column(i: usize) -> usize {
    let (half, word) = (i / 32, i % 32);
    16 * (word / 8) + 8 * half + word % 8
}

fn put(words: &mut AlignedBytes, i: usize, value: i16) {
    words.as_mut_slice()[2 * i..2 * i + 2].copy_from_slice(&value.to_le_bytes());
}

fn word(words: &AlignedBytes, i: usize) -> i16 {
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
                Head::new((dim, rows, width, stride), channel, mean)
            })
            .collect();
        let fast_pairs = fast_pairs.next_multiple_of(4).min(dim / 2);
        Self { dim, stride, segments: width / SEGMENT, rows, fast_pairs, heads }
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

    /// Folds runs of one head's queries into the first `segments` segments of the basis; zeros fill up
    /// the last tile of 64 bytes, and what comes after it is left alone. `queries`:
    /// `[rows, dim]` bytes as [`rotate_to_bytes`] writes them; `slow`: one run of them, turned by about as
    /// much, whose slow pairs stand for those of all runs; `worth`: what the bytes of each row of a run are
    /// worth, the same in all runs.
    ///
    /// # Panics
    /// If queries are not whole runs of at most 16 rows, a slice is shorter than its shape says, or there
    /// is no such head or segment.
    pub fn fold(
        &self,
        head: usize,
        segments: usize,
        queries: &[u8],
        slow: &[u8],
        worth: &[f32],
        out: &mut ByteQueries<'_>,
    ) {
        self.fold_on(ByteIsa::best(), head, segments, queries, slow, worth, out);
    }

    pub(super) fn fold_on(
        &self,
        isa: ByteIsa,
        head: usize,
        segments: usize,
        queries: &[u8],
        slow: &[u8],
        worth: &[f32],
        out: &mut ByteQueries<'_>,
    ) {
        let (run, rows) = (out.runs.0, queries.len() / self.dim);
        assert!(segments <= self.segments, "{segments} of {} segments", self.segments);
        assert!(queries.len() == rows * self.dim, "{} of {} channels", queries.len(), self.dim);
        assert!(worth.len() == run && run <= out.runs.1.min(MAX_RUN), "runs of {:?}", out.runs);
        assert!(slow.len() == run * self.dim, "slow queries: {}", slow.len());
        if rows == 0 {
            return;
        }
        assert!(rows.is_multiple_of(run), "{rows} rows in runs of {run}");
        let last = out.row(rows - 1);
        self.fold_checked(isa, (head, segments), (queries, slow), worth, out, last + 1);
    }

    fn fold_checked(
        &self,
        isa: ByteIsa,
        (head, segments): (usize, usize),
        (queries, slow): (&[u8], &[u8]),
        worth: &[f32],
        out: &mut ByteQueries<'_>,
        rows: usize,
    ) {
        assert!(out.scales.len() >= rows, "scales: {}", out.scales.len());
        assert!(out.bytes.len() >= rows * self.stride, "bytes: {}", out.bytes.len());
        assert!(out.offsets.len() >= rows * self.stride / 4, "offsets: {}", out.offsets.len());
        let head = &self.heads[head];
        #[cfg(target_arch = "x86_64")]
        if isa == ByteIsa::Vnni {
            // SAFETY: `ByteIsa` names only what the processor has; the asserts above are what it
            // needs.
            return unsafe { x86::fold(self, head, segments, (queries, slow), worth, out) };
        }
        let _ = isa;
        for (i, query) in queries.chunks_exact(self.dim).enumerate() {
            let (row, place) = (out.row(i), i % worth.len());
            let pairs = self.dim / 2;
            let slow = &slow[place * self.dim..][..self.dim];
            let query: Vec<i32> = (0..self.dim)
                .map(|d| if d % pairs < self.fast_pairs { query[d] } else { slow[d] })
                .map(|byte| i32::from(byte) - 128)
                .collect();
            out.scales[row] = worth[place] * self.fold_row(head, segments, &query, row, out);
        }
    }

    /// The definition. Returns what a folded byte is worth, see [`Self::worth`].
    fn fold_row(
        &self,
        head: &Head,
        segments: usize,
        query: &[i32],
        row: usize,
        out: &mut ByteQueries<'_>,
    ) -> f32 {
        let shift = shift(self.dim);
        let tiles = (segments * SEGMENT).div_ceil(TILE);
        let mut folded = vec![0i16; tiles * TILE];
        for tile in 0..tiles {
            for place in 0..TILE {
                let sum: i32 = (query.iter().enumerate())
                    .map(|(d, q)| {
                        let at = ((tile * self.dim + d / 4 * 4) * TILE) + 4 * place + d % 4;
                        q * i32::from(head.columns.as_slice()[at] as i8)
                    })
                    .sum();
                let sum = (sum + (1 << shift >> 1)) >> shift;
                folded[tile * TILE + column(place)] =
                    sum.clamp(i32::from(i16::MIN), i32::from(i16::MAX)) as i16;
            }
            for place in 0..TILE {
                let folded = &mut folded[tile * TILE + factor_column(place)];
                *folded = times_fraction(*folded, word(&head.factors, tile * TILE + place));
            }
        }
        folded[segments * SEGMENT..].fill(0);
        let most = folded.iter().map(|f| f.unsigned_abs()).max().unwrap_or(0);
        let factor = byte_factor(most);
        let bytes = &mut out.bytes[row * self.stride..][..tiles * TILE];
        let offsets = &mut out.offsets[row * self.stride / 4..];
        for (byte, folded) in bytes.iter_mut().zip(&folded) {
            *byte = times_fraction(*folded, factor).clamp(-128, 127) as i8;
        }
        for (offsets, bytes) in offsets.chunks_mut(4).zip(bytes.chunks_exact(SEGMENT)) {
            offsets.fill(-128 * bytes.iter().map(|b| i32::from(*b)).sum::<i32>());
        }
        self.worth(head, factor)
    }

    /// What a folded byte is worth in units of the query's bytes.
    fn worth(&self, head: &Head, factor: i16) -> f32 {
        head.unit * (1 << shift(self.dim)) as f32 * 32768.0 / f32::from(factor)
    }

    /// Products of queries with the mean of every row of a block: `out[i, t] = scales[i] · query i ·
    /// mean t`, `[rows, block's rows]` with stride `out_stride`. `queries`: `[rows, dim]` fine queries
    /// as [`rotate_to_bytes`] writes them; `scales`: `[rows]`, what their coarse bytes are worth.
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
        self.mean_scores_on(ByteIsa::best(), head, queries, scales, out, out_stride);
    }

    pub(super) fn mean_scores_on(
        &self,
        isa: ByteIsa,
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
        #[cfg(target_arch = "x86_64")]
        if isa == ByteIsa::Vnni {
            let shape = (rows, self.dim, self.rows);
            let means = head.means.as_slice();
            // SAFETY: as in `fold_on`; means are `[dim / 2, rows, 2]` words.
            return unsafe {
                x86::mean_scores(shape, means, queries, scales, unit, out, out_stride)
            };
        }
        let _ = isa;
        for (row, scale) in scales.iter().enumerate() {
            let query = &queries[row * self.dim..][..self.dim];
            for t in 0..self.rows {
                let product = |(d, q): (usize, &i16)| {
                    let mean = word(&head.means, (d / 2 * self.rows + t) * 2 + d % 2);
                    i32::from(*q) * i32::from(mean)
                };
                let sum: i32 = query.iter().enumerate().map(product).sum();
                out[row * out_stride + t] = sum as f32 * (scale * unit);
            }
        }
    }
}

impl Head {
    fn new<'a>(
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
        Self { columns, begin, factors, unit, means, mean_unit }
    }
}

/// Bits that a folded sum loses to fit 16: sums of `dim` products of bytes.
fn shift(dim: usize) -> u32 {
    (dim.max(2) - 1).ilog2()
}

/// `a · b / 2^15`, rounded.
#[inline(always)]
fn times_fraction(a: i16, b: i16) -> i16 {
    ((i32::from(a) * i32::from(b) + (1 << 14)) >> 15) as i16
}

/// In 2^15ths: what brings a magnitude of `most` to that of a byte.
#[inline(always)]
fn byte_factor(most: u16) -> i16 {
    (MOST * 32768.0 / f32::from(most.max(128))) as i16
}

/// The largest magnitude that a rotation can give a channel: that of the longest pair `(i, i + dim /
/// 2)`.
pub fn largest_pair(query: &[f32]) -> f32 {
    let (first, second) = query.split_at(query.len() / 2);
    let squares = first.iter().zip(second).map(|(a, b)| a * a + b * b);
    squares.fold(0.0, f32::max).sqrt()
}

/// Rotates rows of queries (`[rows, dim]`) by `cos` and `sin` (`[dim / 2]` each; `None`: not at all)
/// and rounds them to integers, and to 256ths of them as bytes, plus 128. No pair may be longer than
/// [`LONGEST`].
///
/// # Panics
/// If a slice is shorter than its shape says, or queries are not whole rows.
pub fn rotate_to_bytes(
    queries: &[f32],
    dim: usize,
    turn: Option<(&[f32], &[f32])>,
    bytes: &mut [u8],
    fine: &mut [i16],
) {
    rotate_to_bytes_on(ByteIsa::best(), queries, dim, turn, bytes, fine);
}

pub(super) fn rotate_to_bytes_on(
    isa: ByteIsa,
    queries: &[f32],
    dim: usize,
    turn: Option<(&[f32], &[f32])>,
    bytes: &mut [u8],
    fine: &mut [i16],
) {
    const ONES: [f32; 128] = [1.0; 128];
    const ZEROS: [f32; 128] = [0.0; 128];
    let (cos, sin) = turn.unwrap_or((&ONES, &ZEROS));
    let n = queries.len();
    assert!(n.is_multiple_of(dim) && bytes.len() >= n && fine.len() >= n, "{n} of queries");
    assert!(cos.len() >= dim / 2 && sin.len() >= dim / 2, "{} angles", cos.len());
    #[cfg(target_arch = "x86_64")]
    if isa == ByteIsa::Vnni {
        // SAFETY: `ByteIsa` names only what the processor has; lengths are asserted above.
        return unsafe { x86::rotate_to_bytes(queries, dim, (cos, sin), bytes, fine) };
    }
    let _ = isa;
    rotate_body(queries, dim, (cos, sin), bytes, fine);
}

#[inline(always)]
fn rotate_body(
    queries: &[f32],
    dim: usize,
    (cos, sin): (&[f32], &[f32]),
    bytes: &mut [u8],
    fine: &mut [i16],
) {
    // Adding 1.5 · 2^23 rounds to an integer, which its low bits then hold.
    const ROUND: f32 = 12_582_912.0;
    let pairs = dim / 2;
    let outputs = fine.chunks_exact_mut(dim).zip(bytes.chunks_exact_mut(dim));
    for (query, (fine, bytes)) in queries.chunks_exact(dim).zip(outputs) {
        let (a, b) = query.split_at(pairs);
        let (fine_a, fine_b) = fine.split_at_mut(pairs);
        let (byte_a, byte_b) = bytes.split_at_mut(pairs);
        for i in 0..pairs {
            let x = (a[i] * cos[i] - b[i] * sin[i] + ROUND).to_bits() as i16;
            let y = (b[i] * cos[i] + a[i] * sin[i] + ROUND).to_bits() as i16;
            (fine_a[i], fine_b[i]) = (x, y);
            byte_a[i] = (x.wrapping_add(128) >> 8) as u8 ^ 128;
            byte_b[i] = (y.wrapping_add(128) >> 8) as u8 ^ 128;
        }
    }
}
