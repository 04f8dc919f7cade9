//! Block tables: which slots hold a sequence's keys and values of one group.

use half::f16;

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
    pub format: Format,
}

/// How a slot is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As tails are written.
    Tail,
    /// By the recipe's codec for sealed blocks.
    Sealed,
}

impl Entry {
    /// An entry that reads a slot as tails are written.
    pub fn tail(slot: SlotId) -> Self {
        Self { slot, gain: f16::ONE, format: Format::Tail }
    }

    /// An entry that reads a slot by the recipe's codec.
    pub fn sealed(slot: SlotId) -> Self {
        Self { slot, gain: f16::ONE, format: Format::Sealed }
    }
}

/// The blocks of one sequence in one (layer, KV head). Entry `i` covers positions `i · block_size ..`;
/// keys and values have their own slots, so that they can be shared, coded and dropped apart. The
/// last entry is the tail: the only block that is written to.
#[derive(Debug, Clone, Default)]
pub struct BlockTable {
    /// Key blocks in order of position.
    pub keys: Vec<Entry>,
    /// Value blocks in order of position.
    pub values: Vec<Entry>,
}

impl BlockTable {
    /// Keys and values, block by block.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.keys.iter().chain(&self.values)
    }
}
