//! Which passages make up which prompt.

use crate::random::SplitMix64;

/// For each prompt the numbers of its passages: `passages` different ones of `0..total`, in order.
///
/// One [`SplitMix64`] serves all prompts, first to last, so that more prompts leave the first ones as they
/// are. A prompt is the first `passages` places of a Fisher–Yates shuffle of `0..total`: place `i` is
/// swapped with place `i + next() % (total - i)`.
pub(super) fn draw(seed: u64, prompts: usize, passages: usize, total: usize) -> Vec<Vec<usize>> {
    let mut random = SplitMix64::new(seed);
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
