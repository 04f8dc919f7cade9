//! Relative squared error of a block that is read from a shared representative.
//!
//! With its own norm kept, a block at cosine c to what is stored has error `2 − 2c`, whatever the
//! dimension; everything here is about c.

use crate::sharing::tree::Representation;

/// Error of a block that is read with its own norm from a vector at this cosine.
pub fn own_norm_error(cosine: f64) -> f64 {
    2.0 - 2.0 * cosine
}

/// Cosine of either block of a pair to their mean, if theirs is `pair`.
pub fn averaged_pair_cosine(pair: f64) -> f64 {
    (0.5 * (1.0 + pair)).max(0.0).sqrt()
}

/// Error of either block of an averaged pair: about `(1 − S) / 2`.
pub fn averaged_pair_error(pair: f64) -> f64 {
    own_norm_error(averaged_pair_cosine(pair))
}

/// Error of a block that is read from another one with its own norm: `2 − 2S`. The other has none.
pub fn redirect_error(pair: f64) -> f64 {
    own_norm_error(pair)
}

/// Error of a block that is read from another one as it is, `norm_ratio` times as long.
pub fn raw_redirect_error(pair: f64, norm_ratio: f64) -> f64 {
    1.0 + norm_ratio * norm_ratio - 2.0 * norm_ratio * pair
}

/// Cosines (of the left block, of each right one) to the mean of one left block and `rights` right
/// ones, each at cosine `pair` to the left one and `mutual` to each other.
pub fn star_cosines(rights: f64, pair: f64, mutual: f64) -> (f64, f64) {
    let squared = 1.0 + rights + 2.0 * rights * pair + rights * (rights - 1.0) * mutual;
    let norm = squared.max(f64::MIN_POSITIVE).sqrt();
    ((1.0 + rights * pair) / norm, (pair + 1.0 + (rights - 1.0) * mutual) / norm)
}

/// Cosine of two blocks that resemble a third one at cosine `pair` and nothing else, where unrelated
/// blocks have cosine `unrelated`: `pair²` for `unrelated` 0.
pub fn mutual_cosine(pair: f64, unrelated: f64) -> f64 {
    chained_cosine(pair, pair, unrelated)
}

/// Cosine of two blocks at cosines `a` and `b` to a third one, and otherwise unrelated: a common
/// direction is shared by all, the rest multiplies.
pub fn chained_cosine(a: f64, b: f64, unrelated: f64) -> f64 {
    if unrelated >= 1.0 {
        return 1.0;
    }
    unrelated + (a - unrelated) * (b - unrelated) / (1.0 - unrelated)
}

/// The angle (radians) that no block is farther from its representative than, after so many levels of
/// merges in pairs: half of arccos τ each. The final check of [`crate::sharing::tree::fuse`] guarantees
/// arccos τ whatever the depth.
pub fn guaranteed_angle(levels: usize, threshold: f64) -> f64 {
    levels as f64 * 0.5 * threshold.clamp(-1.0, 1.0).acos()
}

/// The cosine to expect, rather than to guarantee, after so many merges in pairs at this cosine, when
/// each partner is unrelated to the earlier ones. Where it falls below the threshold, the final check
/// sends most blocks of such depth back.
pub fn expected_cosine(merges: usize, pair: f64) -> f64 {
    (0..merges).map(|_| averaged_pair_cosine(pair)).product()
}

/// Error per block to first order in the fraction f of blocks that were absorbed, whose matches have
/// mean cosine E: `f (1 − E)` for means (two blocks with half of it each), `2 f (1 − E)` for redirects
/// (one block). Matches on top of matches are not in it; [`super::Model::predict`] has them.
pub fn first_order(
    absorbed_fraction: f64,
    mean_cosine: f64,
    representation: Representation,
) -> f64 {
    absorbed_fraction
        * match representation {
            Representation::Mean => 2.0 * averaged_pair_error(mean_cosine),
            Representation::Redirect => redirect_error(mean_cosine),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    fn scaled(a: &[f64], by: f64) -> Vec<f64> {
        a.iter().map(|x| x * by).collect()
    }

    /// Relative squared error of reading `y` for `x`.
    fn error(x: &[f64], y: &[f64]) -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / dot(x, x)
    }

    /// `of`, made as long as `like`.
    fn with_norm(of: &[f64], like: &[f64]) -> Vec<f64> {
        scaled(of, (dot(like, like) / dot(of, of)).sqrt())
    }

    #[test]
    fn pairs_are_as_explicit_vectors() {
        for pair in [-0.4f64, 0.0, 0.6, 0.7, 0.9, 0.99, 1.0] {
            let x = vec![1.5, 0.0];
            let y = scaled(&[pair, (1.0 - pair * pair).sqrt()], 0.8);
            let mean: Vec<f64> = (0..2).map(|i| x[i] / 1.5 + y[i] / 0.8).collect();
            for v in [&x, &y] {
                let found = error(v, &with_norm(&mean, v));
                assert!((found - averaged_pair_error(pair)).abs() < 1e-12);
            }
            assert!((error(&y, &with_norm(&x, &y)) - redirect_error(pair)).abs() < 1e-12);
            assert!((error(&y, &x) - raw_redirect_error(pair, 1.5 / 0.8)).abs() < 1e-12);
        }
    }

    #[test]
    fn errors_at_the_threshold_are_those_of_the_table() {
        let table = [
            (0.60, 0.211, 0.80),
            (0.70, 0.156, 0.60),
            (0.75, 0.129, 0.50),
            (0.80, 0.103, 0.40),
            (0.90, 0.051, 0.20),
            (0.95, 0.025, 0.10),
            (0.99, 0.005, 0.02),
        ];
        for (pair, averaged, redirected) in table {
            assert!((averaged_pair_error(pair) - averaged).abs() < 6e-4);
            assert!((redirect_error(pair) - redirected).abs() < 1e-12);
        }
    }

    #[test]
    fn stars_are_as_explicit_vectors() {
        for (rights, pair, mutual) in [(1, 0.7, 0.0), (2, 0.7, 0.49), (3, 0.9, 0.75), (6, 0.3, 0.1)]
        {
            // Rows of a Cholesky factor of the Gram matrix are vectors with these cosines.
            let n = rights + 1;
            let gram = |i: usize, j: usize| match (i, j) {
                _ if i == j => 1.0,
                (0, _) | (_, 0) => pair,
                _ => mutual,
            };
            let mut rows = vec![vec![0.0f64; n]; n];
            for i in 0..n {
                for j in 0..=i {
                    let rest = gram(i, j) - dot(&rows[i][..j], &rows[j][..j]);
                    rows[i][j] = if i == j { rest.sqrt() } else { rest / rows[j][j] };
                }
            }
            let sum: Vec<f64> = (0..n).map(|c| rows.iter().map(|r| r[c]).sum()).collect();
            let length = dot(&sum, &sum).sqrt();
            let (left, right) = star_cosines(rights as f64, pair, mutual);
            assert!((dot(&rows[0], &sum) / length - left).abs() < 1e-12);
            for row in &rows[1..] {
                assert!((dot(row, &sum) / length - right).abs() < 1e-12);
            }
        }
        let (one, _) = star_cosines(1.0, 0.7, 0.2);
        assert!((one - averaged_pair_cosine(0.7)).abs() < 1e-12);
        assert_eq!(star_cosines(0.0, 0.7, 0.5).0, 1.0);
        // Of a large star averaging gains nothing over reading the left block.
        let (_, right) = star_cosines(1e6, 0.7, mutual_cosine(0.7, 0.0));
        assert!((right - 0.7).abs() < 1e-3);
    }

    #[test]
    fn a_common_direction_is_shared_and_the_rest_multiplies() {
        // x = √μ g + √(1 − μ) u with orthogonal g: cosines of the u's are (S − μ) / (1 − μ).
        let common = 0.3f64;
        let with_common = |u: [f64; 3]| {
            let mut x = scaled(&u, (1.0 - common).sqrt());
            x.push(common.sqrt());
            x
        };
        // Both lean towards the third, each with a direction of its own.
        let third = with_common([1.0, 0.0, 0.0]);
        let a = with_common([0.8, 0.6, 0.0]);
        let b = with_common([0.5, 0.0, 0.75f64.sqrt()]);
        let expected = chained_cosine(dot(&a, &third), dot(&b, &third), common);
        assert!((dot(&a, &b) - expected).abs() < 1e-12);
        assert!((mutual_cosine(0.7, 0.0) - 0.49).abs() < 1e-12);
        assert!((mutual_cosine(0.3, 0.3) - 0.3).abs() < 1e-12);
    }

    #[test]
    fn the_guarantee_falls_below_the_threshold_at_three_levels() {
        for threshold in [0.7f64, 0.9] {
            assert!(guaranteed_angle(2, threshold).cos() > threshold - 1e-12);
            assert!(guaranteed_angle(3, threshold).cos() < threshold);
        }
        assert_eq!(expected_cosine(0, 0.7), 1.0);
        assert!((expected_cosine(2, 0.7) - 0.85).abs() < 1e-12);
        assert!(expected_cosine(4, 0.7) > 0.7 && expected_cosine(5, 0.7) < 0.7);
    }
}
