//! HOT PATH (decode over latents). Rows of a head from latents, and turned: in f16, which is how attention reads few
//! queries' blocks fastest, or in f32.

use half::f16;

use crate::attention::turned;
use crate::isa::Isa;
use crate::simd::tile::{Matrix, Single, accumulate, by_rows};
use crate::simd::{LANES, Lanes, compiled};

/// From latents to the channels of a head, in the order that products read it.
#[derive(Debug, Clone, Default)]
pub struct BackMatrix {
    rank: usize,
    dim: usize,
    /// `[dim / 2 / 16, rank, 2, 16]`: some channels of the first half, and those that RoPE pairs them with. Zeros
    /// follow the last ones.
    tiles: Vec<f32>,
}

impl BackMatrix {
    /// `rows`: `[rank, dim]`, `dim` even.
    pub fn new(rows: &[f32], dim: usize) -> Self {
        let (rank, half) = (rows.len() / dim, dim / 2);
        let mut tiles = Vec::with_capacity(2 * rank * half.next_multiple_of(LANES));
        for first in (0..half).step_by(LANES) {
            let last = half.min(first + LANES);
            for (row, half) in rows.chunks_exact(dim).flat_map(|row| [(row, 0), (row, half)]) {
                tiles.extend_from_slice(&row[half + first..half + last]);
                tiles.resize(tiles.len().next_multiple_of(LANES), 0.0);
            }
        }
        Self { rank, dim, tiles }
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

/// What rows are made of: f32 or f16.
pub trait RowElement: sealed::Element {}

impl RowElement for f32 {}
impl RowElement for f16 {}

mod sealed {
    /// Only what is f32 or f16.
    pub trait Element: Copy {
        const IS_HALF: bool;
    }

    impl Element for f32 {
        const IS_HALF: bool = false;
    }

    impl Element for half::f16 {
        const IS_HALF: bool = true;
    }
}

/// Rounds the first `n` of 16 numbers and stores them.
///
/// # Safety
/// `to` has room.
#[inline(always)]
unsafe fn put<S: Lanes, T: RowElement>(s: S, v: S::F, to: *mut T, n: usize) {
    let mut all = [0u16; LANES];
    // SAFETY: by contract, and a whole vector in between; elements are what they say.
    unsafe {
        match (T::IS_HALF, n) {
            (false, _) => s.store_first(to.cast(), v, n),
            (true, LANES) => s.store_f16(to.cast(), v),
            (true, _) => {
                s.store_f16(all.as_mut_ptr(), v);
                to.cast::<u16>().copy_from_nonoverlapping(all.as_ptr(), n);
            }
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
    let &BackMatrix { rank, dim, .. } = back;
    if tokens == 0 || dim == 0 {
        return;
    }
    assert!(rank <= stride && latents.len() >= (tokens - 1) * stride + rank, "{tokens} tokens");
    assert!(pitch >= dim && out.len() >= (tokens - 1) * pitch + dim, "{tokens} rows of {dim}");
    if let Some((cos, sin)) = turn {
        let needed = tokens * (dim / 2);
        assert!(cos.len() >= needed && sin.len() >= needed, "rotations of {tokens} tokens");
    }
    rows(isa, job, tokens, out, pitch);
}

compiled! {
    fn rows[T: RowElement][T](job: &FromLatents<'_>, tokens: usize, out: &mut [T], pitch: usize) = rows_body
        for [Avx512, Avx2, Sse2];
}

/// See [`rows_from_latents`], which checked the lengths.
#[inline(always)]
fn rows_body<S: Lanes, T: RowElement>(
    s: S,
    job: &FromLatents<'_>,
    tokens: usize,
    out: &mut [T],
    pitch: usize,
) {
    let FromLatents { latents, stride, back, turn } = *job;
    let (rank, half) = (back.rank, back.dim / 2);
    let out = out.as_mut_ptr();
    for j in (0..half).step_by(LANES) {
        let n = LANES.min(half - j);
        let from = back.tiles[2 * rank * j..][..2 * rank * LANES].as_ptr();
        let tile = Matrix { from, step: 2 * LANES, pitch: LANES };
        // A tile stays in L1 while all rows pass.
        by_rows!(S, 2, tokens, [12, 8, 4, 3, 2, 1], |R, first| {
            // SAFETY: rows `first .. first + R` exist, of them all latents, and `n` channels from `j` on in both halves.
            unsafe {
                let x = (latents.as_ptr().add(first * stride), stride, 1);
                let sums = [[s.zero(); 2]; R];
                let sums = accumulate((s, Single), tile, (0, rank), x, &mut (), sums);
                for (r, mut pair) in sums.into_iter().enumerate() {
                    if let Some((cos, sin)) = turn {
                        let at = (first + r) * half + j;
                        let angle = [
                            s.load_first(cos.as_ptr().add(at), n),
                            s.load_first(sin.as_ptr().add(at), n),
                        ];
                        pair = turned(s, pair, angle);
                    }
                    let row = out.add((first + r) * pitch + j);
                    put(s, pair[0], row, n);
                    put(s, pair[1], row.add(half), n);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Set;

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
                let fused = all.iter().zip(Isa::available()).filter(|(_, isa)| isa.has(Set::Avx2));
                assert!(fused.into_iter().all(|(out, _)| out == &all[0]), "{tokens} x {dim}");
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
