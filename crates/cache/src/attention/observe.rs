//! HOT PATH (prompts of recipes that choose tokens). How much attention a block's tokens were paid by queries whose softmax
//! is finished.

use std::ops::Range;

use kvasir_kernels::OnlineSoftmax;

use super::tile::Tile;
use super::{AttentionScratch, BatchSlice, Work, lock};
use crate::error::Result;
use crate::geometry::LayerGeometry;
use crate::kv_cache::KvCache;
use std::sync::Mutex;

/// Query tokens that are taken together.
const QUERY_TOKENS: usize = 64;

/// One layer of a step whose attention is done.
pub(crate) struct Observer<'a> {
    cache: &'a KvCache,
    layer: usize,
    l: &'a LayerGeometry,
    queries: &'a [f32],
    /// `[rows, query_heads]`
    states: &'a [OnlineSoftmax],
    tiles: &'a [Mutex<Tile>],
}

impl<'a> Observer<'a> {
    /// Of what [`KvCache::attend`] left in `scratch`.
    pub(crate) fn new(
        cache: &'a KvCache,
        layer: usize,
        queries: &'a [f32],
        scratch: &'a AttentionScratch,
    ) -> Self {
        let l = &cache.geometry.layers()[layer];
        let AttentionScratch { states, tiles, .. } = scratch;
        Self { cache, layer, l, queries, states, tiles }
    }

    pub(crate) fn block_size(&self) -> usize {
        self.cache.geometry.block_size()
    }

    /// Sums of `tokens` (of a slice's queries) over some blocks of a KV head, into `sums`: `[rows, tokens of the
    /// blocks]`; returns the rows. `task`: number of the thread.
    pub(crate) fn run(
        &self,
        slice: &BatchSlice,
        kv_head: usize,
        tokens: Range<usize>,
        blocks: Range<usize>,
        task: usize,
        sums: &mut Vec<f32>,
    ) -> Result<usize> {
        let block_size = self.block_size();
        let group = self.l.query_heads / self.l.kv_heads;
        let sequence = self.cache.sequence(slice.sequence)?;
        let rows = sequence.recipe.policy().map_or(0, |p| p.observed().rows(group)).max(1);
        let width = blocks.len() * block_size;
        sums.clear();
        sums.resize(rows * width, 0.0);
        let mut tile = lock(&self.tiles[task]);
        let mut states = Vec::new();
        for first in tokens.clone().step_by(QUERY_TOKENS) {
            let len = QUERY_TOKENS.min(tokens.end - first);
            let work = Work::new(
                self.cache,
                self.layer,
                sequence,
                self.queries,
                slice,
                (first, len),
                (kv_head, 1),
            );
            states.clear();
            for t in 0..len {
                let at = (slice.row + first + t) * self.l.query_heads + kv_head * group;
                states.extend_from_slice(&self.states[at..at + group]);
            }
            self.cache.begin_plain(&work, &mut tile);
            for block in blocks.clone() {
                let Some(v) = work.visible(block, block_size) else { continue };
                let at = (block - blocks.start) * block_size;
                self.cache.observe_visible(&work, &v, &states, rows, (width, at), sums, &mut tile);
            }
        }
        Ok(rows)
    }
}
