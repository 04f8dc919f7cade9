//! The tree itself: halve, recurse, merge what matches.

use super::super::similarity::{Direction, best_matches, mean_direction};
use super::{FusionOptions, Representation};

/// What happened at one level of the tree, over all its nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LevelCounts {
    /// Pairs of representatives compared.
    pub comparisons: u64,
    /// Those above the threshold.
    pub matches: u64,
    /// Representatives that joined another.
    pub absorbed: usize,
}

/// Representatives that became one. Representatives are named by their leaders: the block that was
/// leftmost when they began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Merge {
    pub(super) into: usize,
    pub(super) parts: Vec<usize>,
}

/// A representative during the descent.
struct Cluster {
    leader: usize,
    /// Its unit vector, unless that is the leader's own.
    mean: Option<Vec<f32>>,
}

#[derive(Default)]
struct Subtree {
    clusters: Vec<Cluster>,
    merges: Vec<Merge>,
    /// Level 0 is inside groups, level 1 where two groups meet.
    levels: Vec<LevelCounts>,
}

pub(super) struct Tree<'a> {
    pub(super) keys: &'a [Direction<'a>],
    pub(super) options: &'a FusionOptions,
    pub(super) dim: usize,
}

impl Tree<'_> {
    /// Merges of all levels, a representative's parts always before itself, and the counts.
    pub(super) fn fuse(&self, groups: &[Vec<usize>]) -> (Vec<Merge>, Vec<LevelCounts>) {
        let tree = self.subtree(groups);
        (tree.merges, tree.levels)
    }

    fn subtree(&self, groups: &[Vec<usize>]) -> Subtree {
        match groups {
            [] => Subtree::default(),
            [group] => self.leaf(group),
            _ => {
                let (left, right) = groups.split_at(groups.len() / 2);
                let (left, right) = rayon::join(|| self.subtree(left), || self.subtree(right));
                let level = left.levels.len().max(right.levels.len());
                self.merge(left, right, level)
            }
        }
    }

    fn leaf(&self, group: &[usize]) -> Subtree {
        if self.options.within_groups && group.len() > 1 {
            let (left, right) = group.split_at(group.len() / 2);
            return self.merge(self.leaf(left), self.leaf(right), 0);
        }
        let clusters = group.iter().map(|b| Cluster { leader: *b, mean: None }).collect();
        Subtree { clusters, merges: Vec::new(), levels: vec![LevelCounts::default()] }
    }

    fn directions<'b>(&'b self, tree: &'b Subtree) -> Vec<Direction<'b>> {
        let direction = |cluster: &'b Cluster| match &cluster.mean {
            Some(mean) => Direction::of_unit(mean),
            None => self.keys[cluster.leader],
        };
        tree.clusters.iter().map(direction).collect()
    }

    fn merge(&self, left: Subtree, right: Subtree, level: usize) -> Subtree {
        let (l, r) = (self.directions(&left), self.directions(&right));
        let (found, matches) = best_matches(&l, &r, self.options.threshold, |_, _| true);
        let mut joins: Vec<Vec<usize>> = vec![Vec::new(); l.len()];
        for (right, found) in found.iter().enumerate() {
            if let Some(found) = found {
                joins[found.left].push(right);
            }
        }
        let comparisons = (l.len() * r.len()) as u64;
        let absorbed = found.iter().flatten().count();
        // Only what matched is written anew; the rest keeps the vector it has.
        let means: Vec<Option<Vec<f32>>> = (joins.iter().enumerate())
            .map(|(left, rights)| {
                let new = !rights.is_empty() && self.options.representation == Representation::Mean;
                new.then(|| {
                    let parts = std::iter::once(l[left]).chain(rights.iter().map(|i| r[*i]));
                    mean_direction(parts, self.dim)
                })
            })
            .collect();

        let mut out = Subtree { merges: left.merges, ..Subtree::default() };
        out.merges.extend(right.merges);
        // Merged ones first, then the others of the left, then of the right: the paper's order, which
        // decides between equals at the next level.
        let mut unmatched = Vec::new();
        for ((mut cluster, rights), mean) in left.clusters.into_iter().zip(joins).zip(means) {
            if rights.is_empty() {
                unmatched.push(cluster);
                continue;
            }
            let parts = rights.iter().map(|i| right.clusters[*i].leader).collect();
            out.merges.push(Merge { into: cluster.leader, parts });
            cluster.mean = mean.or(cluster.mean);
            out.clusters.push(cluster);
        }
        out.clusters.append(&mut unmatched);
        let rest = right.clusters.into_iter().zip(found).filter(|(_, found)| found.is_none());
        out.clusters.extend(rest.map(|(cluster, _)| cluster));

        let num_levels = left.levels.len().max(right.levels.len()).max(level + 1);
        out.levels = vec![LevelCounts::default(); num_levels];
        let own = [LevelCounts { comparisons, matches, absorbed }];
        let parts = left.levels.iter().enumerate().chain(right.levels.iter().enumerate());
        for (at, counts) in parts.chain(own.iter().map(|counts| (level, counts))) {
            out.levels[at].comparisons += counts.comparisons;
            out.levels[at].matches += counts.matches;
            out.levels[at].absorbed += counts.absorbed;
        }
        out
    }
}
