//! HOT PATH. VNNI code of the functions above it; contracts as their callers state them.

use std::arch::x86_64::*;

use super::{
    ByteBasis, ByteQueries, FOLDED, Head, MAX_RUN, MAX_STRIDE, TILE, byte_factor, rotate_body,
    shift,
};
use crate::trellis::SEGMENT;

/// Rows folded together: their sums for one tile fill 24 registers.
const ROWS: usize = FOLDED;

/// Channels rotated together.
const LANES: usize = 16;

/// See [`ByteBasis::fold`].
///
/// # Safety
/// Queries and outputs must have the lengths that `fold_on` and `fold_checked` assert.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn fold(
    basis: &ByteBasis,
    head: &Head,
    segments: usize,
    (queries, slow): (&[u8], &[u8]),
    worth: &[f32],
    out: &mut ByteQueries<'_>,
) {
    let (dim, stride, run) = (basis.dim, basis.stride, out.runs.0);
    let rows = queries.len() / dim;
    let tiles = (segments * SEGMENT).div_ceil(TILE);
    assert!(tiles * TILE <= stride.min(MAX_STRIDE) && run <= MAX_RUN);
    let quads = Quads { fast: basis.fast_pairs / 4, pairs: dim / 8 };
    let shared = quads.fast < quads.pairs;
    // SAFETY: see below; slow queries are `run` rows.
    unsafe {
        for r in (0..if shared { run } else { 0 }).step_by(SLOW) {
            let query = slow.as_ptr().add(r * dim);
            let to = out.scratch.slow.as_mut_ptr().add(r * MAX_STRIDE);
            match SLOW.min(run - r) {
                4 => slow_rows::<4>(head, dim, tiles, &quads, query, to),
                3 => slow_rows::<3>(head, dim, tiles, &quads, query, to),
                2 => slow_rows::<2>(head, dim, tiles, &quads, query, to),
                _ => slow_rows::<1>(head, dim, tiles, &quads, query, to),
            }
        }
    }
    let mut row = 0;
    while row < rows {
        let n = ROWS.min(rows - row);
        // SAFETY: rows `row .. row + n` of the queries are there; `words` has room for `ROWS` rows of
        // at most `MAX_STRIDE`; the outputs have room for the row of every query.
        unsafe {
            let query = queries.as_ptr().add(row * dim);
            let to = out.scratch.words.as_mut_ptr();
            let slow = out.scratch.slow.as_ptr();
            let begin: [*const i32; ROWS] = std::array::from_fn(|r| match shared {
                true => slow.add((row + r) % run * MAX_STRIDE),
                false => head.begin.as_slice().as_ptr().cast(),
            });
            match n {
                6 => fold_rows::<6>(head, dim, segments, &quads, query, begin, to),
                5 => fold_rows::<5>(head, dim, segments, &quads, query, begin, to),
                4 => fold_rows::<4>(head, dim, segments, &quads, query, begin, to),
                3 => fold_rows::<3>(head, dim, segments, &quads, query, begin, to),
                2 => fold_rows::<2>(head, dim, segments, &quads, query, begin, to),
                _ => fold_rows::<1>(head, dim, segments, &quads, query, begin, to),
            }
            // One step of all rows after the other: each is a long chain.
            let mut most = [0; ROWS];
            for (i, most) in most[..n].iter_mut().enumerate() {
                *most = largest(to.add(i * MAX_STRIDE), tiles);
            }
            let factors = most.map(byte_factor);
            for (i, factor) in factors[..n].iter().enumerate() {
                let r = out.row(row + i);
                let bytes = out.bytes.as_mut_ptr().add(r * stride);
                let offsets = out.offsets.as_mut_ptr().add(r * stride / 4);
                to_bytes(to.add(i * MAX_STRIDE), tiles, *factor, bytes, offsets);
                out.scales[r] = worth[(row + i) % worth.len()] * basis.worth(head, *factor);
            }
        }
        row += n;
    }
}

/// Slow rows whose sums are made together.
const SLOW: usize = 4;

/// Groups of four channels; the two halves of a head are paired.
struct Quads {
    /// Fast ones of a half; then come slow ones.
    fast: usize,
    /// Of a half.
    pairs: usize,
}

/// Adds products of `R` rows with one tile's columns, over channels 4 · `from` to 4 · `to`.
///
/// # Safety
/// `columns`: the tile's; `query`: `R` rows of `dim` bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn add_quads<const R: usize>(
    mut sums: [[__m512i; 4]; R],
    (from, to): (usize, usize),
    columns: *const u8,
    query: *const u8,
    dim: usize,
) -> [[__m512i; 4]; R] {
    for k in from..to {
        // SAFETY: by contract.
        unsafe {
            let at = columns.add(4 * TILE * k);
            let b: [__m512i; 4] = [
                _mm512_loadu_epi8(at.cast()),
                _mm512_loadu_epi8(at.add(64).cast()),
                _mm512_loadu_epi8(at.add(128).cast()),
                _mm512_loadu_epi8(at.add(192).cast()),
            ];
            for (r, sums) in sums.iter_mut().enumerate() {
                let q = query.add(r * dim + 4 * k).cast::<i32>().read_unaligned();
                let q = _mm512_set1_epi32(q);
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_dpbusd_epi32(*sum, q, b);
                }
            }
        }
    }
    sums
}

/// Sums of `R` rows over slow pairs, through all tiles, `MAX_STRIDE` apart.
///
/// # Safety
/// `query`: `R` rows of `dim` bytes; `to`: room for `R` rows of `MAX_STRIDE` sums.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn slow_rows<const R: usize>(
    head: &Head,
    dim: usize,
    tiles: usize,
    quads: &Quads,
    query: *const u8,
    to: *mut i32,
) {
    for tile in 0..tiles {
        // SAFETY: a tile's columns are `dim` · TILE bytes; the rest by contract.
        unsafe {
            let begin = head.begin.as_slice().as_ptr().add(4 * TILE * tile);
            let begin: [__m512i; 4] =
                std::array::from_fn(|i| _mm512_loadu_epi8(begin.add(64 * i).cast()));
            let columns = head.columns.as_slice().as_ptr().add(tile * dim * TILE);
            let (fast, pairs) = (quads.fast, quads.pairs);
            let sums = add_quads([begin; R], (fast, pairs), columns, query, dim);
            let sums = add_quads(sums, (pairs + fast, 2 * pairs), columns, query, dim);
            for (r, sums) in sums.iter().enumerate() {
                for (i, sum) in sums.iter().enumerate() {
                    _mm512_storeu_epi32(to.add(r * MAX_STRIDE + tile * TILE + 16 * i), *sum);
                }
            }
        }
    }
}

/// `R` rows through all tiles, to 16 bits, `MAX_STRIDE` apart. `begin`: where each row's sums begin.
///
/// # Safety
/// `query`: `R` rows of `dim` bytes; `begin`: a sum for every column; `to`: room for `R` rows of
/// `MAX_STRIDE` words.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn fold_rows<const R: usize>(
    head: &Head,
    dim: usize,
    segments: usize,
    quads: &Quads,
    query: *const u8,
    begin: [*const i32; ROWS],
    to: *mut i16,
) {
    let count = _mm_cvtsi32_si128(shift(dim) as i32);
    let columns = head.columns.as_slice().as_ptr();
    let factors = head.factors.as_slice().as_ptr();
    // SAFETY: a tile's columns are `dim` · TILE bytes, its factors TILE words; the rest by contract.
    unsafe {
        for tile in 0..(segments * SEGMENT).div_ceil(TILE) {
            let columns = columns.add(tile * dim * TILE);
            let mut sums = [[_mm512_setzero_si512(); 4]; R];
            for (sums, begin) in sums.iter_mut().zip(begin) {
                let at = begin.add(tile * TILE);
                *sums = std::array::from_fn(|i| _mm512_loadu_epi32(at.add(16 * i)));
            }
            let (fast, pairs) = (quads.fast, quads.pairs);
            let sums = add_quads(sums, (0, fast), columns, query, dim);
            let sums = add_quads(sums, (pairs, pairs + fast), columns, query, dim);
            let factors = factors.add(2 * TILE * tile);
            // A 128-bit lane of factors is half of a segment's: those that are not asked for are zero.
            let lanes = (segments - tile * TILE / SEGMENT).min(4);
            let asked = ((1u16 << (2 * lanes)) - 1) as u8;
            let low = _mm512_maskz_loadu_epi64(asked, factors.cast());
            let high = _mm512_maskz_loadu_epi64(asked, factors.add(64).cast());
            for (r, sums) in sums.iter().enumerate() {
                let [a, b, c, d] = sums.map(|s| _mm512_sra_epi32(s, count));
                let to = to.add(r * MAX_STRIDE + tile * TILE);
                let first = _mm512_mulhrs_epi16(_mm512_packs_epi32(a, b), low);
                let second = _mm512_mulhrs_epi16(_mm512_packs_epi32(c, d), high);
                _mm512_storeu_epi16(to, first);
                _mm512_storeu_epi16(to.add(32), second);
            }
        }
    }
}

/// The largest magnitude of a row of words.
///
/// # Safety
/// `words`: `tiles` · TILE elements.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn largest(words: *const i16, tiles: usize) -> u16 {
    let mut most = _mm512_setzero_si512();
    for tile in 0..tiles {
        // SAFETY: by contract.
        let (a, b) = unsafe { pair(words.add(tile * TILE)) };
        most = _mm512_max_epu16(most, _mm512_abs_epi16(a));
        most = _mm512_max_epu16(most, _mm512_abs_epi16(b));
    }
    let half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64::<1>(most));
    let quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
    // The least complement is the largest.
    let least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi8(-1)));
    !(_mm_extract_epi16::<0>(least) as u16)
}

/// One row of words to bytes and their offsets.
///
/// # Safety
/// `words`, `bytes`: `tiles` · TILE elements; `offsets`: a quarter of that.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
#[inline]
unsafe fn to_bytes(
    words: *const i16,
    tiles: usize,
    factor: i16,
    bytes: *mut i8,
    offsets: *mut i32,
) {
    // SAFETY: by contract.
    unsafe {
        let by = _mm512_set1_epi16(factor);
        for tile in 0..tiles {
            let (a, b) = pair(words.add(tile * TILE));
            let packed = _mm512_packs_epi16(_mm512_mulhrs_epi16(a, by), _mm512_mulhrs_epi16(b, by));
            _mm512_storeu_epi8(bytes.add(tile * TILE), packed);
            // A 128-bit lane is a segment.
            let zero = _mm512_setzero_si512();
            let fours = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(-128), packed);
            let pairs = _mm512_add_epi32(fours, _mm512_shuffle_epi32::<0x4E>(fours));
            let all = _mm512_add_epi32(pairs, _mm512_shuffle_epi32::<0xB1>(pairs));
            _mm512_storeu_epi32(offsets.add(tile * TILE / 4), _mm512_sub_epi32(zero, all));
        }
    }
}

/// # Safety
/// TILE words must be readable.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn pair(words: *const i16) -> (__m512i, __m512i) {
    // SAFETY: by contract.
    unsafe { (_mm512_loadu_epi16(words), _mm512_loadu_epi16(words.add(32))) }
}

/// See [`ByteBasis::mean_scores`]. `means`: `[dim / 2, tokens, 2]` words.
///
/// # Safety
/// Slices must have the lengths that `mean_scores_on` asserts; `tokens` must be a multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn mean_scores(
    (rows, dim, tokens): (usize, usize, usize),
    means: &[u8],
    queries: &[i16],
    scales: &[f32],
    unit: f32,
    out: &mut [f32],
    out_stride: usize,
) {
    assert!(means.len() == 2 * dim * tokens && scales.len() >= rows);
    let mut t = 0;
    while t < tokens {
        let groups = if tokens - t >= 32 { 2 } else { 1 };
        let mut row = 0;
        while row < rows {
            let n = ROWS.min(rows - row);
            // SAFETY: rows `row .. row + n` and columns `t .. t + 16 · groups` are in bounds.
            unsafe {
                let tile = MeanTile {
                    dim,
                    tokens,
                    means: means.as_ptr().add(4 * t),
                    queries: queries.as_ptr().add(row * dim),
                    scales: scales.as_ptr().add(row),
                    unit,
                    out: out.as_mut_ptr().add(row * out_stride + t),
                    out_stride,
                };
                match (n, groups) {
                    (6, 2) => tile.run::<6, 2>(),
                    (5, 2) => tile.run::<5, 2>(),
                    (4, 2) => tile.run::<4, 2>(),
                    (3, 2) => tile.run::<3, 2>(),
                    (2, 2) => tile.run::<2, 2>(),
                    (1, 2) => tile.run::<1, 2>(),
                    (6, _) => tile.run::<6, 1>(),
                    (5, _) => tile.run::<5, 1>(),
                    (4, _) => tile.run::<4, 1>(),
                    (3, _) => tile.run::<3, 1>(),
                    (2, _) => tile.run::<2, 1>(),
                    _ => tile.run::<1, 1>(),
                }
            }
            row += n;
        }
        t += 16 * groups;
    }
}

/// Some rows against some tokens.
struct MeanTile {
    dim: usize,
    tokens: usize,
    means: *const u8,
    queries: *const i16,
    scales: *const f32,
    unit: f32,
    out: *mut f32,
    out_stride: usize,
}

impl MeanTile {
    /// # Safety
    /// `R` rows of queries, scales and outputs and 16 `G` tokens must be there.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    #[inline]
    unsafe fn run<const R: usize, const G: usize>(&self) {
        // SAFETY: by contract.
        unsafe {
            let mut sums = [[_mm512_setzero_si512(); G]; R];
            for k in 0..self.dim / 2 {
                let at = self.means.add(4 * self.tokens * k);
                let mut means = [_mm512_setzero_si512(); G];
                for (g, means) in means.iter_mut().enumerate() {
                    *means = _mm512_loadu_epi8(at.add(64 * g).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let q = self.queries.add(r * self.dim + 2 * k).cast::<i32>().read_unaligned();
                    let q = _mm512_set1_epi32(q);
                    for (sum, means) in sums.iter_mut().zip(means) {
                        *sum = _mm512_dpwssd_epi32(*sum, means, q);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                let scale = _mm512_set1_ps(*self.scales.add(r) * self.unit);
                for (g, sum) in sums.iter().enumerate() {
                    let out = self.out.add(r * self.out_stride + 16 * g);
                    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(*sum), scale));
                }
            }
        }
    }
}

/// See [`super::rotate_to_bytes`].
///
/// # Safety
/// Queries must be whole rows, outputs as long, cosines and sines `dim / 2`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
pub(super) unsafe fn rotate_to_bytes(
    queries: &[f32],
    dim: usize,
    turn: (&[f32], &[f32]),
    bytes: &mut [u8],
    fine: &mut [i16],
) {
    let pairs = dim / 2;
    if !pairs.is_multiple_of(LANES) {
        return rotate_body(queries, dim, turn, bytes, fine);
    }
    for i in (0..pairs).step_by(LANES) {
        // SAFETY: both halves of a row have `pairs` channels, of which 16 from `i` on are taken.
        unsafe {
            let cos = _mm512_loadu_ps(turn.0.as_ptr().add(i));
            let sin = _mm512_loadu_ps(turn.1.as_ptr().add(i));
            for row in (0..queries.len()).step_by(dim) {
                let a = _mm512_loadu_ps(queries.as_ptr().add(row + i));
                let b = _mm512_loadu_ps(queries.as_ptr().add(row + i + pairs));
                // As the definition has it: products are rounded before they are added.
                let x = _mm512_sub_ps(_mm512_mul_ps(a, cos), _mm512_mul_ps(b, sin));
                let y = _mm512_add_ps(_mm512_mul_ps(b, cos), _mm512_mul_ps(a, sin));
                for (value, at) in [(x, row + i), (y, row + i + pairs)] {
                    let words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(value));
                    _mm256_storeu_epi16(fine.as_mut_ptr().add(at), words);
                    let rounded = _mm256_add_epi16(words, _mm256_set1_epi16(128));
                    let coarse = _mm256_cvtepi16_epi8(_mm256_srai_epi16::<8>(rounded));
                    let coarse = _mm_xor_si128(coarse, _mm_set1_epi8(-128));
                    _mm_storeu_epi8(bytes.as_mut_ptr().add(at).cast(), coarse);
                }
            }
        }
    }
}
