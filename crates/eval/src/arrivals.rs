//! When the requests of a load come.

use std::time::Duration;

use crate::random::SplitMix64;

/// When each of `count` requests comes, from the first one's arrival: a Poisson process of `rate` requests
/// a second. An infinite rate is all at once.
pub fn poisson(count: usize, rate: f64, seed: u64) -> Vec<Duration> {
    // Another stream than what prompts are drawn from.
    let mut random = SplitMix64::new(seed ^ 0x6172_7269_7661_6C73);
    let mut at = 0.0;
    let mut next = || {
        let now = at;
        at += -random.unit().ln() / rate;
        // Not a number, or beyond what a duration holds, for rates that make no sense.
        Duration::try_from_secs_f64(now).unwrap_or(Duration::MAX)
    };
    (0..count).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_a_poisson_process() {
        let times = poisson(4001, 50.0, 1);
        assert_eq!(times[0], Duration::ZERO);
        let gaps: Vec<f64> = times.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / 4000.0;
        assert!((mean - 0.02).abs() < 0.001, "{mean}");
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / 4000.0;
        assert!((variance.sqrt() - mean).abs() < 0.002, "{variance}");
    }

    #[test]
    fn a_seed_gives_the_same_times() {
        assert_eq!(poisson(10, 2.0, 3), poisson(10, 2.0, 3));
        assert_eq!(poisson(10, 2.0, 3), poisson(20, 2.0, 3)[..10]);
        assert_ne!(poisson(10, 2.0, 3), poisson(10, 2.0, 4));
        assert_eq!(poisson(3, f64::INFINITY, 3), [Duration::ZERO; 3]);
        assert_eq!(poisson(3, 0.0, 3)[1], Duration::MAX);
    }
}
