//! Picking the best of scores.

/// The positions of the `count` highest scores, ascending. Of equal scores the later position wins: newer
/// tokens matter more. O(n).
pub(crate) fn top(scores: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let count = count.min(order.len());
    if count < order.len() && count > 0 {
        order.select_nth_unstable_by(count - 1, |a, b| {
            let (x, y) = (scores[*a as usize], scores[*b as usize]);
            y.total_cmp(&x).then(b.cmp(a))
        });
    }
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Means over `kernel` neighbours (odd), zeros beyond the ends counted, as `avg_pool1d` with padding does.
pub(crate) fn pool(scores: &[f32], kernel: usize) -> Vec<f32> {
    let half = kernel / 2;
    (0..scores.len())
        .map(|i| {
            let near = &scores[i.saturating_sub(half)..(i + half + 1).min(scores.len())];
            near.iter().sum::<f32>() / kernel as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_in_order_of_position() {
        assert_eq!(top(&[1.0, 5.0, 3.0, 4.0], 2), [1, 3]);
        assert_eq!(top(&[1.0, 1.0, 1.0], 2), [1, 2]);
        assert_eq!(top(&[2.0, f32::INFINITY, 0.0], 5), [0, 1, 2]);
        assert!(top(&[1.0], 0).is_empty() && top(&[], 3).is_empty());
    }

    #[test]
    fn pooling_counts_what_is_beyond_the_ends() {
        assert_eq!(pool(&[3.0, 3.0, 3.0, 3.0], 3), [2.0, 3.0, 3.0, 2.0]);
        assert_eq!(pool(&[1.0, 2.0], 1), [1.0, 2.0]);
    }
}
