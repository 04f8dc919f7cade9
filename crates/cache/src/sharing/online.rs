//! Which sealed blocks a new one may share: candidates, and the check that decides.
//!
//! An index of what is in the pool, not an owner: it holds no references. A slot that was freed, or
//! given to another block since, is told by its stamp and forgotten.

use kvasir_kernels::gemm_nt;
use rustc_hash::FxHashMap;

use crate::format::FormatId;
use crate::pool::{BlockPool, SlotId};
use crate::prefix::BlockHash;

/// Blocks of one content that are kept as candidates; more differ by what came before them.
const MAX_REPRESENTATIVES: usize = 4;

/// A block of tokens whose parts may be shared.
#[derive(Debug)]
struct Representative {
    format: FormatId,
    /// Slot and stamp of every part, in the order of the format's parts.
    parts: Box<[(SlotId, u64)]>,
}

impl Representative {
    /// Memory with its place in the map.
    fn num_bytes(&self) -> usize {
        size_of::<Self>() + size_of::<(BlockHash, usize)>() + size_of_val(&*self.parts)
    }
}

/// Blocks by the tenant, recipe and token ids they belong to.
#[derive(Debug, Default)]
pub(crate) struct SharingIndex {
    by_content: FxHashMap<BlockHash, Vec<Representative>>,
    len: usize,
    num_bytes: usize,
    /// Size at which stale entries are looked for.
    sweep_at: usize,
}

impl SharingIndex {
    /// Bytes of metadata it takes.
    pub(crate) fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Slots that hold part `part` of a block of the same content.
    pub(crate) fn candidates<'a>(
        &'a self,
        content: &BlockHash,
        format: FormatId,
        part: usize,
        pool: &'a BlockPool,
    ) -> impl Iterator<Item = SlotId> + 'a {
        let known = self.by_content.get(content).map_or(&[][..], Vec::as_slice);
        known
            .iter()
            .filter(move |r| r.format == format)
            .filter_map(move |r| r.parts.get(part).copied())
            .filter(|(slot, stamp)| pool.stamp(*slot) == *stamp)
            .map(|(slot, _)| slot)
    }

    /// Makes a sealed block known, unless there are enough of its content already. Charges its own
    /// memory; without room for that the block is not known.
    pub(crate) fn publish(
        &mut self,
        content: BlockHash,
        format: FormatId,
        parts: Box<[(SlotId, u64)]>,
        pool: &mut BlockPool,
    ) {
        if self.len >= self.sweep_at {
            self.sweep(pool);
        }
        let known = self.by_content.entry(content).or_default();
        if let Some(at) = known.iter().position(|r| is_stale(r, pool)) {
            let old = known.swap_remove(at);
            self.len -= 1;
            self.num_bytes -= old.num_bytes();
            pool.discharge_metadata(old.num_bytes());
        }
        if known.len() >= MAX_REPRESENTATIVES {
            return;
        }
        let new = Representative { format, parts };
        if pool.charge_metadata(new.num_bytes()).is_ok() {
            self.len += 1;
            self.num_bytes += new.num_bytes();
            known.push(new);
        } else if known.is_empty() {
            self.by_content.remove(&content);
        }
    }

    /// Forgets blocks that are gone. The next sweep comes when as many again were added.
    pub(crate) fn sweep(&mut self, pool: &mut BlockPool) {
        let (mut len, mut bytes) = (0, 0);
        self.by_content.retain(|_, known| {
            known.retain(|r| !is_stale(r, pool));
            len += known.len();
            bytes += known.iter().map(Representative::num_bytes).sum::<usize>();
            !known.is_empty()
        });
        pool.discharge_metadata(self.num_bytes - bytes);
        (self.len, self.num_bytes) = (len, bytes);
        self.sweep_at = 2 * len + 256;
    }
}

/// Whether none of its parts is there any more.
fn is_stale(representative: &Representative, pool: &BlockPool) -> bool {
    representative.parts.iter().all(|(slot, stamp)| pool.stamp(*slot) != *stamp)
}

/// Sum of products, in f32 over 256 numbers each.
fn product(x: &[f32], y: &[f32]) -> f64 {
    let pieces = x.chunks(256).zip(y.chunks(256));
    let sum = |(x, y): (&[f32], &[f32])| {
        let mut sum = [0.0];
        gemm_nt((1, 1, x.len()), x, x.len(), y, y.len(), &mut sum, 1);
        f64::from(sum[0])
    };
    pieces.map(sum).sum()
}

/// Sum of squares.
pub(crate) fn square(x: &[f32]) -> f32 {
    product(x, x) as f32
}

/// How well `gain` times `y` stands for `x`, with the gain that is best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Fit {
    pub(crate) gain: f32,
    /// Squared error over the square of `x`.
    pub(crate) error: f32,
}

impl Fit {
    /// Compares two blocks. O(len).
    pub(crate) fn new(x: &[f32], y: &[f32]) -> Self {
        if x == y {
            return Self { gain: 1.0, error: 0.0 };
        }
        let (xx, xy, yy) = (product(x, x), product(x, y), product(y, y));
        if xx <= 0.0 || yy <= 0.0 || xy <= 0.0 {
            return Self { gain: 1.0, error: f32::INFINITY };
        }
        let gain = half::f16::from_f64(xy / yy).to_f64();
        let error = (xx - 2.0 * gain * xy + gain * gain * yy) / xx;
        // Different blocks are never taken for equal ones.
        Self { gain: gain as f32, error: (error as f32).max(f32::MIN_POSITIVE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_gain_leaves_what_is_orthogonal() {
        let x: Vec<f32> = (0..512).map(|i| if i % 2 == 0 { 2.0 } else { 0.5 }).collect();
        let y: Vec<f32> = (0..512).map(|i| if i % 2 == 0 { 1.0 } else { 0.0 }).collect();
        let fit = Fit::new(&x, &y);
        assert_eq!(fit.gain, 2.0);
        assert!((fit.error - 0.25 / 4.25).abs() < 1e-6, "{fit:?}");
        assert_eq!(Fit::new(&x, &x), Fit { gain: 1.0, error: 0.0 });
        assert_eq!(Fit::new(&x, &vec![0.0; 512]).error, f32::INFINITY);
        let opposite: Vec<f32> = x.iter().map(|x| -x).collect();
        assert_eq!(Fit::new(&x, &opposite).error, f32::INFINITY);
    }

    #[test]
    fn freed_and_reused_slots_are_no_candidates() {
        let mut pool = BlockPool::new(1 << 20, 64);
        let class = pool.class(64);
        let mut index = SharingIndex::default();
        let content = BlockHash::root(None, "f16", 32, &[0; 32]);
        let format = FormatId::default();
        let slot = pool.allocate(class).unwrap();
        index.publish(content, format, Box::new([(slot, pool.stamp(slot))]), &mut pool);
        assert_eq!(index.candidates(&content, format, 0, &pool).collect::<Vec<_>>(), [slot]);
        assert_eq!(index.candidates(&content, format, 1, &pool).count(), 0);
        pool.release(slot).unwrap();
        assert_eq!(index.candidates(&content, format, 0, &pool).count(), 0);
        let again = pool.allocate(class).unwrap();
        assert_eq!(again, slot);
        assert_eq!(index.candidates(&content, format, 0, &pool).count(), 0);
        pool.release(again).unwrap();
        index.sweep(&mut pool);
        assert_eq!((index.num_bytes(), pool.physical_bytes()), (0, 0));
    }
}
