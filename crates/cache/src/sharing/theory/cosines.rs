//! How near blocks are expected to be to their representatives, and which the final check sends back.

use super::gaussian::{hazard, upper_tail};
use super::sample::MeanCosines;

/// Bins of key cosines from 0 to 1.
const BINS: usize = 128;

/// A number of blocks and the sums of their cosines.
#[derive(Debug, Clone, Copy, Default)]
struct Lot {
    blocks: f64,
    key: f64,
    value: f64,
}

impl Lot {
    fn of(blocks: f64, cosine: MeanCosines) -> Self {
        Self { blocks, key: blocks * cosine.key, value: blocks * cosine.value }
    }

    fn add(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.key += other.key;
        self.value += other.value;
    }

    fn mean(&self) -> MeanCosines {
        MeanCosines { key: self.key / self.blocks, value: self.value / self.blocks }
    }
}

/// From the cosines to the old representative to those to the new one.
pub(super) type Change = Box<dyn Fn(MeanCosines) -> MeanCosines>;

/// Something that may happen to the blocks of one side of a merge.
pub(super) struct Outcome {
    pub(super) probability: f64,
    pub(super) change: Change,
}

/// Blocks by their key cosine, and by whether they were merged never, once, or more often: a single
/// merge cannot fail the final check.
#[derive(Debug, Clone)]
pub(super) struct Cosines {
    never: f64,
    once: Lot,
    often: Vec<Lot>,
}

/// What is left when the final check has sent blocks back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Checked {
    /// Blocks sent back.
    pub(super) rejected: f64,
    /// Mean cosines over all blocks, 1 for those sent back.
    pub(super) cosine: MeanCosines,
}

impl Cosines {
    /// Blocks that represent themselves.
    pub(super) fn own(blocks: f64) -> Self {
        Self { never: blocks, once: Lot::default(), often: vec![Lot::default(); BINS] }
    }

    fn lots(&self) -> impl Iterator<Item = Lot> {
        let never = Lot::of(self.never, MeanCosines { key: 1.0, value: 1.0 });
        [never, self.once].into_iter().chain(self.often.iter().copied())
    }

    pub(super) fn num_blocks(&self) -> f64 {
        self.lots().map(|l| l.blocks).sum()
    }

    /// Mean over all blocks, before the final check.
    pub(super) fn mean(&self) -> MeanCosines {
        let mut all = Lot::default();
        self.lots().for_each(|l| all.add(l));
        if all.blocks > 0.0 { all.mean() } else { MeanCosines { key: 1.0, value: 1.0 } }
    }

    /// Adds the blocks of `side` as they are after one of the outcomes, or else unchanged.
    pub(super) fn add_merged(&mut self, side: &Self, outcomes: &[Outcome]) {
        let unchanged = 1.0 - outcomes.iter().map(|o| o.probability).sum::<f64>();
        self.never += unchanged * side.never;
        let scaled =
            |l: &Lot, by: f64| Lot { blocks: l.blocks * by, key: l.key * by, value: l.value * by };
        self.once.add(scaled(&side.once, unchanged));
        for (to, from) in self.often.iter_mut().zip(&side.often) {
            to.add(scaled(from, unchanged));
        }
        for Outcome { probability, change } in outcomes.iter().filter(|o| o.probability > 0.0) {
            let first = change(MeanCosines { key: 1.0, value: 1.0 });
            self.once.add(Lot::of(probability * side.never, first));
            for lot in std::iter::once(&side.once).chain(&side.often).filter(|l| l.blocks > 0.0) {
                let cosine = change(lot.mean());
                let bin = ((cosine.key * BINS as f64) as usize).min(BINS - 1);
                self.often[bin].add(Lot::of(probability * lot.blocks, cosine));
            }
        }
    }

    /// The final check at this threshold. `deviation` is that of the cosines of unrelated blocks: what
    /// two blocks do not share through those between them is unrelated.
    pub(super) fn check(&self, threshold: f64, deviation: f64) -> Checked {
        let mut kept = Lot::of(self.never, MeanCosines { key: 1.0, value: 1.0 });
        kept.add(self.once);
        let mut rejected = 0.0;
        for lot in self.often.iter().filter(|l| l.blocks > 0.0) {
            let cosine = lot.mean();
            let spread = deviation * (1.0 - cosine.key).max(0.0);
            let (passing, key) = if spread > 0.0 {
                let z = (threshold - cosine.key) / spread;
                (upper_tail(z), (cosine.key + spread * hazard(z)).min(1.0))
            } else {
                (f64::from(u8::from(cosine.key > threshold)), cosine.key)
            };
            kept.add(Lot::of(passing * lot.blocks, MeanCosines { key, value: cosine.value }));
            rejected += (1.0 - passing) * lot.blocks;
        }
        kept.add(Lot::of(rejected, MeanCosines { key: 1.0, value: 1.0 }));
        let nothing = MeanCosines { key: 1.0, value: 1.0 };
        Checked { rejected, cosine: if kept.blocks > 0.0 { kept.mean() } else { nothing } }
    }
}
