//! Random numbers for sampling: a pure function of (seed, sequence, position), so that a preempted
//! sequence draws the same numbers when it goes on, and a batch cannot change what its members draw.

/// SplitMix64's output function (Steele, Lea, Flood 2014): enough to turn a counter into noise.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A number in [0, 1) for one token of one sequence.
pub(crate) fn uniform(seed: u64, sequence: usize, position: usize) -> f64 {
    let bits = mix(mix(mix(seed).wrapping_add(sequence as u64)).wrapping_add(position as u64));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// A seed for the `count`-th request that brings none.
pub(crate) fn derive(seed: u64, count: u64) -> u64 {
    mix(mix(seed).wrapping_add(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_uniform_and_streams_differ() {
        let n = 10_000;
        let mean: f64 = (0..n).map(|i| uniform(1, 0, i)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert_ne!(uniform(1, 0, 0), uniform(2, 0, 0));
        assert_ne!(uniform(1, 0, 0), uniform(1, 1, 0));
        assert_ne!(uniform(1, 0, 1), uniform(1, 1, 0));
        assert_eq!(uniform(7, 3, 9), uniform(7, 3, 9));
    }
}
