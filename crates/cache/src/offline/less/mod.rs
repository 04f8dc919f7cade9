//! Kernels of LESS (arXiv 2402.09398): functions φ of a query and ψ of a key with `φ(q) · ψ(k) ≈ e^(q·k)`, so that tokens that a
//! policy gave up are remembered as sums.
//!
//! Both are small networks of their own for every head, over rows turned by their positions, without biases:
//!
//! ```text
//! φ(q) = scale · |gelu(gelu(q W₁) W₂)|      u = |d₁| ⊙ gelu(gelu(k W₃) W₄)      ψ(k) = |u + (u W₅) ⊙ d₂|
//! ```
//!
//! Differences from the paper: φ is of a query head and ψ of a KV head (there, heads are not grouped); φ has a fixed `scale`,
//! the mean weight of a token that was given up, so that networks of any model begin near what they are to learn; gelu is
//! its tanh approximation, as everywhere here.

mod layer;
mod learner;
mod training;

pub use training::{LessOptions, LessSamples, LessTraining};

use kvasir_kernels::{gelu, gemm_nt};

use super::{Tensor, Tensors};
use crate::geometry::{Geometry, LayerGeometry};

/// Numbers that a row becomes.
pub(crate) const FEATURES: usize = 8;

/// Numbers that look random: the same for every run.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(0x9E37_79B9_7F4A_7C15 ^ seed << 32)
    }

    /// From 0 to below 1.
    pub(super) fn uniform(&mut self) -> f32 {
        let Self(state) = self;
        *state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 40) as f32 / (1u64 << 24) as f32
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        ((self.uniform() * n as f32) as usize).min(n.saturating_sub(1))
    }

    /// Of mean 0 and variance 1, nearly normal.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

/// φ or ψ of one head.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Features {
    pub(crate) dim: usize,
    pub(crate) hidden: usize,
    pub(crate) kind: Kind,
    /// First layer `[hidden, dim]`, second `[FEATURES, hidden]`, and what follows by kind.
    pub(crate) weights: Vec<f32>,
}

/// What follows after the second layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `[scale]`.
    Queries,
    /// `W₅` as `[from, to]`, d₁, d₂.
    Keys,
}

impl Kind {
    /// Weights after the second layer.
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::Queries => 1,
            Self::Keys => FEATURES * FEATURES + 2 * FEATURES,
        }
    }
}

/// The weights of [`Features`], apart.
pub(crate) struct Weights<'a> {
    pub(crate) first: &'a [f32],  // [hidden, dim]
    pub(crate) second: &'a [f32], // [FEATURES, hidden]
    pub(crate) rest: &'a [f32],
}

impl<'a> Weights<'a> {
    /// W₅, d₁ and d₂ of keys.
    pub(crate) fn mix(&self) -> (&'a [f32], &'a [f32], &'a [f32]) {
        let (mix, gains) = self.rest.split_at(FEATURES * FEATURES);
        let (d1, d2) = gains.split_at(FEATURES);
        (mix, d1, d2)
    }
}

impl Features {
    /// Weights of a network.
    pub(crate) fn len(kind: Kind, dim: usize, hidden: usize) -> usize {
        hidden * (dim + FEATURES) + kind.len()
    }

    /// Random weights for rows of a mean square of `energy` a channel.
    fn untrained(kind: Kind, dim: usize, hidden: usize, energy: f32, random: &mut Random) -> Self {
        let mut weights = Vec::with_capacity(Self::len(kind, dim, hidden));
        let by = 1.0 / (dim as f32 * energy.max(1e-12)).sqrt();
        weights.extend((0..hidden * dim).map(|_| by * random.normal()));
        // gelu leaves about .4 of the mean square.
        let by = 1.0 / (0.4 * hidden as f32).sqrt();
        weights.extend((0..FEATURES * hidden).map(|_| by * random.normal()));
        match kind {
            Kind::Queries => weights.push(1.0),
            Kind::Keys => {
                let by = 1.0 / (FEATURES as f32).sqrt();
                weights.extend((0..FEATURES * FEATURES).map(|_| by * random.normal()));
                // So that products are about 1: the paper's 1e-4 begins with no state at all.
                weights.extend([0.5; FEATURES]);
                weights.extend([1e-4; FEATURES]);
            }
        }
        Self { dim, hidden, kind, weights }
    }

    fn of_one(&self, row: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; FEATURES];
        self.of(row, &mut vec![0.0; self.hidden], &mut out);
        out
    }

    pub(crate) fn weights(&self) -> Weights<'_> {
        let (first, rest) = self.weights.split_at(self.hidden * self.dim);
        let (second, rest) = rest.split_at(FEATURES * self.hidden);
        Weights { first, second, rest }
    }

    /// Of rows `[n, dim]`. `hidden` is scratch, of `[n, hidden]`; `out`: `[n, FEATURES]`. O(n · hidden · dim).
    pub(crate) fn of(&self, rows: &[f32], hidden: &mut [f32], out: &mut [f32]) {
        let n = rows.len() / self.dim;
        let w = self.weights();
        let hidden = &mut hidden[..n * self.hidden];
        gemm_nt((n, self.hidden, self.dim), rows, self.dim, w.first, self.dim, hidden, self.hidden);
        gelu(hidden);
        let out = &mut out[..n * FEATURES];
        gemm_nt(
            (n, FEATURES, self.hidden),
            hidden,
            self.hidden,
            w.second,
            self.hidden,
            out,
            FEATURES,
        );
        gelu(out);
        match self.kind {
            Kind::Queries => out.iter_mut().for_each(|x| *x = w.rest[0] * x.abs()),
            Kind::Keys => {
                let (mix, d1, d2) = w.mix();
                for row in out.chunks_exact_mut(FEATURES) {
                    row.iter_mut().zip(d1).for_each(|(x, d)| *x *= d.abs());
                    let mixed = mixed(row, mix);
                    for ((x, mixed), d) in row.iter_mut().zip(mixed).zip(d2) {
                        *x = (*x + mixed * d).abs();
                    }
                }
            }
        }
    }
}

/// `u W₅`.
pub(crate) fn mixed(u: &[f32], mix: &[f32]) -> [f32; FEATURES] {
    let mut out = [0.0; FEATURES];
    for (u, to) in u.iter().zip(mix.chunks_exact(FEATURES)) {
        out.iter_mut().zip(to).for_each(|(out, w)| *out += u * w);
    }
    out
}

/// One layer's.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LessLayer {
    /// By query head.
    pub(crate) queries: Vec<Features>,
    /// By KV head.
    pub(crate) keys: Vec<Features>,
}

impl LessLayer {
    /// Random networks for queries and keys of some mean squares a channel; the same for every run.
    pub(super) fn untrained(
        layer: usize,
        l: &LayerGeometry,
        hidden: usize,
        [queries, keys]: [f32; 2],
    ) -> Self {
        let mut random = Random::new(layer as u64);
        let mut heads = |kind, count, energy| -> Vec<Features> {
            (0..count)
                .map(|_| Features::untrained(kind, l.head_dim, hidden, energy, &mut random))
                .collect()
        };
        Self {
            queries: heads(Kind::Queries, l.query_heads, queries),
            keys: heads(Kind::Keys, l.kv_heads, keys),
        }
    }

    fn num_bytes(&self) -> usize {
        self.queries.iter().chain(&self.keys).map(|f| 4 * f.weights.len()).sum()
    }
}

/// By layer; none for those with a sliding window.
#[derive(Debug, Clone, PartialEq)]
pub struct LessTable {
    pub(crate) layers: Vec<Option<LessLayer>>,
    /// Of what the policy alone gets wrong of attention's outputs on the corpus, the share that is left; by layer.
    pub(crate) errors: Vec<f32>,
}

impl LessTable {
    /// Bytes of all weights.
    pub(crate) fn num_bytes(&self) -> usize {
        self.layers.iter().flatten().map(LessLayer::num_bytes).sum()
    }

    /// Of what the policy alone gets wrong of attention's outputs on the corpus it was trained on, the share that is
    /// left; by layer, 0 for those with a sliding window.
    pub fn errors(&self) -> &[f32] {
        &self.errors
    }

    /// Networks that have learnt nothing.
    pub fn untrained(geometry: &Geometry, hidden: usize) -> Self {
        let layers = geometry.layers().iter().enumerate();
        let layer = |(layer, l): (usize, &LayerGeometry)| {
            l.window.is_none().then(|| LessLayer::untrained(layer, l, hidden, [1.0; 2]))
        };
        let errors = vec![0.0; geometry.layers().len()];
        Self { layers: layers.map(layer).collect(), errors }
    }

    /// φ of a query, turned by its position, in a layer without a sliding window: `[head_dim]` to eight numbers.
    ///
    /// # Panics
    /// If there is no such layer or head.
    pub fn query_features(&self, layer: usize, query_head: usize, query: &[f32]) -> Vec<f32> {
        self.layers[layer].as_ref().map_or(Vec::new(), |l| l.queries[query_head].of_one(query))
    }

    /// ψ of a key, likewise.
    ///
    /// # Panics
    /// If there is no such layer or head.
    pub fn key_features(&self, layer: usize, kv_head: usize, key: &[f32]) -> Vec<f32> {
        self.layers[layer].as_ref().map_or(Vec::new(), |l| l.keys[kv_head].of_one(key))
    }

    pub(super) fn to_tensors(&self) -> Vec<Tensor> {
        let flat = |name: &str, data: Vec<f32>| Tensor {
            name: name.to_owned(),
            shape: vec![data.len()],
            data,
        };
        let hidden = self.layers.iter().flatten().next().map_or(0, |l| l.queries[0].hidden);
        let mut tensors =
            vec![flat("hidden", vec![hidden as f32]), flat("errors", self.errors.clone())];
        for (number, layer) in self.layers.iter().enumerate() {
            let Some(layer) = layer else { continue };
            for (part, all) in [("queries", &layer.queries), ("keys", &layer.keys)] {
                for (head, features) in all.iter().enumerate() {
                    let name = format!("layers.{number}.{part}.{head}");
                    tensors.push(flat(&name, features.weights.clone()));
                }
            }
        }
        tensors
    }

    pub(super) fn from_tensors(geometry: &Geometry, source: &Tensors) -> Result<Self, String> {
        let hidden = source.get("hidden", &[1])?.first().map_or(0.0, |x| *x);
        if !(1.0..=65_536.0).contains(&hidden) {
            return Err(format!("networks of {hidden} hidden channels"));
        }
        let hidden = hidden as usize;
        let errors = source.get("errors", &[geometry.layers().len()])?.to_vec();
        let heads = |layer: usize, part: &str, kind, count, l: &LayerGeometry| {
            let head = |head| {
                let shape = [Features::len(kind, l.head_dim, hidden)];
                let weights = source.get(&format!("layers.{layer}.{part}.{head}"), &shape)?;
                Ok(Features { dim: l.head_dim, hidden, kind, weights: weights.to_vec() })
            };
            (0..count).map(head).collect::<Result<Vec<_>, String>>()
        };
        let mut layers = Vec::new();
        for (layer, l) in geometry.layers().iter().enumerate() {
            let made = match l.window {
                Some(_) => None,
                None => Some(LessLayer {
                    queries: heads(layer, "queries", Kind::Queries, l.query_heads, l)?,
                    keys: heads(layer, "keys", Kind::Keys, l.kv_heads, l)?,
                }),
            };
            layers.push(made);
        }
        Ok(Self { layers, errors })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Method, Table};
    use super::*;
    use crate::geometry::tests::layer;

    #[test]
    fn files_hold_everything_and_wrong_ones_are_refused() {
        let windowed = LayerGeometry { window: Some(4), ..layer(2, 1, 8) };
        let geometry = Geometry::new(vec![layer(4, 2, 8), windowed], 32).unwrap();
        let table = Table::Less(LessTable::untrained(&geometry, 6).into());
        let read = |tensors| Table::from_tensors(Method::Less, &geometry, tensors);
        assert_eq!(read(table.to_tensors()).unwrap(), table);
        let wrong = |name: &str, data: Option<Vec<f32>>| {
            let mut tensors = table.to_tensors();
            let at = tensors.iter().position(|t| t.name == name).unwrap();
            match data {
                Some(data) => (tensors[at].shape, tensors[at].data) = (vec![data.len()], data),
                None => drop(tensors.remove(at)),
            }
            read(tensors).unwrap_err().to_string()
        };
        for (name, data, expected) in [
            ("layers.0.queries.3", None, "layers.0.queries.3 is missing"),
            ("layers.0.keys.1", Some(vec![0.0]), "layers.0.keys.1 is [1], not [176]"),
            ("hidden", Some(vec![0.5]), "networks of 0.5 hidden channels"),
            ("hidden", Some(vec![1e9]), "networks of 1000000000 hidden channels"),
            ("errors", Some(vec![0.0; 3]), "errors is [3], not [2]"),
            ("errors", Some(vec![f32::NAN; 2]), "errors has numbers that are not finite"),
        ] {
            let error = wrong(name, data);
            assert_eq!(error, format!("table of less: {expected}"));
        }
    }

    /// Row by row, by the definition.
    #[test]
    fn features_are_the_definition() {
        let geometry = Geometry::new(vec![layer(2, 1, 8)], 32).unwrap();
        let table = LessTable::untrained(&geometry, 5);
        let l = table.layers[0].as_ref().unwrap();
        let gelu = |x: f64| {
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + y.tanh())
        };
        let dot =
            |w: &[f32], x: &[f64]| -> f64 { w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum() };
        let row: Vec<f32> = (0..8).map(|i| (i as f32 * 1.7).sin() * 2.0).collect();
        let x: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        for features in [&l.queries[1], &l.keys[0]] {
            let w = features.weights();
            let hidden: Vec<f64> = w.first.chunks(8).map(|w| gelu(dot(w, &x))).collect();
            let mut out: Vec<f64> = w.second.chunks(5).map(|w| gelu(dot(w, &hidden))).collect();
            if features.kind == Kind::Keys {
                let (mix, d1, d2) = w.mix();
                let u: Vec<f64> = out.iter().zip(d1).map(|(x, d)| f64::from(d.abs()) * x).collect();
                for (r, out) in out.iter_mut().enumerate() {
                    let column: Vec<f32> = (0..FEATURES).map(|s| mix[s * FEATURES + r]).collect();
                    *out = u[r] + dot(&column, &u) * f64::from(d2[r]);
                }
            }
            for (a, b) in features.of_one(&row).iter().zip(&out) {
                assert!((f64::from(*a) - b.abs()).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}
