//! Bits by reverse water-filling: every next bit goes where it takes away most error.

use kvasir_kernels::trellis::{DISTORTION, MAX_BITS};

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
    fn bits_beyond_the_widest_code_are_left() {
        assert_eq!(allocate(&[1.0, 0.0], 100), [MAX_BITS, MAX_BITS]);
    }
}
