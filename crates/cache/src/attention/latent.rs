//! HOT PATH. Values that are stored as latents are summed as latents, and turned back once for every query row.
//!
//! A row of sums is `[head_dim, latents]`: what came of blocks with rows, and of blocks with latents.

use half::f16;
use kvasir_kernels::{StoredRows, add_assign};

use super::Work;
use super::tile::{Sums, Tile};
use crate::codec::LowRankCodec;
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;

/// Latents that vectors of sums hold without a rest; others are turned back block by block.
const WHOLE: usize = 16;

impl KvCache {
    /// The codec of a sequence's values, if they are summed as latents.
    pub(super) fn value_latents(&self, layer: usize, sequence: &Sequence) -> Option<&LowRankCodec> {
        let layer = sequence.owner(layer);
        let format = &self.formats.get(sequence.sealed_formats[1]).layers[layer];
        let codec = format.groups.first()?[1].low_rank()?;
        codec.rank().is_multiple_of(WHOLE).then_some(codec)
    }

    /// The first latents of a block of values, as attention reads them; `halves` if they are not stored so.
    pub(super) fn read_latents<'a>(
        &self,
        codec: &LowRankCodec,
        bytes: &'a [u8],
        (filled, gain): (usize, f32),
        halves: &'a mut Vec<f16>,
    ) -> StoredRows<'a> {
        if let Some(stored) = codec.stored_latents(bytes).filter(|_| gain == 1.0) {
            return stored;
        }
        halves.resize(filled * codec.rank(), f16::ZERO);
        codec.decode_latents(bytes, self.geometry.block_size(), gain, halves);
        StoredRows::F16(halves)
    }

    /// Turns the sums of a plain job's rows back: `tile.mixed` becomes `[rows, head_dim]`.
    pub(super) fn finish_latents(&self, works: &[Work<'_>], sums: &Sums, tile: &mut Tile) {
        let Some(work) = works.first() else { return };
        let Some(codec) = self.value_latents(work.layer, work.sequence) else { return };
        let (dim, stride) = (work.l.head_dim, work.stride());
        let rows = sums.states.len();
        tile.mixed.resize(rows * dim, 0.0);
        let mixed = &mut tile.mixed[..rows * dim];
        codec.rows_of_sums(work.kv_head, &sums.values[dim..], stride, mixed);
        for (mixed, row) in mixed.chunks_exact_mut(dim).zip(sums.values.chunks_exact(stride)) {
            add_assign(mixed, &row[..dim]);
        }
    }
}
