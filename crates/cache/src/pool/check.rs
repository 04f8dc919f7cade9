//! The pool's books recounted.

use super::{BlockPool, integrity};
use crate::error::Result;

impl BlockPool {
    /// Recounts everything. O(slots).
    ///
    /// # Errors
    /// [`crate::CacheError::Integrity`] naming the first numbers that disagree.
    pub fn check(&self) -> Result<()> {
        let (mut used_bytes, mut idle_bytes) = (0, 0);
        let mut free_slots = vec![0; self.classes.len()];
        for (index, slab) in self.slabs.iter().enumerate() {
            let Some(slab) = slab else { continue };
            let class = &self.classes[slab.class];
            let used = slab.ref_counts.iter().filter(|c| **c > 0).count();
            if used + slab.free.len() != class.slots_per_slab || used == 0 {
                return Err(integrity(format!(
                    "slab {index}: {used} slots used + {} free of {}",
                    slab.free.len(),
                    class.slots_per_slab
                )));
            }
            if let Some(slot) = slab.free.iter().find(|s| slab.ref_counts[usize::from(**s)] != 0) {
                return Err(integrity(format!("slab {index}: slot {slot} is free and in use")));
            }
            let listed = slab.open_at.is_some_and(|at| class.open.get(at) == Some(&index));
            if listed == slab.free.is_empty() || listed != slab.open_at.is_some() {
                return Err(integrity(format!("slab {index}: wrongly listed as open or full")));
            }
            used_bytes += used * class.slot_bytes;
            let slots = slab.ref_counts.iter().zip(&slab.idle);
            idle_bytes += slots.filter(|(c, i)| **c > 0 && c == i).count() * class.slot_bytes;
            free_slots[slab.class] += slab.free.len();
        }
        for (class, free) in self.classes.iter().zip(free_slots) {
            if class.free_slots != free {
                return Err(integrity(format!(
                    "slots of {} bytes: {} counted free, {free} found",
                    class.slot_bytes, class.free_slots
                )));
            }
        }
        if idle_bytes != self.idle_bytes {
            return Err(integrity(format!(
                "{} idle bytes counted, {idle_bytes} found",
                self.idle_bytes
            )));
        }
        if used_bytes != self.used_bytes {
            return Err(integrity(format!(
                "{} bytes counted in use, {used_bytes} found",
                self.used_bytes
            )));
        }
        if self.reserved_bytes() > self.budget_bytes {
            return Err(integrity(format!(
                "{} bytes reserved of a budget of {}",
                self.reserved_bytes(),
                self.budget_bytes
            )));
        }
        Ok(())
    }
}
