//! Compactor (arXiv 2507.08143): a token stays if its key is unlike the others (leverage), or if its neighbourhood attends to
//! it whatever comes first. No query of the future is guessed.
//!
//! `score = z(a) + λ · z(o)`, z over all KV heads of a layer together. `o` are leverage scores of keys before RoPE, the
//! mean over tokens taken out, from a sketch: with `Y = K Φ`, `Φ` random of `sketch` columns, `o_t = y_t (Yᵀ Y + ε)⁻¹ y_tᵀ`. `a` is
//! what tokens are paid in blocks of `chunk` tokens by all queries of the block, earlier and later ones, without the factor
//! 1 / √dim, the mean over query heads, times the length of the value, the mean with both neighbours ([`super::chunks`]). Tokens at
//! both ends always stay and take no part. λ is the share that is given up, as in kvpress (`blend` says another).
//!
//! With `quality` instead of a share, each prompt keeps as little as leaves so much of its worth, by what it surprises
//! the model with ([`crate::offline::CompactorTable`]).
//!
//! Differences from kvpress 0.5.5: a block that is not full is computed at its own size (kvpress pads it with keys that
//! take part of the attention); `Φ` is the same for all heads and requests, so that a prompt always keeps the
//! same tokens; λ does not change the share of a cache that is too short to give anything up.

use kvasir_kernels::gemm_nt;
use nalgebra::{Cholesky, DMatrix};

use super::options::Options;
use super::policy::{Choice, Chunks, LayerView, Observed, Policy};
use super::{Budget, rank};
use crate::error::Result;

/// Of the random numbers of the sketch.
const SEED: u64 = 7;

/// What is added to the diagonal of the sketch's Gram matrix.
const RIDGE: f64 = 1e-2;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Compactor {
    amount: Amount,
    chunk: u16,
    /// In hundredths.
    blend: Option<u16>,
    sketch: u16,
    first: u16,
    last: u16,
}

/// How much of a prompt stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Amount {
    Share(Budget),
    /// What leaves so many hundredths of the context's worth.
    Quality(u16),
}

impl Compactor {
    pub(crate) const NAME: &str = "compactor";
    pub(crate) const USAGE: &str = "compactor:SHARE[:chunk=256][:blend=PERCENT][:sketch=48]\
         [:first=8][:last=4] or compactor:quality=PERCENT";
    /// Half of a prompt.
    pub const HALF: Self = Self {
        amount: Amount::Share(Budget::HALF),
        chunk: 256,
        blend: None,
        sketch: 48,
        first: 8,
        last: 4,
    };

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let quality = options.has("quality") && !options.has_number();
        let amount = match quality {
            true => Amount::Quality(options.whole("quality", 0, 1..=100)?),
            false => Amount::Share(Budget::parse(&mut options)?),
        };
        let chunk = options.whole("chunk", Self::HALF.chunk, 8..=1024)?;
        let blend = options.whole("blend", u16::MAX, 0..=1000)?;
        let blend = (blend != u16::MAX).then_some(blend);
        let sketch = options.whole("sketch", Self::HALF.sketch, 1..=256)?;
        let first = options.whole("first", Self::HALF.first, 0..=1024)?;
        let last = options.whole("last", Self::HALF.last, 0..=1024)?;
        options.done(Self::USAGE)?;
        Ok(Self { amount, chunk, blend, sketch, first, last })
    }

    fn chunks(&self) -> Chunks {
        let [size, first, last] = [self.chunk, self.first, self.last].map(usize::from);
        Chunks { size, first, last }
    }

    fn lambda(&self, budget: Budget) -> f32 {
        self.blend.map_or_else(|| 1.0 - budget.share(), |blend| f32::from(blend) / 100.0)
    }
}

impl std::fmt::Display for Compactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.amount {
            Amount::Share(share) => write!(f, "{}:{share}", Self::NAME)?,
            Amount::Quality(percent) => write!(f, "{}:quality={percent}", Self::NAME)?,
        }
        let usual = Self::HALF;
        for (name, value, usual) in [
            ("chunk", self.chunk, usual.chunk),
            ("blend", self.blend.unwrap_or(u16::MAX), u16::MAX),
            ("sketch", self.sketch, usual.sketch),
            ("first", self.first, usual.first),
            ("last", self.last, usual.last),
        ] {
            if value != usual {
                write!(f, ":{name}={value}")?;
            }
        }
        Ok(())
    }
}

impl Policy for Compactor {
    fn observed(&self) -> Observed {
        Observed::Chunks(self.chunks())
    }

    fn most_kept(&self, prompt: usize) -> usize {
        match self.amount {
            Amount::Share(share) => share.of(prompt),
            Amount::Quality(_) => prompt,
        }
    }

    fn varies(&self) -> bool {
        self.quality().is_some()
    }

    fn quality(&self) -> Option<f64> {
        match self.amount {
            Amount::Share(_) => None,
            Amount::Quality(percent) => Some(f64::from(percent) / 100.0),
        }
    }

    fn choose(&self, layer: &LayerView<'_>) -> Result<Choice> {
        let budget = match self.amount {
            Amount::Share(share) => share,
            Amount::Quality(_) => layer.budget,
        };
        let middle = self.chunks().middle(layer.tokens);
        let sketch = sketch(layer.rows.dim(), usize::from(self.sketch), SEED);
        let mut unlike: Vec<Vec<f32>> = Vec::new();
        let mut attended: Vec<Vec<f32>> = Vec::new();
        for (head, columns) in layer.columns.iter().enumerate() {
            let (keys, lengths) = layer.rows.plain_keys(head, middle.clone());
            unlike.push(leverage(&keys, layer.rows.dim(), &sketch));
            attended.push(attention(&columns[middle.clone()], &lengths, layer.group));
        }
        standardise(&mut unlike);
        standardise(&mut attended);
        for (scores, unlike) in attended.iter_mut().zip(&unlike) {
            scores.iter_mut().zip(unlike).for_each(|(a, o)| *a += self.lambda(budget) * o);
        }
        let mut scores: Vec<Vec<f32>> = attended
            .iter()
            .map(|scores| {
                let mut all = vec![f32::INFINITY; layer.tokens];
                all[middle.clone()].copy_from_slice(scores);
                all
            })
            .collect();
        layer.join(&mut scores);
        let count = budget.of(layer.tokens);
        Ok(Choice { heads: scores.iter().map(|scores| rank::top(scores, count)).collect() })
    }
}

/// `Φ`, transposed: `[columns, dim]`.
pub(super) fn sketch(dim: usize, columns: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut rows = vec![0.0; columns * dim];
    let scale = 1.0 / (columns as f32).sqrt();
    for i in 0..dim {
        for column in 0..columns {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let uniform = (state >> 33) as f32 / (1u64 << 30) as f32 - 1.0;
            rows[column * dim + i] = uniform * scale;
        }
    }
    rows
}

/// Leverage of every row of `keys`, `[tokens, dim]`, in the sketch `[columns, dim]`. O(tokens · columns · (dim + columns)).
pub(super) fn leverage(keys: &[f32], dim: usize, sketch: &[f32]) -> Vec<f32> {
    let (tokens, columns) = (keys.len() / dim, sketch.len() / dim);
    if tokens == 0 {
        return Vec::new();
    }
    let mut mean = vec![0.0f64; dim];
    for key in keys.chunks_exact(dim) {
        mean.iter_mut().zip(key).for_each(|(m, k)| *m += f64::from(*k) / tokens as f64);
    }
    let mut centred = keys.to_vec();
    for key in centred.chunks_exact_mut(dim) {
        key.iter_mut().zip(&mean).for_each(|(k, m)| *k -= *m as f32);
    }
    let mut y = vec![0.0; tokens * columns];
    gemm_nt((tokens, columns, dim), &centred, dim, sketch, dim, &mut y, columns);
    let mut transposed = vec![0.0; columns * tokens];
    for (t, row) in y.chunks_exact(columns).enumerate() {
        row.iter().enumerate().for_each(|(c, x)| transposed[c * tokens + t] = *x);
    }
    let mut gram = vec![0.0; columns * columns];
    gemm_nt(
        (columns, columns, tokens),
        &transposed,
        tokens,
        &transposed,
        tokens,
        &mut gram,
        columns,
    );
    // A matrix of keys that are numbers has a factor with some ridge; those that are not say nothing.
    let root = [RIDGE, 0.1, 1.0, 10.0, 100.0].into_iter().find_map(|ridge| {
        let entry = |r: usize, c: usize| {
            f64::from(gram[r * columns + c]) + if r == c { ridge } else { 0.0 }
        };
        Cholesky::new(DMatrix::from_fn(columns, columns, entry))
    });
    let Some(inverse) = root.and_then(|root| root.l().try_inverse()) else {
        return vec![0.0; tokens];
    };
    // ‖L⁻¹ y‖² = y (L Lᵀ)⁻¹ yᵀ
    let inverse: Vec<f32> =
        (0..columns * columns).map(|i| inverse[(i / columns, i % columns)] as f32).collect();
    let mut white = vec![0.0; tokens * columns];
    gemm_nt((tokens, columns, columns), &y, columns, &inverse, columns, &mut white, columns);
    white.chunks_exact(columns).map(|row| row.iter().map(|x| x * x).sum()).collect()
}

/// From what tokens were paid, over all query heads of a KV head, to their scores.
pub(super) fn attention(paid: &[f32], lengths: &[f32], group: usize) -> Vec<f32> {
    let weighted: Vec<f32> =
        paid.iter().zip(lengths).map(|(paid, length)| paid / group as f32 * length).collect();
    rank::pool(&weighted, 3)
}

/// Takes the mean over everything away and divides by the deviation.
pub(super) fn standardise(scores: &mut [Vec<f32>]) {
    let count = scores.iter().map(Vec::len).sum::<usize>() as f64;
    let all = || scores.iter().flatten().map(|x| f64::from(*x));
    let mean = all().sum::<f64>() / count.max(1.0);
    let variance = all().map(|x| (x - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    let deviation = variance.sqrt().max(1e-6);
    for score in scores.iter_mut().flatten() {
        *score = ((f64::from(*score) - mean) / deviation) as f32;
    }
}
