//! Statistics that all requests of a model share, and that joint codecs code against.
//!
//! For each head group of each layer and for keys and values apart: the mean, and a basis in which
//! coefficients are uncorrelated and ordered by energy (Karhunen–Loève). Keys are taken *as they are
//! stored*, in the block-relative frame: inside a block low RoPE frequencies hardly turn, so a fixed
//! basis catches correlations between different pairs, which a transform that must commute with RoPE
//! cannot. Key channels are weighted by the energy of the queries that will meet them.
//!
//! Measured once per model on a corpus ([`Moments`]), then frozen.

mod allocate;
mod basis;
mod moments;

pub(crate) use allocate::{allocate, part_budget};
pub(crate) use basis::basis;
pub use moments::Moments;
pub(crate) use moments::group_heads;

use half::f16;

use crate::error::{CacheError, Result};
use crate::geometry::Geometry;

/// What the numbers mean; part of every fingerprint. Raise it when that changes.
pub const STATISTICS_VERSION: u32 = 1;

/// Widest block, in channels over all its heads: what one layout of 16 segments of 16 can hold.
pub const MAX_WIDTH: usize = 256;

/// Statistics of one model at one block size.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// Names model, corpus and version; an encoded block is only readable with the same.
    pub fingerprint: [u8; 32],
    /// Tokens per block that keys were framed with.
    pub block_size: usize,
    /// Tokens measured.
    pub tokens: usize,
    /// By layer, then head group: keys and values.
    pub layers: Vec<Vec<[PartStatistics; 2]>>,
}

/// Keys or values of one head group. `width` channels: its heads one after another.
#[derive(Debug, Clone, PartialEq)]
pub struct PartStatistics {
    /// Mean over tokens, of keys before RoPE. `[width]`
    pub mean: Vec<f32>,
    /// What a channel is multiplied with before the basis; 1 for values. Equal over a RoPE pair.
    /// `[width]`
    pub weights: Vec<f32>,
    /// Orthonormal rows, one per coefficient: `[width, width]`.
    pub basis: Vec<f16>,
    /// Root mean square of each segment of 16 coefficients. `[width / 16]`
    pub scales: Vec<f32>,
}

impl Statistics {
    /// Bytes they take in memory: part of what a cache holds.
    pub fn num_bytes(&self) -> usize {
        let groups = self.layers.iter().flatten();
        // Codecs keep the key mean as tokens at every offset see it.
        groups.map(|[keys, values]| keys.num_bytes(self.block_size) + values.num_bytes(1)).sum()
    }

    /// Whether a cache of these shapes can use them: for statistics that come from outside.
    ///
    /// # Errors
    /// [`CacheError::Statistics`]: other shapes, values that are not finite, weights or scales that
    /// are not positive.
    pub fn check(&self, geometry: &Geometry) -> Result<()> {
        self.check_shapes(geometry)?;
        for (layer, groups) in self.layers.iter().enumerate() {
            for (group, parts) in groups.iter().enumerate() {
                for (part, name) in parts.iter().zip(["keys", "values"]) {
                    part.check().map_err(|what| CacheError::Statistics {
                        what: format!("layer {layer}, group {group}, {name}: {what}"),
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Whether they have the shapes of a cache.
    pub(crate) fn check_shapes(&self, geometry: &Geometry) -> Result<()> {
        let wrong = |what: String| Err(CacheError::Statistics { what });
        if self.block_size != geometry.block_size() {
            let (theirs, ours) = (self.block_size, geometry.block_size());
            return wrong(format!("measured for blocks of {theirs} tokens, not {ours}"));
        }
        let shapes = group_shapes(geometry)?;
        if self.layers.len() != shapes.len() {
            let (theirs, ours) = (self.layers.len(), shapes.len());
            return wrong(format!("measured for {theirs} layers, not {ours}"));
        }
        for (layer, (groups, (count, width))) in self.layers.iter().zip(shapes).enumerate() {
            let fits = |part: &PartStatistics| part.has_width(width);
            if groups.len() != count || !groups.iter().flatten().all(fits) {
                return wrong(format!("layer {layer} has other heads than the model"));
            }
        }
        Ok(())
    }
}

impl PartStatistics {
    fn has_width(&self, width: usize) -> bool {
        self.mean.len() == width
            && self.weights.len() == width
            && self.basis.len() == width * width
            && self.scales.len() == width / kvasir_kernels::trellis::SEGMENT
    }

    fn num_bytes(&self, offsets: usize) -> usize {
        let width = self.mean.len();
        4 * (offsets * width + 2 * width + self.scales.len()) + 2 * self.basis.len()
    }

    fn check(&self) -> Result<(), String> {
        let positive = |x: &f32| x.is_finite() && *x > 0.0;
        let first = |found: Option<usize>, what: &str| match found {
            Some(i) => Err(format!("{what} {i}")),
            None => Ok(()),
        };
        first(self.mean.iter().position(|x| !x.is_finite()), "a mean that is not finite, at")?;
        first(self.weights.iter().position(|x| !positive(x)), "a weight that is not positive, at")?;
        first(self.basis.iter().position(|x| !x.is_finite()), "a basis that is not finite, at")?;
        first(self.scales.iter().position(|x| !positive(x)), "a scale that is not positive, at")
    }
}

/// Head groups of every layer, and the channels of one: `(groups, width)`.
///
/// # Errors
/// [`CacheError::Geometry`] for heads that joint codecs cannot hold.
pub fn group_shapes(geometry: &Geometry) -> Result<Vec<(usize, usize)>> {
    let layers = geometry.layers().iter().enumerate();
    layers
        .map(|(layer, l)| {
            let heads = group_heads(layer, l)?;
            Ok((l.kv_heads / heads, heads * l.head_dim))
        })
        .collect()
}

/// KV heads that are coded together: as many as fit [`MAX_WIDTH`] channels and divide the layer's.
/// `None` if one head alone does not fit, or its channels are no multiple of a segment.
pub(crate) fn heads_per_block(kv_heads: usize, head_dim: usize) -> Option<usize> {
    if head_dim > MAX_WIDTH || !head_dim.is_multiple_of(kvasir_kernels::trellis::SEGMENT) {
        return None;
    }
    (1..=kv_heads).rev().find(|h| kv_heads.is_multiple_of(*h) && h * head_dim <= MAX_WIDTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_grouped_up_to_the_widest_block() {
        assert_eq!(heads_per_block(3, 64), Some(3));
        assert_eq!(heads_per_block(8, 128), Some(2));
        assert_eq!(heads_per_block(8, 64), Some(4));
        assert_eq!(heads_per_block(1, 256), Some(1));
        assert_eq!(heads_per_block(5, 80), Some(1));
        assert_eq!(heads_per_block(4, 512), None);
        assert_eq!(heads_per_block(4, 72), None);
    }
}
