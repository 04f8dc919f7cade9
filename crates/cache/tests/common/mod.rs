//! Test support: random inputs and small caches.
// Helpers outside #[test] functions may fail a test by panicking.
#![allow(unreachable_pub, clippy::unwrap_used)]

use kvasir_cache::{CacheConfig, Geometry, KvCache, LayerGeometry, Recipe};
use kvasir_kernels::{RopeScaling, RopeTable};

/// A small deterministic generator.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }
}

pub fn layer(query_heads: usize, kv_heads: usize, head_dim: usize) -> LayerGeometry {
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

pub const ROPE_BASE: f32 = 10_000.0;

pub fn cache(
    layers: Vec<LayerGeometry>,
    block_size: usize,
    recipe: Recipe,
    budget_bytes: usize,
    prefix_caching: bool,
) -> KvCache {
    let head_dim = layers[0].head_dim;
    KvCache::new(CacheConfig {
        geometry: Geometry::new(layers, block_size).unwrap(),
        ropes: vec![RopeTable::new(head_dim, ROPE_BASE, &RopeScaling::None, 1)],
        recipe,
        budget_bytes,
        prefix_caching,
    })
    .unwrap()
}
