//! Training of LESS's kernels, one layer at a time, with exact gradients.
//!
//! A step takes one text and cuts it: of the tokens before the cut the most attended and the newest stay, as [H2O](crate::H2o)
//! and [SnapKV](crate::SnapKv) leave them, and the queries behind it see those, themselves, and sums over the rest. What is
//! lessened is the square of what that does to the layer's output after its output projection. Everything else of the
//! model stays as it is, and a layer's inputs are those of the uncompressed model.
//!
//! Differences from the paper: cuts and budgets are drawn anew for each step, where it trains for one budget; positions are
//! shifted by random distances, which attention cannot tell, and networks over turned rows must learn not to; each query's error
//! is relative to its own output.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use kvasir_kernels::RopeTable;
use rayon::prelude::*;

use super::layer::{Cut, LEAST_TOKENS, LayerTraining};
use super::learner::Learner;
use super::{FEATURES, Features, LessLayer, LessTable, Random};
use crate::error::{CacheError, Result};
use crate::frame::Frame;
use crate::geometry::{Geometry, LayerGeometry};
use crate::offline::Method;

/// How to train.
#[derive(Debug, Clone, Copy)]
pub struct LessOptions {
    /// Channels between the two layers of a network.
    pub hidden: usize,
    /// Passes over all texts.
    pub epochs: usize,
}

impl Default for LessOptions {
    /// A quarter of the paper's width: 512 channels left .67 of the error where 128 left .69 and 32 left .74 (20 passes
    /// over the embedded corpus, SmolLM2-135M), for four times the work of every query.
    fn default() -> Self {
        Self { hidden: 128, epochs: 12 }
    }
}

/// One layer's rows of some texts, not rotated.
#[derive(Debug, Clone, Default)]
pub struct LessSamples {
    pub(super) queries: Vec<f16>, // [tokens, query_heads, head_dim]
    pub(super) keys: Vec<f16>,    // [tokens, kv_heads, head_dim]
    pub(super) values: Vec<f16>,  // [tokens, kv_heads, head_dim]
    /// Tokens of each text.
    texts: Vec<usize>,
}

impl LessSamples {
    /// Adds a text.
    pub fn observe(&mut self, queries: &[f32], keys: &[f32], values: &[f32], tokens: usize) {
        let parts =
            [(&mut self.queries, queries), (&mut self.keys, keys), (&mut self.values, values)];
        for (to, from) in parts {
            to.extend(from.iter().map(|x| f16::from_f32(*x)));
        }
        self.texts.push(tokens);
    }
}

/// Adam's, at the first step: it falls to nothing along half a cosine. With the paper's 1e-3 the same passes left .69 of the
/// error where this leaves .65.
const RATE: f32 = 3e-3;

/// Trains one layer. `output`: `WᵀW` of its output projection, `[query_heads · head_dim]` squared. Returns its
/// networks and what is left of the policy's error.
pub(super) fn train(
    layer: usize,
    l: &LayerGeometry,
    (frame, positions): (&Frame, usize),
    samples: &LessSamples,
    output: &[f32],
    options: LessOptions,
    done: &(dyn Fn() + Sync),
) -> Result<(LessLayer, f32)> {
    let wrong = |what| CacheError::Table { method: Method::Less.name(), what };
    let finite = |x: &[f16]| x.iter().all(|x| x.is_finite());
    if !(finite(&samples.queries) && finite(&samples.keys) && finite(&samples.values)) {
        return Err(wrong(format!("queries, keys or values of layer {layer} are not finite")));
    }
    let starts = samples.texts.iter().scan(0, |next, tokens| {
        *next += tokens;
        Some((*next - tokens, *tokens))
    });
    let texts: Vec<(usize, usize)> = starts.filter(|(_, n)| *n >= LEAST_TOKENS).collect();
    if texts.is_empty() {
        return Err(wrong(format!("no text of the corpus has {LEAST_TOKENS} tokens")));
    }
    let energy =
        |x: &[f16]| x.iter().map(|x| x.to_f32().powi(2)).sum::<f32>() / x.len().max(1) as f32;
    let energies = [energy(&samples.queries), energy(&samples.keys)];
    let untrained = LessLayer::untrained(layer, l, options.hidden, energies);
    let learners =
        |all: Vec<Features>| -> Vec<Learner> { all.into_iter().map(Learner::new).collect() };
    let mut training = LayerTraining {
        l,
        frame,
        positions,
        samples,
        output,
        queries: learners(untrained.queries),
        keys: learners(untrained.keys),
    };
    let mut random = Random::new(1 + layer as u64);
    let cuts: Vec<Cut> =
        texts.iter().map(|(first, n)| training.cut(*first, *n, &mut random)).collect();
    for (logarithm, learner) in training.mean_weights(&cuts).into_iter().zip(&mut training.queries)
    {
        let scale = options.hidden * (l.head_dim + FEATURES);
        learner.features.weights[scale] = logarithm.exp();
    }
    let steps = options.epochs * texts.len();
    let mut sums = [0.0; 2];
    for step in 0..steps {
        let (first, tokens) = texts[random.below(texts.len())];
        let losses = training.step(training.cut(first, tokens, &mut random));
        // Of the last two passes.
        if step + texts.len() * 2 >= steps {
            sums.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss);
        }
        let rate = RATE * 0.5 * (1.0 + (std::f32::consts::PI * step as f32 / steps as f32).cos());
        for learner in training.queries.iter_mut().chain(&mut training.keys) {
            learner.learn(rate, step + 1);
        }
        if (step + 1) % texts.len() == 0 {
            done();
        }
    }
    let LayerTraining { queries, keys, .. } = training;
    let features = |learners: Vec<Learner>| learners.into_iter().map(|l| l.features).collect();
    let left = (sums[0] / sums[1].max(1e-30)) as f32;
    Ok((LessLayer { queries: features(queries), keys: features(keys) }, left))
}

/// Trains layer after layer; see the module's documentation.
#[derive(Debug)]
pub struct LessTraining {
    geometry: Geometry,
    frame: Frame,
    positions: usize,
    options: LessOptions,
    /// Those that are looked at.
    layers: Range<usize>,
    samples: Vec<LessSamples>,
    /// Epochs, over all layers.
    done: AtomicUsize,
    table: LessTable,
}

impl LessTraining {
    /// Nothing trained yet. `positions`: what the model can count to.
    pub fn new(
        geometry: Geometry,
        ropes: Vec<RopeTable>,
        positions: usize,
        options: LessOptions,
    ) -> Self {
        let mut frame = Frame::new(ropes);
        frame.grow(positions);
        let count = geometry.layers().len();
        let table = LessTable { layers: vec![None; count], errors: vec![0.0; count] };
        Self {
            geometry,
            frame,
            positions,
            options,
            layers: 0..0,
            samples: Vec::new(),
            done: AtomicUsize::new(0),
            table,
        }
    }

    /// The next layers whose rows of `tokens` tokens take `bytes` bytes at most, one at least; `None` after the last.
    pub fn next_layers(&mut self, tokens: usize, bytes: usize) -> Option<Range<usize>> {
        let layers = self.geometry.layers();
        let first = self.layers.end;
        let mut held = 0;
        let fits = |l: &LayerGeometry| {
            let heads = if l.window.is_some() { 0 } else { l.query_heads + 2 * l.kv_heads };
            held += 2 * tokens * heads * l.head_dim;
            held <= bytes
        };
        let count = layers[first..].iter().map(fits).take_while(|fits| *fits).count();
        self.layers = first..(first + count.max(1)).min(layers.len());
        self.samples = vec![LessSamples::default(); self.layers.len()];
        (!self.layers.is_empty()).then(|| self.layers.clone())
    }

    /// Adds one layer's rows of one text, not rotated: `[tokens, heads, head_dim]` each.
    pub fn observe(&mut self, layer: usize, queries: &[f32], keys: &[f32], values: &[f32]) {
        let l = &self.geometry.layers()[layer];
        if self.layers.contains(&layer) && l.window.is_none() {
            let tokens = keys.len() / (l.kv_heads * l.head_dim);
            self.samples[layer - self.layers.start].observe(queries, keys, values, tokens);
        }
    }

    /// Trains the layers that were looked at, on the current rayon pool. `output` makes `WᵀW` of a layer's output projection,
    /// `[query_heads · head_dim]` squared; `done` is told after each epoch of each layer how many
    /// that were.
    ///
    /// # Errors
    /// [`CacheError::Table`]: no text is long enough; rows that are not finite.
    pub fn train(
        &mut self,
        output: impl Fn(usize) -> Vec<f32> + Sync,
        done: impl Fn(usize) + Sync,
    ) -> Result<()> {
        let own = || {
            let before = self.done.fetch_add(1, Ordering::Relaxed);
            done(before + 1);
        };
        let Self { geometry, frame, positions, options, layers, samples, table, .. } = self;
        let turns = (&*frame, *positions);
        let trained: Vec<_> = layers
            .clone()
            .into_par_iter()
            .zip(&*samples)
            .filter(|(layer, _)| geometry.layers()[*layer].window.is_none())
            .map(|(layer, samples)| {
                let l = &geometry.layers()[layer];
                let made = train(layer, l, turns, samples, &output(layer), *options, &own)?;
                Ok((layer, made))
            })
            .collect::<Result<_>>()?;
        for (layer, (networks, left)) in trained {
            table.layers[layer] = Some(networks);
            table.errors[layer] = left;
        }
        samples.clear();
        Ok(())
    }

    /// Calls of `done` there will be in all.
    pub fn steps(&self) -> usize {
        let whole = self.geometry.layers().iter().filter(|l| l.window.is_none());
        whole.count() * self.options.epochs
    }

    /// All layers.
    pub fn finish(self) -> LessTable {
        self.table
    }
}

#[cfg(test)]
mod tests {
    use kvasir_kernels::RopeScaling;

    use super::*;
    use crate::codec::conformance::gaussian;
    use crate::geometry::tests::layer;

    const DIM: usize = 8;

    /// Two texts of a layer whose far tokens matter.
    fn samples(l: &LayerGeometry) -> LessSamples {
        let mut samples = LessSamples::default();
        for seed in 1..3 {
            let tokens = LEAST_TOKENS + 60;
            let rows = |heads: usize, seed| gaussian(tokens * heads * DIM, seed);
            let (q, k) = (rows(l.query_heads, seed), rows(l.kv_heads, seed + 10));
            samples.observe(&q, &k, &rows(l.kv_heads, seed + 20), tokens);
        }
        samples
    }

    fn identity(width: usize) -> Vec<f32> {
        (0..width * width).map(|i| if i % (width + 1) == 0 { 1.0 } else { 0.0 }).collect()
    }

    #[test]
    fn gradients_are_differences() {
        let l = layer(4, 2, DIM);
        let mut frame = Frame::new(vec![RopeTable::new(DIM, 1e4, &RopeScaling::None, 1)]);
        frame.grow(512);
        let samples = samples(&l);
        let output = gaussian(32 * 32, 5);
        // Symmetric, as squares are.
        let output: Vec<f32> = (0..32 * 32)
            .map(|i| (0..32).map(|k| output[i / 32 * 32 + k] * output[i % 32 * 32 + k]).sum())
            .collect();
        let networks = LessLayer::untrained(0, &l, 12, [1.0; 2]);
        let learners = |all: Vec<Features>| all.into_iter().map(Learner::new).collect();
        let mut training = LayerTraining {
            l: &l,
            frame: &frame,
            positions: 512,
            samples: &samples,
            output: &output,
            queries: learners(networks.queries),
            keys: learners(networks.keys),
        };
        let cut = Cut { first: 0, before: 150, shift: 7, heavy: 10, newest: 12 };
        // Second gains that count for something.
        for keys in &mut training.keys {
            let at = keys.features.weights.len() - FEATURES;
            keys.features.weights[at..].fill(0.3);
        }
        training.step(cut);
        let gradients: Vec<Vec<f32>> =
            training.queries.iter().chain(&training.keys).map(|l| l.gradient.clone()).collect();
        for (head, gradient) in gradients.iter().enumerate() {
            let trained = gradient.len() - usize::from(head < 4);
            let mut squares = [0.0; 2];
            for at in (0..trained).step_by(7).chain([trained - 1, trained - 10]) {
                let mut loss = |by: f32| {
                    let learner = match head.checked_sub(4) {
                        None => &mut training.queries[head],
                        Some(head) => &mut training.keys[head],
                    };
                    learner.features.weights[at] += by;
                    let [loss, _] = training.step(cut);
                    let learner = match head.checked_sub(4) {
                        None => &mut training.queries[head],
                        Some(head) => &mut training.keys[head],
                    };
                    learner.features.weights[at] -= by;
                    loss
                };
                let slope = (loss(1e-3) - loss(-1e-3)) / 2e-3;
                squares[0] += (slope - f64::from(gradient[at])).powi(2);
                squares[1] += slope.powi(2);
            }
            // A difference may step over a fold of the absolute value.
            let off = (squares[0] / squares[1]).sqrt();
            println!("head {head}: {off} off");
            assert!(off < 0.1, "head {head}: gradients are {off} off");
        }
    }

    #[test]
    fn training_leaves_less_of_the_error() {
        let layers = vec![layer(4, 2, DIM), LayerGeometry { window: Some(5), ..layer(4, 2, DIM) }];
        let geometry = Geometry::new(layers.clone(), 32).unwrap();
        let ropes = vec![RopeTable::new(DIM, 1e4, &RopeScaling::None, 1)];
        let train = |epochs| {
            let options = LessOptions { hidden: 16, epochs };
            let mut training = LessTraining::new(geometry.clone(), ropes.clone(), 1024, options);
            // One layer at a time.
            let mut seen = Vec::new();
            while let Some(range) = training.next_layers(1000, 1) {
                let samples = samples(&layers[0]);
                let (mut q, mut k, mut v) = (0, 0, 0);
                for tokens in &samples.texts {
                    let rows = |x: &[f16], at: &mut usize, heads: usize| -> Vec<f32> {
                        let from = *at;
                        *at += tokens * heads * DIM;
                        x[from..*at].iter().map(|x| x.to_f32()).collect()
                    };
                    let q = rows(&samples.queries, &mut q, 4);
                    let (k, v) = (rows(&samples.keys, &mut k, 2), rows(&samples.values, &mut v, 2));
                    (0..2).for_each(|layer| training.observe(layer, &q, &k, &v));
                }
                training.train(|_| identity(4 * DIM), |done| assert!(done <= epochs)).unwrap();
                seen.push(range);
            }
            assert_eq!(seen, [0..1, 1..2]);
            assert_eq!(training.steps(), epochs);
            training.finish()
        };
        let table = train(30);
        assert!(table.layers[0].is_some() && table.layers[1].is_none());
        let [trained, windowed] = table.errors() else { panic!("{:?}", table.errors()) };
        assert!(*trained < 0.75 && *windowed == 0.0, "{:?}", table.errors());
        assert_eq!(table, train(30));
    }

    #[test]
    fn corpora_that_show_nothing_are_refused() {
        let geometry = Geometry::new(vec![layer(4, 2, DIM)], 32).unwrap();
        let ropes = vec![RopeTable::new(DIM, 1e4, &RopeScaling::None, 1)];
        let refused = |tokens: usize, x: f32| {
            let options = LessOptions { hidden: 4, epochs: 1 };
            let mut training = LessTraining::new(geometry.clone(), ropes.clone(), 512, options);
            training.next_layers(tokens, 1 << 20);
            let (q, k) = (vec![x; tokens * 4 * DIM], vec![x; tokens * 2 * DIM]);
            training.observe(0, &q, &k, &k);
            training.train(|_| identity(4 * DIM), |_| ()).unwrap_err().to_string()
        };
        assert_eq!(refused(100, 1.0), "table of less: no text of the corpus has 192 tokens");
        let what = "table of less: queries, keys or values of layer 0 are not finite";
        assert_eq!(refused(300, f32::NAN), what);
    }
}
