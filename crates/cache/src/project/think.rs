//! ThinK (arXiv 2407.21018): of a prompt's keys, only the channels are stored that its last queries use.
//!
//! `score(i) = mean over the last 32 queries of q_i² · mean over tokens of k_i²`, both after RoPE; every KV head keeps the
//! channels with the highest scores. Keys of the prompt, but for its newest 32 tokens and what does not fill a block with
//! them, are stored with those channels only, and read as if the others were 0. Values, and tokens that are generated, stay
//! whole.
//!
//! Differences from the released code: keys are not repeated for query heads, a KV head chooses once, by the mean over its
//! query heads, as kvpress does (which then writes zeros, and frees nothing). The number is the share of channels that
//! *stays*, as everywhere in recipes: the paper's λ = 0.4 is `think:0.6`.
//!
//! Channels go one by one, not in RoPE pairs: kept keys are stored turned by their own position, so a pair is never turned
//! again. Jointly coded keys are, and all prompts share their statistics: there whole pairs go, which ones is chosen once, by
//! the same score over the corpus that the statistics were measured on, of every block, and what is left out reads as its
//! mean ([`Think::statistics`]).

use kvasir_kernels::trellis::SEGMENT;

use crate::attention::BatchSlice;
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::select::{Budget, Options, top};
use crate::stats::{PartStatistics, basis};

/// Newest tokens whose queries score channels, and whose keys stay whole.
pub(crate) const RECENT: usize = 32;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Think {
    share: Budget,
}

impl Think {
    pub(crate) const NAME: &str = "think";
    pub(crate) const USAGE: &str = "think:SHARE";
    /// The paper's: two fifths of the channels go.
    pub const USUAL: Self = Self { share: Budget::SIX_TENTHS };

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let share = Budget::parse(&mut options)?;
        options.done(Self::USAGE)?;
        Ok(Self { share })
    }

    /// Channels that stay of `dim`: ⌊λ · dim⌋ go.
    pub(crate) fn kept(self, dim: usize) -> usize {
        self.share.of_rounded_up(dim)
    }

    /// Statistics of keys of heads of `dim` channels that leave some RoPE pairs of each out: those whose channels have the
    /// smallest `mean of q² · mean of k²` over the corpus, which a key's weight and energy say. What is left out has next
    /// to no energy, so no bits are spent on it, and reads as its mean. O(width³).
    pub(crate) fn statistics(self, part: &PartStatistics, dim: usize) -> PartStatistics {
        let (width, half) = (part.mean.len(), dim / 2);
        let rows: Vec<f64> = part.basis.iter().map(|x| x.to_f64()).collect();
        let mut covariance = vec![0.0; width * width];
        for (row, axis) in rows.chunks_exact(width).enumerate() {
            let energy = f64::from(part.scales[row / SEGMENT]).powi(2);
            for (x, covariance) in axis.iter().zip(covariance.chunks_exact_mut(width)) {
                covariance.iter_mut().zip(axis).for_each(|(sum, y)| *sum += energy * x * y);
            }
        }
        let scores: Vec<f32> = (0..width)
            .map(|c| {
                let (weight, mean) = (part.weights[c], part.mean[c]);
                // Weights are the fourth root of the mean of q²; rows are weighted.
                let energy = covariance[c * width + c] as f32 / (weight * weight) + mean * mean;
                weight.powi(4) * energy
            })
            .collect();
        let mut stays = vec![false; width];
        for (head, scores) in scores.chunks_exact(dim).enumerate() {
            let pairs: Vec<f32> = (0..half).map(|i| scores[i] + scores[i + half]).collect();
            for pair in top(&pairs, self.kept(half)) {
                stays[head * dim + pair as usize] = true;
                stays[head * dim + pair as usize + half] = true;
            }
        }
        for (i, x) in covariance.iter_mut().enumerate() {
            if !(stays[i / width] && stays[i % width]) {
                *x = 0.0;
            }
        }
        let (basis, scales) = basis(&covariance, width);
        PartStatistics { basis, scales, ..part.clone() }
    }

    /// The channels that stay. `energies`: Σ q² of the last queries, `[dim]`; `keys`: `[tokens, dim]`.
    pub(crate) fn choose(self, energies: &[f32], keys: &[f32]) -> Channels {
        let dim = energies.len();
        let mut scores = vec![0.0; dim];
        for key in keys.chunks_exact(dim) {
            scores.iter_mut().zip(key).for_each(|(sum, k)| *sum += k * k);
        }
        scores.iter_mut().zip(energies).for_each(|(score, energy)| *score *= energy);
        let mut mask = vec![0; dim.div_ceil(32)];
        for channel in top(&scores, self.kept(dim)) {
            mask[channel as usize / 32] |= 1 << (channel % 32);
        }
        Channels { mask: mask.into() }
    }
}

impl std::fmt::Display for Think {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", Self::NAME, self.share)
    }
}

/// The channels of one head's keys that are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Channels {
    /// 32 a word, lowest bit first.
    mask: Box<[u32]>,
}

impl Channels {
    /// Bytes in memory.
    pub(crate) fn num_bytes(&self) -> usize {
        size_of_val(&*self.mask)
    }

    pub(crate) fn mask(&self) -> &[u32] {
        &self.mask
    }

    /// How many there are.
    pub(crate) fn kept(&self) -> usize {
        self.mask.iter().map(|word| word.count_ones() as usize).sum()
    }

    fn has(&self, channel: usize) -> bool {
        self.mask[channel / 32] >> (channel % 32) & 1 == 1
    }

    /// Rows of `dim` channels without those that are not stored.
    pub(crate) fn narrow(&self, rows: &[f32], dim: usize) -> Vec<f32> {
        let kept = rows.iter().enumerate().filter(|(i, _)| self.has(i % dim));
        kept.map(|(_, x)| *x).collect()
    }

    /// Puts stored channels back, zeros in the places of others. `narrow`: `[tokens, kept]`; `out`: `[tokens, dim]`.
    pub(crate) fn widen(&self, narrow: &[f32], dim: usize, out: &mut [f32]) {
        let mut next = narrow.iter();
        for (i, x) in out.iter_mut().enumerate() {
            *x = if self.has(i % dim) { next.next().copied().unwrap_or(0.0) } else { 0.0 };
        }
    }
}

impl KvCache {
    /// Adds the squares of the prompt's last queries, turned by their positions, where channels will be chosen by them.
    pub(crate) fn observe_channels(
        &mut self,
        layer: usize,
        slices: &[BatchSlice],
        queries: &[f32],
    ) -> Result<()> {
        for slice in slices {
            let sequence = self.sequence(slice.sequence)?;
            let prompt = sequence.selection.as_ref().and_then(|selection| selection.prompt);
            let (Some(prompt), Some(_)) = (prompt, sequence.recipe.think()) else { continue };
            if !sequence.owns(layer) {
                continue;
            }
            let first = (prompt.saturating_sub(RECENT)).saturating_sub(slice.start).min(slice.len);
            if first == slice.len {
                continue;
            }
            self.with_sequence(slice.sequence, |cache, sequence| {
                let l = &cache.geometry.layers()[layer];
                let (dim, group) = (l.head_dim, l.query_heads / l.kv_heads);
                let groups = cache.geometry.num_groups();
                let base = cache.geometry.group(layer, 0);
                let Some(selection) = &mut sequence.selection else { return Ok(()) };
                selection.energies.resize(groups, Vec::new());
                let mut turned = vec![0.0; dim];
                for t in first..slice.len {
                    let at = (slice.row + t) * l.query_heads * dim;
                    let heads = queries[at..at + l.query_heads * dim].chunks_exact(dim);
                    for (head, query) in heads.enumerate() {
                        cache.frame.rotate(l.rope, slice.start + t, query, &mut turned);
                        let energies = &mut selection.energies[base + head / group];
                        energies.resize(dim, 0.0);
                        energies.iter_mut().zip(&turned).for_each(|(sum, q)| *sum += q * q);
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn think(share: &str) -> Think {
        Think::parse(Options::new(&format!("think:{share}"))).unwrap()
    }

    #[test]
    fn the_share_that_goes_is_rounded_down() {
        assert_eq!(think("0.6").kept(64), 39);
        assert_eq!([think("0.5").kept(64), think("0.5").kept(5), think("1").kept(64)], [32, 3, 64]);
        assert_eq!(think("0.001").kept(64), 1);
    }

    #[test]
    fn channels_with_the_largest_products_stay() {
        let keys = [1.0, 2.0, 3.0, 0.0, -1.0, -2.0, 3.0, 0.1];
        let channels = think("0.5").choose(&[9.0, 1.0, 0.5, 100.0], &keys);
        // Scores 18, 8, 9, 1.
        assert_eq!(channels.mask(), [0b0101]);
        let narrow = channels.narrow(&keys, 4);
        assert_eq!(narrow, [1.0, 3.0, -1.0, 3.0]);
        let mut wide = [f32::NAN; 8];
        channels.widen(&narrow, 4, &mut wide);
        assert_eq!(wide, [1.0, 0.0, 3.0, 0.0, -1.0, 0.0, 3.0, 0.0]);
    }

    /// Where whole pairs go, they go from every axis, and the energy of the others stays where it was.
    #[test]
    fn left_out_pairs_have_no_part_in_a_basis() {
        let (dim, width) = (16, 32);
        let identity = |i: usize| f32::from(u8::from(i / width == i % width));
        let part = PartStatistics {
            mean: vec![0.0; width],
            weights: (0..width).map(|c| if c % 8 < 2 { 2.0 } else { 1.0 }).collect(),
            basis: (0..width * width).map(|i| half::f16::from_f32(identity(i))).collect(),
            scales: vec![1.0, 1.0],
        };
        let narrow = think("0.5").statistics(&part, dim);
        // Of every head of eight pairs, four stay: the two that queries use most, and the last two of equals.
        let stays = |c: usize| [0, 1, 6, 7].contains(&(c % 8));
        let energy = |c: usize| -> f32 {
            let axes = narrow.basis[c..].iter().step_by(width).enumerate();
            axes.map(|(r, x)| (x.to_f32() * narrow.scales[r / SEGMENT]).powi(2)).sum()
        };
        for c in 0..width {
            let expected = f32::from(u8::from(stays(c)));
            assert!((energy(c) - expected).abs() < 4e-3, "{c}: {}", energy(c));
        }
        assert_eq!((narrow.mean, narrow.weights), (part.mean, part.weights));
    }
}
