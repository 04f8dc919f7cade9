//! Random numbers that are the same for a seed on every machine.

/// SplitMix64 (Steele, Lea, Flood 2014), its state starting at the seed.
pub(crate) struct SplitMix64(u64);

impl SplitMix64 {
    /// The generator whose state is `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Uniform in (0, 1]: its logarithm is finite.
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

/// FNV-1a over bytes, its start changed by a seed: seeds of things that have names.
pub(crate) fn hash(seed: u64, bytes: impl IntoIterator<Item = u8>) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
    bytes.into_iter().fold(0xCBF2_9CE4_8422_2325 ^ seed, step)
}

/// The same tokens for the same seed on every machine.
pub(crate) fn random_tokens(n: usize, vocab_size: usize, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab_size.max(1) as u64) as u32
    };
    std::iter::repeat_with(next).take(n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The first outputs of the reference implementation.
        let mut random = SplitMix64::new(0);
        assert_eq!(random.next(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(random.next(), 0x6E78_9E6A_A1B9_65F4);
        assert_eq!(random.next(), 0x06C4_5D18_8009_454F);
    }

    #[test]
    fn hashes_are_fnv_1a() {
        // Of the reference's test vectors.
        assert_eq!(hash(0, []), 0xCBF2_9CE4_8422_2325);
        assert_eq!(hash(0, *b"foobar"), 0x8594_4171_F739_67E8);
    }

    #[test]
    fn units_are_never_zero() {
        let mut random = SplitMix64::new(5);
        let units: Vec<f64> = std::iter::repeat_with(|| random.unit()).take(1000).collect();
        assert!(units.iter().all(|u| *u > 0.0 && *u <= 1.0));
        let mean = units.iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.03, "{mean}");
    }

    #[test]
    fn a_seed_gives_the_same_tokens() {
        assert_eq!(random_tokens(50, 100, 7), random_tokens(50, 100, 7));
        assert_ne!(random_tokens(50, 100, 7), random_tokens(50, 100, 8));
        assert!(random_tokens(500, 100, 7).iter().all(|t| *t < 100));
        assert_eq!(random_tokens(2, 0, 7), [0, 0]);
    }
}
