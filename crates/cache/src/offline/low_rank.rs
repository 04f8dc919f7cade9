//! Axes of keys and values: what LoRC and ReCalKV project on.
//!
//! Both methods put a product of two thin matrices in the place of a projection, `W ≈ L·R`, and cache `R·x`. In
//! both, the best `L` of a given size has orthonormal columns, and `R = Lᵀ·W`: the cached latent is `Lᵀ·k`, and what is
//! read is `L·Lᵀ·k`. So nothing of the model need change: a table holds, by layer, orthonormal axes in order of falling
//! energy, and a codec cuts them where its rank ends.
//!
//! LoRC (arXiv 2410.03111) takes the left singular vectors of the weights. ReCalKV (arXiv 2505.24357) whitens the weights
//! with the inputs of a corpus first; the left singular vectors of `W·S`, `S·Sᵀ = E[x·xᵀ]`, are the axes of `E[k·kᵀ]`, which is
//! what is measured here. Its calibration of values (alternating least squares on the same inputs) finds the same axes again:
//! for `z = Uᵀ·v` the best way back, `E[v·zᵀ]·E[z·zᵀ]⁻¹`, is `U`.

use nalgebra::{DMatrix, SymmetricEigen};

use super::{Tensor, Tensors};
use crate::error::{CacheError, Result};
use crate::geometry::{Geometry, LayerGeometry};

/// Heads whose keys ReCalKV takes together.
const HEADS_TOGETHER: usize = 4;

/// Axes of some KV heads of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadGroup {
    /// The heads, in the order of their channels.
    pub heads: Vec<usize>,
    /// One row an axis, orthonormal, in order of falling energy: `[width, width]`.
    pub axes: Vec<f32>,
    /// Of every axis. `[width]`
    pub energies: Vec<f32>,
}

/// Keys, or values, of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Axes {
    /// Every head is in one of them.
    pub groups: Vec<HeadGroup>,
}

impl Axes {
    /// The largest singular value over the least that counts.
    fn condition(&self) -> f64 {
        let all = || self.groups.iter().flat_map(|g| &g.energies).map(|e| f64::from(*e).max(0.0));
        let largest = all().fold(0.0, f64::max);
        let least = all().filter(|e| *e > largest * 1e-12).fold(largest, f64::min);
        if least > 0.0 { (largest / least).sqrt() } else { 1.0 }
    }

    fn width(&self) -> usize {
        self.groups.iter().map(|g| g.energies.len()).sum()
    }
}

/// See the module's documentation. Keys are taken before RoPE.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRankTable {
    /// By layer: keys and values.
    pub layers: Vec<[Axes; 2]>,
}

/// Axes and energies of a symmetric matrix.
fn eigen(matrix: &[f64], width: usize) -> (Vec<f32>, Vec<f32>) {
    let eigen = SymmetricEigen::new(DMatrix::from_row_slice(width, width, matrix));
    let mut order: Vec<usize> = (0..width).collect();
    order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]));
    let axes = order.iter().flat_map(|i| {
        let axis = eigen.eigenvectors.column(*i);
        (0..width).map(move |c| axis[c] as f32).collect::<Vec<_>>()
    });
    let energies = order.iter().map(|i| eigen.eigenvalues[*i].max(0.0) as f32);
    (axes.collect(), energies.collect())
}

/// The part of a `[width, width]` matrix that some heads of `dim` channels meet in.
fn submatrix(matrix: &[f64], width: usize, heads: &[usize], dim: usize) -> Vec<f64> {
    let channels: Vec<usize> = heads.iter().flat_map(|h| h * dim..(h + 1) * dim).collect();
    let row = |r: &usize| -> Vec<f64> { channels.iter().map(|c| matrix[r * width + c]).collect() };
    channels.iter().flat_map(row).collect()
}

/// Linear centred kernel alignment of two heads: `‖E[k_a·k_bᵀ]‖² / (‖E[k_a·k_aᵀ]‖ · ‖E[k_b·k_bᵀ]‖)`.
fn alignment(squares: &[f64], width: usize, dim: usize, a: usize, b: usize) -> f64 {
    let norm = |a: usize, b: usize| -> f64 {
        let rows = a * dim..(a + 1) * dim;
        let row = |r: usize| &squares[r * width + b * dim..r * width + (b + 1) * dim];
        rows.flat_map(|r| row(r).iter()).map(|x| x * x).sum::<f64>().sqrt()
    };
    norm(a, b).powi(2) / (norm(a, a) * norm(b, b)).max(f64::MIN_POSITIVE)
}

/// Heads that are alike together, `HEADS_TOGETHER` at most: pairs in order of falling alignment are joined while they fit
/// and there are groups left; what is left fills what is free.
fn alike(squares: &[f64], heads: usize, dim: usize) -> Vec<Vec<usize>> {
    let width = heads * dim;
    let most = heads.div_ceil(HEADS_TOGETHER);
    let mut pairs: Vec<(f64, usize, usize)> = (0..heads)
        .flat_map(|b| (0..b).map(move |a| (a, b)))
        .map(|(a, b)| (alignment(squares, width, dim, a, b), a, b))
        .collect();
    pairs.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (_, a, b) in pairs {
        let place = |groups: &[Vec<usize>], head| groups.iter().position(|g| g.contains(&head));
        match (place(&groups, a), place(&groups, b)) {
            (None, None) if groups.len() < most => groups.push(vec![a, b]),
            (Some(at), None) if groups[at].len() < HEADS_TOGETHER => groups[at].push(b),
            (None, Some(at)) if groups[at].len() < HEADS_TOGETHER => groups[at].push(a),
            _ => {}
        }
    }
    for head in 0..heads {
        if groups.iter().any(|g| g.contains(&head)) {
            continue;
        }
        match groups.iter_mut().find(|g| g.len() < HEADS_TOGETHER) {
            Some(group) => group.push(head),
            None => groups.push(vec![head]),
        }
    }
    groups.iter_mut().for_each(|group| group.sort_unstable());
    groups.sort_unstable();
    groups
}

impl LowRankTable {
    /// LoRC's. `weights`: by layer `W·Wᵀ` of keys and of values, `[width, width]` each, over all KV heads. O(layers · width³).
    pub fn lorc(weights: &[[Vec<f64>; 2]], geometry: &Geometry) -> Self {
        let layers = weights.iter().zip(geometry.layers());
        let layers = layers.map(|(parts, l)| {
            let all: Vec<usize> = (0..l.kv_heads).collect();
            [0, 1].map(|part| Axes { groups: vec![group(&parts[part], all.clone(), l)] })
        });
        Self { layers: layers.collect() }
    }

    /// ReCalKV's. `squares`: by layer `E[k·kᵀ]` and `E[v·vᵀ]`, `[width, width]` each, over all KV heads, keys before RoPE. Keys are
    /// grouped by likeness, values are taken together.
    pub fn recalkv(squares: &[[Vec<f64>; 2]], geometry: &Geometry) -> Self {
        let layers = squares.iter().zip(geometry.layers());
        let layers = layers.map(|([keys, values], l)| {
            let groups = alike(keys, l.kv_heads, l.head_dim);
            let keys = groups.into_iter().map(|heads| group(keys, heads, l)).collect();
            let all = (0..l.kv_heads).collect();
            [Axes { groups: keys }, Axes { groups: vec![group(values, all, l)] }]
        });
        Self { layers: layers.collect() }
    }

    /// Ranks of LoRC by layer: the first layers keep most, since an error there passes through all others.
    ///
    /// `d_l = d_max · (1 − (max log κ̃ − log κ̃_l) / (max log κ̃ − min log κ̃) · (1 − d_min / d_max))`, `κ̃_l` being the product of the
    /// condition numbers of the layers from `l` on; `d_min` is half of `d_max`, and both are such that `share` of all
    /// channels is kept. No released code says how; where `d_max` would be more than everything, what is left over goes to the
    /// others.
    pub(crate) fn progressive(&self, share: f64) -> Vec<f64> {
        const LEAST: f64 = 0.5;
        let logs = self.layers.iter().map(|[k, v]| k.condition().ln() + v.condition().ln());
        let mut from_here: Vec<f64> = logs.collect();
        for l in (1..from_here.len()).rev() {
            from_here[l - 1] += from_here[l];
        }
        let (most, least) = (from_here.first().copied(), from_here.last().copied());
        let span = (most.unwrap_or(0.0) - least.unwrap_or(0.0)).max(f64::MIN_POSITIVE);
        let shape: Vec<f64> = from_here
            .iter()
            .map(|log| 1.0 - (most.unwrap_or(0.0) - log) / span * (1.0 - LEAST))
            .collect();
        // Shares of 1 at most, their mean as asked for: the factor is found by halving.
        let mean = |by: f64| {
            shape.iter().map(|s| (s * by).min(1.0)).sum::<f64>() / shape.len().max(1) as f64
        };
        let (mut low, mut high) = (0.0, 1.0 / LEAST);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if mean(middle) < share { low = middle } else { high = middle }
        }
        shape.iter().map(|s| (s * high).min(1.0)).collect()
    }

    /// Ranks by layer, part and group that keep `share` of all channels and most of the energy, each layer's counted as a
    /// share of its own: sixteen axes at a time go where they add most.
    pub(crate) fn by_energy(&self, share: f64) -> Vec<[Vec<usize>; 2]> {
        const STEP: usize = 16;
        let mut ranks: Vec<[Vec<usize>; 2]> = self
            .layers
            .iter()
            .map(|parts| {
                [0, 1].map(|part| {
                    let groups = parts[part].groups.iter();
                    groups.map(|g| STEP.min(g.energies.len())).collect()
                })
            })
            .collect();
        let all: usize = self.layers.iter().flatten().map(Axes::width).sum();
        let mut left = (share * all as f64) as usize;
        left = left.saturating_sub(ranks.iter().flatten().flatten().sum());
        let gain = |layer: usize, part: usize, group: usize, rank: usize| {
            let axes = &self.layers[layer][part];
            let total: f32 = axes.groups.iter().flat_map(|g| &g.energies).sum();
            let energies = &axes.groups[group].energies;
            let end = (rank + STEP).min(energies.len());
            energies[rank..end].iter().sum::<f32>() / total.max(f32::MIN_POSITIVE)
        };
        let mut gains: Vec<(f32, usize, usize, usize)> = Vec::new();
        for (layer, parts) in ranks.iter().enumerate() {
            for (part, groups) in parts.iter().enumerate() {
                for (group, rank) in groups.iter().enumerate() {
                    gains.push((gain(layer, part, group, *rank), layer, part, group));
                }
            }
        }
        while left > 0 {
            let best = gains.iter_mut().max_by(|a, b| a.0.total_cmp(&b.0));
            let Some(best) = best.filter(|best| best.0 > f32::MIN) else { break };
            let (_, layer, part, group) = *best;
            let most = self.layers[layer][part].groups[group].energies.len();
            let rank = &mut ranks[layer][part][group];
            let step = STEP.min(most - *rank).min(left);
            *rank += step;
            left -= step;
            best.0 = if *rank < most { gain(layer, part, group, *rank) } else { f32::MIN };
        }
        ranks
    }

    pub(super) fn to_tensors(&self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        for (layer, parts) in self.layers.iter().enumerate() {
            for (axes, part) in parts.iter().zip(PARTS) {
                for (number, group) in axes.groups.iter().enumerate() {
                    let width = group.energies.len();
                    let name = |what: &str| format!("layers.{layer}.{part}.groups.{number}.{what}");
                    let heads = group.heads.iter().map(|h| *h as f32).collect();
                    tensors.extend([
                        Tensor { name: name("heads"), shape: vec![group.heads.len()], data: heads },
                        Tensor {
                            name: name("axes"),
                            shape: vec![width, width],
                            data: group.axes.clone(),
                        },
                        Tensor {
                            name: name("energies"),
                            shape: vec![width],
                            data: group.energies.clone(),
                        },
                    ]);
                }
            }
        }
        tensors
    }

    pub(super) fn from_tensors(geometry: &Geometry, source: &Tensors) -> Result<Self, String> {
        let layers = geometry.layers().iter().enumerate().map(|(layer, l)| {
            let read = |part: &str| -> Result<Axes, String> {
                let (mut groups, mut seen) = (Vec::new(), vec![false; l.kv_heads]);
                while seen.contains(&false) {
                    let prefix = format!("layers.{layer}.{part}.groups.{}", groups.len());
                    let name = format!("{prefix}.heads");
                    let found = source.tensors.iter().find(|t| t.name == name);
                    let heads = &found.ok_or_else(|| format!("{name} is missing"))?.data;
                    let heads: Vec<usize> = heads.iter().map(|h| *h as usize).collect();
                    for head in &heads {
                        match seen.get_mut(*head) {
                            Some(seen) if !*seen => *seen = true,
                            _ => return Err(format!("{name} names head {head} of {}", seen.len())),
                        }
                    }
                    if heads.is_empty() {
                        return Err(format!("{name} names no head"));
                    }
                    let width = heads.len() * l.head_dim;
                    let axes = source.get(&format!("{prefix}.axes"), &[width, width])?.to_vec();
                    let energies = source.get(&format!("{prefix}.energies"), &[width])?.to_vec();
                    groups.push(HeadGroup { heads, axes, energies });
                }
                Ok(Axes { groups })
            };
            Ok([read(PARTS[0])?, read(PARTS[1])?])
        });
        Ok(Self { layers: layers.collect::<Result<_, String>>()? })
    }

    /// Whether it is of a model of these shapes.
    pub(crate) fn check(&self, method: &'static str, geometry: &Geometry) -> Result<()> {
        let fits = |(parts, l): (&[Axes; 2], &LayerGeometry)| {
            parts.iter().all(|axes| axes.width() == l.kv_heads * l.head_dim)
        };
        let layers = self.layers.iter().zip(geometry.layers());
        match self.layers.len() == geometry.layers().len() && layers.into_iter().all(fits) {
            true => Ok(()),
            false => {
                let what = "made for a model of other shapes".to_owned();
                Err(CacheError::Table { method, what })
            }
        }
    }
}

const PARTS: [&str; 2] = ["keys", "values"];

fn group(matrix: &[f64], heads: Vec<usize>, l: &LayerGeometry) -> HeadGroup {
    let own = submatrix(matrix, l.kv_heads * l.head_dim, &heads, l.head_dim);
    let (axes, energies) = eigen(&own, heads.len() * l.head_dim);
    HeadGroup { heads, axes, energies }
}

#[cfg(test)]
mod tests {
    use super::super::{Method, Table};
    use super::*;
    use crate::codec::conformance::gaussian;
    use crate::geometry::tests::layer;
    use std::sync::Arc;

    /// `A·Aᵀ` of a matrix whose rows fade from head to head by `like`.
    fn squares(width: usize, seed: u64) -> Vec<f64> {
        let a = gaussian(width * width, seed);
        let row = |r: usize| a[r * width..(r + 1) * width].iter();
        let dot = |r, c| row(r).zip(row(c)).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        (0..width * width).map(|i| dot(i / width, i % width)).collect()
    }

    fn geometry(heads: usize, dim: usize, layers: usize) -> Geometry {
        Geometry::new(vec![layer(heads, heads, dim); layers], 32).unwrap()
    }

    #[test]
    fn axes_are_orthonormal_and_in_order() {
        let geometry = geometry(2, 8, 2);
        let matrices = [[squares(16, 1), squares(16, 2)], [squares(16, 3), squares(16, 4)]];
        let table = LowRankTable::lorc(&matrices, &geometry);
        for (parts, matrices) in table.layers.iter().zip(&matrices) {
            for (axes, matrix) in parts.iter().zip(matrices) {
                let HeadGroup { heads, axes, energies } = &axes.groups[0];
                assert_eq!(heads, &[0, 1]);
                assert!(energies.windows(2).all(|e| e[0] >= e[1]));
                let trace: f64 = (0..16).map(|i| matrix[i * 17]).sum();
                let sum: f32 = energies.iter().sum();
                assert!((f64::from(sum) / trace - 1.0).abs() < 1e-5);
                for a in 0..16 {
                    for b in 0..16 {
                        let dot: f32 = (0..16).map(|c| axes[a * 16 + c] * axes[b * 16 + c]).sum();
                        assert!((dot - f32::from(u8::from(a == b))).abs() < 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn heads_that_are_alike_are_taken_together() {
        // Heads 0, 2, 5, 7 are one random head, the others another, and a little of their own.
        let (heads, dim) = (8, 4);
        let width = heads * dim;
        let (first, second, own) = (gaussian(400, 1), gaussian(400, 2), gaussian(100 * width, 3));
        let mut matrix = vec![0.0; width * width];
        for t in 0..100 {
            let row: Vec<f64> = (0..width)
                .map(|i| {
                    let shared = if [0, 2, 5, 7].contains(&(i / dim)) { &first } else { &second };
                    f64::from(shared[t * dim + i % dim] + 0.3 * own[t * width + i])
                })
                .collect();
            for r in 0..width {
                for c in 0..width {
                    matrix[r * width + c] += row[r] * row[c];
                }
            }
        }
        assert_eq!(alike(&matrix, heads, dim), [vec![0, 2, 5, 7], vec![1, 3, 4, 6]]);
        assert_eq!(alike(&squares(12, 1), 3, 4), [vec![0, 1, 2]]);
        assert_eq!(alike(&squares(4, 1), 1, 4), [vec![0]]);
    }

    #[test]
    fn ranks_add_up_and_fall_from_layer_to_layer() {
        let geometry = geometry(2, 16, 6);
        let matrices: Vec<_> = (0..6).map(|i| [squares(32, i), squares(32, 50 + i)]).collect();
        let table = LowRankTable::lorc(&matrices, &geometry);
        for share in [0.3, 0.5, 0.8, 1.0] {
            let ranks = table.progressive(share);
            assert!(ranks.windows(2).all(|r| r[0] >= r[1]), "{ranks:?}");
            assert!((ranks.iter().sum::<f64>() / 6.0 - share).abs() < 1e-6, "{ranks:?}");
            let ranks = table.by_energy(share);
            let sum: usize = ranks.iter().flatten().flatten().sum();
            // Sixteen of each of twelve at least.
            assert_eq!(sum, ((share * 384.0) as usize).max(192));
        }
        assert!(table.by_energy(1.0).iter().flatten().flatten().all(|rank| *rank == 32));
    }

    #[test]
    fn tables_come_back_from_tensors_and_wrong_ones_do_not() {
        let geometry = geometry(5, 4, 2);
        let matrices = [[squares(20, 1), squares(20, 2)], [squares(20, 3), squares(20, 4)]];
        let table = Table::ReCalKv(Arc::new(LowRankTable::recalkv(&matrices, &geometry)));
        let tensors = table.to_tensors();
        let read = |tensors| Table::from_tensors(Method::ReCalKv, &geometry, tensors);
        assert_eq!(read(tensors.clone()).unwrap(), table);
        let refused = |change: &dyn Fn(&mut Vec<Tensor>), expected: &str| {
            let mut tensors = tensors.clone();
            change(&mut tensors);
            let error = read(tensors).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        refused(&|t| drop(t.remove(0)), "layers.0.keys.groups.0.heads is missing");
        refused(&|t| t[1].shape = vec![1, 256], "is [1, 256], not [16, 16]");
        refused(&|t| t[1].data[0] = f32::NAN, "not finite");
        refused(&|t| t[0].data[0] = 9.0, "names head 9 of 5");
        refused(&|t| t[0].data[0] = 1.0, "names head 1 of 5");
    }
}
