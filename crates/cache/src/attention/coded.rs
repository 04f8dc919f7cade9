//! HOT PATH (decode). Jointly coded tiles in their own basis: the basis is folded into the query once per
//! block, values are summed as coefficients, and the sum is turned back once per query head, after all ranges.
//!
//! An item's sequences walk their blocks side by side. [`bytes`] does the sums.

mod bytes;

pub(super) use bytes::ByteTile;
pub(crate) use bytes::GROUP_TOKENS;

use super::tile::{Sums, Tile};
use super::{Visible, Work};
use crate::codec::JointCodec;
use crate::kv_cache::KvCache;
use crate::pool::SlotId;
use crate::sequence::Sequence;
use crate::table::Entry;

/// Query rows of one KV head up to which tiles are read in their basis: beyond it turning the tile
/// back costs less than turning the queries.
const CODED_QUERY_ROWS: usize = 16;

/// Sequences with equal affinity go well together, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Affinity {
    /// Which basis their blocks are in: all of an item have one.
    pub(super) basis: usize,
    /// KV heads of a block.
    pub(super) heads: usize,
    /// The first slot that a common prefix would share.
    first: Option<SlotId>,
}

/// What a row of sums holds: plain channels, coded ones, and the mass of the blocks in coded ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stride {
    /// From one row to the next.
    pub(super) row: usize,
    /// Where the mass is.
    mass: usize,
}

impl Stride {
    /// Of sums over blocks of `heads` heads of `dim` channels.
    pub(super) fn new(dim: usize, heads: usize) -> Self {
        let mass = dim * (1 + heads);
        Self { row: mass + 16, mass }
    }

    fn of(work: &Work<'_>) -> Self {
        Self::new(work.l.head_dim, work.heads)
    }
}

impl KvCache {
    fn joint_keys(&self, layer: usize, sequence: &Sequence) -> Option<(usize, &JointCodec)> {
        let layer = sequence.owner(layer);
        let format = &self.formats.get(sequence.sealed_formats[1]).layers[layer];
        Some((format.heads, format.groups.first()?[0].joint()?))
    }

    /// How a sequence with this many query rows a head takes part in a coded item, if it should.
    pub(super) fn affinity(
        &self,
        layer: usize,
        sequence: &Sequence,
        query_rows: usize,
    ) -> Option<Affinity> {
        // Rows outside the pool are read one KV head at a time.
        if sequence.kept.cold.is_some() || sequence.kept.memory.is_some() {
            return None;
        }
        let (heads, codec) = self.joint_keys(layer, sequence)?;
        let table = &sequence.tables[self.geometry.group(sequence.owner(layer), 0)];
        (query_rows <= CODED_QUERY_ROWS).then(|| Affinity {
            basis: std::sync::Arc::as_ptr(codec.basis()) as usize,
            heads,
            first: table.keys.get(1).map(|entry| entry.slot),
        })
    }

    /// Whether a sequence's blocks are jointly coded.
    pub(super) fn is_coded(&self, layer: usize, sequence: &Sequence) -> bool {
        self.joint_keys(layer, sequence).is_some()
    }

    /// Some blocks of one job over all heads of a head group. `sums`: of [`Stride`], by work, `[heads, rows]`, to which
    /// they are added.
    pub(super) fn attend_coded(
        &self,
        works: &[Work<'_>],
        (from, to): (usize, usize),
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let Some(first) = works.first() else { return };
        let (dim, heads, block_size) = (first.l.head_dim, first.heads, self.geometry.block_size());
        let rows: usize = works.iter().map(Work::rows).sum();
        tile.resize(heads * rows, dim, heads * dim, block_size);
        self.attend_bytes(works, (from, to), sums, tile);
    }

    /// Turns the sums of one job over all its blocks back. `tile.mixed` becomes `[heads, rows of all works,
    /// head_dim]`.
    pub(super) fn finish_coded(&self, works: &[Work<'_>], sums: &Sums, tile: &mut Tile) {
        let Some(first) = works.first() else { return };
        let rows: usize = works.iter().map(Work::rows).sum();
        tile.mixed.resize(first.heads * rows * first.l.head_dim, 0.0);
        self.finish_bytes(works, sums, tile);
    }

    /// Keys and values of a sealed block that all queries see.
    fn sealed_entries(&self, work: &Work<'_>, block: usize) -> Option<[Entry; 2]> {
        let v = work.visible(block, self.geometry.block_size())?;
        let group = self.geometry.group(work.layer, work.kv_head);
        let own = work.own_block(block)?;
        let entry = |part| work.sequence.entry(group, part, own);
        let whole = own < work.sequence.num_sealed && (v.t0, v.t1) == (0, work.len);
        whole.then(|| [entry(0), entry(1)])
    }

    /// The same, with their codecs, if they are jointly coded.
    fn coded_entries(
        &self,
        work: &Work<'_>,
        block: usize,
    ) -> Option<([Entry; 2], [&JointCodec; 2])> {
        let own = self.sealed_entries(work, block)?;
        let codec = |part: usize| {
            let format = &self.formats.get(own[part].format).layers[work.layer];
            format.groups[work.kv_head / format.heads][part].joint()
        };
        Some((own, [codec(0)?, codec(1)?]))
    }

    /// A block of another kind, or one that not all queries see: head by head, into the plain channels of
    /// the sums. `place`: the first row of the first head, and rows from one head to the next.
    fn plain_block(
        &self,
        work: &Work<'_>,
        v: &Visible,
        (first_row, rows): (usize, usize),
        sums: &mut Sums,
        tile: &mut Tile,
    ) {
        let stride = Stride::of(work).row;
        for head in 0..work.heads {
            let first = head * rows + first_row;
            let (states, values) = (&mut sums.states[first..], &mut sums.values[first * stride..]);
            self.load_queries(work, work.kv_head + head, tile);
            let kv_head = work.kv_head + head;
            self.attend_visible(work, v, kv_head, states, values, stride, tile);
        }
    }
}
