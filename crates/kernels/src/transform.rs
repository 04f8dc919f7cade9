//! HOT PATH (no allocation, locks or logging). Blocks of rows times a square matrix, in bf16.
//!
//! What transform coding begins with: inputs and entries are rounded to bf16, sums are in f32. The
//! rounding leaves 3 parts in a million of the rows' energy as noise.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
mod x86;

/// Coefficients in a register of sums.
const LANES: usize = 16;

/// A pair of channels in 16 coefficients.
type Lanes = [[bf16; 2]; LANES];

/// A matrix of bf16, and rows that meet it.
#[derive(Debug, Default)]
pub struct Transform {
    width: usize,
    /// `[width / 16, width / 2]`.
    pairs: Vec<Lanes>,
    inputs: Vec<bf16>,
}

impl Transform {
    /// Whether the processor has products of bf16. Nothing here is to be called where it has not.
    pub fn is_available() -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            crate::Isa::best().has(crate::Set::Avx512Bf16)
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            false
        }
    }

    /// Takes a matrix, and forgets the one before. `columns`: `[channels, coefficients]`, as many of both;
    /// each channel is multiplied with its weight.
    ///
    /// # Panics
    /// If the shapes disagree, the width is no multiple of 16, or [`Self::is_available`] says no.
    pub fn load(&mut self, columns: &[f16], weights: &[f32]) {
        let width = weights.len();
        assert!(Self::is_available(), "no products of bf16");
        assert!(width.is_multiple_of(LANES), "{width} channels");
        assert!(columns.len() == width * width, "columns: {}", columns.len());
        self.width = width;
        self.pairs.resize(width / LANES * (width / 2), Lanes::default());
        #[cfg(target_arch = "x86_64")]
        // SAFETY: available.
        unsafe {
            x86::load(columns, weights, &mut self.pairs);
        }
    }

    /// `out[t] = matrix · (x[t] - means[t mod m])` for rows `[n, width]` of `x` and `out`, and `m` rows of
    /// means. `inputs`: scratch.
    ///
    /// # Panics
    /// If nothing was loaded, a slice is not whole rows, there are no means, or `x` and `out` differ in length.
    pub fn apply(&mut self, x: &[f32], means: &[f32], out: &mut [f32]) {
        let Self { width, pairs, inputs } = self;
        let width = *width;
        assert!(width > 0, "no matrix");
        assert!(x.len() == out.len() && x.len().is_multiple_of(width), "x: {}", x.len());
        assert!(!means.is_empty() && means.len().is_multiple_of(width), "means: {}", means.len());
        inputs.resize(x.len(), bf16::ZERO);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: only loaded where it is available.
        unsafe {
            x86::round(x, means, inputs);
            x86::multiply(pairs, width, inputs, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 7919) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    #[test]
    fn products_are_those_of_rounded_numbers() {
        if !Transform::is_available() {
            return;
        }
        for width in [16, 48, 64, 192, 256] {
            let columns = numbers(width * width, 3).into_iter().map(f16::from_f32);
            let columns: Vec<f16> = columns.collect();
            let weights = numbers(width, 5);
            let mut transform = Transform::default();
            transform.load(&columns, &weights);
            for rows in [1, 3, 8, 16, 33] {
                let (x, means) = (numbers(rows * width, 11), numbers(2 * width, 17));
                let mut out = vec![f32::NAN; x.len()];
                transform.apply(&x, &means, &mut out);
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
                // Alone, a row gets the same.
                let last = (rows - 1) * width;
                let mut one = vec![0.0; width];
                let mean = &means[(rows - 1) % 2 * width..][..width];
                transform.apply(&x[last..], mean, &mut one);
                assert_eq!(one, out[last..]);
            }
        }
    }
}
