//! Candidates by random projections (Charikar 2002): blocks whose vectors point the same way have equal
//! signs in most random directions. 32 signs in four bands of eight: two blocks at a relative error of
//! .15 (23°) meet in a band with probability .8, unrelated ones with .016. A bucket keeps few blocks, so
//! a look-up costs at most [`BANDS`] · [`MAX_IN_BUCKET`] comparisons.

use rustc_hash::FxHashMap;

use crate::format::FormatId;
use crate::pool::{BlockPool, SlotId};
use crate::prefix::BlockHash;

const BITS: usize = 32;
const BANDS: usize = 4;
const MAX_IN_BUCKET: usize = 2;

/// One bucket: whose blocks, which part of a block, and how the band's signs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Bucket {
    tenant: BlockHash,
    format: FormatId,
    part: u32,
    band: u8,
    signs: u8,
}

/// See the module's documentation. Holds no references; stale slots are told by their stamps.
#[derive(Debug, Default)]
pub(crate) struct SketchIndex {
    buckets: FxHashMap<Bucket, Vec<(SlotId, u64)>>,
    /// Directions: bit b of word i is the sign of number i in direction b.
    directions: Vec<u32>,
    num_bytes: usize,
    sweep_at: usize,
}

/// Signs of one block in all directions.
pub(crate) type Sketch = [u8; BANDS];

impl SketchIndex {
    /// Memory of a bucket and what it holds.
    const BUCKET_BYTES: usize =
        size_of::<(Bucket, Vec<(SlotId, u64)>)>() + MAX_IN_BUCKET * size_of::<(SlotId, u64)>();

    /// Bytes of metadata it takes.
    pub(crate) fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Makes ready for blocks of up to `len` numbers.
    pub(crate) fn prepare(&mut self, len: usize) {
        // SplitMix64 from a fixed seed: every server has the same directions.
        while self.directions.len() < len {
            let mut z = (self.directions.len() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            self.directions.push((z ^ (z >> 31)) as u32);
        }
    }

    /// The signs of a block of a length that was prepared for. O(32 · len).
    pub(crate) fn sketch(&self, x: &[f32]) -> Sketch {
        let mut sums = [0.0f32; BITS];
        for (x, word) in x.iter().zip(&self.directions) {
            for (b, sum) in sums.iter_mut().enumerate() {
                *sum += f32::from_bits(x.to_bits() ^ ((word >> b) & 1) << 31);
            }
        }
        std::array::from_fn(|band| {
            (0..8).fold(0, |signs, b| signs | u8::from(sums[band * 8 + b] < 0.0) << b)
        })
    }

    fn bucket(
        tenant: &BlockHash,
        format: FormatId,
        part: usize,
        sketch: Sketch,
        band: usize,
    ) -> Bucket {
        Bucket { tenant: *tenant, format, part: part as u32, band: band as u8, signs: sketch[band] }
    }

    /// Slots whose sketch agrees in at least one band; a slot may come more than once.
    pub(crate) fn candidates<'a>(
        &'a self,
        tenant: &'a BlockHash,
        format: FormatId,
        part: usize,
        sketch: Sketch,
        pool: &'a BlockPool,
    ) -> impl Iterator<Item = SlotId> + 'a {
        (0..BANDS)
            .filter_map(move |band| {
                self.buckets.get(&Self::bucket(tenant, format, part, sketch, band))
            })
            .flatten()
            .filter(|(slot, stamp)| pool.stamp(*slot) == *stamp)
            .map(|(slot, _)| *slot)
    }

    /// Makes a slot known, in the buckets that have room. Without budget for a bucket it is not made.
    pub(crate) fn publish(
        &mut self,
        tenant: &BlockHash,
        format: FormatId,
        part: usize,
        sketch: Sketch,
        slot: SlotId,
        pool: &mut BlockPool,
    ) {
        if self.buckets.len() >= self.sweep_at {
            self.sweep(pool);
        }
        for band in 0..BANDS {
            let bucket = Self::bucket(tenant, format, part, sketch, band);
            if !self.buckets.contains_key(&bucket) {
                if pool.charge_metadata(Self::BUCKET_BYTES).is_err() {
                    return;
                }
                self.num_bytes += Self::BUCKET_BYTES;
            }
            let known = self.buckets.entry(bucket).or_default();
            let entry = (slot, pool.stamp(slot));
            match known.iter().position(|(slot, stamp)| pool.stamp(*slot) != *stamp) {
                Some(stale) => known[stale] = entry,
                None if known.len() < MAX_IN_BUCKET => known.push(entry),
                None => {}
            }
        }
    }

    /// Forgets slots that are gone. The next sweep comes when as many buckets again were made.
    pub(crate) fn sweep(&mut self, pool: &mut BlockPool) {
        self.buckets.retain(|_, known| {
            known.retain(|(slot, stamp)| pool.stamp(*slot) == *stamp);
            !known.is_empty()
        });
        let bytes = self.buckets.len() * Self::BUCKET_BYTES;
        pool.discharge_metadata(self.num_bytes - bytes);
        self.num_bytes = bytes;
        self.sweep_at = 2 * self.buckets.len() + 4096;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::conformance::gaussian;

    #[test]
    fn near_blocks_meet_and_far_ones_rarely_do() {
        let mut index = SketchIndex::default();
        index.prepare(1024);
        let (mut near, mut far) = (0, 0);
        const TRIALS: usize = 200;
        for trial in 0..TRIALS {
            let x = gaussian(1024, 2 * trial as u64);
            let noise = gaussian(1024, 2 * trial as u64 + 1);
            // Relative squared error .15 after the best gain.
            let y: Vec<f32> = x.iter().zip(&noise).map(|(x, n)| x + 0.42 * n).collect();
            let meet = |a: Sketch, b: Sketch| a.iter().zip(b).any(|(a, b)| *a == b);
            let (sx, sy, sn) = (index.sketch(&x), index.sketch(&y), index.sketch(&noise));
            near += usize::from(meet(sx, sy));
            far += usize::from(meet(sx, sn));
        }
        assert!(near > TRIALS * 7 / 10, "{near} of {TRIALS} near blocks met");
        assert!(far < TRIALS / 12, "{far} of {TRIALS} unrelated blocks met");
    }

    #[test]
    fn only_the_tenants_own_living_blocks_are_found() {
        let mut pool = BlockPool::new(1 << 20, 64);
        let class = pool.class(64);
        let slot = pool.allocate(class).unwrap();
        let mut index = SketchIndex::default();
        let tenant = |salt| BlockHash::root(Some(salt), "f16", 32, &[0; 32]);
        let (a, b, format) = (tenant("a"), tenant("b"), FormatId::default());
        index.prepare(64);
        let sketch = index.sketch(&gaussian(64, 1));
        index.publish(&a, format, 3, sketch, slot, &mut pool);
        assert_eq!(index.candidates(&a, format, 3, sketch, &pool).count(), BANDS);
        assert_eq!(index.candidates(&b, format, 3, sketch, &pool).count(), 0);
        assert_eq!(index.candidates(&a, format, 2, sketch, &pool).count(), 0);
        pool.release(slot).unwrap();
        assert_eq!(index.candidates(&a, format, 3, sketch, &pool).count(), 0);
        index.sweep(&mut pool);
        assert_eq!((index.num_bytes(), pool.physical_bytes()), (0, 0));
    }
}
