//! The cache of one model: sequences append, seal, read and free through it.

use kvasir_kernels::RopeTable;

use crate::codec::Part;
use crate::config::Recipe;
use crate::error::{CacheError, Result};
use crate::frame::Frame;
use crate::geometry::Geometry;
use crate::pool::{BlockPool, ClassId};
use crate::prefix::{BlockHash, PrefixCache};
use crate::sequence::{Sequence, SequenceId};

/// What a [`KvCache`] is made of.
#[derive(Debug)]
pub struct CacheConfig {
    /// Shapes of the model and the block size.
    pub geometry: Geometry,
    /// The model's RoPE tables, as [`crate::LayerGeometry::rope`] numbers them.
    pub ropes: Vec<RopeTable>,
    /// How blocks are stored.
    pub recipe: Recipe,
    /// Budget of the block pool.
    pub budget_bytes: usize,
    /// Whether equal prefixes share blocks.
    pub prefix_caching: bool,
}

/// Gauges of a cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// What all cached tokens would take in f16: every sequence's tokens, and unused prefixes.
    pub logical_bytes: usize,
    /// What they take.
    pub physical_bytes: usize,
    /// Of `physical_bytes`, what unused prefixes take; freed on demand.
    pub evictable_bytes: usize,
    /// The budget.
    pub budget_bytes: usize,
    /// Most bytes ever handed out.
    pub peak_physical_bytes: usize,
    /// Sequences.
    pub num_sequences: usize,
    /// Blocks of tokens in the prefix cache.
    pub num_prefix_blocks: usize,
    /// What the pool has taken from the budget: whole slabs, and metadata.
    pub reserved_bytes: usize,
    /// Values that were NaN, infinite or too large to store, since the start.
    pub num_clamped: u64,
}

/// See the crate's documentation.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) geometry: Geometry,
    pub(crate) frame: Frame,
    pub(crate) pool: BlockPool,
    recipe: Recipe,
    pub(crate) prefix: PrefixCache,
    prefix_caching: bool,
    /// Slot class of every group's tails.
    pub(crate) group_class: Vec<ClassId>,
    /// Slots that one tail block of tokens takes, by class.
    pub(crate) block_slots: Vec<(ClassId, usize)>,
    /// Slot classes of every group's sealed keys and values; empty if tails keep their slots.
    pub(crate) sealed_class: Vec<[ClassId; 2]>,
    /// Slots that one sealed block of tokens takes, by class.
    pub(crate) sealed_slots: Vec<(ClassId, usize)>,
    /// Most tokens written between two commits.
    max_chunk: usize,
    /// One block while it is sealed.
    pub(crate) block_rows: Vec<f32>,
    pub(crate) sequences: Vec<Option<Sequence>>,
    pub(crate) generations: Vec<u32>,
    /// One rotated key, or one value, while it is written.
    pub(crate) row: Vec<f32>,
    pub(crate) num_clamped: u64,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    /// A layer that names a RoPE table that is not there.
    pub fn new(config: CacheConfig) -> Result<Self> {
        let CacheConfig { geometry, ropes, recipe, budget_bytes, prefix_caching } = config;
        let frame = Frame::new(ropes);
        for (layer, l) in geometry.layers().iter().enumerate() {
            if let Some(rope) = l.rope.filter(|r| *r >= frame.num_tables()) {
                let what = format!("RoPE table {rope} of {} does not exist", frame.num_tables());
                return Err(CacheError::Geometry { layer, what });
            }
        }
        let tail = recipe.codec().tail();
        let slot_bytes = |dim: usize| tail.slot_bytes(geometry.block_size(), dim);
        let head_dims = || geometry.layers().iter().map(|l| l.head_dim);
        let mut pool = BlockPool::new(budget_bytes, head_dims().map(slot_bytes).max().unwrap_or(0));
        let group_class: Vec<ClassId> =
            geometry.groups().map(|(_, l)| pool.class(slot_bytes(l.head_dim))).collect();
        let block_slots = count_classes(group_class.iter().flat_map(|c| [*c, *c]));
        let mut sealed_class = Vec::new();
        if let (Some(keys), Some(values)) =
            (recipe.codec().sealed(Part::Keys), recipe.codec().sealed(Part::Values))
        {
            sealed_class.extend(geometry.groups().map(|(_, l)| {
                [keys, values].map(|c| pool.class(c.slot_bytes(geometry.block_size(), l.head_dim)))
            }));
        }
        let sealed_slots = count_classes(sealed_class.iter().flatten().copied());
        let block_rows = head_dims().max().unwrap_or(0) * geometry.block_size();
        let row = vec![0.0; head_dims().max().unwrap_or(0)];
        Ok(Self {
            geometry,
            frame,
            pool,
            recipe,
            prefix: PrefixCache::default(),
            prefix_caching,
            group_class,
            block_slots,
            sealed_class,
            sealed_slots,
            max_chunk: usize::MAX,
            block_rows: vec![0.0; block_rows],
            sequences: Vec::new(),
            generations: Vec::new(),
            row,
            num_clamped: 0,
        })
    }

    /// Shapes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// How blocks are stored.
    pub fn recipe(&self) -> Recipe {
        self.recipe
    }

    /// Bytes of the budget that one sequence of `tokens` tokens takes when it is alone. What is larger
    /// than the budget can never run.
    pub fn bytes_alone(&self, tokens: usize) -> usize {
        let blocks = self.geometry.blocks_for(tokens);
        let slots = self.slots_for(blocks);
        self.pool.bytes_alone(&slots, blocks * self.metadata_per_block())
    }

    /// Says that no step writes more than `tokens` tokens of one sequence, so that a long sequence never
    /// holds more unsealed blocks than that. Unlimited until it is said.
    pub fn set_max_chunk(&mut self, tokens: usize) {
        self.max_chunk = tokens;
    }

    /// Slots of `blocks` blocks while the last of them are being written.
    fn slots_for(&self, blocks: usize) -> Vec<(ClassId, usize)> {
        let open = match self.sealed_slots.is_empty() {
            true => blocks,
            // A chunk may begin and end inside a block.
            false => blocks.min(self.geometry.blocks_for(self.max_chunk).saturating_add(1)),
        };
        let tails = self.block_slots.iter().map(|(c, n)| (*c, n * open));
        let mut slots: Vec<(ClassId, usize)> = tails.collect();
        for (class, n) in &self.sealed_slots {
            add_class(&mut slots, *class, n * blocks);
        }
        slots
    }

    /// Table entries, and the prefix cache's copy of them.
    fn metadata_per_block(&self) -> usize {
        let node = PrefixCache::node_bytes(2 * self.geometry.num_groups());
        self.geometry.table_bytes_per_block() + if self.prefix_caching { node } else { 0 }
    }

    /// Adds an empty sequence. `salt` separates tenants: prefixes are shared within equal salts only.
    pub fn add_sequence(&mut self, salt: Option<&str>) -> SequenceId {
        let chain = self
            .prefix_caching
            .then(|| BlockHash::root(salt, &self.recipe.to_string(), self.geometry.block_size()));
        let sequence = Sequence::new(self.geometry.num_groups(), chain);
        let index = match self.sequences.iter().position(Option::is_none) {
            Some(index) => {
                self.sequences[index] = Some(sequence);
                index
            }
            None => {
                self.sequences.push(Some(sequence));
                self.generations.push(0);
                self.sequences.len() - 1
            }
        };
        SequenceId { index: index as u32, generation: self.generations[index] }
    }

    pub(crate) fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        find(&self.sequences, &self.generations, id)
    }

    /// Takes a sequence out while it is worked on; callers put it back.
    fn take(&mut self, id: SequenceId) -> Result<Sequence> {
        self.sequence(id)?;
        self.sequences[id.index as usize]
            .take()
            .ok_or_else(|| CacheError::UnknownSequence { id: id.to_string() })
    }

    pub(crate) fn with_sequence<T>(
        &mut self,
        id: SequenceId,
        work: impl FnOnce(&mut Self, &mut Sequence) -> Result<T>,
    ) -> Result<T> {
        let mut sequence = self.take(id)?;
        let result = work(self, &mut sequence);
        self.sequences[id.index as usize] = Some(sequence);
        result
    }

    /// Committed tokens of a sequence.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn num_tokens(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequence(id)?.num_tokens)
    }

    /// Gives an empty sequence the cached blocks of the longest known prefix of `tokens`, but never all
    /// of them: at least one token is left to compute. Returns the tokens found.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn match_prefix(&mut self, id: SequenceId, tokens: &[u32]) -> Result<usize> {
        let block_size = self.geometry.block_size();
        self.with_sequence(id, |cache, sequence| {
            let Some(mut chain) = sequence.chain.filter(|_| sequence.num_blocks() == 0) else {
                return Ok(0);
            };
            let usable = tokens.len().saturating_sub(1) / block_size;
            for block in tokens.chunks_exact(block_size).take(usable) {
                let hash = chain.child(block);
                let Some(node) = cache.prefix.find(&hash) else { break };
                // Pinned first, so that making room for the table cannot evict what was found.
                cache.prefix.acquire(node, &mut cache.pool)?;
                let table_bytes = cache.geometry.table_bytes_per_block();
                if !cache.prefix.charge(table_bytes, &mut cache.pool)? {
                    cache.prefix.release(node, &mut cache.pool)?;
                    break;
                }
                let entries = cache.prefix.entries(node)?;
                for (table, pair) in sequence.tables.iter_mut().zip(entries.chunks_exact(2)) {
                    table.keys.push(pair[0]);
                    table.values.push(pair[1]);
                }
                sequence.nodes.push(node);
                sequence.num_sealed += 1;
                chain = hash;
            }
            sequence.chain = Some(chain);
            sequence.num_tokens = sequence.num_sealed * block_size;
            sequence.num_reserved = sequence.num_tokens;
            cache.frame.grow(sequence.num_tokens + 1);
            Ok(sequence.num_tokens)
        })
    }

    /// Whether equal prefixes share blocks.
    pub fn prefix_caching(&self) -> bool {
        self.prefix_caching
    }

    /// Tokens of the longest known prefix, and what evicting its unused blocks would free.
    fn lookup_prefix(&self, salt: Option<&str>, tokens: &[u32]) -> (usize, usize) {
        let block_size = self.geometry.block_size();
        let usable = tokens.len().saturating_sub(1) / block_size;
        let mut chain = BlockHash::root(salt, &self.recipe.to_string(), block_size);
        let (mut found, mut evictable) = (0, 0);
        for block in tokens.chunks_exact(block_size).take(usable) {
            chain = chain.child(block);
            let Some(node) = self.prefix.find(&chain) else { break };
            found += block_size;
            evictable += self.prefix.evictable_bytes_of(node);
        }
        (found, evictable)
    }

    /// Whether a new sequence of `tokens`, and `headroom` tokens more, would fit: with `reuse` it takes
    /// known prefixes from the cache; other unused prefixes count as room. An estimate for admission
    /// that changes nothing: [`Self::reserve`] decides. O(tokens).
    pub fn fits_new(
        &self,
        salt: Option<&str>,
        tokens: &[u32],
        reuse: bool,
        headroom: usize,
    ) -> bool {
        let (found, kept) = match reuse && self.prefix_caching {
            true => self.lookup_prefix(salt, tokens),
            false => (0, 0),
        };
        let all = self.geometry.blocks_for(tokens.len() + headroom);
        let blocks = all - found / self.geometry.block_size();
        let slots = self.slots_for(blocks);
        let metadata = blocks * self.metadata_per_block()
            + found / self.geometry.block_size() * self.geometry.table_bytes_per_block();
        if self.pool.can_allocate(&slots, metadata) {
            return true;
        }
        let room = self.prefix.evictable_bytes().saturating_sub(kept);
        let pinned = self.pool.reserved_bytes().saturating_sub(room);
        pinned + self.pool.bytes_alone(&slots, metadata) <= self.pool.budget_bytes()
    }

    /// Frees a sequence. Its sealed blocks stay in the prefix cache until room is needed.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn remove_sequence(&mut self, id: SequenceId) -> Result<()> {
        let sequence = self.take(id)?;
        self.generations[id.index as usize] += 1;
        self.pool.discharge_metadata(sequence.num_blocks() * self.geometry.table_bytes_per_block());
        let entries = sequence.tables.iter().flat_map(|t| t.entries()).map(|e| e.slot);
        for slot in entries.chain(sequence.seal_slots.iter().flatten().copied()) {
            self.pool.release(slot)?;
        }
        // The deepest block leaves first, so that it is evicted first.
        for node in sequence.nodes.iter().rev() {
            self.prefix.leave(*node)?;
        }
        Ok(())
    }

    /// Logical and physical bytes of one sequence, blocks it shares counted whole.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn sequence_bytes(&self, id: SequenceId) -> Result<(usize, usize)> {
        let sequence = self.sequence(id)?;
        let slots = sequence.tables.iter().flat_map(|t| t.entries());
        let bytes: usize = slots.map(|e| self.pool.size_of(e.slot)).sum();
        let tables = sequence.num_blocks() * self.geometry.table_bytes_per_block();
        Ok((sequence.num_tokens * self.geometry.logical_bytes_per_token(), bytes + tables))
    }

    /// Logical and physical bytes of one sequence's sealed blocks other than its first, with their table
    /// entries: what a recipe does to the long run of a sequence.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn sealed_bytes(&self, id: SequenceId) -> Result<(usize, usize)> {
        let sequence = self.sequence(id)?;
        let range = sequence.num_sealed.min(1)..sequence.num_sealed;
        let slots = sequence
            .tables
            .iter()
            .flat_map(|t| t.keys[range.clone()].iter().chain(&t.values[range.clone()]));
        let bytes: usize = slots.map(|e| self.pool.size_of(e.slot)).sum();
        let tokens = range.len() * self.geometry.block_size();
        let tables = range.len() * self.geometry.table_bytes_per_block();
        Ok((tokens * self.geometry.logical_bytes_per_token(), bytes + tables))
    }

    /// Evicts every unused prefix; returns the bytes freed.
    ///
    /// # Errors
    /// [`CacheError::Integrity`] if the books are wrong.
    pub fn reset_prefix_cache(&mut self) -> Result<usize> {
        let before = self.pool.physical_bytes();
        while self.prefix.evict_one(&mut self.pool)? {}
        Ok(before - self.pool.physical_bytes())
    }

    /// A snapshot. O(sequences).
    pub fn stats(&self) -> CacheStats {
        let tokens: usize = self.sequences.iter().flatten().map(|s| s.num_tokens).sum();
        let unused = self.prefix.num_unused() * self.geometry.block_size();
        CacheStats {
            logical_bytes: (tokens + unused) * self.geometry.logical_bytes_per_token(),
            physical_bytes: self.pool.physical_bytes(),
            evictable_bytes: self.prefix.evictable_bytes(),
            budget_bytes: self.pool.budget_bytes(),
            peak_physical_bytes: self.pool.peak_bytes(),
            num_sequences: self.sequences.iter().flatten().count(),
            num_prefix_blocks: self.prefix.len(),
            reserved_bytes: self.pool.reserved_bytes(),
            num_clamped: self.num_clamped,
        }
    }

    /// Recounts references, users and bytes over pool, prefix cache and sequences. O(everything).
    ///
    /// # Errors
    /// [`CacheError::Integrity`] naming the first numbers that disagree.
    pub fn check_integrity(&self) -> Result<()> {
        self.pool.check()?;
        self.prefix.check()?;
        let agree = |what: &str, counted: usize, found: usize| {
            if counted == found {
                Ok(())
            } else {
                let what = format!("{what}: {counted} counted, {found} found");
                Err(CacheError::Integrity { what })
            }
        };
        let live = || self.sequences.iter().flatten();
        let entries: usize = live().flat_map(|s| &s.tables).map(|t| t.entries().count()).sum();
        let held: usize = live().flat_map(|s| &s.seal_slots).map(Vec::len).sum();
        let references = entries + held + self.prefix.num_references();
        agree("slot references", self.pool.num_references(), references)?;
        agree("prefix users", self.prefix.num_users(), live().map(|s| s.nodes.len()).sum())?;
        let tables: usize =
            live().map(|s| s.num_blocks() * self.geometry.table_bytes_per_block()).sum();
        let metadata = tables + self.prefix.metadata_bytes();
        agree("metadata bytes", self.pool.metadata_bytes(), metadata)?;
        for s in live() {
            let blocks = self.geometry.blocks_for(s.num_reserved);
            agree("blocks of a sequence", s.num_blocks(), blocks.max(s.num_sealed))?;
            let sealed = s.num_tokens / self.geometry.block_size();
            agree("sealed blocks of a sequence", s.num_sealed, sealed)?;
        }
        Ok(())
    }
}

/// Adds to the count of a class.
fn add_class(counts: &mut Vec<(ClassId, usize)>, class: ClassId, n: usize) {
    match counts.iter_mut().find(|(c, _)| *c == class) {
        Some((_, count)) => *count += n,
        None => counts.push((class, n)),
    }
}

fn count_classes(classes: impl Iterator<Item = ClassId>) -> Vec<(ClassId, usize)> {
    let mut counts = Vec::new();
    classes.for_each(|class| add_class(&mut counts, class, 1));
    counts
}

/// The sequence of an id; a function of fields, so that others stay free to borrow.
pub(crate) fn find<'a>(
    sequences: &'a [Option<Sequence>],
    generations: &[u32],
    id: SequenceId,
) -> Result<&'a Sequence> {
    let index = id.index as usize;
    let found = sequences.get(index).and_then(Option::as_ref);
    found
        .filter(|_| generations.get(index) == Some(&id.generation))
        .ok_or_else(|| CacheError::UnknownSequence { id: id.to_string() })
}
