//! HOT PATH (decode). What queries see of sums over tokens that are gone ([`crate::Less`]): one more token, whose logit is the
//! logarithm of the weight of all of them, and whose value is their mean.

use kvasir_kernels::{OnlineSoftmax, merge_rows, parallel_zip};

use super::tile::{Sums, Tile};
use super::{BatchSlice, Work};
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::offline::FEATURES;

/// φ of the queries of a step whose sequences remember something.
#[derive(Debug, Default)]
pub(super) struct QueryFeatures {
    /// By slice: its first row among those; `None` if nothing is remembered.
    first: Vec<Option<usize>>,
    rows: usize,
    features: Vec<f32>, // [query_heads, rows, FEATURES]
    scratch: Vec<f32>,  // [query_heads, rows · (head_dim + hidden)]
}

impl QueryFeatures {
    /// Of a query head's rows from a slice's token `token` on: `[.., FEATURES]`.
    fn of(&self, slice: usize, query_head: usize, token: usize) -> Option<&[f32]> {
        let first = (*self.first.get(slice)?)?;
        let at = (query_head * self.rows + first + token) * FEATURES;
        self.features.get(at..at + FEATURES)
    }
}

impl KvCache {
    /// Computes φ of a step's queries.
    pub(super) fn query_features(
        &self,
        layer: usize,
        slices: &[BatchSlice],
        queries: &[f32],
        out: &mut QueryFeatures,
    ) -> Result<()> {
        let l = &self.geometry.layers()[layer];
        let dim = l.head_dim;
        out.first.clear();
        out.rows = 0;
        let mut table = None;
        for slice in slices {
            let memory = self.sequence(slice.sequence)?.kept.memory.as_ref();
            let memory = memory.filter(|_| l.window.is_none());
            out.first.push(memory.map(|_| out.rows));
            if let Some(memory) = memory {
                table = Some(&memory.table);
                out.rows += slice.len;
            }
        }
        let networks = table.and_then(|table| table.layers[layer].as_ref());
        let Some(networks) = networks.filter(|_| out.rows > 0) else {
            out.first.clear();
            return Ok(());
        };
        let rows = out.rows;
        let hidden = networks.queries.first().map_or(0, |features| features.hidden);
        out.features.resize(l.query_heads * rows * FEATURES, 0.0);
        out.scratch.resize(l.query_heads * rows * (dim + hidden), 0.0);
        let scratch = (&mut out.scratch[..], rows * (dim + hidden));
        let features = (&mut out.features[..], rows * FEATURES);
        let first = &out.first;
        parallel_zip(scratch, features, |head, _, scratch, features| {
            let (turned, hidden) = scratch.split_at_mut(rows * dim);
            for (slice, first) in slices.iter().zip(first) {
                let Some(first) = *first else { continue };
                for token in 0..slice.len {
                    let at = ((slice.row + token) * l.query_heads + head) * dim;
                    let to = &mut turned[(first + token) * dim..][..dim];
                    self.frame.rotate(l.rope, slice.start + token, &queries[at..at + dim], to);
                }
            }
            networks.queries[head].of(turned, hidden, features);
        });
        Ok(())
    }

    /// What a plain job attends to beside blocks. `slice`: its number; `first`: its first token in the slice. `sums`: `[len ·
    /// group, Work::stride]`, to which it is added.
    pub(super) fn attend_state(
        &self,
        work: &Work<'_>,
        (slice, first): (usize, usize),
        features: &QueryFeatures,
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let Some(memory) = &work.sequence.kept.memory else { return };
        let Some(state) = memory.state(self.geometry.group(work.layer, work.kv_head)) else {
            return;
        };
        let (dim, stride) = (work.l.head_dim, work.stride());
        let seen = &mut tile.seen;
        seen.clear();
        seen.resize(stride, 0.0);
        let rows = sums.states.iter_mut().zip(sums.values.chunks_exact_mut(stride));
        for (row, (own, values)) in rows.enumerate() {
            let head = work.kv_head * work.group + row % work.group;
            let Some(features) = features.of(slice, head, first + row / work.group) else { return };
            let weight = state.read(features, &mut seen[..dim]);
            if weight > 0.0 {
                let one = OnlineSoftmax::of_one(weight.ln());
                merge_rows(std::slice::from_mut(own), values, &[one], seen, stride);
            }
        }
    }
}
