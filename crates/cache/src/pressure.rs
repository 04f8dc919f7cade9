//! The pressure ladder: when the pool is full and no unused prefix is left, the oldest blocks of recipes
//! that allow it are coded again with fewer bits, before anybody is preempted.
//!
//! Memory comes back in slabs, so blocks are lowered a slab at a time, the one that was filled longest ago
//! first; several at once, so that the books are gone through rarely. Coefficients go from one code to
//! the next without leaving their basis.

use rustc_hash::FxHashMap;

use crate::error::Result;
use crate::format::FormatId;
use crate::kv_cache::KvCache;
use crate::pool::{ClassId, SlotId};
use crate::sequence::Sequence;
use crate::table::Entry;

/// Of all slabs, the share that is lowered at once: the distance between two activations.
const SHARE_OF_SLABS: usize = 16;

/// Where a block stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    format: FormatId,
    layer: usize,
    group: usize,
    part: usize,
    /// Class of what it becomes.
    lower_class: ClassId,
}

/// A block in its new code.
struct Lowered {
    old: SlotId,
    format: FormatId,
    class: ClassId,
    bytes: Vec<u8>,
}

impl KvCache {
    /// Lowers some blocks of all sequences and prefixes, `current` (which is out of its place) included.
    /// False if nothing can be lowered.
    pub(crate) fn lower_oldest(&mut self, current: &mut Sequence) -> Result<bool> {
        if !self.formats.has_ladder() {
            return Ok(false);
        }
        let mut places = FxHashMap::default();
        for sequence in self.sequences.iter().flatten().chain([&*current]) {
            for (group, table) in sequence.tables.iter().enumerate() {
                for (part, entry) in table.parts() {
                    self.note(&mut places, group, part, entry);
                }
            }
        }
        for (i, entry) in self.prefix.all_entries() {
            self.note(&mut places, i / 2, i % 2, entry);
        }
        let count = (self.pool.num_slabs() / SHARE_OF_SLABS).max(1);
        // Parts of one size may become parts of several sizes, which need more slabs than they leave: such
        // a slab stays.
        let victims =
            self.pool.oldest_slabs(count, |slot| places.get(&slot).map(|p| p.lower_class));
        let mut moved: FxHashMap<SlotId, (SlotId, FormatId)> = FxHashMap::default();
        for slots in victims {
            // What was lowered before may have come into this slab, which would not become empty then.
            let slab = slots.first().map(|slot| slot.slab());
            if moved.values().any(|(new, _)| Some(new.slab()) == slab) {
                continue;
            }
            let lowered = slots
                .into_iter()
                .filter_map(|slot| self.lowered(slot, *places.get(&slot)?))
                .collect::<Vec<_>>();
            // The slab is empty before the first new slot is taken: it holds more of the smaller ones.
            let counts =
                lowered.iter().map(|l| self.pool.take_out(l.old)).collect::<Result<Vec<_>>>()?;
            for (l, (references, idle)) in lowered.into_iter().zip(counts) {
                let slot = self.pool.allocate(l.class)?;
                self.pool.bytes_mut(slot)?[..l.bytes.len()].copy_from_slice(&l.bytes);
                for _ in 1..references {
                    self.pool.retain(slot)?;
                }
                for _ in 0..idle {
                    self.pool.park(slot)?;
                }
                moved.insert(l.old, (slot, l.format));
                self.num_lowered += 1;
            }
        }
        if moved.is_empty() {
            return Ok(false);
        }
        let mut change = |entry: &mut Entry| {
            if let Some((slot, format)) = moved.get(&entry.slot) {
                (entry.slot, entry.format) = (*slot, *format);
            }
        };
        for sequence in self.sequences.iter_mut().flatten().chain([current]) {
            for table in &mut sequence.tables {
                table.entries_mut().for_each(&mut change);
            }
        }
        self.prefix.remap(&mut change);
        Ok(true)
    }

    /// Bytes that lowering everything to its floor would free, about.
    pub(crate) fn lowerable_bytes(&self) -> usize {
        self.formats
            .ladder_classes()
            .map(|(class, floor)| {
                let saved = self.pool.slot_bytes(class).saturating_sub(self.pool.slot_bytes(floor));
                self.pool.num_used_of(class) * saved
            })
            .sum()
    }

    fn note(
        &self,
        places: &mut FxHashMap<SlotId, Place>,
        group: usize,
        part: usize,
        entry: &Entry,
    ) {
        let format = self.formats.get(entry.format);
        if let Some(lower) = format.lower {
            let (layer, kv_head) = self.geometry.layer_of(group);
            let group = kv_head / format.layers[layer].heads;
            let lower_class = self.formats.get(lower).layers[layer].groups[group][part].class;
            let place = Place { format: entry.format, layer, group, part, lower_class };
            places.insert(entry.slot, place);
        }
    }

    /// A block one step down.
    fn lowered(&mut self, slot: SlotId, place: Place) -> Option<Lowered> {
        let lower = self.formats.get(place.format).lower?;
        let part =
            |format| &self.formats.get(format).layers[place.layer].groups[place.group][place.part];
        let (from, to) = (part(place.format).joint()?, part(lower).joint()?);
        let tokens = self.geometry.block_size();
        let mut z = vec![0.0; tokens * from.basis().width()];
        from.decode_coefficients(self.pool.bytes(slot), tokens, &mut z);
        let mut bytes = vec![0; crate::codec::Codec::slot_bytes(to, tokens, 0)];
        to.encode_coefficients(&z, &mut bytes);
        Some(Lowered { old: slot, format: lower, class: place.lower_class, bytes })
    }
}
