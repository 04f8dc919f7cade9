//! HOT PATH (decode). Rows that are in a file: every query head picks clusters of them, and attends to their rows where
//! they lie.

use kvasir_kernels::{KvBlock, QueryRows, StoredRows, attend_block};

use super::Work;
use super::tile::{Sums, Tile};
use crate::codec::CodecKind;
use crate::kv_cache::KvCache;

/// Rows that are read at a time.
const ROWS: usize = 64;

impl KvCache {
    /// What a plain job attends to beside blocks. `sums`: `[len · group, Work::stride]`, to which it is added.
    pub(super) fn attend_cold(&self, work: &Work<'_>, sums: &mut Sums, tile: &mut Tile) {
        let Some(cold) = &work.sequence.kept.cold else { return };
        let Some(group) = cold.group(self.geometry.group(work.layer, work.kv_head)) else { return };
        let budget = cold.policy.tokens(cold.prompt);
        let (dim, stride) = (work.l.head_dim, work.stride());
        let Tile { queries, scores: turned, ranges, block: scratch, .. } = tile;
        turned.resize(turned.len().max(dim), 0.0);
        let rows = queries.chunks_exact(dim).zip(&mut sums.states);
        let rows = rows.zip(sums.values.chunks_exact_mut(stride));
        for (row, ((query, state), sums)) in rows.enumerate() {
            let turned = &mut turned[..dim];
            self.frame.rotate(work.l.rope, work.start + row / work.group, query, turned);
            group.select(turned, budget, ranges);
            let queries = QueryRows {
                rows: turned,
                dim,
                group: 1,
                turn: None,
                // All rows are of tokens before it.
                offset: ROWS,
                window: None,
                cap: work.l.score_cap,
                products: match work.sequence.recipe.tail_kind() {
                    CodecKind::F32 => kvasir_kernels::Products::F32,
                    _ => self.products,
                },
            };
            for (first, end) in ranges.iter().copied() {
                for begin in (first..end).step_by(ROWS) {
                    let [keys, values] = cold.rows(group, begin);
                    let kv = KvBlock {
                        keys: StoredRows::F16(keys),
                        values: StoredRows::F16(values),
                        value_dim: dim,
                        at: 0,
                        filled: ROWS.min(end - begin),
                        next: [&[]; 2],
                    };
                    let state = std::slice::from_mut(&mut *state);
                    attend_block(&queries, &kv, state, sums, stride, scratch);
                }
            }
        }
    }
}
