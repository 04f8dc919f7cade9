//! Linear models with a little shrinking: of numbers (ridge regression) and of chances (logistic regression by Newton's method).

use kvasir_engine::guard::{Linear, Weight, chance};

/// Shrinks weights of standardised features, as so many samples at 0 would.
const RIDGE: f64 = 1.0;

/// Steps of Newton's method.
const STEPS: usize = 30;

/// What a model is fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Number,
    /// 0 or 1.
    Chance,
}

/// Fits `rows` of features to `targets`; what is no number counts as its feature's mean. O(steps · rows · features²).
pub(super) fn fit(rows: &[Vec<f64>], targets: &[f64], target: Target) -> Linear {
    let n = rows.first().map_or(0, Vec::len);
    let mean = |i: usize, of: &dyn Fn(f64) -> f64| {
        let known = rows.iter().map(|row| row[i]).filter(|x| x.is_finite());
        let (count, sum) = known.fold((0.0, 0.0), |(n, sum), x| (n + 1.0, sum + of(x)));
        sum / f64::max(count, 1.0)
    };
    let means: Vec<f64> = (0..n).map(|i| mean(i, &|x| x)).collect();
    let spread = |i: usize| mean(i, &|x| (x - means[i]).powi(2)).sqrt();
    // What is the same everywhere says nothing.
    let scales: Vec<f64> =
        (0..n).map(spread).map(|s| if s > 1e-9 { 1.0 / s } else { 0.0 }).collect();
    let standard = |row: &Vec<f64>| -> Vec<f64> {
        let all = row.iter().zip(means.iter().zip(&scales));
        let of = |(x, (mean, scale)): (&f64, (&f64, &f64))| {
            if x.is_finite() { (x - mean) * scale } else { 0.0 }
        };
        all.map(of).chain([1.0]).collect()
    };
    let standard: Vec<Vec<f64>> = rows.iter().map(standard).collect();
    let width = n + 1;
    let mut weights = vec![0.0; width];
    let steps = if target == Target::Chance { STEPS } else { 1 };
    for _ in 0..steps {
        let (mut hessian, mut gradient) = (vec![0.0; width * width], vec![0.0; width]);
        for (row, y) in standard.iter().zip(targets) {
            let sum: f64 = row.iter().zip(&weights).map(|(x, w)| x * w).sum();
            let (found, weight) = match target {
                Target::Number => (sum, 1.0),
                Target::Chance => (chance(sum), (chance(sum) * (1.0 - chance(sum))).max(1e-6)),
            };
            for i in 0..width {
                gradient[i] += row[i] * (y - found);
                for j in 0..width {
                    hessian[i * width + j] += weight * row[i] * row[j];
                }
            }
        }
        for i in 0..width {
            // The constant is hardly shrunk.
            let ridge = if i < n { RIDGE } else { 1e-6 };
            hessian[i * width + i] += ridge;
            gradient[i] -= ridge * weights[i];
        }
        let step = solve(hessian, gradient);
        // For numbers one step is exact, however long; for chances a long one may be too long.
        let most = if target == Target::Chance { 4.0 } else { f64::INFINITY };
        weights.iter_mut().zip(&step).for_each(|(w, s)| *w += s.clamp(-most, most));
        if step.iter().all(|s| s.abs() < 1e-9) {
            break;
        }
    }
    let bound = |i: usize, of: fn(f64, f64) -> f64| {
        let known = rows.iter().map(|row| row[i]).filter(|x| x.is_finite());
        known.reduce(of).unwrap_or(0.0)
    };
    let features = (0..n).map(|i| Weight {
        name: String::new(),
        low: bound(i, f64::min),
        high: bound(i, f64::max),
        mean: means[i],
        scale: scales[i],
        weight: weights[i],
    });
    Linear { features: features.collect(), constant: weights[n] }
}

/// The number, or the chance.
pub(super) fn predict(model: &Linear, row: &[f64], target: Target) -> f64 {
    match target {
        Target::Number => model.sum(row),
        Target::Chance => model.chance(row),
    }
}

/// Gauss and Jordan with pivots; what is singular gets 0.
fn solve(mut a: Vec<f64>, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for column in 0..n {
        let largest =
            |i: &usize, j: &usize| a[i * n + column].abs().total_cmp(&a[j * n + column].abs());
        let Some(pivot) = (column..n).max_by(largest) else { break };
        if a[pivot * n + column].abs() < 1e-12 {
            continue;
        }
        for j in 0..n {
            a.swap(column * n + j, pivot * n + j);
        }
        b.swap(column, pivot);
        for row in (0..n).filter(|row| *row != column) {
            let factor = a[row * n + column] / a[column * n + column];
            for j in column..n {
                a[row * n + j] -= factor * a[column * n + j];
            }
            b[row] -= factor * b[column];
        }
    }
    let of = |i: usize| if a[i * n + i].abs() < 1e-12 { 0.0 } else { b[i] / a[i * n + i] };
    (0..n).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    #[test]
    fn lines_are_found() {
        let rows: Vec<Vec<f64>> =
            (0..200).map(|i| vec![f64::from(i), f64::from(i * i % 13), 7.0]).collect();
        let targets: Vec<f64> = rows.iter().map(|row| 3.0 + 0.5 * row[0] - 2.0 * row[1]).collect();
        let model = fit(&rows, &targets, Target::Number);
        for (row, target) in rows.iter().zip(&targets) {
            assert!(
                (predict(&model, row, Target::Number) - target).abs() < 0.6,
                "{} {target}",
                predict(&model, row, Target::Number)
            );
        }
    }

    #[test]
    fn chances_are_found() {
        let mut random = SplitMix64::new(5);
        let rows: Vec<Vec<f64>> =
            (0..4000).map(|_| vec![4.0 * random.unit() - 2.0, random.unit()]).collect();
        let law = |row: &[f64]| 1.0 / (1.0 + (1.0 - 1.5 * row[0]).exp());
        let targets: Vec<f64> =
            rows.iter().map(|row| f64::from(u8::from(random.unit() < law(row)))).collect();
        let model = fit(&rows, &targets, Target::Chance);
        for x in [-1.5, 0.0, 1.0, 2.0] {
            let row = [x, 0.5];
            assert!(
                (predict(&model, &row, Target::Chance) - law(&row)).abs() < 0.05,
                "{x}: {}",
                predict(&model, &row, Target::Chance)
            );
        }
    }

    #[test]
    fn what_is_not_known_counts_as_usual() {
        let row = |i: u32| {
            vec![f64::from(i), if i.is_multiple_of(3) { f64::NAN } else { f64::from(i % 5) }]
        };
        let rows: Vec<Vec<f64>> = (0..300).map(row).collect();
        let targets: Vec<f64> = (0..300).map(|i| f64::from(i) + 4.0 * f64::from(i % 5)).collect();
        let model = fit(&rows, &targets, Target::Number);
        assert!(model.features.iter().all(|f| f.weight.is_finite() && f.scale > 0.0));
        let [known, usual] = [vec![7.0, 2.0], vec![7.0, f64::NAN]].map(|row| model.sum(&row));
        assert!((known - usual).abs() < 1.0, "2 is the mean: {known} {usual}");
    }

    #[test]
    fn what_is_separable_stays_finite() {
        let rows: Vec<Vec<f64>> = (0..20).map(|i| vec![f64::from(i)]).collect();
        let targets: Vec<f64> = (0..20).map(|i| f64::from(u8::from(i > 9))).collect();
        let model = fit(&rows, &targets, Target::Chance);
        let (low, high) =
            (predict(&model, &[0.0], Target::Chance), predict(&model, &[19.0], Target::Chance));
        assert!(low < 0.1 && high > 0.9 && low > 0.0 && high < 1.0);
        let none = fit(&[], &[], Target::Chance);
        assert_eq!(predict(&none, &[], Target::Chance), 0.5);
    }
}
