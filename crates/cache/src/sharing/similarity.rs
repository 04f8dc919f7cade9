//! Cosines between many long vectors: the only costly part of finding blocks to share.

use std::ops::Range;

use kvasir_kernels::gemm_nt;
use rayon::prelude::*;

/// Numbers of a vector multiplied at once. A register tile's operands (10 rows) then fit in L1.
const PANEL: usize = 512;
/// Left vectors of a tile: with [`PANEL`], 384 KiB of L2.
const LEFT_ROWS: usize = 192;
/// Right vectors of a task: with [`PANEL`], 256 KiB of L2.
const RIGHT_ROWS: usize = 128;

/// Euclidean length, summed in f64.
pub(super) fn norm(values: &[f32]) -> f32 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32
}

/// The direction of a vector, without a copy of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Direction<'a> {
    values: &'a [f32],
    /// Makes a unit vector of `values`; 0 if they have no direction.
    scale: f32,
}

impl<'a> Direction<'a> {
    /// The direction of any vector. Vectors of length zero, and those with NaN or infinity, have
    /// none: their cosine with everything is 0.
    pub(super) fn of(values: &'a [f32]) -> Self {
        let scale = 1.0 / norm(values);
        let usable = scale.is_finite() && scale > 0.0;
        Self { values, scale: if usable { scale } else { 0.0 } }
    }

    /// The direction of a vector that has length 1 already.
    pub(super) fn of_unit(values: &'a [f32]) -> Self {
        Self { values, scale: 1.0 }
    }

    /// Writes a range of the unit vector.
    fn write(&self, range: Range<usize>, out: &mut [f32]) {
        if self.scale == 0.0 {
            out.fill(0.0);
            return;
        }
        for (out, x) in out.iter_mut().zip(&self.values[range]) {
            *out = x * self.scale;
        }
    }

    /// Adds the unit vector to `sum`.
    pub(super) fn add_to(&self, sum: &mut [f32]) {
        if self.scale != 0.0 {
            for (sum, x) in sum.iter_mut().zip(self.values) {
                *sum += x * self.scale;
            }
        }
    }
}

/// The direction of the unweighted sum of directions, as a unit vector; zeros if they cancel.
pub(super) fn mean_direction<'a>(
    parts: impl IntoIterator<Item = Direction<'a>>,
    dim: usize,
) -> Vec<f32> {
    let mut sum = vec![0.0f32; dim];
    for part in parts {
        part.add_to(&mut sum);
    }
    let scale = 1.0 / norm(&sum);
    if scale.is_finite() {
        for x in &mut sum {
            *x *= scale;
        }
    }
    sum
}

fn panels(dim: usize) -> impl Iterator<Item = Range<usize>> {
    (0..dim).step_by(PANEL).map(move |start| start..(start + PANEL).min(dim))
}

/// Rounding may give 1 + 1e-7; a threshold of 1 must still match nothing. (Not `min`: it drops NaN.)
fn clamp(cosine: f32) -> f32 {
    if cosine > 1.0 { 1.0 } else { cosine }
}

/// Cosine of two directions of equal length, bit for bit what [`best_matches`] finds for the pair.
pub(super) fn cosine(a: Direction<'_>, b: Direction<'_>) -> f32 {
    let (mut x, mut y) = ([0.0f32; PANEL], [0.0f32; PANEL]);
    let mut sum = 0.0;
    for range in panels(a.values.len()) {
        let len = range.len();
        a.write(range.clone(), &mut x[..len]);
        b.write(range, &mut y[..len]);
        let mut part = [0.0];
        gemm_nt((1, 1, len), &x, len, &y, len, &mut part, 1);
        sum += part[0];
    }
    clamp(sum)
}

/// The left vector that a right one resembles most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Match {
    pub(super) left: usize,
    pub(super) cosine: f32,
}

/// For every right vector the best left one above the threshold (the first of equals), among those
/// that `may_match(left, right)` allows; and the number of allowed pairs above the threshold.
///
/// All vectors have one length. Cost 2 · left · right · length operations on the current rayon pool;
/// the result does not depend on its size.
pub(super) fn best_matches(
    left: &[Direction<'_>],
    right: &[Direction<'_>],
    threshold: f32,
    may_match: impl Fn(usize, usize) -> bool + Sync,
) -> (Vec<Option<Match>>, u64) {
    let dim = left.first().map_or(0, |d| d.values.len());
    let mut found = Vec::with_capacity(right.len());
    let mut pairs = 0;
    let parts: Vec<_> = right
        .par_chunks(RIGHT_ROWS)
        .enumerate()
        .map(|(chunk, right)| {
            let cosines = cosines(left, right, dim);
            let mut best: Vec<Option<Match>> = vec![None; right.len()];
            let mut pairs = 0;
            for (l, row) in cosines.chunks_exact(right.len()).enumerate() {
                for (r, cosine) in row.iter().map(|c| clamp(*c)).enumerate() {
                    if cosine > threshold && may_match(l, chunk * RIGHT_ROWS + r) {
                        pairs += 1;
                        if best[r].is_none_or(|b| cosine > b.cosine) {
                            best[r] = Some(Match { left: l, cosine });
                        }
                    }
                }
            }
            (best, pairs)
        })
        .collect();
    for (best, above) in parts {
        found.extend(best);
        pairs += above;
    }
    (found, pairs)
}

/// All dot products, `[left, right]`.
fn cosines(left: &[Direction<'_>], right: &[Direction<'_>], dim: usize) -> Vec<f32> {
    let columns = right.len();
    let mut sums = vec![0.0f32; left.len() * columns];
    let mut x = vec![0.0f32; LEFT_ROWS.min(left.len()) * PANEL];
    let mut y = vec![0.0f32; columns * PANEL];
    let mut part = vec![0.0f32; LEFT_ROWS.min(left.len()) * columns];
    for range in panels(dim) {
        let len = range.len();
        pack(right, range.clone(), &mut y);
        for (left, sums) in left.chunks(LEFT_ROWS).zip(sums.chunks_mut(LEFT_ROWS * columns)) {
            pack(left, range.clone(), &mut x);
            gemm_nt((left.len(), columns, len), &x, len, &y, len, &mut part, columns);
            for (sum, part) in sums.iter_mut().zip(&part) {
                *sum += part;
            }
        }
    }
    sums
}

fn pack(directions: &[Direction<'_>], range: Range<usize>, out: &mut [f32]) {
    for (direction, row) in directions.iter().zip(out.chunks_exact_mut(range.len())) {
        direction.write(range.clone(), row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::conformance::gaussian;

    #[test]
    fn best_matches_are_those_of_single_cosines() {
        let dim = 2 * PANEL + 37;
        let values = gaussian((LEFT_ROWS + 5 + RIGHT_ROWS + 3) * dim, 3);
        let all: Vec<Direction<'_>> = values.chunks_exact(dim).map(Direction::of).collect();
        let (left, right) = all.split_at(LEFT_ROWS + 5);
        let threshold = 0.05;
        let (found, pairs) = best_matches(left, right, threshold, |l, _| l != 2);
        let mut expected_pairs = 0;
        for (r, found) in right.iter().zip(found) {
            let mut best: Option<Match> = None;
            for (l, x) in left.iter().enumerate().filter(|(l, _)| *l != 2) {
                let exact: f64 = x.values.iter().zip(r.values).map(|(a, b)| f64::from(a * b)).sum();
                let exact = exact / f64::from(norm(x.values)) / f64::from(norm(r.values));
                let cosine = cosine(*x, *r);
                assert!((f64::from(cosine) - exact).abs() < 1e-5);
                if cosine > threshold {
                    expected_pairs += 1;
                    if best.is_none_or(|b| cosine > b.cosine) {
                        best = Some(Match { left: l, cosine });
                    }
                }
            }
            assert_eq!(found, best);
        }
        assert_eq!(pairs, expected_pairs);
        assert!(pairs > 100);
    }

    #[test]
    fn vectors_without_direction_match_nothing() {
        let dim = 40;
        let good = gaussian(dim, 1);
        for bad in [0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut broken = vec![0.0; dim];
            broken[3] = bad;
            let directions = [Direction::of(&broken), Direction::of(&good)];
            for d in directions {
                assert_eq!(cosine(directions[0], d), 0.0);
            }
            let (found, pairs) = best_matches(&directions, &directions[..1], 0.0, |_, _| true);
            assert_eq!((found[0], pairs), (None, 0));
            assert_eq!(mean_direction([directions[0]], dim), vec![0.0; dim]);
        }
    }

    #[test]
    fn nothing_is_above_a_cosine_of_one() {
        for seed in 0..20 {
            let x = gaussian(1000, seed);
            let d = Direction::of(&x);
            assert!(cosine(d, d) <= 1.0 && cosine(d, d) > 1.0 - 1e-6);
            assert_eq!(best_matches(&[d], &[d], 1.0, |_, _| true).1, 0);
        }
    }

    #[test]
    fn no_vectors_are_no_matches() {
        let x = [1.0];
        let d = Direction::of(&x);
        assert_eq!(best_matches(&[], &[d], 0.5, |_, _| true), (vec![None], 0));
        assert_eq!(best_matches(&[d], &[], 0.5, |_, _| true), (vec![], 0));
    }
}
