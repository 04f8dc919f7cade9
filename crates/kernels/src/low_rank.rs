//! HOT PATH (decode over latents). Rows of a head from latents, and turned: in f16, which is how attention reads few
//! queries' blocks fastest, or in f32.

use half::f16;

use crate::isa::{Isa, Set};

/// Channels of a vector.
const LANES: usize = 16;

/// Rows that pass together: 8 rows × 2 vectors of sums.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 8;

/// From latents to the channels of a head, in the order that products read it.
#[derive(Debug, Clone, Default)]
pub struct BackMatrix {
    rank: usize,
    dim: usize,
    /// `[dim / 2 / lanes, rank, 2, lanes]`: some channels of the first half, and those that RoPE pairs them with.
    tiles: Vec<f32>,
    lanes: usize,
}

impl BackMatrix {
    /// `rows`: `[rank, dim]`, `dim` even.
    pub fn new(rows: &[f32], dim: usize) -> Self {
        let (rank, half) = (rows.len() / dim, dim / 2);
        let lanes = if half.is_multiple_of(LANES) { LANES } else { half };
        let mut tiles = Vec::with_capacity(rows.len());
        for first in (0..half).step_by(lanes.max(1)) {
            for row in rows.chunks_exact(dim) {
                tiles.extend_from_slice(&row[first..first + lanes]);
                tiles.extend_from_slice(&row[half + first..half + first + lanes]);
            }
        }
        Self { rank, dim, tiles, lanes }
    }

    /// Latents of the head.
    pub fn rank(&self) -> usize {
        self.rank
    }
}

/// Latents of some rows, and what becomes of them.
#[derive(Debug, Clone, Copy)]
pub struct FromLatents<'a> {
    /// `[tokens, stride]`, of which the first of a row count, as many as the matrix has.
    pub latents: &'a [f32],
    /// From a row to the next.
    pub stride: usize,
    /// The head's.
    pub back: &'a BackMatrix,
    /// Cosines and sines of every row's rotation, `[tokens, dim / 2]` each.
    pub turn: Option<(&'a [f32], &'a [f32])>,
}

/// What rows are made of.
pub trait RowElement: Copy {
    /// Rounds.
    fn from_f32(x: f32) -> Self;

    /// Rounds and stores 16 of them.
    ///
    /// # Safety
    /// The processor has AVX-512, and `to` has room.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store(x: std::arch::x86_64::__m512, to: *mut Self);
}

impl RowElement for f32 {
    fn from_f32(x: f32) -> Self {
        x
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store(x: std::arch::x86_64::__m512, to: *mut Self) {
        // SAFETY: by contract.
        unsafe { std::arch::x86_64::_mm512_storeu_ps(to, x) }
    }
}

impl RowElement for f16 {
    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store(x: std::arch::x86_64::__m512, to: *mut Self) {
        use std::arch::x86_64::{_MM_FROUND_TO_NEAREST_INT, _mm256_storeu_si256, _mm512_cvtps_ph};
        // SAFETY: by contract.
        unsafe {
            let x = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm256_storeu_si256(to.cast(), x);
        }
    }
}

/// `out[t] = R_t (backᵀ · latents[t])`, a row every `pitch` elements. A sum is one chain of multiply-adds over the
/// latents in order.
///
/// # Panics
/// If a slice is shorter than its shape says.
pub fn rows_from_latents<T: RowElement>(
    job: &FromLatents<'_>,
    tokens: usize,
    out: &mut [T],
    pitch: usize,
) {
    rows_from_latents_on(Isa::best(), job, tokens, out, pitch);
}

fn rows_from_latents_on<T: RowElement>(
    isa: Isa,
    job: &FromLatents<'_>,
    tokens: usize,
    out: &mut [T],
    pitch: usize,
) {
    let FromLatents { latents, stride, back, turn } = *job;
    let BackMatrix { rank, dim, tiles, lanes } = back;
    let (rank, dim, lanes) = (*rank, *dim, *lanes);
    if tokens == 0 || dim == 0 {
        return;
    }
    assert!(rank <= stride && latents.len() >= (tokens - 1) * stride + rank, "{tokens} tokens");
    assert!(pitch >= dim && out.len() >= (tokens - 1) * pitch + dim, "{tokens} rows of {dim}");
    if let Some((cos, sin)) = turn {
        let needed = tokens * (dim / 2);
        assert!(cos.len() >= needed && sin.len() >= needed, "rotations of {tokens} tokens");
    }
    let half = dim / 2;
    for (column, tile) in tiles.chunks_exact(2 * lanes * rank.max(1)).enumerate() {
        let j = column * lanes;
        #[cfg(target_arch = "x86_64")]
        if isa.has(Set::Avx512) && lanes == LANES {
            // A tile stays in L1 while all rows pass.
            let place = x86::Place { j, half, pitch };
            for first in (0..tokens).step_by(ROWS) {
                let n = ROWS.min(tokens - first);
                // SAFETY: the processor has AVX-512; lengths were checked.
                unsafe {
                    match n {
                        ROWS => x86::rows::<ROWS, T>(job, tile, &place, first, out),
                        _ => (first..first + n)
                            .for_each(|t| x86::rows::<1, T>(job, tile, &place, t, out)),
                    }
                }
            }
            continue;
        }
        for t in 0..tokens {
            let z = &latents[t * stride..t * stride + rank];
            for c in 0..lanes {
                let sum = |at: usize| {
                    let rows = tile.chunks_exact(2 * lanes);
                    z.iter().zip(rows).fold(0.0f32, |sum, (z, row)| z.mul_add(row[at], sum))
                };
                let (a, b) = (sum(c), sum(lanes + c));
                let (a, b) = match turn {
                    Some((cos, sin)) => {
                        let (cos, sin) = (cos[t * half + j + c], sin[t * half + j + c]);
                        (a.mul_add(cos, -(b * sin)), b.mul_add(cos, a * sin))
                    }
                    None => (a, b),
                };
                out[t * pitch + j + c] = T::from_f32(a);
                out[t * pitch + half + j + c] = T::from_f32(b);
            }
        }
    }
    let _ = isa;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{FromLatents, LANES, RowElement};

    /// Where a tile's channels go.
    pub(super) struct Place {
        /// The first of them.
        pub(super) j: usize,
        /// From a channel to the one that it is paired with.
        pub(super) half: usize,
        /// From a row to the next.
        pub(super) pitch: usize,
    }

    /// One tile's channels of rows `first .. first + N`.
    ///
    /// # Safety
    /// The processor must have AVX-512; `tile` is of 16 lanes; all slices have `first + N` rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn rows<const N: usize, T: RowElement>(
        job: &FromLatents<'_>,
        tile: &[f32],
        place: &Place,
        first: usize,
        out: &mut [T],
    ) {
        let Place { j, half, pitch } = *place;
        let latents: [*const f32; N] =
            std::array::from_fn(|t| job.latents[(first + t) * job.stride..].as_ptr());
        let mut sums = [[_mm512_setzero_ps(); 2]; N];
        // SAFETY: rows and columns exist by contract.
        unsafe {
            for (r, row) in tile.chunks_exact(2 * LANES).enumerate() {
                let low = _mm512_loadu_ps(row.as_ptr());
                let high = _mm512_loadu_ps(row.as_ptr().add(LANES));
                for (z, sums) in latents.iter().zip(&mut sums) {
                    let z = _mm512_set1_ps(*z.add(r));
                    sums[0] = _mm512_fmadd_ps(z, low, sums[0]);
                    sums[1] = _mm512_fmadd_ps(z, high, sums[1]);
                }
            }
            let out = out.as_mut_ptr();
            for (t, [a, b]) in sums.into_iter().enumerate() {
                let (a, b) = match job.turn {
                    Some((cos, sin)) => {
                        let at = (first + t) * half + j;
                        let cos = _mm512_loadu_ps(cos.as_ptr().add(at));
                        let sin = _mm512_loadu_ps(sin.as_ptr().add(at));
                        (
                            _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)),
                            _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)),
                        )
                    }
                    None => (a, b),
                };
                let row = out.add((first + t) * pitch + j);
                T::store(a, row);
                T::store(b, row.add(half));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize, by: f32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + 1.0) * by).sin()).collect()
    }

    #[test]
    fn every_way_gives_the_same_bits_and_they_are_the_definition() {
        for (tokens, dim, rank, stride) in
            [(32, 64, 96, 96), (5, 32, 7, 20), (8, 24, 3, 3), (1, 96, 1, 2)]
        {
            let (latents, rows) = (wave(tokens * stride, 0.7), wave(rank * dim, 0.31));
            let back = &BackMatrix::new(&rows, dim);
            let (cos, sin) = (wave(tokens * dim / 2, 0.2), wave(tokens * dim / 2, 0.9));
            for turn in [None, Some((&cos[..], &sin[..]))] {
                let job = FromLatents { latents: &latents, stride, back, turn };
                let pitch = dim + 3;
                let all: Vec<(Vec<f32>, Vec<f16>)> = Isa::available()
                    .into_iter()
                    .map(|isa| {
                        let mut out = vec![9.0f32; tokens * pitch];
                        rows_from_latents_on(isa, &job, tokens, &mut out, pitch);
                        let mut halves = vec![f16::ZERO; tokens * dim];
                        rows_from_latents_on(isa, &job, tokens, &mut halves, dim);
                        (out, halves)
                    })
                    .collect();
                assert!(all.iter().all(|out| out == &all[0]), "{tokens} x {dim}");
                let (out, halves) = &all[0];
                for (i, half) in halves.iter().enumerate() {
                    let (t, c) = (i / dim, i % dim);
                    let found = out[t * pitch + c];
                    assert_eq!(*half, f16::from_f32(found));
                    let sum = |c: usize| -> f64 {
                        let z = (0..rank).map(|r| latents[t * stride + r] * rows[r * dim + c]);
                        z.map(f64::from).sum()
                    };
                    let (j, pairs) = (c % (dim / 2), dim / 2);
                    let expected = match turn {
                        Some(_) => {
                            let (a, b) = (sum(j), sum(j + pairs));
                            let at = t * pairs + j;
                            let (cos, sin) = (f64::from(cos[at]), f64::from(sin[at]));
                            if c < pairs { a * cos - b * sin } else { b * cos + a * sin }
                        }
                        None => sum(c),
                    };
                    let off = (f64::from(found) - expected).abs();
                    assert!(off < 1e-4 * (1.0 + expected.abs()), "{i}: {found} {expected}");
                }
                assert!((0..tokens).all(|t| out[t * pitch + dim..(t + 1) * pitch] == [9.0; 3]));
            }
        }
    }
}
