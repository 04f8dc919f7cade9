//! Which passages make up which prompt.

/// SplitMix64 (Steele, Lea, Flood 2014), its state starting at the seed.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }
}

/// For each prompt the numbers of its passages: `passages` different ones of `0..total`, in order.
///
/// One [`SplitMix64`] serves all prompts, first to last, so that more prompts leave the first ones as they
/// are. A prompt is the first `passages` places of a Fisher–Yates shuffle of `0..total`: place `i` is
/// swapped with place `i + next() % (total - i)`.
pub(super) fn draw(seed: u64, prompts: usize, passages: usize, total: usize) -> Vec<Vec<usize>> {
    let mut random = SplitMix64(seed);
    let mut prompt = || {
        let mut order: Vec<usize> = (0..total).collect();
        for i in 0..passages.min(total) {
            let other = i + (random.next() % (total - i) as u64) as usize;
            order.swap(i, other);
        }
        order.truncate(passages);
        order
    };
    (0..prompts).map(|_| prompt()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The first outputs of the reference implementation.
        let mut random = SplitMix64(0);
        assert_eq!(random.next(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(random.next(), 0x6E78_9E6A_A1B9_65F4);
        assert_eq!(random.next(), 0x06C4_5D18_8009_454F);
    }

    #[test]
    fn a_seed_gives_the_same_prompts_and_more_prompts_keep_the_first() {
        let eight = draw(0, 8, 4, 8);
        assert_eq!(eight, draw(0, 8, 4, 8));
        assert_eq!(eight, draw(0, 20, 4, 8)[..8]);
        assert_ne!(eight, draw(1, 8, 4, 8));
        // Measured figures rest on these.
        assert_eq!(eight[..2], [[7, 2, 3, 0], [3, 0, 7, 1]]);
    }

    #[test]
    fn passages_of_a_prompt_differ_and_every_order_comes() {
        let mut counts = [[0; 5]; 3];
        for prompt in draw(7, 5000, 3, 5) {
            let mut sorted = prompt.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), 3, "{prompt:?}");
            prompt.iter().enumerate().for_each(|(place, p)| counts[place][*p] += 1);
        }
        for count in counts.iter().flatten() {
            assert!((900..1100).contains(count), "{counts:?}");
        }
        let all = draw(3, 1, 6, 6);
        assert_eq!(all[0].len(), 6);
    }
}
