//! Blocks by name: who holds them, and which are only kept because they may be wanted again.

use std::collections::{BTreeMap, HashMap};

/// Names a block by its contents and all that precede it.
pub(super) type BlockId = u64;

#[derive(Debug, Clone, Copy)]
struct Block {
    /// Sequences that hold it.
    references: usize,
    /// When it was let go; its place in the order of eviction.
    released: u64,
}

/// Blocks of a prefix cache, least recently used first out.
#[derive(Debug, Default)]
pub(super) struct Pool {
    blocks: HashMap<BlockId, Block>,
    /// Those that nobody holds, by when they were let go.
    free: BTreeMap<u64, BlockId>,
    clock: u64,
}

impl Pool {
    /// Blocks that are there.
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds.
    pub(super) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// How many of `ids`, from the first, are there, and how many of those nobody holds.
    pub(super) fn matching(&self, ids: &[BlockId]) -> (usize, usize) {
        let found = ids.iter().map_while(|id| self.blocks.get(id));
        found.fold((0, 0), |(n, free), block| (n + 1, free + usize::from(block.references == 0)))
    }

    /// Holds a block, which comes into being if it is not there.
    pub(super) fn hold(&mut self, id: BlockId) {
        let block = self.blocks.entry(id).or_insert(Block { references: 0, released: u64::MAX });
        if block.references == 0 && block.released != u64::MAX {
            self.free.remove(&block.released);
        }
        block.references += 1;
    }

    /// Lets blocks go, the last first, so that the end of a prefix goes before its beginning; they are gone at once if `keep` is not set.
    pub(super) fn release(&mut self, ids: &[BlockId], keep: bool) {
        for id in ids.iter().rev() {
            let Some(block) = self.blocks.get_mut(id) else { continue };
            block.references -= 1;
            if block.references > 0 {
                continue;
            }
            if keep {
                self.clock += 1;
                block.released = self.clock;
                self.free.insert(self.clock, *id);
            } else {
                self.blocks.remove(id);
            }
        }
    }

    /// Takes out the block that nobody has held for longest; whether there was one.
    pub(super) fn evict(&mut self) -> bool {
        match self.free.pop_first() {
            Some((_, id)) => self.blocks.remove(&id).is_some(),
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_held_kept_found_and_evicted_in_order() {
        let mut pool = Pool::default();
        for id in [1, 2, 3] {
            pool.hold(id);
        }
        pool.hold(1);
        assert_eq!((pool.len(), pool.num_free()), (3, 0));
        pool.release(&[1, 2, 3], true);
        assert_eq!((pool.len(), pool.num_free()), (3, 2));
        assert_eq!(pool.matching(&[1, 2, 9, 3]), (2, 1));
        pool.hold(2);
        assert!(pool.evict() && !pool.evict());
        assert_eq!(pool.matching(&[1, 2, 3]), (2, 0));
        pool.release(&[2], false);
        assert_eq!(pool.matching(&[2]), (0, 0));
        assert_eq!(pool.len(), 1);
    }
}
