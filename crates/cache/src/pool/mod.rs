//! The block pool: byte-budgeted slabs of equally sized slots, with reference counts.
//!
//! Slots are multiples of a cache line. Memory is taken in slabs. A slab serves one slot size while any of its slots is in use and any
//! size after, so recipes with several slot sizes share one budget. The budget bounds slabs plus
//! metadata (tables) at all times: [`BlockPool::reserved_bytes`] never exceeds it.

mod check;

use kvasir_kernels::{AlignedBytes, Arena};

use crate::error::{CacheError, Result};

/// Bits of a slot's index inside its slab.
const INDEX_BITS: u32 = 12;
/// Bits of a slab's index.
const MAX_SLABS_BITS: u32 = 32 - INDEX_BITS;
/// Slots begin on cache lines, so that codecs may view them as numbers of any size.
const SLOT_ALIGNMENT: usize = 64;
/// Slab size for ordinary budgets.
const SLAB_BYTES: usize = 256 << 10;
/// Buffers of empty slabs kept for reuse; the rest go back to the operating system.
const SPARE_BUFFERS: usize = 16;

/// Where an encoded block lives. Valid while its reference count is above zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(u32);

impl SlotId {
    fn new(slab: usize, index: usize) -> Self {
        Self(((slab as u32) << INDEX_BITS) | index as u32)
    }

    pub(crate) fn slab(self) -> usize {
        (self.0 >> INDEX_BITS) as usize
    }

    fn index(self) -> usize {
        (self.0 & ((1 << INDEX_BITS) - 1)) as usize
    }
}

/// A slot size registered with the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ClassId(usize);

#[derive(Debug)]
struct Class {
    slot_bytes: usize,
    slots_per_slab: usize,
    /// Slabs with at least one free slot.
    open: Vec<usize>,
    free_slots: usize,
    used_slots: usize,
}

#[derive(Debug)]
struct Slab {
    buffer: AlignedBytes,
    class: usize,
    /// Where the slab stands in its class's `open` list, if it has a free slot.
    open_at: Option<usize>,
    ref_counts: Vec<u32>,
    /// Of those, references whose holder would give them up on demand.
    idle: Vec<u32>,
    /// When the slot was taken, in allocations.
    stamps: Vec<u64>,
    free: Vec<u16>,
}

/// See the module's documentation. Operations are O(1), but for those that open or empty a slab.
#[derive(Debug)]
pub struct BlockPool {
    budget_bytes: usize,
    slab_bytes: usize,
    classes: Vec<Class>,
    slabs: Vec<Option<Slab>>,
    vacant: Vec<usize>,
    spare: Vec<AlignedBytes>,
    arena: Arena,
    num_slabs: usize,
    used_bytes: usize,
    metadata_bytes: usize,
    peak_bytes: usize,
    /// Bytes of slots whose references are all idle.
    idle_bytes: usize,
    num_allocated: u64,
}

impl BlockPool {
    /// A pool that never holds more than `budget_bytes`; `largest_slot` is the biggest slot it will be
    /// asked for.
    pub fn new(budget_bytes: usize, largest_slot: usize) -> Self {
        // Small budgets get small slabs, so that rounding to slabs costs a few percent at most.
        let largest_slot = largest_slot.next_multiple_of(SLOT_ALIGNMENT).max(SLOT_ALIGNMENT);
        let slots = (budget_bytes / 64).clamp(largest_slot, SLAB_BYTES.max(largest_slot));
        // Slot ids have 32 bits: huge budgets get larger slabs.
        let slab_bytes = (slots / largest_slot * largest_slot).max(budget_bytes >> MAX_SLABS_BITS);
        let slab_bytes = slab_bytes.next_multiple_of(largest_slot);
        Self {
            budget_bytes,
            slab_bytes,
            classes: Vec::new(),
            slabs: Vec::new(),
            vacant: Vec::new(),
            spare: Vec::new(),
            arena: Arena::default(),
            num_slabs: 0,
            used_bytes: 0,
            metadata_bytes: 0,
            peak_bytes: 0,
            idle_bytes: 0,
            num_allocated: 0,
        }
    }

    /// Registers a slot size (or finds it), rounded up to whole cache lines. It must not be above the
    /// `largest_slot` given to [`Self::new`].
    pub fn class(&mut self, slot_bytes: usize) -> ClassId {
        let slot_bytes = slot_bytes.next_multiple_of(SLOT_ALIGNMENT).max(SLOT_ALIGNMENT);
        debug_assert!(slot_bytes <= self.slab_bytes, "a slot of {slot_bytes} bytes");
        if let Some(found) = self.classes.iter().position(|c| c.slot_bytes == slot_bytes) {
            return ClassId(found);
        }
        let slots_per_slab = (self.slab_bytes / slot_bytes).clamp(1, 1 << INDEX_BITS);
        self.classes.push(Class {
            slot_bytes,
            slots_per_slab,
            open: Vec::new(),
            free_slots: 0,
            used_slots: 0,
        });
        ClassId(self.classes.len() - 1)
    }

    /// Bytes of a slot of this class.
    pub fn slot_bytes(&self, class: ClassId) -> usize {
        self.classes[class.0].slot_bytes
    }

    /// The budget.
    pub fn budget_bytes(&self) -> usize {
        self.budget_bytes
    }

    /// Bytes handed out: slots in use and metadata. The numerator of pressure, the denominator of
    /// every ratio.
    pub fn physical_bytes(&self) -> usize {
        self.used_bytes + self.metadata_bytes
    }

    /// Bytes taken from the budget: whole slabs and metadata.
    pub fn reserved_bytes(&self) -> usize {
        self.num_slabs * self.slab_bytes + self.metadata_bytes
    }

    /// Most bytes ever handed out.
    pub fn peak_bytes(&self) -> usize {
        self.peak_bytes
    }

    /// Bytes of slabs and metadata that these (class, slots) and `metadata` bytes would take in an empty
    /// pool.
    pub fn bytes_alone(&self, slots: &[(ClassId, usize)], metadata: usize) -> usize {
        let slabs: usize =
            slots.iter().map(|(c, n)| n.div_ceil(self.classes[c.0].slots_per_slab)).sum();
        slabs * self.slab_bytes + metadata
    }

    /// Whether these (class, slots) and `metadata` bytes all fit now.
    pub fn can_allocate(&self, slots: &[(ClassId, usize)], metadata: usize) -> bool {
        let slabs: usize = slots
            .iter()
            .map(|(class, count)| {
                let c = &self.classes[class.0];
                count.saturating_sub(c.free_slots).div_ceil(c.slots_per_slab)
            })
            .sum();
        self.reserved_bytes() + slabs * self.slab_bytes + metadata <= self.budget_bytes
    }

    /// Takes a slot with reference count 1. Its bytes are whatever they were.
    ///
    /// # Errors
    /// [`CacheError::Exhausted`] if the budget has no room.
    pub fn allocate(&mut self, class: ClassId) -> Result<SlotId> {
        if self.classes[class.0].open.is_empty() {
            self.open_slab(class)?;
        }
        let c = &mut self.classes[class.0];
        let slab_index = c.open.last().copied().unwrap_or_default();
        let slab = self.slabs.get_mut(slab_index).and_then(Option::as_mut);
        let Some((slab, index)) = slab.and_then(|s| s.free.pop().map(|index| (s, index))) else {
            return Err(integrity(format!("open slab {slab_index} has no free slot")));
        };
        if slab.free.is_empty() {
            c.open.pop();
            slab.open_at = None;
        }
        self.num_allocated += 1;
        slab.ref_counts[usize::from(index)] = 1;
        slab.idle[usize::from(index)] = 0;
        slab.stamps[usize::from(index)] = self.num_allocated;
        c.free_slots -= 1;
        c.used_slots += 1;
        self.used_bytes += c.slot_bytes;
        self.peak_bytes = self.peak_bytes.max(self.physical_bytes());
        Ok(SlotId::new(slab_index, usize::from(index)))
    }

    fn open_slab(&mut self, class: ClassId) -> Result<()> {
        let c = &mut self.classes[class.0];
        if (self.num_slabs + 1) * self.slab_bytes + self.metadata_bytes > self.budget_bytes {
            return Err(CacheError::Exhausted {
                needed: 1,
                slot_bytes: c.slot_bytes,
                used_bytes: self.used_bytes + self.metadata_bytes,
                budget_bytes: self.budget_bytes,
            });
        }
        let slab = Slab {
            buffer: self.spare.pop().unwrap_or_else(|| self.arena.zeroed(self.slab_bytes)),
            class: class.0,
            open_at: Some(c.open.len()),
            ref_counts: vec![0; c.slots_per_slab],
            idle: vec![0; c.slots_per_slab],
            stamps: vec![0; c.slots_per_slab],
            // Popped from the end: low indices first.
            free: (0..c.slots_per_slab as u16).rev().collect(),
        };
        let index = match self.vacant.pop() {
            Some(index) => {
                self.slabs[index] = Some(slab);
                index
            }
            None => {
                self.slabs.push(Some(slab));
                self.slabs.len() - 1
            }
        };
        c.open.push(index);
        c.free_slots += c.slots_per_slab;
        self.num_slabs += 1;
        Ok(())
    }

    /// Adds a reference.
    ///
    /// # Errors
    /// [`CacheError::Integrity`] if the slot is not in use.
    pub fn retain(&mut self, slot: SlotId) -> Result<()> {
        self.count(slot, 1, 0)
    }

    /// Drops a reference; the last one frees the slot, and with a slab's last slot the slab.
    ///
    /// # Errors
    /// [`CacheError::Integrity`] if the slot is not in use, or only idle references are left.
    pub fn release(&mut self, slot: SlotId) -> Result<()> {
        self.count(slot, -1, 0)
    }

    /// Says that one of the slot's references would be given up on demand. A slot whose references are
    /// all idle counts as [`Self::idle_bytes`].
    ///
    /// # Errors
    /// [`CacheError::Integrity`] if no reference is left to say it of.
    pub fn park(&mut self, slot: SlotId) -> Result<()> {
        self.count(slot, 0, 1)
    }

    /// Undoes [`Self::park`].
    ///
    /// # Errors
    /// [`CacheError::Integrity`] if no reference is idle.
    pub fn unpark(&mut self, slot: SlotId) -> Result<()> {
        self.count(slot, 0, -1)
    }

    /// Changes a slot's references and how many of them are idle.
    fn count(&mut self, slot: SlotId, references: i32, idle: i32) -> Result<()> {
        let wrong = || {
            let what = format!("{references:+} references and {idle:+} idle ones for {slot:?}");
            integrity(format!("{what}, which does not have them"))
        };
        let slab = self.slabs.get_mut(slot.slab()).and_then(Option::as_mut).ok_or_else(wrong)?;
        let bytes = self.classes[slab.class].slot_bytes;
        let index = slot.index();
        let before = slab.ref_counts.get(index).copied().zip(slab.idle.get(index).copied());
        let (old, old_idle) = before.filter(|(count, _)| *count > 0).ok_or_else(wrong)?;
        let new = old.checked_add_signed(references).ok_or_else(wrong)?;
        let new_idle = old_idle.checked_add_signed(idle).filter(|i| *i <= new).ok_or_else(wrong)?;
        if old == old_idle {
            self.idle_bytes -= bytes;
        }
        if new > 0 && new == new_idle {
            self.idle_bytes += bytes;
        }
        (slab.ref_counts[index], slab.idle[index]) = (new, new_idle);
        if new == 0 {
            self.free(slot);
        }
        Ok(())
    }

    /// Frees a slot whatever its references, which somebody moves to another slot; returns how many there
    /// were, and how many of them were idle.
    ///
    /// # Errors
    /// [`CacheError::Integrity`] if the slot is not in use.
    pub(crate) fn take_out(&mut self, slot: SlotId) -> Result<(u32, u32)> {
        let slab = self.slabs.get(slot.slab()).and_then(Option::as_ref);
        let counts =
            slab.and_then(|s| Some((*s.ref_counts.get(slot.index())?, *s.idle.get(slot.index())?)));
        let (references, idle) = counts.unwrap_or_default();
        self.count(slot, -(references as i32), -(idle as i32))?;
        Ok((references, idle))
    }

    /// Slots of up to `count` slabs whose slots are all of one `kind` (`None`: of no kind), those filled
    /// longest ago first. O(slots).
    pub(crate) fn oldest_slabs<K: PartialEq>(
        &self,
        count: usize,
        kind: impl Fn(SlotId) -> Option<K>,
    ) -> Vec<Vec<SlotId>> {
        let mut found: Vec<(u64, Vec<SlotId>)> = Vec::new();
        for (index, slab) in self.slabs.iter().enumerate() {
            let Some(slab) = slab else { continue };
            let used = (0..slab.ref_counts.len()).filter(|i| slab.ref_counts[*i] > 0);
            let slots: Vec<SlotId> = used.map(|i| SlotId::new(index, i)).collect();
            let first = slots.first().and_then(|slot| kind(*slot));
            if first.is_some() && slots.iter().all(|slot| kind(*slot) == first) {
                let newest = slots.iter().map(|s| slab.stamps[s.index()]).max().unwrap_or(0);
                found.push((newest, slots));
            }
        }
        found.sort_unstable_by_key(|(newest, _)| *newest);
        found.truncate(count);
        found.into_iter().map(|(_, slots)| slots).collect()
    }

    /// Slabs in use.
    pub(crate) fn num_slabs(&self) -> usize {
        self.num_slabs
    }

    /// Slots in use of a class.
    pub(crate) fn num_used_of(&self, class: ClassId) -> usize {
        self.classes[class.0].used_slots
    }

    /// Bytes of slots whose references are all idle.
    pub fn idle_bytes(&self) -> usize {
        self.idle_bytes
    }

    /// Tells one use of a slot from the next: different after every allocation. 0 if it is free.
    pub fn stamp(&self, slot: SlotId) -> u64 {
        let slab = self.slabs.get(slot.slab()).and_then(Option::as_ref);
        slab.filter(|s| s.ref_counts.get(slot.index()).is_some_and(|c| *c > 0))
            .and_then(|s| s.stamps.get(slot.index()).copied())
            .unwrap_or(0)
    }

    /// Copies the beginning of one slot over that of another.
    ///
    /// # Errors
    /// As [`Self::bytes_mut`].
    pub(crate) fn copy(&mut self, from: SlotId, to: SlotId, scratch: &mut Vec<u8>) -> Result<()> {
        scratch.clear();
        scratch.extend_from_slice(self.bytes(from));
        let target = self.bytes_mut(to)?;
        let n = scratch.len().min(target.len());
        target[..n].copy_from_slice(&scratch[..n]);
        Ok(())
    }

    fn free(&mut self, slot: SlotId) {
        let Some(slab) = self.slabs.get_mut(slot.slab()).and_then(Option::as_mut) else { return };
        let c = &mut self.classes[slab.class];
        if slab.free.is_empty() {
            slab.open_at = Some(c.open.len());
            c.open.push(slot.slab());
        }
        slab.free.push(slot.index() as u16);
        c.free_slots += 1;
        c.used_slots -= 1;
        self.used_bytes -= c.slot_bytes;
        if slab.free.len() == c.slots_per_slab {
            c.free_slots -= c.slots_per_slab;
            if let Some(at) = slab.open_at {
                c.open.swap_remove(at);
                let moved = c.open.get(at).copied();
                if let Some(Some(moved)) = moved.map(|m| &mut self.slabs[m]) {
                    moved.open_at = Some(at);
                }
            }
            self.vacant.push(slot.slab());
            self.num_slabs -= 1;
            if let Some(slab) = self.slabs[slot.slab()].take()
                && self.spare.len() < SPARE_BUFFERS
            {
                self.spare.push(slab.buffer);
            }
        }
    }

    /// References to a slot; 0 if it is not in use.
    pub fn ref_count(&self, slot: SlotId) -> u32 {
        let slab = self.slabs.get(slot.slab()).and_then(Option::as_ref);
        slab.and_then(|s| s.ref_counts.get(slot.index()).copied()).unwrap_or(0)
    }

    /// A slot's bytes; empty if it is not in use.
    #[inline]
    pub fn bytes(&self, slot: SlotId) -> &[u8] {
        match self.slabs.get(slot.slab()) {
            Some(Some(slab)) => {
                let size = self.classes[slab.class].slot_bytes;
                &slab.buffer.as_slice()[slot.index() * size..(slot.index() + 1) * size]
            }
            _ => &[],
        }
    }

    /// A slot's bytes for writing.
    ///
    /// # Errors
    /// [`CacheError::Integrity`] unless there is exactly one reference: shared blocks are immutable.
    #[inline]
    pub fn bytes_mut(&mut self, slot: SlotId) -> Result<&mut [u8]> {
        let references = self.ref_count(slot);
        match self.slabs.get_mut(slot.slab()) {
            Some(Some(slab)) if references == 1 => {
                let size = self.classes[slab.class].slot_bytes;
                Ok(&mut slab.buffer.as_mut_slice()[slot.index() * size..(slot.index() + 1) * size])
            }
            _ => Err(integrity(format!("write to {slot:?} with {references} references"))),
        }
    }

    /// The class of a slot; `None` if it is not in use.
    pub(crate) fn class_of(&self, slot: SlotId) -> Option<ClassId> {
        let slab = self.slabs.get(slot.slab()).and_then(Option::as_ref);
        slab.filter(|_| self.ref_count(slot) > 0).map(|slab| ClassId(slab.class))
    }

    /// Bytes of the slot's class; 0 if it is not in use.
    pub fn size_of(&self, slot: SlotId) -> usize {
        self.bytes(slot).len()
    }

    /// Takes `bytes` of the budget for tables and the like.
    ///
    /// # Errors
    /// [`CacheError::Exhausted`] if the budget has no room.
    pub fn charge_metadata(&mut self, bytes: usize) -> Result<()> {
        if self.reserved_bytes() + bytes > self.budget_bytes {
            return Err(CacheError::Exhausted {
                needed: 1,
                slot_bytes: bytes,
                used_bytes: self.physical_bytes(),
                budget_bytes: self.budget_bytes,
            });
        }
        self.metadata_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.physical_bytes());
        Ok(())
    }

    /// Gives metadata bytes back.
    pub fn discharge_metadata(&mut self, bytes: usize) {
        self.metadata_bytes = self.metadata_bytes.saturating_sub(bytes);
    }

    /// Metadata bytes charged.
    pub fn metadata_bytes(&self) -> usize {
        self.metadata_bytes
    }

    /// Slots in use.
    pub fn num_used_slots(&self) -> usize {
        let slabs = self.slabs.iter().flatten();
        slabs.map(|s| s.ref_counts.iter().filter(|c| **c > 0).count()).sum()
    }

    /// Sum of all reference counts.
    pub fn num_references(&self) -> usize {
        let slabs = self.slabs.iter().flatten();
        slabs.flat_map(|s| &s.ref_counts).map(|c| *c as usize).sum()
    }
}

fn integrity(what: String) -> CacheError {
    CacheError::Integrity { what }
}

#[cfg(test)]
mod tests;
