//! Test support: random inputs and small caches.
// Helpers outside #[test] functions may fail a test by panicking.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::ops::Range;
use std::sync::Arc;

use kvasir_cache::offline::{
    CompactorTable, ContextWorth, KvSharerTable, LessTable, LowRankTable, Method, Squares, Table,
    Tables,
};
use kvasir_cache::stats::{Moments, Statistics};
use kvasir_cache::{CacheConfig, Geometry, KvCache, LayerGeometry, Recipe, SequenceId, Sharing};
use kvasir_kernels::{Products, RopeScaling, RopeTable};

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

fn ropes(head_dim: usize) -> Vec<RopeTable> {
    vec![RopeTable::new(head_dim, ROPE_BASE, &RopeScaling::None, 1)]
}

/// An uncompressed cache of one layer whose rotations are scaled.
pub fn scaled_cache(l: &LayerGeometry, rope: RopeTable) -> KvCache {
    KvCache::new(CacheConfig {
        geometry: Geometry::new(vec![l.clone()], 32).unwrap(),
        ropes: vec![rope],
        recipe: Recipe::F32,
        statistics: None,
        tables: Tables::default(),
        sharing: Sharing::OFF,
        products: Products::Bf16,
        budget_bytes: 8 << 20,
        prefix_caching: false,
    })
    .unwrap()
}

/// Statistics of uniform random numbers, for recipes that need some.
pub fn statistics(geometry: &Geometry, head_dim: usize) -> Statistics {
    let mut moments = Moments::new(geometry.clone(), ropes(head_dim)).unwrap();
    let mut random = Random::new(3);
    for (layer, l) in geometry.layers().iter().enumerate() {
        let rows = 512;
        let q = random.values(rows * l.query_heads * l.head_dim);
        let k = random.values(rows * l.kv_heads * l.head_dim);
        let v = random.values(rows * l.kv_heads * l.head_dim);
        moments.observe(layer, 0, &q, &k, &v);
    }
    moments.finish([7; 32]).unwrap()
}

/// Tables of uniform random numbers, for methods that need some.
pub fn tables(geometry: &Geometry) -> Tables {
    let mut squares = Squares::new(geometry.clone());
    let mut random = Random::new(4);
    for (layer, l) in geometry.layers().iter().enumerate() {
        let rows = 512 * l.kv_heads * l.head_dim;
        let (k, v) = (random.values(rows), random.values(rows));
        squares.observe(layer, &k, &v);
    }
    let squares = squares.finish(Method::ReCalKv).unwrap();
    let mut tables = Tables::default();
    tables.add(Table::Lorc(LowRankTable::lorc(&squares, geometry).into()));
    // Of the last half of all layers each reads the one before it.
    let layers = geometry.layers().len();
    let pairs = (layers.div_ceil(2).max(1)..layers).rev().map(|layer| (layer, layer - 1)).collect();
    tables.add(Table::KvSharer(KvSharerTable { layers, pairs }.into()));
    tables.add(Table::Less(LessTable::untrained(geometry, 24).into()));
    // A prompt of one nat a token may give up more than one of three.
    let context = |nll: f64, kept: f64| ContextWorth { nll, worth: 1.0, kept: vec![(0.5, kept)] };
    let curve = CompactorTable::fit(&[context(1.0, 0.95), context(3.0, 0.6)]);
    tables.add(Table::Compactor(curve));
    tables.add(Table::ReCalKv(LowRankTable::recalkv(&squares, geometry).into()));
    tables
}

/// Notes how likely the tokens of a step are, where a recipe asks: `prompt` is the prompt's length.
pub fn note_nll(cache: &mut KvCache, id: SequenceId, step: Range<usize>, prompt: usize, nll: f64) {
    let known = (step.end + 1).min(prompt).saturating_sub(step.start + 1);
    cache.note_prompt_nll(id, known, known as f64 * nll).unwrap();
}

pub fn cache(
    layers: Vec<LayerGeometry>,
    block_size: usize,
    recipe: Recipe,
    budget_bytes: usize,
    prefix_caching: bool,
) -> KvCache {
    sharing_cache(layers, block_size, recipe, budget_bytes, prefix_caching, Sharing::OFF)
}

/// With tables of somebody's choice.
pub fn cache_with(
    layers: Vec<LayerGeometry>,
    block_size: usize,
    recipe: Recipe,
    tables: Tables,
) -> KvCache {
    let head_dim = layers[0].head_dim;
    KvCache::new(CacheConfig {
        geometry: Geometry::new(layers, block_size).unwrap(),
        ropes: ropes(head_dim),
        recipe,
        statistics: None,
        tables,
        sharing: Sharing::OFF,
        products: Products::Bf16,
        budget_bytes: 16 << 20,
        prefix_caching: true,
    })
    .unwrap()
}

pub fn sharing_cache(
    layers: Vec<LayerGeometry>,
    block_size: usize,
    recipe: Recipe,
    budget_bytes: usize,
    prefix_caching: bool,
    sharing: Sharing,
) -> KvCache {
    let head_dim = layers[0].head_dim;
    let geometry = Geometry::new(layers, block_size).unwrap();
    KvCache::new(CacheConfig {
        geometry: geometry.clone(),
        ropes: ropes(head_dim),
        recipe,
        statistics: recipe.needs_statistics().then(|| Arc::new(statistics(&geometry, head_dim))),
        tables: match recipe.needs_tables().next() {
            Some(_) => tables(&geometry),
            None => Tables::default(),
        },
        sharing,
        products: Products::Bf16,
        budget_bytes,
        prefix_caching,
    })
    .unwrap()
}
