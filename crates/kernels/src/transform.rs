//! HOT PATH (no allocation, locks or logging). Blocks of rows times a square matrix, in bf16.
//!
//! What transform coding begins with: inputs and entries are rounded to bf16, sums are in f32. The
//! rounding leaves 3 parts in a million of the rows' energy as noise.

use half::bf16;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Coefficients in a register of sums.
const LANES: usize = 16;

/// A pair of channels in 16 coefficients.
type Lanes = [[bf16; 2]; LANES];

/// A matrix of bf16, for processors with products of them.
#[derive(Debug, Clone)]
pub struct Transform {
    width: usize,
    /// `[width / 16, width / 2, 16, 2]`: coefficients beside each other, channels in pairs.
    pairs: Vec<Lanes>,
}

impl Transform {
    /// `entry(coefficient, channel)` of a matrix of `width` × `width`. `None` if the processor has no
    /// products of bf16, or `width` is no multiple of 16.
    pub fn new(width: usize, entry: impl Fn(usize, usize) -> f32) -> Option<Self> {
        if !has_products() || !width.is_multiple_of(LANES) {
            return None;
        }
        let entry = &entry;
        let lanes = (0..width / LANES).flat_map(|l| (0..width / 2).map(move |k| (l, k)));
        let pairs = lanes.map(|(l, k)| {
            std::array::from_fn(|c| [0, 1].map(|e| bf16::from_f32(entry(LANES * l + c, 2 * k + e))))
        });
        Some(Self { width, pairs: pairs.collect() })
    }

    /// Bytes it takes.
    pub fn num_bytes(&self) -> usize {
        size_of_val(&*self.pairs)
    }

    /// `out[t] = matrix · (x[t] - means[t mod m])` for rows `[n, width]` of `x` and `out`, and `m` rows of
    /// means. `inputs`: scratch.
    ///
    /// # Panics
    /// If a slice is not whole rows, there are no means, or `x` and `out` differ in length.
    pub fn apply(&self, x: &[f32], means: &[f32], inputs: &mut Vec<bf16>, out: &mut [f32]) {
        let width = self.width;
        assert!(x.len() == out.len() && x.len().is_multiple_of(width), "x: {}", x.len());
        assert!(!means.is_empty() && means.len().is_multiple_of(width), "means: {}", means.len());
        inputs.resize(x.len(), bf16::ZERO);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: only made where the processor has what it takes.
        unsafe {
            x86::round(x, means, inputs);
            x86::multiply(&self.pairs, width, inputs, out);
        }
    }
}

/// Whether the processor has products of bf16.
fn has_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        crate::Isa::best() == crate::Isa::Avx512 && std::is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
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
        for width in [16, 48, 64, 192, 256] {
            let matrix = numbers(width * width, 3);
            let Some(transform) = Transform::new(width, |c, k| matrix[c * width + k]) else {
                return;
            };
            for rows in [1, 3, 8, 16, 33] {
                let (x, means) = (numbers(rows * width, 11), numbers(2 * width, 17));
                let (mut inputs, mut out) = (Vec::new(), vec![f32::NAN; x.len()]);
                transform.apply(&x, &means, &mut inputs, &mut out);
                for (t, c) in (0..rows).flat_map(|t| (0..width).map(move |c| (t, c))) {
                    let round = |x: f32| f64::from(bf16::from_f32(x).to_f32());
                    let term = |k: usize| {
                        round(x[t * width + k] - means[t % 2 * width + k])
                            * round(matrix[c * width + k])
                    };
                    let want: f64 = (0..width).map(term).sum();
                    let got = f64::from(out[t * width + c]);
                    assert!((got - want).abs() < 1e-4, "{width} [{t}, {c}]: {got}, {want}");
                }
                // Alone, a row gets the same.
                let last = (rows - 1) * width;
                let mut one = vec![0.0; width];
                let mean = &means[(rows - 1) % 2 * width..][..width];
                transform.apply(&x[last..], mean, &mut inputs, &mut one);
                assert_eq!(one, out[last..]);
            }
        }
    }
}
