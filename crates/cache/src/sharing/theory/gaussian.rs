//! The normal distribution far out in its tail, where thresholds lie.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// `exp(x²) · erfc(x)` for x ≥ 0, to about 1e-13 of itself; it does not underflow.
fn scaled_erfc(x: f64) -> f64 {
    if x < 2.0 {
        // erf(x) = 2/√π · exp(−x²) · Σ 2ⁿ x²ⁿ⁺¹ / (2n+1)!!, all terms positive.
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term > 1e-17 * sum {
            n += 1.0;
            term *= 2.0 * x * x / (2.0 * n + 1.0);
            sum += term;
        }
        return (x * x).exp() - 2.0 / PI.sqrt() * sum;
    }
    // Continued fraction x + (1/2)/(x + (2/2)/(x + (3/2)/(x + …))), from the inside out.
    let fraction = (1..=80).rev().fold(x, |f, k| x + 0.5 * f64::from(k) / f);
    1.0 / (PI.sqrt() * fraction)
}

/// Density φ(z) of the standard normal distribution.
pub fn density(z: f64) -> f64 {
    (-0.5 * z * z).exp() / (2.0 * PI).sqrt()
}

/// Q(z): the probability that a standard normal variable exceeds `z`. Underflows to 0 beyond z = 38.
pub fn upper_tail(z: f64) -> f64 {
    if z < 0.0 {
        return 1.0 - upper_tail(-z);
    }
    0.5 * scaled_erfc(z * FRAC_1_SQRT_2) * (-0.5 * z * z).exp()
}

/// φ(z) ÷ Q(z): by how much a variable that exceeds `z` does so is about 1 ÷ this. Finite for every z.
pub fn hazard(z: f64) -> f64 {
    if z < 0.0 {
        return density(z) / upper_tail(z);
    }
    (2.0 / PI).sqrt() / scaled_erfc(z * FRAC_1_SQRT_2)
}

/// The `z` with Q(z) = `p`; ±∞ at 0 and 1, NaN outside.
pub fn upper_tail_inverse(p: f64) -> f64 {
    if p > 0.5 {
        return -upper_tail_inverse(1.0 - p);
    }
    if p <= 0.0 || p.is_nan() {
        return if p == 0.0 { f64::INFINITY } else { f64::NAN };
    }
    // Newton's method on ln Q, whose slope is −hazard; it is nearly a parabola, so a few steps do.
    let mut z = (-2.0 * p.ln()).sqrt();
    for _ in 0..50 {
        let ln_tail = (0.5 * scaled_erfc(z * FRAC_1_SQRT_2)).ln() - 0.5 * z * z;
        let step = (ln_tail - p.ln()) / hazard(z);
        z = (z + step).max(0.0);
        if step.abs() < 1e-14 * z.max(1.0) {
            break;
        }
    }
    z
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_has_the_known_values() {
        // Q(z) = erfc(z / √2) / 2.
        let known = [
            (0.0, 0.5),
            (0.5, 0.308_537_538_725_986_9),
            (1.0, 0.158_655_253_931_457_05),
            (2.0, 0.022_750_131_948_179_21),
            (2.8, 0.002_555_130_330_427_931),
            (2.9, 0.001_865_813_300_384_038),
            (3.0, 0.001_349_898_031_630_095),
            (5.0, 2.866_515_718_791_939e-7),
            (10.0, 7.619_853_024_160_53e-24),
            (30.0, 4.906_713_927_148_19e-198),
        ];
        for (z, q) in known {
            assert!((upper_tail(z) / q - 1.0).abs() < 1e-12, "Q({z}) = {}", upper_tail(z));
            assert!((upper_tail(-z) - (1.0 - q)).abs() < 1e-15);
        }
        assert_eq!(upper_tail(f64::INFINITY), 0.0);
    }

    #[test]
    fn inverse_and_hazard_agree_with_the_tail() {
        for p in [1e-300, 1e-30, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.9999] {
            let z = upper_tail_inverse(p);
            assert!((upper_tail(z) / p - 1.0).abs() < 1e-11, "{p}: {z}");
        }
        for z in [-6.0, -1.0, 0.0, 1.0, 2.8, 2.9, 20.0] {
            assert!((hazard(z) * upper_tail(z) / density(z) - 1.0).abs() < 1e-12);
        }
        // z + 1/z − 2/z³ far out, where Q itself is 0.
        assert!((hazard(90.0) - (90.0 + 1.0 / 90.0 - 2.0 / 90f64.powi(3))).abs() < 1e-7);
        assert_eq!(upper_tail_inverse(0.0), f64::INFINITY);
        assert_eq!(upper_tail_inverse(1.0), f64::NEG_INFINITY);
        assert!(upper_tail_inverse(-0.1).is_nan() && upper_tail_inverse(1.1).is_nan());
    }
}
