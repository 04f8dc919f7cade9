//! What fusing a batch did and what the theory says it would do.

use super::SharingError;
use super::similarity::{Direction, cosine};
use super::theory::{Distortion, Model, PairCosines, PairSample, Prediction, Tail, Workload};
use super::tree::Representation;

/// What the tree did to one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerFusion {
    /// The layer.
    pub layer: usize,
    /// Sealed blocks of the batch, one for each reader.
    pub blocks: usize,
    /// Different blocks that they are read from now, as the tree counts them.
    pub representatives: usize,
    /// Of the blocks, those that were compared for the first time.
    pub new: usize,
    /// Of the new ones, those that gave up their slots for another's.
    pub moved: usize,
    /// Blocks that the tree had merged and the final check sent back.
    pub rejected: usize,
}

/// What [`crate::KvCache::fuse`] did. Only tenants with new blocks are counted: without any, everything
/// is 0.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FusionReport {
    /// Blocks of tokens that were fused for the first time.
    pub blocks: usize,
    /// The layers that take part: all but the first two and the last two.
    pub layers: Vec<LayerFusion>,
    /// Bytes that the pool had handed out before, all layers, tails and tables included.
    pub bytes_before: usize,
    /// The same, after.
    pub bytes_after: usize,
    /// What the theory says from a sample of pairs of the same blocks; nothing unless it was asked for.
    pub predicted: Option<Prediction>,
}

impl FusionReport {
    /// Blocks ÷ representatives over the layers that take part; 1 without any. Counted, not realised.
    pub fn counted_ratio(&self) -> f64 {
        let sum = |of: fn(&LayerFusion) -> usize| self.layers.iter().map(of).sum::<usize>();
        ratio(sum(|l| l.blocks), sum(|l| l.representatives))
    }

    /// Bytes before ÷ bytes after, of the whole pool; 1 if it is empty.
    pub fn realised_ratio(&self) -> f64 {
        ratio(self.bytes_before, self.bytes_after)
    }

    /// Blocks that the final check sent back, all layers.
    pub fn rejected(&self) -> usize {
        self.layers.iter().map(|l| l.rejected).sum()
    }

    /// Adds what was done to a layer of another tenant.
    pub(crate) fn add(&mut self, layer: LayerFusion) {
        let Some(known) = self.layers.iter_mut().find(|l| l.layer == layer.layer) else {
            self.layers.push(layer);
            return;
        };
        known.blocks += layer.blocks;
        known.representatives += layer.representatives;
        known.new += layer.new;
        known.moved += layer.moved;
        known.rejected += layer.rejected;
    }
}

fn ratio(all: usize, left: usize) -> f64 {
    if left == 0 { 1.0 } else { all as f64 / left as f64 }
}

/// Vectors of the new blocks of one group: a row of `dim` numbers each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewBlocks<'a> {
    pub(crate) keys: &'a [f32],
    pub(crate) values: &'a [f32],
}

/// Predictions of several layers, brought together.
#[derive(Debug, Default)]
pub(crate) struct Predictions {
    blocks: f64,
    representatives: f64,
    keys: f64,
    values: f64,
}

impl Predictions {
    /// Predicts a layer (of one tenant) from the cosines of `pairs` random pairs of blocks of different
    /// groups. The contents of blocks are not known here, so all pairs are of one class, and the tail
    /// is counted: a normal one would miss the copies.
    pub(crate) fn add(
        &mut self,
        groups: &[NewBlocks<'_>],
        dim: usize,
        pairs: usize,
        threshold: f32,
    ) -> Result<(), SharingError> {
        let blocks: usize = groups.iter().map(|g| g.keys.len() / dim).sum();
        let per_group = blocks as f64 / groups.len().max(1) as f64;
        let model = Model {
            sample: PairSample::unclassified(&sample(groups, dim, pairs))?,
            workload: Workload::unrelated(groups.len(), per_group)?,
            representation: Representation::Mean,
            tail: Tail::Empirical,
        };
        let Prediction { ratio, distortion, .. } = model.predict(f64::from(threshold));
        let blocks = blocks as f64;
        self.blocks += blocks;
        self.representatives += blocks / ratio;
        self.keys += blocks * distortion.keys;
        self.values += blocks * distortion.values;
        Ok(())
    }

    /// All layers together; nothing if there were no blocks.
    pub(crate) fn total(&self, threshold: f32) -> Option<Prediction> {
        let Self { blocks, representatives, keys, values } = *self;
        (blocks > 0.0).then(|| Prediction {
            threshold: f64::from(threshold),
            ratio: blocks / representatives,
            distortion: Distortion { keys: keys / blocks, values: values / blocks },
        })
    }
}

/// Cosines of random pairs of blocks of different groups, drawn with a fixed seed; all pairs being
/// equally likely, with repetition.
fn sample(groups: &[NewBlocks<'_>], dim: usize, pairs: usize) -> Vec<PairCosines> {
    let owners = groups.iter().enumerate();
    let blocks: Vec<(usize, usize)> =
        owners.flat_map(|(g, group)| (0..group.keys.len() / dim).map(move |b| (g, b))).collect();
    let mut state = 1u64;
    let mut draw = || {
        // A linear congruential generator's high bits are random enough to pick pairs.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        blocks.get((state >> 33) as usize % blocks.len().max(1)).copied()
    };
    let mut drawn = Vec::with_capacity(pairs);
    // Half of all pairs of two groups are of one group; of many, few are.
    for _ in 0..4 * pairs {
        let (Some(a), Some(b)) = (draw(), draw()) else { break };
        if a.0 == b.0 {
            continue;
        }
        let (x, y) = (groups[a.0], groups[b.0]);
        drawn.push(PairCosines {
            key: cosine(row(dim, x.keys, a.1), row(dim, y.keys, b.1)),
            value: cosine(row(dim, x.values, a.1), row(dim, y.values, b.1)),
        });
        if drawn.len() == pairs {
            break;
        }
    }
    drawn
}

fn row(dim: usize, rows: &[f32], block: usize) -> Direction<'_> {
    Direction::of(&rows[block * dim..][..dim])
}
