//! Least squares with coefficients that are not negative, robust against single values that are far off.

/// Rounds of weights.
const ROUNDS: usize = 6;

/// Sweeps over the coefficients in a round.
const SWEEPS: usize = 2000;

/// Relative errors beyond this count linearly and not by their square (Huber): a step during which the machine did something
/// else is not the recipe's.
const HUBER: f64 = 0.15;

/// Coefficients that make the sums of `rows` come near `targets`, relative to these. `penalties` are further rows, whose target is 0, in
/// the same relative scale.
///
/// Coordinate descent on the normal equations. O(rounds · (rows · n² + sweeps · n²)).
pub(super) fn solve(rows: &[Vec<f64>], targets: &[f64], penalties: &[Vec<f64>]) -> Vec<f64> {
    let n = rows.first().map_or(0, Vec::len);
    let mut x = vec![0.0; n];
    for round in 0..ROUNDS {
        let mut q = vec![0.0; n * n];
        let mut b = vec![0.0; n];
        let mut add = |row: &[f64], target: f64, weight: f64| {
            for i in 0..n {
                b[i] += weight * row[i] * target;
                for j in 0..n {
                    q[i * n + j] += weight * row[i] * row[j];
                }
            }
        };
        for (row, target) in rows.iter().zip(targets).filter(|(_, target)| **target > 0.0) {
            let found: f64 = row.iter().zip(&x).map(|(a, x)| a * x).sum();
            let error = ((found - target) / target).abs();
            let trust = if round == 0 { 1.0 } else { (HUBER / error.max(1e-12)).min(1.0) };
            add(row, *target, trust / (target * target));
        }
        for penalty in penalties {
            add(penalty, 0.0, 1.0);
        }
        for _ in 0..SWEEPS {
            let mut change = 0.0f64;
            for i in 0..n {
                let diagonal = q[i * n + i];
                if diagonal <= 0.0 {
                    continue;
                }
                let product: f64 = q[i * n..(i + 1) * n].iter().zip(&x).map(|(q, x)| q * x).sum();
                let next = (x[i] + (b[i] - product) / diagonal).max(0.0);
                change = change.max((next - x[i]).abs() * diagonal.sqrt());
                x[i] = next;
            }
            if change < 1e-10 {
                break;
            }
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_sums_are_found_and_a_stray_value_does_not_matter() {
        let rows: Vec<Vec<f64>> =
            (0..40).map(|i| vec![1.0, f64::from(i), f64::from(i * i % 7)]).collect();
        let mut targets: Vec<f64> = rows.iter().map(|r| 2.0 + 0.5 * r[1] + 0.25 * r[2]).collect();
        targets[11] *= 8.0;
        let found = solve(&rows, &targets, &[]);
        for (found, expected) in found.iter().zip([2.0, 0.5, 0.25]) {
            assert!((found - expected).abs() < 0.02, "{found} {expected}");
        }
    }

    #[test]
    fn nothing_is_negative() {
        let rows: Vec<Vec<f64>> = (1..20).map(|i| vec![1.0, f64::from(i)]).collect();
        let targets: Vec<f64> = (1..20).map(|i| 30.0 - f64::from(i)).collect();
        let found = solve(&rows, &targets, &[]);
        assert_eq!(found[1], 0.0);
        assert!(found[0] > 10.0);
        assert!(solve(&[], &[], &[]).is_empty());
    }
}
