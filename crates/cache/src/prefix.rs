//! The prefix cache: full blocks of tokens by chained hash, so that equal beginnings of prompts are
//! computed and stored once. Least recently used blocks that no sequence needs are evicted on demand.
//!
//! A block's hash covers the tenant's salt, the recipe and every token up to the block's end, so a hit
//! means that the whole prefix is equal. BLAKE3 makes that an identity: no token is compared again.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use crate::error::{CacheError, Result};
use crate::pool::BlockPool;
use crate::table::Entry;

/// Identity of a prefix that ends at a block border.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// The empty prefix of one tenant under one recipe and its statistics.
    pub fn root(
        salt: Option<&str>,
        recipe: &str,
        block_size: usize,
        statistics: &[u8; 32],
    ) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"kvasir prefix v1\0");
        hasher.update(recipe.as_bytes());
        hasher.update(&(block_size as u64).to_le_bytes());
        hasher.update(statistics);
        // "no salt" and "empty salt" are different tenants.
        if let Some(salt) = salt {
            hasher.update(b"\x01");
            hasher.update(salt.as_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// This prefix followed by one block of tokens.
    pub fn child(&self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// Index of a cached block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

#[derive(Debug)]
struct Node {
    hash: BlockHash,
    /// Key and value entry of every group: `[groups, 2]`.
    entries: Box<[Entry]>,
    /// Blocks before this one: deeper blocks are evicted first.
    depth: u32,
    /// Sequences whose tables hold these entries.
    users: u32,
    /// Tick of the last time a user left.
    last_used: u64,
}

/// Memory of a node beside its entries, about: node, map entry, eviction entry.
const NODE_BYTES: usize = 192;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct PrefixCache {
    by_hash: FxHashMap<BlockHash, NodeId>,
    nodes: Vec<Option<Node>>,
    vacant: Vec<NodeId>,
    /// Unused blocks in order of eviction: oldest first, and of one age the deepest first.
    unused: BTreeSet<(u64, std::cmp::Reverse<u32>, NodeId)>,
    tick: u64,
    /// Metadata of unused blocks.
    idle_metadata: usize,
    /// Blocks that room was made of, since the start.
    num_evicted: u64,
}

impl PrefixCache {
    /// Metadata bytes of a node with this many entries.
    pub(crate) fn node_bytes(num_entries: usize) -> usize {
        NODE_BYTES + num_entries * crate::geometry::ENTRY_BYTES
    }

    pub(crate) fn find(&self, hash: &BlockHash) -> Option<NodeId> {
        self.by_hash.get(hash).copied()
    }

    /// Number of blocks held.
    pub(crate) fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Blocks that no sequence uses.
    pub(crate) fn num_unused(&self) -> usize {
        self.unused.len()
    }

    /// Bytes that evicting every unused block would free: slots that nobody else reads, and metadata.
    pub(crate) fn evictable_bytes(&self, pool: &BlockPool) -> usize {
        pool.idle_bytes() + self.idle_metadata
    }

    fn node(&self, id: NodeId) -> Result<&Node> {
        self.nodes.get(id.0 as usize).and_then(Option::as_ref).ok_or_else(|| missing(id))
    }

    fn node_mut(&mut self, id: NodeId) -> Result<&mut Node> {
        self.nodes.get_mut(id.0 as usize).and_then(Option::as_mut).ok_or_else(|| missing(id))
    }

    /// Adds a user, who takes a reference to every slot.
    pub(crate) fn acquire(&mut self, id: NodeId, pool: &mut BlockPool) -> Result<()> {
        let node = self.node_mut(id)?;
        let first = node.users == 0;
        node.users += 1;
        let key = (node.last_used, std::cmp::Reverse(node.depth), id);
        if first {
            self.unused.remove(&key);
            self.idle_metadata -= Self::node_bytes(self.node(id)?.entries.len());
        }
        for entry in &self.node(id)?.entries {
            if first {
                pool.unpark(entry.slot)?;
            }
            pool.retain(entry.slot)?;
        }
        Ok(())
    }

    /// Undoes [`Self::acquire`].
    pub(crate) fn release(&mut self, id: NodeId, pool: &mut BlockPool) -> Result<()> {
        for entry in &self.node(id)?.entries {
            pool.release(entry.slot)?;
        }
        self.leave(id, pool)
    }

    /// The entries of a cached block.
    pub(crate) fn entries(&self, id: NodeId) -> Result<&[Entry]> {
        Ok(&self.node(id)?.entries)
    }

    /// What a block holds back from eviction by being used again, at most; 0 while it is used.
    pub(crate) fn evictable_bytes_of(&self, id: NodeId, pool: &BlockPool) -> usize {
        let Some(node) = self.node(id).ok().filter(|n| n.users == 0) else { return 0 };
        let slots = node.entries.iter().enumerate();
        // Heads that are coded together name one slot: entries of a part stand two apart.
        let distinct = slots.filter(|(i, e)| *i < 2 || node.entries[i - 2].slot != e.slot);
        let slots: usize = distinct.map(|(_, e)| pool.size_of(e.slot)).sum();
        slots + Self::node_bytes(node.entries.len())
    }

    /// Every entry of every block, with its place among its block's.
    pub(crate) fn all_entries(&self) -> impl Iterator<Item = (usize, &Entry)> {
        self.nodes.iter().flatten().flat_map(|n| n.entries.iter().enumerate())
    }

    /// Points every entry at the slot that took the place of its own.
    pub(crate) fn remap(&mut self, change: &mut dyn FnMut(&mut Entry)) {
        for node in self.nodes.iter_mut().flatten() {
            node.entries.iter_mut().for_each(&mut *change);
        }
    }

    /// Takes budget for tables or nodes, evicting unused blocks as needed; false if there is none.
    pub(crate) fn charge(&mut self, bytes: usize, pool: &mut BlockPool) -> Result<bool> {
        while pool.charge_metadata(bytes).is_err() {
            if !self.evict_one(pool)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Publishes a sequence's freshly sealed block; the sequence becomes its first user. Returns
    /// `None`, having published nothing, if the budget has no room for the entry itself.
    pub(crate) fn publish(
        &mut self,
        hash: BlockHash,
        depth: usize,
        entries: Box<[Entry]>,
        pool: &mut BlockPool,
    ) -> Result<Option<NodeId>> {
        if !self.charge(Self::node_bytes(entries.len()), pool)? {
            return Ok(None);
        }
        for entry in &entries {
            pool.retain(entry.slot)?;
        }
        let node = Node { hash, entries, depth: depth as u32, users: 1, last_used: 0 };
        let id = match self.vacant.pop() {
            Some(id) => id,
            None => {
                self.nodes.push(None);
                NodeId(self.nodes.len() as u32 - 1)
            }
        };
        self.nodes[id.0 as usize] = Some(node);
        self.by_hash.insert(hash, id);
        Ok(Some(id))
    }

    /// Removes a user. The caller has released, or is about to release, its own references.
    pub(crate) fn leave(&mut self, id: NodeId, pool: &mut BlockPool) -> Result<()> {
        self.tick += 1;
        let tick = self.tick;
        let node = self.node_mut(id)?;
        node.users = node.users.checked_sub(1).ok_or_else(|| CacheError::Integrity {
            what: format!("prefix block {id:?} left by more sequences than used it"),
        })?;
        if node.users == 0 {
            node.last_used = tick;
            let key = (tick, std::cmp::Reverse(node.depth), id);
            self.unused.insert(key);
            let entries = &self.node(id)?.entries;
            for entry in entries {
                pool.park(entry.slot)?;
            }
            self.idle_metadata += Self::node_bytes(entries.len());
        }
        Ok(())
    }

    /// Evicts the least recently used block; false if every block is in use.
    pub(crate) fn evict_one(&mut self, pool: &mut BlockPool) -> Result<bool> {
        let Some((_, _, id)) = self.unused.pop_first() else { return Ok(false) };
        let node = self.nodes[id.0 as usize].take().ok_or_else(|| missing(id))?;
        self.by_hash.remove(&node.hash);
        self.vacant.push(id);
        self.num_evicted += 1;
        self.idle_metadata -= Self::node_bytes(node.entries.len());
        pool.discharge_metadata(Self::node_bytes(node.entries.len()));
        for entry in &node.entries {
            pool.unpark(entry.slot)?;
            pool.release(entry.slot)?;
        }
        Ok(true)
    }

    /// Blocks that room was made of, since the start.
    pub(crate) fn num_evicted(&self) -> u64 {
        self.num_evicted
    }

    /// Metadata bytes of all nodes.
    pub(crate) fn metadata_bytes(&self) -> usize {
        self.nodes.iter().flatten().map(|n| Self::node_bytes(n.entries.len())).sum()
    }

    /// References held by all nodes.
    pub(crate) fn num_references(&self) -> usize {
        self.nodes.iter().flatten().map(|n| n.entries.len()).sum()
    }

    /// Users of all nodes together.
    pub(crate) fn num_users(&self) -> usize {
        self.nodes.iter().flatten().map(|n| n.users as usize).sum()
    }

    /// Recounts users, hashes and evictable bytes. O(nodes).
    pub(crate) fn check(&self) -> Result<()> {
        let unused: Vec<&Node> = self.nodes.iter().flatten().filter(|n| n.users == 0).collect();
        let bytes: usize = unused.iter().map(|n| Self::node_bytes(n.entries.len())).sum();
        let live = self.nodes.iter().flatten().count();
        if unused.len() != self.unused.len()
            || bytes != self.idle_metadata
            || live != self.by_hash.len()
        {
            return Err(CacheError::Integrity {
                what: format!(
                    "prefix cache: {} unused blocks listed, {} found; {} bytes of them counted, \
                     {bytes} found; {} hashes for {live} blocks",
                    self.unused.len(),
                    unused.len(),
                    self.idle_metadata,
                    self.by_hash.len(),
                ),
            });
        }
        Ok(())
    }
}

fn missing(id: NodeId) -> CacheError {
    CacheError::Integrity { what: format!("prefix block {id:?} does not exist") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::FormatId;

    fn pool_with(slots: usize) -> (BlockPool, Vec<Entry>) {
        let mut pool = BlockPool::new(1 << 20, 64);
        let class = pool.class(64);
        let entries = (0..slots)
            .map(|_| Entry::new(pool.allocate(class).unwrap(), FormatId::default()))
            .collect();
        (pool, entries)
    }

    #[test]
    fn hashes_separate_tenants_recipes_and_orders() {
        let root = BlockHash::root(None, "f16", 32, &[0; 32]);
        assert_ne!(root, BlockHash::root(Some(""), "f16", 32, &[0; 32]));
        assert_ne!(root, BlockHash::root(None, "f32", 32, &[0; 32]));
        assert_ne!(root, BlockHash::root(None, "f16", 16, &[0; 32]));
        assert_ne!(root.child(&[1, 2]), root.child(&[2, 1]));
        assert_ne!(root.child(&[1]).child(&[2]), root.child(&[1, 2]));
        assert_eq!(root.child(&[1, 2]), root.child(&[1, 2]));
    }

    #[test]
    fn the_oldest_goes_first_and_of_one_sequence_the_deepest() {
        let (mut pool, entries) = pool_with(3);
        let mut cache = PrefixCache::default();
        let root = BlockHash::root(None, "f16", 16, &[0; 32]);
        let hashes = [root.child(&[1]), root.child(&[1]).child(&[2]), root.child(&[9])];
        let mut ids = Vec::new();
        for (i, hash) in hashes.iter().enumerate() {
            let entry = Box::new([entries[i]]);
            let depth = usize::from(i == 1);
            ids.push(cache.publish(*hash, depth, entry, &mut pool).unwrap().unwrap());
            pool.release(entries[i].slot).unwrap();
        }
        assert!(!cache.evict_one(&mut pool).unwrap());
        // Sequences leave their deepest block first.
        for id in [ids[1], ids[0], ids[2]] {
            cache.leave(id, &mut pool).unwrap();
        }
        cache.check().unwrap();
        assert_eq!(cache.num_unused(), 3);
        let evicted: Vec<usize> = (0..3)
            .map(|_| {
                let before: Vec<bool> = hashes.iter().map(|h| cache.find(h).is_some()).collect();
                assert!(cache.evict_one(&mut pool).unwrap());
                (0..3).find(|i| before[*i] && cache.find(&hashes[*i]).is_none()).unwrap()
            })
            .collect();
        assert_eq!(evicted, [1, 0, 2]);
        assert_eq!(pool.physical_bytes(), 0);
        cache.check().unwrap();
    }

    #[test]
    fn a_used_block_is_not_evicted() {
        let (mut pool, entries) = pool_with(1);
        let mut cache = PrefixCache::default();
        let hash = BlockHash::root(None, "f16", 16, &[0; 32]).child(&[1]);
        let id = cache.publish(hash, 0, Box::new([entries[0]]), &mut pool).unwrap().unwrap();
        cache.leave(id, &mut pool).unwrap();
        cache.acquire(id, &mut pool).unwrap();
        assert_eq!(cache.entries(id).unwrap(), [entries[0]]);
        assert!(!cache.evict_one(&mut pool).unwrap());
        assert_eq!(cache.evictable_bytes(&pool), 0);
        assert!(cache.leave(id, &mut pool).is_ok());
        assert!(cache.leave(id, &mut pool).is_err());
    }
}
