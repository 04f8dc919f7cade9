//! The books of a cache: bytes by sequence and by layer, the gauges, and the recount of everything.

use std::sync::atomic::Ordering;

use rustc_hash::FxHashSet;

use crate::error::{CacheError, Result};
use crate::kv_cache::{KvCache, own_groups};
use crate::seal::SharingCounts;
use crate::select::Cold;
use crate::sequence::SequenceId;
use crate::sharing::online::SharingIndex;
use crate::sharing::sketch::SketchIndex;

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
    /// Blocks of unused prefixes that were given up for room, or on demand, since the start.
    pub num_evicted: u64,
    /// Parts of blocks that pressure coded again with fewer bits, since the start.
    pub num_lowered: u64,
    /// What the statistics of joint recipes take, beside `physical_bytes`.
    pub statistics_bytes: usize,
    /// Bytes of rows that are in files, not in `physical_bytes`.
    pub spilled_bytes: usize,
    /// What the index of sharing takes, in `physical_bytes`.
    pub sharing_index_bytes: usize,
    /// What sharing did.
    pub sharing: SharingCounts,
    /// Prompts that a policy chose from, by the share that stayed: up to a tenth, up to two, …
    pub kept_shares: [u64; 10],
    /// Nanoseconds spent on sealing blocks: finding what to share, and encoding.
    pub seal_nanos: u64,
    /// Nanoseconds spent on prompts whose recipe was decided late: on what was known of them, and on storing them anew, sealing
    /// included.
    pub recode_nanos: u64,
    /// Nanoseconds spent in attention, decoding of tiles included.
    pub attention_nanos: u64,
    /// Nanoseconds, of all threads together, spent on decoding blocks for attention.
    pub decode_nanos: u64,
}

impl KvCache {
    /// Bytes of networks, if a recipe in use has them.
    fn network_bytes(&self) -> usize {
        let used = self.recipes.iter().any(|recipe| recipe.remembers());
        let table = self.tables.less().ok().filter(|_| used);
        table.map_or(0, |table| table.num_bytes())
    }

    /// Logical and physical bytes of one sequence, blocks it shares with others counted whole.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn sequence_bytes(&self, id: SequenceId) -> Result<(usize, usize)> {
        self.bytes_of(&[id], false)
    }

    /// Logical and physical bytes of some sequences with their table entries, slots that several of them
    /// share counted once. With `sealed_only`, only sealed blocks other than each sequence's first: what a
    /// recipe does to the long run of a sequence.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn bytes_of(&self, ids: &[SequenceId], sealed_only: bool) -> Result<(usize, usize)> {
        let mut seen = FxHashSet::default();
        let (mut logical, mut physical) = (0, 0);
        for id in ids {
            let sequence = self.sequence(*id)?;
            let (range, tokens) = match sealed_only {
                true => {
                    let range = sequence.num_sealed.min(1)..sequence.num_sealed;
                    let tokens = range.len() * self.geometry.block_size();
                    (range, tokens)
                }
                false => (0..sequence.num_blocks(), sequence.num_tokens),
            };
            // What a policy kept stands for the prompt.
            let (range, tokens) = match sequence.origin {
                0 => (range, tokens),
                origin if sealed_only => (
                    sequence.released..sequence.num_sealed,
                    origin + sequence.num_sealed * self.geometry.block_size(),
                ),
                _ => (sequence.released..sequence.num_blocks(), tokens),
            };
            let held = range.start - sequence.released..range.end - sequence.released;
            for group in own_groups(&self.geometry, sequence) {
                let table = &sequence.tables[group];
                let open = table.keys[held.clone()].iter().chain(&table.values[held.clone()]);
                let kept = table.kept.iter().flat_map(|block| &block.entries);
                for entry in open.chain(kept) {
                    if seen.insert(entry.slot) {
                        physical += self.pool.size_of(entry.slot);
                    }
                }
            }
            if !sealed_only {
                let residual = sequence.residual.values.iter().flatten();
                let residual = residual.filter(|e| seen.insert(e.slot));
                physical += residual.map(|e| self.pool.size_of(e.slot)).sum::<usize>();
            }
            physical += range.len() * self.geometry.table_bytes_per_block();
            physical += sequence.metadata_bytes();
            logical += tokens * self.geometry.logical_bytes_per_token();
        }
        Ok((logical, physical))
    }

    /// Logical and physical bytes of every layer over all sequences, shared slots once. O(entries).
    pub fn layer_bytes(&self) -> Vec<(usize, usize)> {
        let mut seen = FxHashSet::default();
        let layers = self.geometry.layers().iter().enumerate();
        layers
            .map(|(layer, l)| {
                seen.clear();
                let (first, mut tokens, mut physical) = (self.geometry.group(layer, 0), 0, 0);
                for sequence in self.sequences.iter().flatten() {
                    tokens += sequence.num_tokens;
                    for table in &sequence.tables[first..first + l.kv_heads] {
                        for entry in table.entries() {
                            physical += size_of::<crate::table::Entry>();
                            if seen.insert(entry.slot) {
                                physical += self.pool.size_of(entry.slot);
                            }
                        }
                    }
                    let residual = sequence.residual.values.iter().skip(first).take(l.kv_heads);
                    let residual = residual.flatten().filter(|e| seen.insert(e.slot));
                    physical += residual.map(|e| self.pool.size_of(e.slot)).sum::<usize>();
                }
                (2 * 2 * tokens * l.kv_heads * l.head_dim, physical)
            })
            .collect()
    }

    /// Forgets every candidate for sharing: hints, not blocks. False if there was none.
    pub(crate) fn drop_sharing_index(&mut self) -> bool {
        let bytes = self.sharing_index_bytes();
        self.pool.discharge_metadata(bytes);
        self.sharing_index = SharingIndex::default();
        self.sketch_index = SketchIndex::default();
        bytes > 0
    }

    pub(crate) fn sharing_index_bytes(&self) -> usize {
        self.sharing_index.num_bytes() + self.sketch_index.num_bytes()
    }

    /// A snapshot. O(sequences).
    pub fn stats(&self) -> CacheStats {
        let tokens: usize = self.sequences.iter().flatten().map(|s| s.num_tokens).sum();
        let unused = self.prefix.num_unused() * self.geometry.block_size();
        CacheStats {
            logical_bytes: (tokens + unused) * self.geometry.logical_bytes_per_token(),
            physical_bytes: self.pool.physical_bytes(),
            evictable_bytes: self.prefix.evictable_bytes(&self.pool),
            budget_bytes: self.budget_bytes,
            peak_physical_bytes: self.pool.peak_bytes(),
            num_sequences: self.sequences.iter().flatten().count(),
            num_prefix_blocks: self.prefix.len(),
            reserved_bytes: self.pool.reserved_bytes(),
            num_clamped: self.num_clamped,
            num_evicted: self.prefix.num_evicted(),
            num_lowered: self.num_lowered,
            statistics_bytes: self.formats.num_bytes() + self.network_bytes(),
            spilled_bytes: self
                .sequences
                .iter()
                .flatten()
                .filter_map(|s| s.kept.cold.as_ref())
                .map(Cold::spilled_bytes)
                .sum(),
            sharing_index_bytes: self.sharing_index_bytes(),
            sharing: self.sharing_counts,
            kept_shares: self.kept_shares,
            seal_nanos: self.seal_nanos,
            recode_nanos: self.recode_nanos,
            attention_nanos: self.attention_nanos.load(Ordering::Relaxed),
            decode_nanos: self.decode_nanos.load(Ordering::Relaxed),
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
        let entries: usize = live().map(|s| s.entries().count()).sum();
        let held: usize = live().map(|s| s.slots_to_come().count()).sum();
        let references = entries + held + self.prefix.num_references();
        agree("slot references", self.pool.num_references(), references)?;
        agree("prefix users", self.prefix.num_users(), live().map(|s| s.nodes.len()).sum())?;
        let tables: usize = live()
            .map(|s| s.num_held() * self.geometry.table_bytes_per_block() + s.metadata_bytes())
            .sum();
        let metadata = tables + self.prefix.metadata_bytes() + self.sharing_index_bytes();
        agree("metadata bytes", self.pool.metadata_bytes(), metadata)?;
        for s in live() {
            agree("metadata of what was kept", s.kept.metadata_bytes, s.kept.count(&s.tables))?;
            let blocks = self.geometry.blocks_for(s.num_reserved - s.origin);
            agree("blocks of a sequence", s.num_blocks(), blocks.max(s.num_sealed))?;
            let sealed = (s.num_tokens - s.origin) / self.geometry.block_size();
            agree("sealed blocks of a sequence", s.num_sealed, sealed)?;
        }
        Ok(())
    }
}
