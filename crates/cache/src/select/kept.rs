//! What a policy kept of a prompt, and what of it, and of what was generated, no later query sees.

use std::sync::Arc;

use super::cold::Cold;
use super::compact::position_bytes;
use super::h2o::Scores;
use super::policy::Recent;
use super::state::Memory;
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::project::Channels;
use crate::sequence::Sequence;
use crate::table::{BlockTable, KeptBlock, Stays};

/// What a sequence has kept of its prompt, beside the blocks in its tables.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Of those that go on choosing.
    pub(crate) recent: Option<Recent>,
    /// By group, of those that go on scoring.
    pub(crate) scores: Vec<Scores>,
    /// Rows that are outside the pool.
    pub(crate) cold: Option<Cold>,
    /// Sums over what is gone.
    pub(crate) memory: Option<Memory>,
    /// What the books say of all that.
    pub(crate) metadata_bytes: usize,
}

impl Kept {
    /// Metadata bytes of scores and of all kept blocks of some tables; positions that several heads share once. Of a
    /// window's scores as many as there are at most.
    pub(crate) fn count(&self, tables: &[BlockTable]) -> usize {
        let window = self.recent.map_or(0, |recent| recent.window);
        let mut bytes = self.scores.iter().map(|scores| scores.num_bytes(window)).sum::<usize>();
        bytes += self.cold.as_ref().map_or(0, Cold::num_bytes);
        bytes += self.memory.as_ref().map_or(0, Memory::num_bytes);
        let mut before: &[KeptBlock] = &[];
        for table in tables {
            bytes += table.channels.as_ref().map_or(0, Channels::num_bytes);
            for (i, block) in table.kept.iter().enumerate() {
                bytes += size_of::<KeptBlock>();
                let shared = before.get(i).and_then(|b| b.positions.as_ref());
                if let Some(positions) = &block.positions
                    && !shared.is_some_and(|shared| Arc::ptr_eq(shared, positions))
                {
                    bytes += position_bytes(positions.len());
                }
            }
            before = &table.kept;
        }
        bytes
    }
}

impl KvCache {
    /// Frees what no later query sees.
    pub(crate) fn release_unseen(&mut self, sequence: &mut Sequence) -> Result<()> {
        let block_size = self.geometry.block_size();
        let next = sequence.num_tokens;
        let recent = sequence.kept.recent.map(|recent| recent.window);
        let mut changed = false;
        for (layer, l) in self.geometry.layers().iter().enumerate() {
            let window = [l.window, recent].into_iter().flatten().min();
            let Some(oldest) = window.map(|window| (next + 1).saturating_sub(window)) else {
                continue;
            };
            for head in 0..l.kv_heads {
                let kept = &mut sequence.tables[self.geometry.group(layer, head)].kept;
                let gone = |b: &KeptBlock| b.stays == Stays::InWindow && b.first + b.rows <= oldest;
                // In order of position: none is gone if the first is not.
                if !kept.iter().find(|b| b.stays == Stays::InWindow).is_some_and(gone) {
                    continue;
                }
                for block in kept.iter().filter(|b| gone(b)) {
                    for entry in block.entries {
                        self.pool.release(entry.slot)?;
                    }
                }
                kept.retain(|b| !gone(b));
                changed = true;
            }
        }
        if changed {
            let metadata = sequence.kept.count(&sequence.tables);
            self.pool.discharge_metadata(sequence.kept.metadata_bytes - metadata);
            sequence.kept.metadata_bytes = metadata;
        }
        let Some(window) = recent else { return Ok(()) };
        let oldest = (next + 1).saturating_sub(window).saturating_sub(sequence.origin);
        // The values of the last sealed block may be read from elsewhere.
        let last = sequence.num_sealed.saturating_sub(1);
        let gone = (oldest / block_size).min(last).saturating_sub(sequence.released);
        if gone > 0 {
            for table in sequence.tables.iter_mut().filter(|table| !table.keys.is_empty()) {
                for entry in table.keys.drain(..gone).chain(table.values.drain(..gone)) {
                    self.pool.release(entry.slot)?;
                }
            }
            sequence.released += gone;
            self.pool.discharge_metadata(gone * self.geometry.table_bytes_per_block());
        }
        Ok(())
    }
}
