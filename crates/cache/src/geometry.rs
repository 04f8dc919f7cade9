//! Shapes: layers, heads, blocks, and the bytes of everything.

use crate::error::{CacheError, Result};

/// Bytes of a table entry in memory: slot and gain, padded.
pub(crate) const ENTRY_BYTES: usize = size_of::<crate::table::Entry>();

/// One attention layer as the cache sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerGeometry {
    /// Query heads; a multiple of `kv_heads`.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Channels of a head, for keys and values alike; even.
    pub head_dim: usize,
    /// A query at position m sees keys at m - window + 1 ..= m; `None` sees all.
    pub window: Option<usize>,
    /// Which of the model's RoPE tables turns this layer; `None` for a layer without positions.
    pub rope: Option<usize>,
    /// Factor of query · key.
    pub score_scale: f32,
    /// Soft cap of scores (Gemma 2), applied after the scale.
    pub score_cap: Option<f32>,
}

/// All layers, and the block size. A *group* is one KV head of one layer: the unit that owns a block
/// table.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    layers: Vec<LayerGeometry>,
    first_group: Vec<usize>, // [layers + 1]
    block_size: usize,
}

impl Geometry {
    /// Checks and indexes.
    ///
    /// # Errors
    /// A block size other than 16, 32, 64; heads that do not divide; an odd head size.
    pub fn new(layers: Vec<LayerGeometry>, block_size: usize) -> Result<Self> {
        if ![16, 32, 64].contains(&block_size) {
            return Err(CacheError::BlockSize { found: block_size });
        }
        let mut first_group = vec![0];
        let mut groups = 0;
        for (layer, l) in layers.iter().enumerate() {
            let wrong = |what: String| CacheError::Geometry { layer, what };
            if l.kv_heads == 0 || l.query_heads == 0 || !l.query_heads.is_multiple_of(l.kv_heads) {
                return Err(wrong(format!(
                    "{} query heads cannot share {} KV heads",
                    l.query_heads, l.kv_heads
                )));
            }
            if l.head_dim == 0 || !l.head_dim.is_multiple_of(2) {
                return Err(wrong(format!("head size {} is not even", l.head_dim)));
            }
            if l.window == Some(0) {
                return Err(wrong("a sliding window of 0 tokens sees nothing".to_owned()));
            }
            groups += l.kv_heads;
            first_group.push(groups);
        }
        Ok(Self { layers, first_group, block_size })
    }

    /// All layers.
    pub fn layers(&self) -> &[LayerGeometry] {
        &self.layers
    }

    /// Tokens in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Number of (layer, KV head) pairs.
    pub fn num_groups(&self) -> usize {
        self.first_group[self.layers.len()]
    }

    /// Index of a (layer, KV head) pair.
    pub fn group(&self, layer: usize, kv_head: usize) -> usize {
        self.first_group[layer] + kv_head
    }

    /// The layer and the KV head of a group.
    pub fn layer_of(&self, group: usize) -> (usize, usize) {
        let layer = self.first_group.partition_point(|first| *first <= group) - 1;
        (layer, group - self.first_group[layer])
    }

    /// Every group with its layer, in index order.
    pub fn groups(&self) -> impl Iterator<Item = (usize, &LayerGeometry)> {
        self.layers.iter().flat_map(|l| std::iter::repeat_n(l, l.kv_heads)).enumerate()
    }

    /// Bytes that one token's keys and values take in f16, over all layers: what "logical" means.
    pub fn logical_bytes_per_token(&self) -> usize {
        self.layers.iter().map(|l| 2 * 2 * l.kv_heads * l.head_dim).sum()
    }

    /// Bytes of the table entries of one block of tokens: a key and a value entry per group.
    pub fn table_bytes_per_block(&self) -> usize {
        2 * self.num_groups() * ENTRY_BYTES
    }

    /// Blocks that hold `tokens` tokens.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn layer(query_heads: usize, kv_heads: usize, head_dim: usize) -> LayerGeometry {
        LayerGeometry {
            query_heads,
            kv_heads,
            head_dim,
            window: None,
            rope: Some(0),
            score_scale: 1.0 / (head_dim as f32).sqrt(),
            score_cap: None,
        }
    }

    #[test]
    fn smollm2_takes_23040_bytes_a_token() {
        let geometry = Geometry::new(vec![layer(9, 3, 64); 30], 32).unwrap();
        assert_eq!(geometry.logical_bytes_per_token(), 23_040);
        assert_eq!(geometry.num_groups(), 90);
        assert_eq!(geometry.group(1, 2), 5);
        assert_eq!((geometry.layer_of(5), geometry.layer_of(0)), ((1, 2), (0, 0)));
        assert_eq!(geometry.blocks_for(33), 2);
    }

    #[test]
    fn bad_shapes_are_named() {
        assert!(matches!(Geometry::new(vec![], 17), Err(CacheError::BlockSize { found: 17 })));
        let error = Geometry::new(vec![layer(9, 3, 64), layer(8, 3, 64)], 16).unwrap_err();
        assert_eq!(error.to_string(), "layer 1: 8 query heads cannot share 3 KV heads");
        assert!(Geometry::new(vec![layer(1, 1, 7)], 16).is_err());
    }
}
