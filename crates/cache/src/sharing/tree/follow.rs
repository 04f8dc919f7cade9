//! Forming representatives from their members: of keys for the final check, of values after it.

use rustc_hash::FxHashMap;

use super::super::similarity::{Direction, cosine, mean_direction, norm};
use super::merge::Merge;
use super::{BlockId, Cluster, Fusion, Representation, Representative, check_shape};
use crate::sharing::SharingError;

/// Vectors of all blocks, and how near a block's must be to its representative.
pub(super) struct Track<'a> {
    pub(super) vectors: Vec<Direction<'a>>,
    pub(super) threshold: f32,
}

impl Track<'_> {
    pub(super) fn accepts(&self, representative: Direction<'_>, block: usize) -> bool {
        cosine(representative, self.vectors[block]) > self.threshold
    }
}

/// Sends back the members that are too far from their representative, and says how many.
///
/// Each block sent back is a representative of its own. The others' mean is formed again without it,
/// so that nobody is distorted by a block that is stored elsewhere, and checked again.
pub(super) fn settle(
    cluster: Cluster,
    tracks: &[Track<'_>],
    representation: Representation,
    ids: &[BlockId],
    dim: usize,
) -> (Vec<Representative>, usize) {
    let Cluster { members: mut kept, merges } = cluster;
    // Blocks that joined an earlier representative need no merge: they read its own vector.
    let mean = representation == Representation::Mean && !merges.is_empty();
    let mut sent_back = Vec::new();
    while kept.len() > 1 {
        let means: Vec<Option<Vec<f32>>> = (tracks.iter())
            .map(|t| mean.then(|| replay(&merges, &kept, &t.vectors, dim)))
            .collect();
        let leader = kept[0];
        // The worst of a block's cosines, counted from each threshold.
        let margin = |block: usize| {
            let margins = tracks.iter().zip(&means).map(|(track, mean)| {
                let representative =
                    mean.as_deref().map_or(track.vectors[leader], Direction::of_unit);
                cosine(representative, track.vectors[block]) - track.threshold
            });
            margins.fold(f32::INFINITY, f32::min)
        };
        let mut failing: Vec<(f32, usize)> = (kept.iter())
            .filter(|block| mean || **block != leader)
            .map(|block| (margin(*block), *block))
            .filter(|(margin, _)| *margin <= 0.0)
            .collect();
        if failing.is_empty() {
            break;
        }
        // Without the worst ones others may pass: a mean between two bundles is near neither.
        failing.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        if mean {
            failing.truncate(failing.len().div_ceil(2));
        }
        kept.retain(|block| failing.iter().all(|(_, failed)| failed != block));
        sent_back.extend(failing.iter().map(|(_, block)| *block));
    }
    let num_rejected = sent_back.len();
    let alone =
        |block: usize| Representative { id: ids[block], members: vec![block], merges: Vec::new() };
    let mut representatives: Vec<Representative> = sent_back.into_iter().map(alone).collect();
    if let Some(first) = kept.first() {
        let merges = if mean && kept.len() > 1 { merges } else { Vec::new() };
        representatives.push(Representative { id: ids[*first], members: kept, merges });
    }
    (representatives, num_rejected)
}

/// The mean of the members' unit vectors, formed in the tree's order: at each merge parts weigh the
/// same, whatever their number of members. Parts without members are left out.
fn replay(merges: &[Merge], members: &[usize], vectors: &[Direction<'_>], dim: usize) -> Vec<f32> {
    let mut means: FxHashMap<usize, Vec<f32>> = FxHashMap::default();
    let mut last = None;
    for merge in merges {
        let parts = || std::iter::once(&merge.into).chain(&merge.parts);
        // A leader that is no member has no vector until a merge has given it one.
        let direction = |part: &usize| match means.get(part) {
            Some(mean) => Some(Direction::of_unit(mean)),
            None => members.binary_search(part).ok().map(|_| vectors[*part]),
        };
        let directions: Vec<Direction<'_>> = parts().filter_map(direction).collect();
        if directions.is_empty() {
            continue;
        }
        let mean = mean_direction(directions, dim);
        for part in &merge.parts {
            means.remove(part);
        }
        means.insert(merge.into, mean);
        last = Some(merge.into);
    }
    last.and_then(|leader| means.remove(&leader)).unwrap_or_else(|| vec![0.0; dim])
}

/// Vectors of one kind (keys or values) brought to their representatives. See [`Fusion::follow`].
#[derive(Debug, Clone)]
pub struct Followed {
    /// Per representative: the mean as a unit vector, or nothing where the first member's own vector
    /// stays, which then need not be written.
    pub means: Vec<Option<Vec<f32>>>,
    /// Per representative: the length it is to be stored with, so that gains are near 1: the mean
    /// length of its members, or the first member's own.
    pub stored_norms: Vec<f32>,
    /// Per block: the length of its own vector, 0 if that is not finite.
    pub norms: Vec<f32>,
    /// Per block: what to multiply the stored representative by, so that it has the block's own
    /// length. Exactly 1 for a block that stays as it is.
    pub gains: Vec<f32>,
    /// Per block: cosine to its representative, exactly 1 for a block that stays as it is.
    pub cosines: Vec<f32>,
}

impl Followed {
    /// Mean over the blocks of their relative squared errors, `2 − 2 cos`; 0 without blocks.
    pub fn distortion(&self) -> f64 {
        let errors: f64 = self.cosines.iter().map(|c| 2.0 - 2.0 * f64::from(*c)).sum();
        errors / (self.cosines.len().max(1) as f64)
    }
}

impl Fusion {
    /// Brings vectors to their representatives: keys after fusion, or the values that follow them.
    ///
    /// `vectors`: for each group that was fused its `[blocks, dim]` rows, in the same order.
    ///
    /// # Errors
    /// If these are not as many groups and blocks as were fused.
    pub fn follow(&self, vectors: &[&[f32]], dim: usize) -> Result<Followed, SharingError> {
        if vectors.len() != self.group_sizes.len() {
            return Err(SharingError::NumGroups {
                expected: self.group_sizes.len(),
                found: vectors.len(),
            });
        }
        for (group, (rows, blocks)) in vectors.iter().zip(&self.group_sizes).enumerate() {
            check_shape(group, rows, *blocks, dim)?;
        }
        let rows: Vec<&[f32]> =
            self.origin.iter().map(|(g, row)| &vectors[*g][row * dim..][..dim]).collect();
        let directions: Vec<Direction<'_>> = rows.iter().map(|row| Direction::of(row)).collect();
        let finite = |norm: f32| if norm.is_finite() { norm } else { 0.0 };
        let norms: Vec<f32> = rows.iter().map(|row| finite(norm(row))).collect();
        let mut followed = Followed {
            means: Vec::with_capacity(self.representatives.len()),
            stored_norms: Vec::with_capacity(self.representatives.len()),
            gains: vec![1.0; rows.len()],
            cosines: vec![1.0; rows.len()],
            norms,
        };
        for representative in &self.representatives {
            let members = &representative.members;
            let first = members[0];
            let mean = representative
                .is_mean()
                .then(|| replay(&representative.merges, members, &directions, dim));
            let norms = &followed.norms;
            let stored_norm = match mean {
                Some(_) => members.iter().map(|m| norms[*m]).sum::<f32>() / members.len() as f32,
                None => norms[first],
            };
            let shared = mean.as_deref().map_or(directions[first], Direction::of_unit);
            for member in members.iter().filter(|m| mean.is_some() || **m != first) {
                followed.gains[*member] =
                    if stored_norm > 0.0 { followed.norms[*member] / stored_norm } else { 0.0 };
                followed.cosines[*member] = cosine(shared, directions[*member]);
            }
            followed.means.push(mean);
            followed.stored_norms.push(stored_norm);
        }
        Ok(followed)
    }
}
