//! Bits: between keys and values by a fixed share, inside each by reverse water-filling, where every next
//! bit goes where it takes away most error.

use kvasir_kernels::trellis::{DISTORTION, MAX_BITS, SEGMENT};

use crate::codec::Part;

/// Channels of a row for which keys give one segment's bit to values: a quarter of a bit a channel.
///
/// Keys have few strong directions and lose less at the same rate than values do. Measured on two models,
/// values with half a bit more than keys lose least at 2 and 3 bits a channel; the optimum is flat.
const CHANNELS_PER_MOVED_BIT: usize = 4 * SEGMENT;

/// Bits for the segments of one part of `width` channels, where keys and values together have twice
/// `budget`: nothing is moved that the other part cannot use.
pub(crate) fn part_budget(part: Part, width: usize, budget: usize) -> usize {
    let room = (width / SEGMENT * usize::from(MAX_BITS)).saturating_sub(budget);
    let moved = (width / CHANNELS_PER_MOVED_BIT).min(budget).min(room);
    match part {
        Part::Keys => budget - moved,
        Part::Values => budget + moved,
    }
}

/// Bits of every segment, `budget` in all, for segments of mean square `scale²`. Greedy, which is
/// optimal because the error of a segment is convex in its bits (tests). Ties go to the first.
/// O(budget · segments).
pub(crate) fn allocate(scales: &[f32], budget: usize) -> Vec<u8> {
    let mut bits = vec![0u8; scales.len()];
    for _ in 0..budget {
        let gain = |i: usize| {
            let b = usize::from(bits[i]);
            if bits[i] == MAX_BITS {
                return -1.0;
            }
            scales[i] * scales[i] * (DISTORTION[b] - DISTORTION[b + 1])
        };
        let best = (0..scales.len()).reduce(|a, b| if gain(b) > gain(a) { b } else { a });
        match best.filter(|i| bits[*i] < MAX_BITS) {
            Some(i) => bits[i] += 1,
            None => break,
        }
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(scales: &[f32], bits: &[u8]) -> f32 {
        scales.iter().zip(bits).map(|(s, b)| s * s * DISTORTION[usize::from(*b)]).sum()
    }

    #[test]
    fn no_bit_is_better_elsewhere() {
        let scales = [5.0, 3.0, 1.0, 0.4, 0.01];
        for budget in 1..20 {
            let bits = allocate(&scales, budget);
            assert_eq!(bits.iter().map(|b| usize::from(*b)).sum::<usize>(), budget);
            for from in 0..bits.len() {
                for to in 0..bits.len() {
                    if bits[from] == 0 || bits[to] == MAX_BITS || from == to {
                        continue;
                    }
                    let mut other = bits.clone();
                    other[from] -= 1;
                    other[to] += 1;
                    assert!(error(&scales, &other) >= error(&scales, &bits) * 0.999_99);
                }
            }
        }
    }

    #[test]
    fn what_keys_give_values_can_use() {
        for width in [16, 48, 64, 192, 256] {
            let most = width / SEGMENT * usize::from(MAX_BITS);
            for budget in 0..=most {
                let [keys, values] =
                    [Part::Keys, Part::Values].map(|part| part_budget(part, width, budget));
                assert_eq!(keys + values, 2 * budget, "width {width}");
                assert!(keys <= values && values <= most, "width {width}: {keys} {values}");
            }
        }
        // A quarter of a bit for each of 192 channels is that for 12 segments of 16.
        assert_eq!(part_budget(Part::Keys, 192, 23), 20);
    }

    #[test]
    fn bits_beyond_the_widest_code_are_left() {
        assert_eq!(allocate(&[1.0, 0.0], 100), [MAX_BITS, MAX_BITS]);
    }
}
