//! Which layers may read another's keys and values (KVSharer, arXiv 2410.18517).

use super::{Tensor, Tensors};
use crate::geometry::Geometry;

/// Pairs in the order in which the search accepted them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvSharerTable {
    /// Layers of the model.
    pub layers: usize,
    /// A layer, and the one before it whose keys and values it reads.
    pub pairs: Vec<(usize, usize)>,
}

impl KvSharerTable {
    /// By layer whose keys and values it reads, if the first `count` pairs are in force: an owner is always a layer
    /// that stores its own.
    pub fn owners(&self, count: usize) -> Vec<usize> {
        let mut owners: Vec<usize> = (0..self.layers).collect();
        for (layer, other) in self.pairs.iter().take(count) {
            let owner = owners[*other];
            // Those that read the layer so far follow it.
            owners.iter_mut().filter(|o| **o == *layer).for_each(|o| *o = owner);
        }
        owners
    }

    /// Pairs of layers in the order in which the search tries them: the least alike first. `means`: by layer, mean keys and
    /// values of texts of one length, `[tokens, width]` each; only layers of one kind are paired. The distance of two
    /// is the mean length of the differences of their rows, over keys and values.
    pub fn candidates(means: &[[Vec<f32>; 2]], geometry: &Geometry) -> Vec<(usize, usize)> {
        let layers = geometry.layers();
        let distance = |a: usize, b: usize| -> f64 {
            let width = layers[a].kv_heads * layers[a].head_dim;
            let part = |p: usize| {
                let rows = means[a][p].chunks_exact(width).zip(means[b][p].chunks_exact(width));
                let lengths = rows.map(|(x, y)| {
                    let square = |(x, y): (&f32, &f32)| f64::from(x - y).powi(2);
                    x.iter().zip(y).map(square).sum::<f64>().sqrt()
                });
                lengths.sum::<f64>() * width as f64 / means[a][p].len().max(1) as f64
            };
            (part(0) + part(1)) / 2.0
        };
        let mut pairs: Vec<(f64, usize, usize)> = (0..layers.len())
            .flat_map(|layer| (0..layer).map(move |other| (layer, other)))
            .filter(|(layer, other)| layers[*layer] == layers[*other])
            .map(|(layer, other)| (distance(layer, other), layer, other))
            .collect();
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        pairs.into_iter().map(|(_, layer, other)| (layer, other)).collect()
    }

    pub(super) fn to_tensors(&self) -> Vec<Tensor> {
        let data = self.pairs.iter().flat_map(|(a, b)| [*a as f32, *b as f32]).collect();
        let layers = vec![self.layers as f32];
        vec![
            Tensor { name: "layers".to_owned(), shape: vec![1], data: layers },
            Tensor { name: "pairs".to_owned(), shape: vec![self.pairs.len(), 2], data },
        ]
    }

    pub(super) fn from_tensors(geometry: &Geometry, source: &Tensors) -> Result<Self, String> {
        let layers = source.get("layers", &[1])?.first().map_or(0, |x| *x as usize);
        let found = geometry.layers().len();
        if layers != found {
            return Err(format!("made for {layers} layers, not {found}"));
        }
        let pairs = source.tensors.iter().find(|t| t.name == "pairs");
        let pairs = &pairs.ok_or("pairs is missing")?.data;
        let pairs: Vec<(usize, usize)> =
            pairs.chunks_exact(2).map(|p| (p[0] as usize, p[1] as usize)).collect();
        let mut replaced = vec![false; layers];
        for (layer, other) in &pairs {
            let kinds = geometry.layers();
            let good = layer > other && *layer < layers && kinds[*layer] == kinds[*other];
            if !good || std::mem::replace(&mut replaced[*layer], true) {
                return Err(format!("layer {layer} cannot read layer {other}"));
            }
        }
        Ok(Self { layers, pairs })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Method, Table};
    use super::*;
    use crate::geometry::{LayerGeometry, tests::layer};

    #[test]
    fn owners_store_their_own() {
        let table = KvSharerTable { layers: 6, pairs: vec![(5, 3), (3, 1), (4, 3), (1, 0)] };
        assert_eq!(table.owners(0), [0, 1, 2, 3, 4, 5]);
        assert_eq!(table.owners(1), [0, 1, 2, 3, 4, 3]);
        assert_eq!(table.owners(2), [0, 1, 2, 1, 4, 1]);
        assert_eq!(table.owners(3), [0, 1, 2, 1, 1, 1]);
        assert_eq!(table.owners(9), [0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn the_least_alike_come_first_and_kinds_stay_apart() {
        let kind = layer(1, 1, 2);
        let other = LayerGeometry { window: Some(4), ..layer(1, 1, 2) };
        let layers = vec![kind.clone(), kind.clone(), other, kind];
        let geometry = Geometry::new(layers, 32).unwrap();
        // Two tokens; layer 3 is far from 0 and nearer to 1.
        let mean = |x: f32| [vec![x, 0.0, x, 0.0], vec![0.0; 4]];
        let means = [mean(0.0), mean(3.0), mean(50.0), mean(10.0)];
        assert_eq!(KvSharerTable::candidates(&means, &geometry), [(3, 0), (3, 1), (1, 0)]);
    }

    #[test]
    fn wrong_pairs_are_refused() {
        let geometry = Geometry::new(vec![layer(1, 1, 2); 3], 32).unwrap();
        let read = |layers, pairs| {
            let table = Table::KvSharer(KvSharerTable { layers, pairs }.into());
            Table::from_tensors(Method::KvSharer, &geometry, table.to_tensors())
        };
        assert!(read(3, vec![(2, 0), (1, 0)]).is_ok());
        for (layers, pairs, expected) in [
            (4, vec![], "made for 4 layers, not 3"),
            (3, vec![(0, 0)], "layer 0 cannot read layer 0"),
            (3, vec![(1, 2)], "layer 1 cannot read layer 2"),
            (3, vec![(2, 0), (2, 1)], "layer 2 cannot read layer 1"),
            (3, vec![(7, 1)], "layer 7 cannot read layer 1"),
        ] {
            let error = read(layers, pairs).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
