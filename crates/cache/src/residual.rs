//! The residual window of recipes that keep the newest values exact (KIVI, arXiv 2402.02750): keys are coded
//! when their block is full, but a value only when as many tokens as a block holds have come after it.
//!
//! A block is coded and published whole when it is sealed, as with every recipe. What is kept besides is the
//! tail's slots of its values: the sequence reads those, and row by row, as tokens leave the window, they
//! are overwritten with what was stored, rounded to the tail's precision. Prefixes that are found in the cache
//! are read as stored.

use crate::append::clamp;
use crate::error::Result;
use crate::kv_cache::KvCache;
use crate::sequence::Sequence;
use crate::table::Entry;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Residual {
    /// Values of the last sealed block by group, none of those that store nothing; empty if they are read as stored.
    pub(crate) values: Vec<Option<Entry>>,
    /// Rows that are as stored.
    faded: usize,
}

impl KvCache {
    /// Keeps the values of the block that is about to be sealed, if its recipe wants that, instead of those of
    /// the block before it.
    pub(crate) fn keep_residual(&mut self, sequence: &mut Sequence, block: usize) -> Result<()> {
        for entry in std::mem::take(&mut sequence.residual).values.into_iter().flatten() {
            self.pool.release(entry.slot)?;
        }
        if sequence.keeps_residual() {
            let values = sequence
                .tables
                .iter()
                .enumerate()
                .map(|(group, table)| {
                    let owns = sequence.owns_group(&self.geometry, group);
                    owns.then(|| table.values[block - sequence.released])
                })
                .collect::<Vec<_>>();
            for entry in values.iter().flatten() {
                self.pool.retain(entry.slot)?;
            }
            sequence.residual.values = values;
        }
        Ok(())
    }

    /// Brings the rows that left the window to what is stored. A token leaves it for every token after the
    /// last sealed block.
    pub(crate) fn fade_residual(&mut self, sequence: &mut Sequence) -> Result<()> {
        let (from, to) = (sequence.residual.faded, sequence.tail_tokens.len());
        if sequence.residual.values.is_empty() || to <= from {
            return Ok(());
        }
        let block = sequence.num_sealed - 1;
        let block_size = self.geometry.block_size();
        let mut rows = std::mem::take(&mut self.residual_rows);
        for (group, kept) in sequence.residual.values.iter().enumerate() {
            let Some(kept) = kept else { continue };
            let (layer, kv_head) = self.geometry.layer_of(group);
            let dim = self.geometry.layers()[layer].head_dim;
            let stored = sequence.tables[group].values[block - sequence.released];
            if stored.slot == kept.slot {
                // A block that is kept as it was written.
                continue;
            }
            let format = &self.formats.get(stored.format).layers[layer];
            let codec = format.groups[kv_head / format.heads][1].codec();
            rows.resize(to * dim, 0.0);
            codec.decode(self.pool.bytes(stored.slot), block_size, dim, &mut rows);
            let slot = self.pool.bytes_mut(kept.slot)?;
            let tail = sequence.recipe.tail();
            for row in from..to {
                let values = &mut rows[row * dim..(row + 1) * dim];
                values.iter_mut().for_each(|v| *v *= stored.gain.to_f32());
                clamp(values, tail.largest());
                tail.write_row(row, values, slot);
            }
        }
        self.residual_rows = rows;
        sequence.residual.faded = to;
        Ok(())
    }
}
