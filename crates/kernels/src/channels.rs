//! HOT PATH (decode over keys with pruned channels). Rows of the channels that were kept, back to rows of all.

use half::f16;

use crate::isa::{Isa, Set};

/// Channels that a word of a mask stands for, and that are moved together.
const CHANNELS: usize = 32;

/// `out[t, c]` is the next element of row `t` if bit `c` of the mask is set, else 0. `kept`: `[tokens, n]`, n being the bits
/// that are set; `mask`: 32 channels a word, lowest bit first; `out`: `[tokens, dim]`, its length says how many tokens.
///
/// # Panics
/// If a slice is shorter than its shape says, or the mask has bits beyond `dim`.
pub fn expand_channels(kept: &[f16], mask: &[u32], dim: usize, out: &mut [f16]) {
    expand_channels_on(Isa::best(), kept, mask, dim, out);
}

fn expand_channels_on(isa: Isa, kept: &[f16], mask: &[u32], dim: usize, out: &mut [f16]) {
    let n: usize = mask.iter().map(|word| word.count_ones() as usize).sum();
    let tokens = out.len() / dim;
    assert!(kept.len() >= tokens * n, "{} elements are no {tokens} rows of {n}", kept.len());
    assert!(mask.len() == dim.div_ceil(CHANNELS), "{} words for {dim} channels", mask.len());
    let beyond = mask.last().is_some_and(|last| {
        let used = dim - (mask.len() - 1) * CHANNELS;
        used < CHANNELS && last >> used != 0
    });
    assert!(!beyond, "bits beyond channel {dim}");
    #[cfg(target_arch = "x86_64")]
    if dim.is_multiple_of(CHANNELS) && isa.has(Set::Avx512Icl) {
        // SAFETY: the processor can, and lengths were checked.
        return unsafe { x86::expand(kept, mask, n, out) };
    }
    let _ = isa;
    for (row, kept) in out.chunks_exact_mut(dim).zip(kept.chunks_exact(n.max(1))) {
        row.fill(f16::ZERO);
        let mut from = kept.iter();
        for (word, row) in mask.iter().zip(row.chunks_mut(CHANNELS)) {
            let mut left = *word;
            while left != 0 {
                if let Some(x) = from.next() {
                    row[left.trailing_zeros() as usize] = *x;
                }
                left &= left - 1;
            }
        }
    }
    if n == 0 {
        out.fill(f16::ZERO);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::CHANNELS;

    /// # Safety
    /// The processor must have AVX-512 with VBMI2; `out` is whole rows of `mask.len()` words of channels, and `kept` as
    /// many rows of `n`, the bits that are set.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
    pub(super) unsafe fn expand(kept: &[f16], mask: &[u32], n: usize, out: &mut [f16]) {
        let rows = out.chunks_exact_mut(mask.len() * CHANNELS);
        for (t, row) in rows.enumerate() {
            let mut at = t * n;
            for (word, out) in mask.iter().zip(row.chunks_exact_mut(CHANNELS)) {
                let count = word.count_ones();
                let first = ((1u64 << count) - 1) as u32;
                // SAFETY: only the `count` elements are read that belong to this word; 32 are written.
                unsafe {
                    let x = _mm512_maskz_loadu_epi16(first, kept.as_ptr().add(at).cast());
                    let x = _mm512_maskz_expand_epi16(*word, x);
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), x);
                }
                at += count as usize;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_puts_channels_back_where_they_were() {
        for dim in [16usize, 24, 64, 96, 256] {
            for seed in 0..8u32 {
                let mask: Vec<u32> = (0..u32::try_from(dim.div_ceil(CHANNELS)).unwrap())
                    .map(|word| {
                        let bits = match seed {
                            0 => 0,
                            1 => u32::MAX,
                            _ => (seed * 2_654_435_761).rotate_left(word * 7 + seed),
                        };
                        let used = dim - word as usize * CHANNELS;
                        if used < CHANNELS { bits & ((1 << used) - 1) } else { bits }
                    })
                    .collect();
                let n: usize = mask.iter().map(|w| w.count_ones() as usize).sum();
                let kept: Vec<f16> = (0..5 * n).map(|i| f16::from_f32(i as f32 + 1.0)).collect();
                for isa in Isa::available() {
                    let mut out = vec![f16::NAN; 5 * dim];
                    expand_channels_on(isa, &kept, &mask, dim, &mut out);
                    let mut next = kept.iter();
                    for (i, x) in out.iter().enumerate() {
                        let c = i % dim;
                        let expected = match mask[c / CHANNELS] >> (c % CHANNELS) & 1 {
                            1 => *next.next().unwrap(),
                            _ => f16::ZERO,
                        };
                        assert_eq!(*x, expected, "{isa:?}, {dim} channels, seed {seed}, {i}");
                    }
                    assert!(next.next().is_none());
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "bits beyond channel 24")]
    fn masks_do_not_reach_beyond_a_row() {
        expand_channels(&[f16::ONE; 64], &[1 << 24], 24, &mut [f16::ZERO; 24]);
    }
}
