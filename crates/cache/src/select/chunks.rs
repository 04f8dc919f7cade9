//! What tokens are paid inside chunks of a prompt, by earlier and by later queries of the chunk alike
//! ([`super::Compactor`]). A chunk is summed up in the step that completes it; its queries from steps before are kept until
//! then, in f16, and their bytes are taken from the budget.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use kvasir_kernels::{OnlineSoftmax, gemm_nt, num_threads, parallel_for};

use super::policy::{Chunks, Observed, Policy};
use crate::attention::{BatchSlice, lock};
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;

/// Query rows whose scores exist at a time.
const ROWS: usize = 64;

/// A chunk that a step completes, for one KV head.
struct Unit<'a> {
    sequence: &'a Sequence,
    slice: usize,
    kv_head: usize,
    /// Positions.
    chunk: Range<usize>,
    /// Queries of a KV head from earlier steps, `[tokens, query_heads, head_dim]`.
    earlier: &'a [f16],
}

impl KvCache {
    /// Bytes of the queries that may have to be kept, over all layers.
    pub(super) fn chunk_bytes(&self, size: usize, prompt: usize) -> usize {
        // A chunk that one step holds keeps none.
        let layers = self.geometry.layers().iter().filter(|l| l.window.is_none());
        let tokens = size.min(prompt).saturating_sub(1);
        layers.map(|l| 2 * tokens * l.query_heads * l.head_dim).sum()
    }

    /// Adds what the tokens of the chunks that this step completes were paid in a layer.
    pub(super) fn observe_chunks(
        &mut self,
        layer: usize,
        slices: &[BatchSlice],
        queries: &[f32],
    ) -> Result<()> {
        let mut wanted = Vec::new();
        for (number, slice) in slices.iter().enumerate() {
            if let Some((chunks, prompt)) = self.chunked(layer, slice)? {
                self.with_sequence(slice.sequence, |_, sequence| {
                    if let Some(selection) = &mut sequence.selection {
                        let layers = selection.pending.len().max(layer + 1);
                        selection.pending.resize(layers, Vec::new());
                    }
                    Ok(())
                })?;
                wanted.push((number, chunks, prompt));
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let mut units = Vec::new();
        for (number, chunks, prompt) in &wanted {
            let slice = &slices[*number];
            let (begin, end) = (slice.start, slice.start + slice.len);
            let sequence = self.sequence(slice.sequence)?;
            let earlier = sequence.selection.as_ref().map_or(&[][..], |s| &s.pending[layer]);
            let done = chunks.of(*prompt).filter(|c| (begin + 1..=end).contains(&c.end));
            for chunk in done {
                for kv_head in 0..self.geometry.layers()[layer].kv_heads {
                    let earlier = if chunk.start < begin { earlier } else { &[] };
                    units.push(Unit {
                        sequence,
                        slice: *number,
                        kv_head,
                        chunk: chunk.clone(),
                        earlier,
                    });
                }
            }
        }
        let results: Vec<Mutex<Vec<f32>>> = units.iter().map(|_| Mutex::default()).collect();
        let next = AtomicUsize::new(0);
        parallel_for(num_threads().min(units.len()), |_, _| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let (Some(unit), Some(result)) = (units.get(i), results.get(i)) else { break };
                *lock(result) = self.chunk_sums(layer, unit, &slices[unit.slice], queries);
            }
        });
        let done: Vec<(usize, usize, usize)> =
            units.iter().map(|u| (u.slice, u.kv_head, u.chunk.start)).collect();
        for ((slice, kv_head, begin), sums) in done.into_iter().zip(results) {
            let sums = sums.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let group = self.geometry.group(layer, kv_head);
            let mut columns = self.take_columns(slices[slice].sequence, group)?;
            columns[begin..begin + sums.len()].copy_from_slice(&sums);
            self.with_sequence(slices[slice].sequence, |_, sequence| {
                if let Some(selection) = &mut sequence.selection {
                    selection.columns[group] = columns;
                }
                Ok(())
            })?;
        }
        self.keep_pending(layer, slices, queries, &wanted)
    }

    /// Keeps the queries of chunks that this step did not complete.
    fn keep_pending(
        &mut self,
        layer: usize,
        slices: &[BatchSlice],
        queries: &[f32],
        wanted: &[(usize, Chunks, usize)],
    ) -> Result<()> {
        let l = &self.geometry.layers()[layer];
        let width = l.query_heads * l.head_dim;
        for (number, chunks, prompt) in wanted {
            let slice = &slices[*number];
            let end = slice.start + slice.len;
            let open = chunks.of(*prompt).find(|c| c.start < end && end < c.end);
            self.with_sequence(slice.sequence, |_, sequence| {
                let Some(selection) = &mut sequence.selection else { return Ok(()) };
                let pending = &mut selection.pending[layer];
                match open {
                    None => *pending = Vec::new(),
                    Some(chunk) => {
                        if chunk.start >= slice.start {
                            pending.clear();
                        }
                        let first = chunk.start.max(slice.start) - slice.start;
                        let rows = (slice.row + first) * width..(slice.row + slice.len) * width;
                        pending.extend(queries[rows].iter().map(|x| f16::from_f32(*x)));
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The size of chunks and the length of the prompt, if a policy wants to see chunks.
    fn chunked(&self, layer: usize, slice: &BatchSlice) -> Result<Option<(Chunks, usize)>> {
        let sequence = self.sequence(slice.sequence)?;
        if !sequence.owns(layer) {
            return Ok(None);
        }
        let prompt = sequence.selection.as_ref().and_then(|selection| selection.prompt);
        let observed = sequence.recipe.policy().map(Policy::observed);
        let (Some(prompt), Some(Observed::Chunks(chunks))) = (prompt, observed) else {
            return Ok(None);
        };
        Ok(self.geometry.layers()[layer].window.is_none().then_some((chunks, prompt)))
    }

    /// `[tokens of the chunk]`: the sum over its queries, and the query heads of a KV head, of the softmax over its keys.
    fn chunk_sums(
        &self,
        layer: usize,
        unit: &Unit<'_>,
        slice: &BatchSlice,
        queries: &[f32],
    ) -> Vec<f32> {
        let l = &self.geometry.layers()[layer];
        let (dim, group, n) = (l.head_dim, l.query_heads / l.kv_heads, unit.chunk.len());
        let positions: Vec<u32> = unit.chunk.clone().map(|p| p as u32).collect();
        let [keys, _] = self.gather_chosen(unit.sequence, layer, unit.kv_head, &positions);
        let mut rotated = vec![0.0; ROWS * dim];
        let mut scores = vec![0.0; ROWS * n];
        let mut plain = vec![0.0; dim];
        let mut sums = vec![0.0f32; n];
        let rows: Vec<(usize, usize)> =
            unit.chunk.clone().flat_map(|p| (0..group).map(move |g| (p, g))).collect();
        let num_earlier = unit.earlier.len() / (l.query_heads * dim);
        for rows in rows.chunks(ROWS) {
            for ((p, g), out) in rows.iter().zip(rotated.chunks_exact_mut(dim)) {
                let head = unit.kv_head * group + g;
                match p.checked_sub(slice.start) {
                    Some(t) => {
                        let at = ((slice.row + t) * l.query_heads + head) * dim;
                        // As they would have been kept, so that steps do not matter.
                        let from = &queries[at..at + dim];
                        plain
                            .iter_mut()
                            .zip(from)
                            .for_each(|(x, q)| *x = f16::from_f32(*q).to_f32());
                    }
                    None => {
                        let t = num_earlier - (slice.start - p);
                        let at = (t * l.query_heads + head) * dim;
                        let from = &unit.earlier[at..at + dim];
                        plain.iter_mut().zip(from).for_each(|(x, q)| *x = q.to_f32());
                    }
                }
                self.frame.rotate(l.rope, *p, &plain, out);
            }
            gemm_nt((rows.len(), n, dim), &rotated, dim, &keys, dim, &mut scores, n);
            for row in scores.chunks_exact_mut(n).take(rows.len()) {
                let mut softmax = OnlineSoftmax::default();
                softmax.push(row, &mut []);
                let share = softmax.normaliser();
                sums.iter_mut().zip(row).for_each(|(sum, weight)| *sum += *weight * share);
            }
        }
        sums
    }
}
