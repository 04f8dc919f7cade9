//! HOT PATH (no allocation, locks or logging). Blocks of rows times a square matrix, rounded to bf16.
//!
//! What transform coding begins with: inputs and entries are rounded to bf16, sums are in f32. The
//! rounding leaves 3 parts in a million of the rows' energy as noise. Products of two bf16 are exact in f32, so that
//! every set gives the same bits, with multiply-adds in one instruction or in two: codes do not depend on the processor.

// Register blocks are indexed by (row, column); iterators would hide that.
#![allow(clippy::needless_range_loop)]

use half::f16;

use crate::isa::Isa;
use crate::lines::Lines;
use crate::simd::tile::{
    self, Matrix, Pairs, Product, Single, accumulate, by_kind, has_bf16, tiles,
};
use crate::simd::{LANES, Lanes, Simd};

/// A matrix of bf16, and rows that meet it.
#[derive(Debug, Default)]
pub struct Transform {
    width: usize,
    /// `[width / 16, width / depth, 16]` of words.
    matrix: Lines,
    /// `[rows, width / depth]` of words.
    inputs: Lines,
}

impl Transform {
    /// Takes a matrix, and forgets the one before. `columns`: `[channels, coefficients]`, as many of both;
    /// each channel is multiplied with its weight.
    ///
    /// # Panics
    /// If the shapes disagree, or the width is no multiple of 16.
    pub fn load(&mut self, columns: &[f16], weights: &[f32]) {
        self.load_on(Isa::best(), columns, weights);
    }

    fn load_on(&mut self, isa: Isa, columns: &[f16], weights: &[f32]) {
        let width = weights.len();
        assert!(width.is_multiple_of(LANES), "{width} channels");
        assert!(columns.len() == width * width, "columns: {}", columns.len());
        self.width = width;
        self.matrix.resize(width * width);
        load(isa, has_bf16(isa), columns, weights, self.matrix.as_mut_slice());
    }

    /// `out[t] = matrix · (x[t] - means[t mod m])` for rows `[n, width]` of `x` and `out`, and `m` rows of
    /// means.
    ///
    /// # Panics
    /// If nothing was loaded, a slice is not whole rows, there are no means, or `x` and `out` differ in length.
    pub fn apply(&mut self, x: &[f32], means: &[f32], out: &mut [f32]) {
        self.apply_on(Isa::best(), x, means, out);
    }

    fn apply_on(&mut self, isa: Isa, x: &[f32], means: &[f32], out: &mut [f32]) {
        let width = self.width;
        assert!(width > 0, "no matrix");
        assert!(x.len() == out.len() && x.len().is_multiple_of(width), "x: {}", x.len());
        assert!(!means.is_empty() && means.len().is_multiple_of(width), "means: {}", means.len());
        self.inputs.resize(x.len());
        let inputs = self.inputs.as_mut_slice();
        multiply(isa, has_bf16(isa), width, self.matrix.as_slice(), (x, means), inputs, out);
    }
}

/// Numbers rounded to bf16, as words that products take; of two neighbours the second is taken first.
trait Rounded<S: Lanes>: Product<S> {
    /// 16 numbers of a row, from element `i` on.
    ///
    /// # Safety
    /// The row has them.
    unsafe fn put_inputs(self, s: S, row: *mut f32, i: usize, v: S::F);

    /// 16 columns of two neighbours.
    ///
    /// # Safety
    /// Their words are writable.
    unsafe fn put_columns(self, s: S, to: *mut f32, first: S::F, second: S::F);
}

impl<S: Lanes> Rounded<S> for Pairs {
    #[inline(always)]
    unsafe fn put_inputs(self, s: S, row: *mut f32, i: usize, v: S::F) {
        // SAFETY: by contract.
        unsafe { self.put(s, row, i, v, LANES) }
    }

    #[inline(always)]
    unsafe fn put_columns(self, s: S, to: *mut f32, first: S::F, second: S::F) {
        // SAFETY: by contract.
        unsafe { s.istore(to.cast(), s.join(first, second)) }
    }
}

#[inline(always)]
fn rounded<S: Simd>(s: S, v: S::F) -> S::F {
    s.from_bits(s.shl(s.round_bf16(v), 16))
}

impl<S: Lanes> Rounded<S> for Single {
    #[inline(always)]
    unsafe fn put_inputs(self, s: S, row: *mut f32, i: usize, v: S::F) {
        let mut all = [0.0f32; LANES];
        // SAFETY: whole vectors, by contract.
        unsafe {
            s.store(all.as_mut_ptr(), rounded(s, v));
            for l in 0..LANES {
                *row.add(i + l) = all[l ^ 1];
            }
        }
    }

    #[inline(always)]
    unsafe fn put_columns(self, s: S, to: *mut f32, first: S::F, second: S::F) {
        // SAFETY: by contract.
        unsafe {
            s.store(to, rounded(s, second));
            s.store(to.add(LANES), rounded(s, first));
        }
    }
}

by_kind! {
    /// See [`Transform::load`].
    fn load(columns: &[f16], weights: &[f32], out: &mut [f32]) = load_body;
}

#[inline(always)]
fn load_body<S: Lanes>(
    s: S,
    kind: impl Rounded<S>,
    columns: &[f16],
    weights: &[f32],
    out: &mut [f32],
) {
    let width = weights.len();
    let (words, pair) = (width / kind.depth(), 2 / kind.depth());
    assert!(columns.len() >= width * width && out.len() >= width * words);
    for (k, weights) in weights.as_chunks::<2>().0.iter().enumerate() {
        for j in (0..width).step_by(LANES) {
            // SAFETY: 16 coefficients of channels 2 k and 2 k + 1, and their words.
            unsafe {
                let from = columns.as_ptr().add(2 * k * width + j);
                let first = s.mul(s.load_f16(from.cast()), s.splat(weights[0]));
                let second = s.mul(s.load_f16(from.add(width).cast()), s.splat(weights[1]));
                let to = out.as_mut_ptr().add(j * words + k * pair * LANES);
                kind.put_columns(s, to, first, second);
            }
        }
    }
}

by_kind! {
    /// See [`Transform::apply`], which checked the lengths.
    fn multiply(width: usize, matrix: &[f32], x: (&[f32], &[f32]), inputs: &mut [f32], out: &mut [f32]) = multiply_body;
}

#[inline(always)]
fn multiply_body<S: Lanes>(
    s: S,
    kind: impl Rounded<S>,
    width: usize,
    matrix: &[f32],
    (x, means): (&[f32], &[f32]),
    inputs: &mut [f32],
    out: &mut [f32],
) {
    let (words, n) = (width / kind.depth(), x.len() / width);
    assert!(matrix.len() >= width * words && inputs.len() >= n * words && out.len() == x.len());
    let inputs = inputs.as_mut_ptr();
    for (t, (row, mean)) in x.chunks_exact(width).zip(means.chunks_exact(width).cycle()).enumerate()
    {
        for i in (0..width).step_by(LANES) {
            // SAFETY: whole vectors of whole rows.
            unsafe {
                let x = s.sub(s.load(row.as_ptr().add(i)), s.load(mean.as_ptr().add(i)));
                kind.put_inputs(s, inputs.add(t * words), i, x);
            }
        }
    }
    // SAFETY: vectors of columns, and rows `first .. first + R` of inputs and of `out`.
    tiles!(S, n, width / LANES, |R, first, NV, v| unsafe {
        let from = matrix.as_ptr().add(v * LANES * words);
        let matrix = Matrix { from, step: LANES, pitch: LANES * words };
        let x = (inputs.add(first * words).cast_const(), words, 1);
        let sums = [[s.zero(); NV]; R];
        let sums = accumulate((s, kind), matrix, (0, words), x, &mut (), sums);
        tile::store(s, sums, out.as_mut_ptr().add(first * width + v * LANES), width);
    });
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 7919) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    #[test]
    fn products_are_those_of_rounded_numbers_with_the_same_bits_on_all_sets() {
        for width in [16, 48, 64, 192, 256] {
            let columns = numbers(width * width, 3).into_iter().map(f16::from_f32);
            let columns: Vec<f16> = columns.collect();
            let weights = numbers(width, 5);
            for rows in [1, 3, 8, 16, 33] {
                let (x, means) = (numbers(rows * width, 11), numbers(2 * width, 17));
                let on = |isa: Isa, x: &[f32], means: &[f32]| {
                    let mut transform = Transform::default();
                    transform.load_on(isa, &columns, &weights);
                    let mut out = vec![f32::NAN; x.len()];
                    transform.apply_on(isa, x, means, &mut out);
                    out
                };
                let out = on(Isa::BASELINE, &x, &means);
                for (t, c) in (0..rows).flat_map(|t| (0..width).map(move |c| (t, c))) {
                    let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
                    let term = |k: usize| {
                        round(x[t * width + k] - means[t % 2 * width + k])
                            * round(columns[k * width + c].to_f32() * weights[k])
                    };
                    let want: f64 = (0..width).map(term).sum();
                    let got = f64::from(out[t * width + c]);
                    assert!((got - want).abs() < 1e-4, "{width} [{t}, {c}]: {got}, {want}");
                }
                let last = (rows - 1) * width;
                let mean = &means[(rows - 1) % 2 * width..][..width];
                for isa in Isa::available() {
                    assert_eq!(on(isa, &x, &means), out, "{isa} {rows} rows of {width}");
                    // Alone, a row gets the same.
                    assert_eq!(on(isa, &x[last..], mean), out[last..], "{isa} {width}");
                }
            }
        }
    }
}
