//! The fusion tree of "Joint Encoding of KV-Cache Blocks" (arXiv 2601.03067): which blocks of a set of
//! groups are to share one representative. With requests as groups this is the paper's Batch Fast
//! Fusion, with the chunks of one prompt its Chunk Fast Fusion.
//!
//! The list of groups is halved (at ⌊B/2⌋) down to single groups, whose blocks are not compared with
//! each other. Where two halves meet, every representative of the right half joins the left one it
//! resembles most, if their cosine is above the threshold; a left one and those that join it become one
//! representative: the unweighted mean of their unit vectors, made a unit vector again. Values follow
//! keys: [`Fusion::follow`] replays the same joins on them.
//!
//! Where this departs from the paper's published code, and why:
//!
//! - A right representative that resembles several left ones there goes into the mean of all of them
//!   and is stored with the last; so the others are distorted by a block that they do not store. Here
//!   it contributes to the one it is stored with. Ratios hardly change: it leaves either way.
//! - Redirects there are computed on the indices of merged lists, wrong from the second level on. Here
//!   a union-find over the blocks of the input says where each went, and tables are read, not written.
//! - Means drift from level to level. Here every block is compared with its final representative and
//!   leaves if it is not above the threshold; the mean is then formed again without it.
//! - There every pass fuses everything again. Here a block that was fused once never moves again and
//!   is not averaged again; blocks that are new may join it as it is stored.
//! - Blocks that share nothing are returned as they are, not rounded through norm and back.
//! - Values can be checked too ([`FusionOptions::value_threshold`]); there they are averaged unseen.

mod follow;
mod merge;
#[cfg(test)]
mod tests;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

pub use follow::Followed;
pub use merge::LevelCounts;

use self::follow::{Track, settle};
use self::merge::{Merge, Tree};
use super::SharingError;
use super::similarity::{Direction, best_matches};

/// Names a block of the input; the caller's number, never an index of this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A block of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Its name. The same block may be listed by several groups (a shared prefix): it is one block
    /// then, compared where its first group is.
    pub id: BlockId,
    /// Whether an earlier fusion has seen it. Such a block keeps its vector; new ones may join it.
    pub fused: bool,
}

impl Block {
    /// A block that was never fused.
    pub fn new(id: u32) -> Self {
        Self { id: BlockId(id), fused: false }
    }
}

/// A request, or a chunk of a prompt: blocks that are not compared with each other.
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    /// Its blocks, all full.
    pub blocks: &'a [Block],
    /// `[blocks, dim]`: key vectors, of any length but with a direction.
    pub keys: &'a [f32],
    /// `[blocks, dim]`: their values, or nothing if values are not checked.
    pub values: &'a [f32],
}

/// What the blocks that share read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Representation {
    /// The mean of their directions, with their own norms.
    Mean,
    /// The vector of the first of them, unchanged.
    Redirect,
}

/// How to fuse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FusionOptions {
    /// Blocks whose keys have a cosine strictly above this may share, 0 to 1; 1 shares nothing.
    pub threshold: f32,
    /// If given, the cosine of a block's values to their representative must be above this as well.
    pub value_threshold: Option<f32>,
    /// What the readers share.
    pub representation: Representation,
    /// Whether blocks of one group are compared with each other too (by a tree of their own, before
    /// the groups meet). The paper does not.
    pub within_groups: bool,
}

impl FusionOptions {
    /// The paper's: means, keys only, nothing within a group.
    pub fn paper(threshold: f32) -> Self {
        Self {
            threshold,
            value_threshold: None,
            representation: Representation::Mean,
            within_groups: false,
        }
    }
}

/// A block that several blocks share, or a block that stays alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Representative {
    /// The block in whose place it is stored: the first of [`Self::members`].
    pub id: BlockId,
    /// Its members, as indices into [`Fusion::blocks`].
    pub members: Vec<usize>,
    /// How the mean came about; nothing if it is the first member's own vector.
    merges: Vec<Merge>,
}

impl Representative {
    /// Whether it is a mean; otherwise it is the first member's own vector.
    pub fn is_mean(&self) -> bool {
        !self.merges.is_empty()
    }
}

/// Who shares with whom. See [`fuse`].
#[derive(Debug, Clone)]
pub struct Fusion {
    blocks: Vec<BlockId>,
    index: FxHashMap<BlockId, usize>,
    /// Group and row of each block's vector.
    origin: Vec<(usize, usize)>,
    group_sizes: Vec<usize>,
    representatives: Vec<Representative>,
    representative_of: Vec<usize>,
    levels: Vec<LevelCounts>,
    num_joined: usize,
    num_rejected: usize,
}

impl Fusion {
    /// The blocks of the input, each once, in order of first appearance.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// The representatives, in order of their first members.
    pub fn representatives(&self) -> &[Representative] {
        &self.representatives
    }

    /// Index of the representative of each of [`Self::blocks`].
    pub fn representative_of(&self) -> &[usize] {
        &self.representative_of
    }

    /// The block to read instead of `id`: `id` itself if it stays, `None` if it was not in the input.
    pub fn redirect(&self, id: BlockId) -> Option<BlockId> {
        let block = *self.index.get(&id)?;
        Some(self.representatives[self.representative_of[block]].id)
    }

    /// A table with every block redirected; blocks that were not in the input stay.
    pub fn redirected(&self, table: &[BlockId]) -> Vec<BlockId> {
        table.iter().map(|id| self.redirect(*id).unwrap_or(*id)).collect()
    }

    /// What happened at each level: first inside groups, then from pairs of groups to the root.
    pub fn levels(&self) -> &[LevelCounts] {
        &self.levels
    }

    /// New blocks that joined a block fused earlier, before the tree.
    pub fn num_joined(&self) -> usize {
        self.num_joined
    }

    /// Blocks that the tree had merged and the final check sent back.
    pub fn num_rejected(&self) -> usize {
        self.num_rejected
    }

    /// Representatives that the tree ended with, before the final check.
    pub fn num_before_check(&self) -> usize {
        let absorbed: usize = self.levels.iter().map(|l| l.absorbed).sum();
        self.blocks.len() - self.num_joined - absorbed
    }

    /// Blocks ÷ representatives, 1 if there are none. This is counted, not realised: bytes are saved
    /// when the pool has freed the slots that nobody reads any more.
    pub fn counted_ratio(&self) -> f64 {
        if self.blocks.is_empty() {
            return 1.0;
        }
        self.blocks.len() as f64 / self.representatives.len() as f64
    }
}

/// Finds the blocks that are to share, for one layer (or one head group).
///
/// `dim`: numbers of a block's key vector, and of its value vector. Cost: at most the dot products of
/// all pairs of different groups, on the current rayon pool. Deterministic.
///
/// # Errors
/// If a threshold is not between 0 and 1, or vectors do not have the shape of their group.
pub fn fuse(
    groups: &[Group<'_>],
    dim: usize,
    options: &FusionOptions,
) -> Result<Fusion, SharingError> {
    check(groups, dim, options)?;
    let input = Input::new(groups);
    let mut tracks = vec![Track {
        vectors: input.directions(groups, dim, |g| g.keys),
        threshold: options.threshold,
    }];
    if let Some(threshold) = options.value_threshold {
        tracks.push(Track { vectors: input.directions(groups, dim, |g| g.values), threshold });
    }

    let mut parent: Vec<usize> = (0..input.blocks.len()).collect();
    let num_joined = join_fused(&input, &tracks, &mut parent);

    let fresh: Vec<Vec<usize>> = input
        .first_in
        .iter()
        .map(|b| b.iter().copied().filter(|b| !input.fused[*b] && parent[*b] == *b).collect())
        .collect();
    let tree = Tree { keys: &tracks[0].vectors, options, dim };
    let (merges, levels) = tree.fuse(&fresh);
    for merge in &merges {
        for part in &merge.parts {
            parent[*part] = merge.into;
        }
    }

    let clusters = clusters(&parent, merges);
    let settled: Vec<(Vec<Representative>, usize)> = clusters
        .into_par_iter()
        .map(|cluster| settle(cluster, &tracks, options.representation, &input.blocks, dim))
        .collect();
    let num_rejected = settled.iter().map(|(_, rejected)| rejected).sum();
    let mut representatives: Vec<Representative> =
        settled.into_iter().flat_map(|(r, _)| r).collect();
    representatives.sort_by_key(|r| r.members[0]);

    let mut representative_of = vec![0; input.blocks.len()];
    for (i, representative) in representatives.iter().enumerate() {
        for member in &representative.members {
            representative_of[*member] = i;
        }
    }
    Ok(Fusion {
        blocks: input.blocks,
        index: input.index,
        origin: input.origin,
        group_sizes: groups.iter().map(|g| g.blocks.len()).collect(),
        representatives,
        representative_of,
        levels,
        num_joined,
        num_rejected,
    })
}

fn check(groups: &[Group<'_>], dim: usize, options: &FusionOptions) -> Result<(), SharingError> {
    for threshold in [Some(options.threshold), options.value_threshold].into_iter().flatten() {
        if !(0.0..=1.0).contains(&threshold) {
            return Err(SharingError::Threshold { found: threshold });
        }
    }
    for (group, g) in groups.iter().enumerate() {
        check_shape(group, g.keys, g.blocks.len(), dim)?;
        if !g.values.is_empty() {
            check_shape(group, g.values, g.blocks.len(), dim)?;
        } else if options.value_threshold.is_some() && !g.blocks.is_empty() {
            return Err(SharingError::NoValues { group });
        }
    }
    Ok(())
}

fn check_shape(
    group: usize,
    vectors: &[f32],
    blocks: usize,
    dim: usize,
) -> Result<(), SharingError> {
    if dim == 0 || blocks.checked_mul(dim) != Some(vectors.len()) {
        return Err(SharingError::Shape { group, found: vectors.len(), blocks, dim });
    }
    Ok(())
}

/// The distinct blocks of the groups.
struct Input {
    blocks: Vec<BlockId>,
    fused: Vec<bool>,
    index: FxHashMap<BlockId, usize>,
    origin: Vec<(usize, usize)>,
    /// Blocks of each group that no earlier group has.
    first_in: Vec<Vec<usize>>,
    /// All groups of each block, ascending.
    groups_of: Vec<Vec<usize>>,
}

impl Input {
    fn new(groups: &[Group<'_>]) -> Self {
        let mut input = Self {
            blocks: Vec::new(),
            fused: Vec::new(),
            index: FxHashMap::default(),
            origin: Vec::new(),
            first_in: vec![Vec::new(); groups.len()],
            groups_of: Vec::new(),
        };
        for (g, group) in groups.iter().enumerate() {
            for (row, block) in group.blocks.iter().enumerate() {
                let next = input.blocks.len();
                let i = *input.index.entry(block.id).or_insert(next);
                if i == next {
                    input.blocks.push(block.id);
                    input.fused.push(block.fused);
                    input.origin.push((g, row));
                    input.first_in[g].push(i);
                    input.groups_of.push(Vec::new());
                }
                input.fused[i] |= block.fused;
                input.groups_of[i].push(g);
            }
        }
        input
    }

    fn directions<'a>(
        &self,
        groups: &[Group<'a>],
        dim: usize,
        vectors: impl Fn(&Group<'a>) -> &'a [f32] + Sync,
    ) -> Vec<Direction<'a>> {
        self.origin
            .par_iter()
            .map(|(group, row)| Direction::of(&vectors(&groups[*group])[row * dim..][..dim]))
            .collect()
    }
}

/// Lets new blocks join blocks that were fused earlier, in other groups. Returns how many did.
fn join_fused(input: &Input, tracks: &[Track<'_>], parent: &mut [usize]) -> usize {
    let (fused, fresh): (Vec<usize>, Vec<usize>) =
        (0..input.blocks.len()).partition(|b| input.fused[*b]);
    let pick = |blocks: &[usize]| -> Vec<Direction<'_>> {
        blocks.iter().map(|b| tracks[0].vectors[*b]).collect()
    };
    let apart = |l: usize, r: usize| {
        let groups = &input.groups_of[fused[l]];
        input.groups_of[fresh[r]].iter().all(|g| groups.binary_search(g).is_err())
    };
    let (found, _) = best_matches(&pick(&fused), &pick(&fresh), tracks[0].threshold, apart);
    let mut joined = 0;
    for (block, found) in fresh.iter().zip(found) {
        let Some(target) = found.map(|m| fused[m.left]) else { continue };
        if tracks[1..].iter().all(|t| t.accepts(t.vectors[target], *block)) {
            parent[*block] = target;
            joined += 1;
        }
    }
    joined
}

/// Blocks that ended in one place, the leader first, and the merges that brought them there, in order.
struct Cluster {
    members: Vec<usize>,
    merges: Vec<Merge>,
}

fn clusters(parent: &[usize], merges: Vec<Merge>) -> Vec<Cluster> {
    let root = |mut block: usize| {
        while parent[block] != block {
            block = parent[block];
        }
        block
    };
    let mut clusters: Vec<Cluster> = Vec::new();
    let mut cluster_of: FxHashMap<usize, usize> = FxHashMap::default();
    for block in 0..parent.len() {
        let leader = root(block);
        let cluster = *cluster_of.entry(leader).or_insert_with(|| {
            clusters.push(Cluster { members: vec![leader], merges: Vec::new() });
            clusters.len() - 1
        });
        if block != leader {
            clusters[cluster].members.push(block);
        }
    }
    for merge in merges {
        if let Some(cluster) = cluster_of.get(&root(merge.into)) {
            clusters[*cluster].merges.push(merge);
        }
    }
    clusters
}
