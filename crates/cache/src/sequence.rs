//! One sequence's share of the cache.

use std::collections::VecDeque;

use crate::config::{KeyFrame, Recipe};
use crate::format::FormatId;
use crate::geometry::Geometry;
use crate::pool::SlotId;
use crate::prefix::{BlockHash, NodeId};
use crate::project::Owners;
use crate::recode::Watched;
use crate::residual::Residual;
use crate::select::{Kept, Selection};
use crate::table::{BlockTable, Entry};

/// Names a sequence in a [`crate::KvCache`]; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}

/// Life of a token: *reserved* (a slot exists), *written* (every layer put its key and value there),
/// *committed* (counts), and, when its block is full, *sealed* (immutable, shareable).
///
/// ```text
/// 0 ───────── num_sealed · block_size ───── num_tokens ───── num_reserved
///   sealed, maybe shared     │   committed tail   │   being written   │
/// ```
///
/// Where a policy chose among the tokens of the prompt, all this begins at `origin`, and its first
/// `released` blocks are gone.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// One per group.
    pub(crate) tables: Vec<BlockTable>,
    pub(crate) num_tokens: usize,
    pub(crate) num_reserved: usize,
    /// Sealed blocks.
    pub(crate) num_sealed: usize,
    /// Prefix blocks in use, one per leading sealed block that the prefix cache knows.
    pub(crate) nodes: Vec<NodeId>,
    /// Hash of the sealed blocks; `None` if this sequence takes no part in prefix caching.
    pub(crate) chain: Option<BlockHash>,
    /// Tokens after the last sealed block.
    pub(crate) tail_tokens: Vec<u32>,
    /// Slots taken by `reserve` for blocks that will be sealed, in the order of the format's parts; empty
    /// for blocks that keep their tail's slots. Oldest first.
    pub(crate) seal_slots: VecDeque<Vec<SlotId>>,
    /// How it is encoded.
    pub(crate) recipe: Recipe,
    /// If some layers read another's keys and values.
    pub(crate) owners: Option<Owners>,
    /// Format of the tail.
    pub(crate) tail_format: FormatId,
    /// Formats of the first block and of the others, once sealed.
    pub(crate) sealed_formats: [FormatId; 2],
    /// Tokens that the last block's slots have room for.
    pub(crate) tail_capacity: usize,
    /// Values of the last sealed block as they are read while its tokens leave the window of exact values.
    pub(crate) residual: Residual,
    /// Whether blocks with values that were no numbers are coded like others.
    pub(crate) codes_odd_blocks: bool,
    /// Whose blocks it may share.
    pub(crate) tenant: BlockHash,
    /// Leading sealed blocks that the tree has seen.
    pub(crate) num_fused: usize,
    /// What is to be chosen from when the prompt is complete; until then nothing is coded.
    pub(crate) selection: Option<Box<Selection>>,
    /// Set while its recipe is to be decided.
    pub(crate) watched: Option<Watched>,
    /// What was chosen.
    pub(crate) kept: Kept,
    /// Position of the first token of the blocks in `tables`, those that were kept of the prompt aside.
    pub(crate) origin: usize,
    /// Blocks from there on that left the window of a policy, and the tables.
    pub(crate) released: usize,
}

impl Sequence {
    pub(crate) fn new(
        num_groups: usize,
        recipe: Recipe,
        tail_format: FormatId,
        sealed_formats: [FormatId; 2],
        tenant: BlockHash,
        prefix_caching: bool,
    ) -> Self {
        Self {
            tables: vec![BlockTable::default(); num_groups],
            num_tokens: 0,
            num_reserved: 0,
            num_sealed: 0,
            nodes: Vec::new(),
            chain: prefix_caching.then_some(tenant),
            tail_tokens: Vec::new(),
            seal_slots: VecDeque::new(),
            recipe,
            owners: None,
            tail_format,
            sealed_formats,
            tail_capacity: 0,
            residual: Residual::default(),
            codes_odd_blocks: false,
            tenant,
            num_fused: 0,
            selection: None,
            watched: None,
            kept: Kept::default(),
            origin: 0,
            released: 0,
        }
    }

    /// The frame that keys of its blocks are in. Before a policy has chosen nothing is coded, and prefixes are those of
    /// every recipe that keeps blocks as they are written.
    pub(crate) fn frame(&self) -> KeyFrame {
        if self.selection.is_some() { KeyFrame::BlockRelative } else { self.recipe.frame() }
    }

    /// The layer whose keys and values a layer reads.
    #[inline]
    pub(crate) fn owner(&self, layer: usize) -> usize {
        self.owners.as_ref().map_or(layer, |owners| owners[layer])
    }

    /// Whether a layer stores its own.
    #[inline]
    pub(crate) fn owns(&self, layer: usize) -> bool {
        self.owner(layer) == layer
    }

    /// Whether the tables of this sequence are empty in a layer.
    pub(crate) fn owns_group(&self, geometry: &Geometry, group: usize) -> bool {
        self.owners.is_none() || self.owns(geometry.layer_of(group).0)
    }

    /// Whether values of the last sealed block stay exact for a while.
    pub(crate) fn keeps_residual(&self) -> bool {
        self.selection.is_none() && self.recipe.keeps_residual()
    }

    /// The format that block `block` is sealed in.
    pub(crate) fn sealed_format(&self, block: usize) -> FormatId {
        self.sealed_formats[block.min(1)]
    }

    /// One block of one group as it is read.
    #[inline]
    pub(crate) fn entry(&self, group: usize, part: usize, block: usize) -> Entry {
        match self.residual.values.get(group) {
            Some(Some(values)) if part == 1 && block + 1 == self.num_sealed => *values,
            _ => self.tables[group].part(part)[block - self.released],
        }
    }

    /// Every reference to a slot that it holds, but for [`Self::slots_to_come`].
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.tables
            .iter()
            .flat_map(BlockTable::entries)
            .chain(self.residual.values.iter().flatten())
    }

    /// Blocks so far, the tail included, those that were released and those of the prompt's choice not.
    pub(crate) fn num_blocks(&self) -> usize {
        self.released + self.num_held()
    }

    /// Blocks in every table, the tail included.
    pub(crate) fn num_held(&self) -> usize {
        self.tables.first().map_or(0, |t| t.keys.len())
    }

    /// Every slot that is held for blocks to come.
    pub(crate) fn slots_to_come(&self) -> impl Iterator<Item = SlotId> {
        let kept = self.selection.iter().flat_map(|s| &s.slots);
        self.seal_slots.iter().flatten().chain(kept).copied()
    }

    /// Metadata bytes beside the table entries of its blocks.
    pub(crate) fn metadata_bytes(&self) -> usize {
        self.selection.as_ref().map_or(0, |s| s.charged) + self.kept.metadata_bytes
    }
}
