//! Rows of a prompt that stay outside the pool, sorted by cluster, and what finds them.

use half::f16;
use kvasir_kernels::{AlignedBytes, Spill, SpillWriter, f32_to_f16};

use super::ClusterKv;

/// Most iterations of a search for clusters.
const ITERATIONS: usize = 20;

/// Rows that attention reads at a time, and may read beyond the last.
const PADDING: usize = 64;

/// One KV head's clusters.
#[derive(Debug)]
pub(crate) struct ColdGroup {
    /// Of keys in the spilled bytes; values follow.
    at: usize,
    rows: usize,
    dim: usize,
    /// Means of the clusters' keys: `[clusters, head_dim]`.
    means: Vec<f16>,
    /// First row of every cluster, and the end of the last.
    first: Vec<u32>,
}

/// One KV head's rows on their way out.
#[derive(Debug)]
pub(super) struct ColdRows {
    group: ColdGroup,
    /// Keys, then values, with padding.
    bytes: Vec<f16>,
}

/// All of a sequence's. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Cold {
    pub(crate) policy: ClusterKv,
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    spill: Spill,
    groups: Vec<Option<ColdGroup>>,
}

/// Most bytes that the clusters of `tokens` tokens take in memory.
pub(super) fn group_bytes(policy: ClusterKv, tokens: usize, dim: usize) -> usize {
    let clusters = policy.clusters(tokens);
    2 * clusters * dim + 4 * (clusters + 1)
}

/// Clusters of rows by direction: for every row its cluster. `rows`: `[n, dim]`.
fn k_means(rows: &[f32], dim: usize, clusters: usize) -> Vec<usize> {
    let n = rows.len() / dim;
    let row = |i: usize| &rows[i * dim..(i + 1) * dim];
    let mut means: Vec<f32> =
        (0..clusters).flat_map(|c| row(c * n / clusters).iter().copied()).collect();
    let mut labels = vec![usize::MAX; n];
    let mut scores = vec![0.0; n * clusters];
    for _ in 0..ITERATIONS {
        // Only directions count: of rows, too, but one row's length is the same for all clusters.
        for mean in means.chunks_exact_mut(dim) {
            let length = mean.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-30);
            mean.iter_mut().for_each(|x| *x /= length);
        }
        let shape = (n, clusters, dim);
        kvasir_kernels::gemm_nt(shape, rows, dim, &means, dim, &mut scores, clusters);
        let mut changed = false;
        for (label, scores) in labels.iter_mut().zip(scores.chunks_exact(clusters)) {
            let best = (0..clusters).reduce(|a, b| if scores[b] > scores[a] { b } else { a });
            let best = best.unwrap_or(0);
            changed |= *label != best;
            *label = best;
        }
        if !changed {
            break;
        }
        means.fill(0.0);
        for (i, label) in labels.iter().enumerate() {
            let mean = &mut means[label * dim..(label + 1) * dim];
            let length = row(i).iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-30);
            mean.iter_mut().zip(row(i)).for_each(|(m, x)| *m += x / length);
        }
    }
    labels
}

impl ColdRows {
    /// Clusters the rows of one head. `keys`, turned by their positions, and `values`: `[n, dim]`.
    pub(super) fn new(policy: ClusterKv, keys: &[f32], values: &[f32], dim: usize) -> Self {
        let n = keys.len() / dim;
        let labels = k_means(keys, dim, policy.clusters(n));
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_key(|i| (labels[*i], *i));
        let (mut means, mut first) = (Vec::new(), Vec::new());
        let mut begin = 0;
        for cluster in order.chunk_by(|a, b| labels[*a] == labels[*b]) {
            let mut mean = vec![0.0; dim];
            for i in cluster {
                let key = &keys[i * dim..(i + 1) * dim];
                mean.iter_mut().zip(key).for_each(|(m, x)| *m += x / cluster.len() as f32);
            }
            means.extend(mean.into_iter().map(f16::from_f32));
            first.push(begin as u32);
            begin += cluster.len();
        }
        first.push(n as u32);
        let padded = (n + PADDING) * dim;
        let mut bytes = vec![f16::ZERO; 2 * padded];
        for (part, rows) in [keys, values].into_iter().enumerate() {
            let to = &mut bytes[part * padded..];
            for (to, i) in to.chunks_exact_mut(dim).zip(&order) {
                f32_to_f16(&rows[i * dim..(i + 1) * dim], to);
            }
        }
        Self { group: ColdGroup { at: 0, rows: n, dim, means, first }, bytes }
    }
}

/// Collects the groups of a sequence.
#[derive(Debug)]
pub(super) struct ColdBuilder {
    writer: SpillWriter,
    groups: Vec<Option<ColdGroup>>,
}

impl ColdBuilder {
    pub(super) fn new(groups: usize) -> Self {
        Self { writer: SpillWriter::new(), groups: (0..groups).map(|_| None).collect() }
    }

    pub(super) fn add(&mut self, group: usize, rows: ColdRows) {
        let ColdRows { group: cold, bytes } = rows;
        self.groups[group] = Some(ColdGroup { at: self.writer.len(), ..cold });
        self.writer.write(bytemuck::cast_slice(&bytes));
        // Rows of the next head begin on a cache line, as slots do.
        let rest = self.writer.len().next_multiple_of(64) - self.writer.len();
        self.writer.write(&AlignedBytes::zeroed(64).as_slice()[..rest]);
    }

    pub(super) fn finish(self, policy: ClusterKv, prompt: usize) -> Cold {
        Cold { policy, prompt, spill: self.writer.finish(), groups: self.groups }
    }
}

impl Cold {
    /// Bytes of means and of places, and of rows that no file took.
    pub(crate) fn num_bytes(&self) -> usize {
        let groups = self.groups.iter().flatten();
        let groups = groups.map(|g| 2 * g.means.len() + 4 * g.first.len()).sum::<usize>();
        groups + self.spill.resident_bytes()
    }

    /// Bytes of rows in files.
    pub(crate) fn spilled_bytes(&self) -> usize {
        self.spill.as_slice().len() - self.spill.resident_bytes()
    }

    pub(crate) fn group(&self, group: usize) -> Option<&ColdGroup> {
        self.groups.get(group)?.as_ref()
    }

    /// Keys and values of a group from row `row` on, and what attention may read behind them.
    pub(crate) fn rows(&self, group: &ColdGroup, row: usize) -> [&[f16]; 2] {
        let padded = (group.rows + PADDING) * group.dim;
        let all: &[f16] = bytemuck::cast_slice(&self.spill.as_slice()[group.at..]);
        [0, 1].map(|part| &all[part * padded + row * group.dim..(part + 1) * padded])
    }
}

impl ColdGroup {
    /// Rows that a query attends to, as ranges: whole clusters in order of its product with their means, until there are
    /// `budget`, of the last as many as fit. `query`: turned by its position.
    pub(crate) fn select(&self, query: &[f32], budget: usize, out: &mut Vec<(usize, usize)>) {
        let mut scores: Vec<(f32, usize)> = self
            .means
            .chunks_exact(self.dim)
            .map(|mean| mean.iter().zip(query).map(|(m, q)| m.to_f32() * q).sum())
            .enumerate()
            .map(|(cluster, score)| (score, cluster))
            .collect();
        scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        out.clear();
        let mut left = budget;
        for (_, cluster) in scores {
            let (first, end) = (self.first[cluster] as usize, self.first[cluster + 1] as usize);
            let taken = left.min(end - first);
            if taken == 0 {
                break;
            }
            out.push((first, first + taken));
            left -= taken;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::Options;

    #[test]
    fn directions_are_found_whatever_the_lengths() {
        let directions = [[1.0, 0.0, 0.2], [0.0, 1.0, 0.0], [-1.0, 0.1, 0.0]];
        let rows: Vec<f32> = (0..60)
            .flat_map(|i| {
                let by = 1.0 + (i * 7 % 11) as f32;
                directions[i * i % 3].map(|x| x * by + 0.01 * (i as f32).sin())
            })
            .collect();
        let labels = k_means(&rows, 3, 6);
        for i in 0..60 {
            for j in 0..60 {
                if i * i % 3 != j * j % 3 {
                    assert_ne!(labels[i], labels[j]);
                }
            }
        }
    }

    #[test]
    fn queries_take_the_nearest_clusters_and_part_of_the_last() {
        let policy = ClusterKv::parse(Options::new("clusterkv:0.5:size=3")).unwrap();
        // Two directions, three rows of each, taken in turn.
        let keys: Vec<f32> =
            (0..6).flat_map(|i| if i % 2 == 0 { [1.0, 0.0] } else { [0.0, 1.0] }).collect();
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut builder = ColdBuilder::new(3);
        builder.add(1, ColdRows::new(policy, &keys, &values, 2));
        let cold = builder.finish(policy, 6);
        assert!(cold.group(0).is_none() && cold.spilled_bytes() > 0);
        let group = cold.group(1).unwrap();
        let rows_of = |query: &[f32], budget| -> Vec<f32> {
            let mut ranges = Vec::new();
            group.select(query, budget, &mut ranges);
            let rows = ranges.iter().flat_map(|(first, end)| {
                let [_, values] = cold.rows(group, *first);
                values[..(end - first) * 2].iter().step_by(2).map(|x| x.to_f32())
            });
            rows.collect()
        };
        assert_eq!(rows_of(&[0.0, 1.0], 3), [2.0, 6.0, 10.0]);
        assert_eq!(rows_of(&[1.0, 0.0], 4), [0.0, 4.0, 8.0, 2.0]);
        assert_eq!(rows_of(&[1.0, 0.0], 1), [0.0]);
        assert_eq!(rows_of(&[1.0, 0.0], 100).len(), 6);
        assert!(cold.num_bytes() <= group_bytes(policy, 6, 2));
    }
}
