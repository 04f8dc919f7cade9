//! Block tables: which slots hold a sequence's keys and values of one group.

use half::f16;

use crate::format::FormatId;
use crate::pool::SlotId;

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

/// The blocks of one sequence in one (layer, KV head). Entry `i` covers positions `i · block_size ..`;
/// keys and values have their own slots, so that they can be shared, coded and dropped apart. Where
/// several heads are coded together their tables name the same slot. The
/// last entry is the tail: the only block that is written to.
#[derive(Debug, Clone, Default)]
pub struct BlockTable {
    /// Key blocks in order of position.
    pub keys: Vec<Entry>,
    /// Value blocks in order of position.
    pub values: Vec<Entry>,
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

    /// Keys and values, block by block.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.keys.iter().chain(&self.values)
    }
}
