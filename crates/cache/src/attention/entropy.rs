//! How widely the last token of a prompt looks around: the entropy of its attention, for prompts that are watched
//! ([`KvCache::watch_prompt`]). One query a layer over rows as they were written, beside the prompt's own attention.

use std::time::Instant;

use super::BatchSlice;
use crate::error::Result;
use crate::geometry::LayerGeometry;
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;

impl KvCache {
    /// Notes the entropies of a layer for the watched prompts that end in this step. Layers with a sliding window are left
    /// out: how wide they look is not theirs to say.
    pub(crate) fn watch_attention(
        &mut self,
        layer: usize,
        slices: &[BatchSlice],
        queries: &[f32],
    ) -> Result<()> {
        for slice in slices {
            let sequence = self.sequence(slice.sequence)?;
            let l = &self.geometry.layers()[layer];
            let Some(watched) = sequence.watched.filter(|_| l.window.is_none()) else { continue };
            let last = watched.prompt - 1;
            if !(slice.start..slice.start + slice.len).contains(&last) || last == 0 {
                continue;
            }
            let clock = Instant::now();
            let at = (slice.row + last - slice.start) * l.query_heads * l.head_dim;
            let query = &queries[at..at + l.query_heads * l.head_dim];
            // One query: not worth waking threads for, and sums in one order.
            let sum: f64 = (0..l.kv_heads)
                .map(|head| self.entropies(sequence, (layer, l), head, last, query))
                .sum();
            let count = l.query_heads;
            self.recode_nanos += clock.elapsed().as_nanos() as u64;
            self.with_sequence(slice.sequence, |_, sequence| {
                if let Some(watched) = &mut sequence.watched {
                    watched.entropy += sum / (watched.prompt as f64).ln();
                    watched.heads += count;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Sum of the entropies of a KV head's queries at position `last` over all keys up to it, in nats. `query`: `[query_heads,
    /// head_dim]`, not rotated. O(`last` · group · head_dim).
    fn entropies(
        &self,
        sequence: &Sequence,
        (layer, l): (usize, &LayerGeometry),
        kv_head: usize,
        last: usize,
        query: &[f32],
    ) -> f64 {
        let (dim, group, block_size) =
            (l.head_dim, l.query_heads / l.kv_heads, self.geometry.block_size());
        let table = &sequence.tables[self.geometry.group(layer, kv_head)];
        let tail = sequence.recipe.tail();
        let mut scores = vec![Vec::with_capacity(last + 1); group];
        let (mut keys, mut turned) = (Vec::new(), vec![0.0; dim]);
        for (block, entry) in table.keys.iter().enumerate() {
            let first = block * block_size;
            if first > last {
                break;
            }
            keys.resize((last + 1 - first).min(block_size) * dim, 0.0);
            tail.decode(self.pool.bytes(entry.slot), block_size, dim, &mut keys);
            let gain = entry.gain.to_f32();
            for (head, scores) in scores.iter_mut().enumerate() {
                let own = &query[(kv_head * group + head) * dim..][..dim];
                self.frame.rotate(l.rope, last - first, own, &mut turned);
                scores.extend(keys.chunks_exact(dim).map(|key| {
                    let dot: f32 = key.iter().zip(&turned).map(|(k, q)| k * q).sum();
                    let score = dot * gain * l.score_scale;
                    l.score_cap.map_or(score, |cap| cap * (score / cap).tanh())
                }));
            }
        }
        scores.iter().map(|scores| entropy(scores)).sum()
    }
}

/// Entropy in nats of the softmax of `scores`.
fn entropy(scores: &[f32]) -> f64 {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (mut sum, mut weighted) = (0.0, 0.0);
    for score in scores {
        let below = f64::from(score - most);
        sum += below.exp();
        weighted += below * below.exp();
    }
    // Of scores that are no numbers nothing is known.
    let entropy = sum.ln() - weighted / sum;
    if entropy.is_finite() { entropy } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropies_by_hand() {
        assert!((entropy(&[1.0; 8]) - 8f64.ln()).abs() < 1e-12);
        assert!(entropy(&[0.0, 100.0]) < 1e-12);
        // One half, two quarters: 1.5 bits.
        let half = 0.5f32.ln();
        assert!((entropy(&[half, 2.0 * half, 2.0 * half]) - 1.5 * 2f64.ln()).abs() < 1e-6);
        assert_eq!(entropy(&[f32::NAN, 1.0]), 0.0);
        assert_eq!(entropy(&[]), 0.0);
    }
}
