//! Block tables: which slots hold a sequence's keys and values of one group.

use half::f16;

use crate::format::FormatId;
use crate::pool::SlotId;
use crate::project::Channels;

/// One block of keys or of values, as one reader sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    /// Where the block lives.
    pub slot: SlotId,
    /// What the stored block is multiplied with for this reader; 1 unless a block that is merely
    /// similar is shared.
    pub gain: f16,
    /// How the slot is to be read.
    pub format: FormatId,
}

impl Entry {
    /// An entry that reads a slot as it is.
    pub fn new(slot: SlotId, format: FormatId) -> Self {
        Self { slot, gain: f16::ONE, format }
    }
}

/// How long a kept block is seen, and from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stays {
    /// Always.
    Always,
    /// Always; queries take their places in the cache for positions, of which this is the last.
    AsSink(usize),
    /// While its tokens, which follow each other, are in the window.
    InWindow,
}

/// A block of tokens that a policy kept. Keys are in the absolute frame, but for jointly coded ones.
#[derive(Debug, Clone)]
pub(crate) struct KeptBlock {
    /// Keys and values.
    pub(crate) entries: [Entry; 2],
    /// Tokens in it.
    pub(crate) rows: usize,
    /// Position of the first of them.
    pub(crate) first: usize,
    pub(crate) stays: Stays,
    /// Of keys that are turned by their row in the block: their positions.
    pub(crate) positions: Option<std::sync::Arc<[u32]>>,
}

/// The blocks of one sequence in one (layer, KV head). Entry `i` covers positions `i · block_size ..` (from the end of the
/// prompt on, if a policy chose among its tokens: those it kept stand before);
/// keys and values have their own slots, so that they can be shared, coded and dropped apart. Where
/// several heads are coded together their tables name the same slot. The
/// last entry is the tail: the only block that is written to.
#[derive(Debug, Clone, Default)]
pub struct BlockTable {
    /// Key blocks in order of position.
    pub keys: Vec<Entry>,
    /// Value blocks in order of position.
    pub values: Vec<Entry>,
    /// What a policy kept of the prompt.
    pub(crate) kept: Vec<KeptBlock>,
    /// Channels that keys of some of these have, if not all: those of formats with fewer.
    pub(crate) channels: Option<Channels>,
}

impl BlockTable {
    /// Keys (0) or values (1).
    pub(crate) fn part(&self, part: usize) -> &[Entry] {
        if part == 0 { &self.keys } else { &self.values }
    }

    /// Keys (0) or values (1).
    pub(crate) fn part_mut(&mut self, part: usize) -> &mut [Entry] {
        if part == 0 { &mut self.keys } else { &mut self.values }
    }

    /// Every entry.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.parts().map(|(_, entry)| entry)
    }

    /// Every entry, with its part.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (usize, &Entry)> {
        let kept = self.kept.iter().flat_map(|block| block.entries.iter().enumerate());
        let keys = self.keys.iter().map(|entry| (0, entry));
        kept.chain(keys).chain(self.values.iter().map(|entry| (1, entry)))
    }

    /// The same, to be changed.
    pub(crate) fn entries_mut(&mut self) -> impl Iterator<Item = &mut Entry> {
        let kept = self.kept.iter_mut().flat_map(|block| &mut block.entries);
        kept.chain(&mut self.keys).chain(&mut self.values)
    }
}
