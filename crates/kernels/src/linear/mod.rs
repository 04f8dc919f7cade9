//! Linear layers.
//!
//! Weights stay packed as the file has them (4- and 8-bit codes with a scale for 32), or are rounded to
//! bf16, or, where somebody wants a control, kept in f32. Inputs of packed layers are rounded to bf16 once
//! per row and shared by all layers that read them, or, for codes, to bytes with a step for each 16, which is 1.7
//! times as fast on processors with VNNI.
//!
//! Row invariant, on every path.

mod activations;
mod bytes;
mod packed;
mod portable;
mod product;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

pub use activations::{ActivationKind, Activations};
pub use packed::{CodeFormat, GROUP, GroupCodes};

use crate::activation::{Activation, gated};
use crate::gemm::gemm_nt_raw;
use crate::isa::Isa;
use crate::threads::{Disjoint, num_threads, parallel_for};
use packed::{Packed, TILE};
use product::{Block, Path, ROWS, Target, multiply_tile};

/// Rows per pass over the weights: their inputs stay in L2 while tiles pass by.
const ROWS_PER_PASS: usize = 256;

/// Tasks of a thread in a loop over few rows: enough to even out what is left at the end.
const TASKS_PER_THREAD: usize = 6;

/// `y = x Wᵀ + b` with `W: [out_features, in_features]`.
#[derive(Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Vec<f32>>,
    in_features: usize,
    out_features: usize,
}

#[derive(Debug)]
enum Weight {
    F32(Vec<f32>), // [out_features, in_features]
    Packed(Packed),
}

/// What becomes of the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Put {
    Set,
    Add,
}

impl Linear {
    /// Weights in f32, used as they are. `weight`: `[out_features, in_features]`; `bias`: `[out_features]`.
    ///
    /// # Panics
    /// If the lengths disagree: shapes are checked where tensors are read.
    pub fn new(
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
    ) -> Self {
        assert_eq!(weight.len(), in_features * out_features, "weight of {out_features} rows");
        Self { weight: Weight::F32(weight), bias: None, in_features, out_features }.with_bias(bias)
    }

    /// Weights rounded to bf16. As [`Self::new`] otherwise.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn bf16(
        weight: &[f32],
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
    ) -> Self {
        assert_eq!(weight.len(), in_features * out_features, "weight of {out_features} rows");
        let weight = Weight::Packed(Packed::from_rows(weight, in_features, out_features));
        Self { weight, bias: None, in_features, out_features }.with_bias(bias)
    }

    /// Weights in groups of codes, kept as they are, for inputs in bf16 or, if the format has such products, in bytes;
    /// scales and minimums are rounded to f16. `groups(row, out)` fills the `in_features / GROUP` groups of a row. `None` if a scale or a minimum is out of
    /// f16's range of normal numbers.
    ///
    /// # Errors
    /// What `groups` returns.
    ///
    /// # Panics
    /// If `in_features` is not whole groups, or a bias has another length than `out_features`.
    pub fn from_codes<E>(
        (format, inputs): (CodeFormat, ActivationKind),
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
        groups: impl FnMut(usize, &mut [GroupCodes]) -> Result<(), E>,
    ) -> Result<Option<Self>, E> {
        assert!(in_features.is_multiple_of(GROUP), "{in_features} inputs in groups of {GROUP}");
        let bytes = inputs == ActivationKind::Bytes && format.counts_from_lowest();
        let inputs = if bytes { ActivationKind::Bytes } else { ActivationKind::Bf16 };
        let packed = Packed::from_codes(format, inputs, (in_features, out_features), groups)?;
        Ok(packed.map(|packed| {
            Self { weight: Weight::Packed(packed), bias: None, in_features, out_features }
                .with_bias(bias)
        }))
    }

    fn with_bias(self, bias: Option<Vec<f32>>) -> Self {
        assert!(bias.as_ref().is_none_or(|b| b.len() == self.out_features), "bias length");
        Self { bias, ..self }
    }

    /// Length of an input row.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Length of an output row.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes of the weights as held in memory.
    pub fn num_bytes(&self) -> usize {
        let weight = match &self.weight {
            Weight::F32(weight) => 4 * weight.len(),
            Weight::Packed(packed) => packed.bytes.len(),
        };
        weight + 4 * self.bias.as_ref().map_or(0, Vec::len)
    }

    /// The form in which this layer reads its inputs.
    pub fn activation_kind(&self) -> ActivationKind {
        match &self.weight {
            Weight::F32(_) => ActivationKind::F32,
            Weight::Packed(packed) => packed.inputs,
        }
    }

    /// One row of the weight: an embedding, when the matrix is an embedding table. `out`: `[in_features]`.
    ///
    /// # Panics
    /// If `row` is not below `out_features`, or `out` has another length.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.out_features && out.len() == self.in_features, "row {row}");
        match &self.weight {
            Weight::F32(weight) => {
                out.copy_from_slice(&weight[row * self.in_features..(row + 1) * self.in_features]);
            }
            Weight::Packed(packed) => packed.row_into(row, out),
        }
    }

    /// `out = x Wᵀ + b`. `out`: `[x.rows(), out_features]`. Uses the current threads.
    ///
    /// # Panics
    /// If `x` has rows of another length or kind, or `out` other rows.
    pub fn forward(&self, x: &Activations, out: &mut [f32]) {
        forward_on(self.path(), [self], x, [out], Put::Set);
    }

    /// `out += x Wᵀ + b`; see [`Self::forward`].
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn forward_add(&self, x: &Activations, out: &mut [f32]) {
        forward_on(self.path(), [self], x, [out], Put::Add);
    }

    /// The part of the bias that belongs to a tile.
    fn tile_bias(&self, tile: usize) -> Option<&[f32]> {
        let bias = self.bias.as_ref()?;
        Some(&bias[tile * TILE..bias.len().min((tile + 1) * TILE)])
    }

    fn path(&self) -> Path {
        Path::best(self.activation_kind())
    }

    fn check(&self, x: &Activations, out: &[f32]) {
        let (rows, n) = (x.rows(), self.out_features);
        assert_eq!(x.width, self.in_features, "inputs of a row");
        assert!(x.is(self.activation_kind()), "inputs as {:?}", self.activation_kind());
        assert_eq!(out.len(), rows * n, "output rows of {n} for {rows} inputs");
    }
}

/// [`Linear::forward`] of several layers with the same inputs, in one loop over all their features.
///
/// # Panics
/// As [`Linear::forward`].
pub fn forward_all<const N: usize>(linears: [&Linear; N], x: &Activations, outs: [&mut [f32]; N]) {
    let Some(first) = linears.first() else { return };
    forward_on(first.path(), linears, x, outs, Put::Set);
}

fn forward_on<const N: usize>(
    path: Path,
    linears: [&Linear; N],
    x: &Activations,
    mut outs: [&mut [f32]; N],
    how: Put,
) {
    for (linear, out) in linears.iter().zip(&outs) {
        linear.check(x, out);
    }
    let tiles = linears.map(|linear| linear.out_features.div_ceil(TILE));
    let outs = outs.each_mut().map(|out| Disjoint::new(out));
    for_passes(x.rows(), tiles.iter().sum(), |rows, mut tile| {
        let mut which = 0;
        while tile >= tiles[which] {
            tile -= tiles[which];
            which += 1;
        }
        forward_tile(path, linears[which], tile, x, rows, &outs[which], how);
    });
}

/// Calls `body(rows, tile)` for every tile and pass, on the current threads.
fn for_passes(rows: usize, tiles: usize, body: impl Fn(Range<usize>, usize) + Sync) {
    let passes = rows.div_ceil(ROWS_PER_PASS);
    // Few rows are done with a tile in less than a microsecond: taking a task would cost a part of that.
    let most = if rows <= ROWS { passes * tiles / (TASKS_PER_THREAD * num_threads()) } else { 1 };
    let per_task = most.max(1);
    parallel_for((passes * tiles).div_ceil(per_task), |task, _| {
        for tile in task * per_task..(passes * tiles).min((task + 1) * per_task) {
            let first = tile / tiles * ROWS_PER_PASS;
            body(first..rows.min(first + ROWS_PER_PASS), tile % tiles);
        }
    });
}

/// One tile of features for some rows.
fn forward_tile(
    path: Path,
    linear: &Linear,
    tile: usize,
    x: &Activations,
    rows: Range<usize>,
    out: &Disjoint<'_, f32>,
    how: Put,
) {
    let n = linear.out_features;
    let features = TILE.min(n - tile * TILE);
    let target = Target {
        start: out.rows((rows.start * n + tile * TILE, n), (rows.len(), features)),
        stride: n,
        features,
        bias: linear.tile_bias(tile),
        add: how == Put::Add,
    };
    // SAFETY: these features of these rows belong to this task alone.
    unsafe { put_tile(path, linear, tile, x, rows, &target) };
}

/// Puts the products of a tile of features.
///
/// # Safety
/// `target` is as many rows that nobody else has.
unsafe fn put_tile(
    path: Path,
    linear: &Linear,
    tile: usize,
    x: &Activations,
    rows: Range<usize>,
    target: &Target<'_>,
) {
    match &linear.weight {
        // SAFETY: by contract.
        Weight::Packed(packed) => unsafe { multiply_tile(path, packed, tile, x, rows, target) },
        Weight::F32(weight) => {
            for first in rows.clone().step_by(ROWS) {
                let block = first..rows.end.min(first + ROWS);
                let products = plain_tile(path, linear, weight, tile, x, block.clone());
                for (row, products) in block.zip(&products) {
                    // SAFETY: by contract.
                    unsafe { target.put(row - rows.start, products) };
                }
            }
        }
    }
}

/// Rows of f32 inputs, up to [`ROWS`], against a tile of f32 weights.
fn plain_tile(
    path: Path,
    linear: &Linear,
    weight: &[f32],
    tile: usize,
    x: &Activations,
    rows: Range<usize>,
) -> Block {
    let isa = match path {
        Path::Portable(isa) => isa,
        #[cfg(target_arch = "x86_64")]
        Path::Bf16 | Path::Vnni => Isa::best(),
    };
    let (k, first) = (linear.in_features, tile * TILE);
    let (m, n) = (rows.len().min(ROWS), TILE.min(linear.out_features - first));
    let (x, w) = (&x.plain[rows.start * k..][..m * k], &weight[first * k..(first + n) * k]);
    let mut out = [[0.0; TILE]; ROWS];
    let out_start = out.as_mut_ptr().cast::<f32>();
    // SAFETY: m rows of k inputs, n rows of k weights, m rows of n outputs, TILE apart.
    unsafe { gemm_nt_raw(isa, (m, n, k), x.as_ptr(), k, w.as_ptr(), k, out_start, TILE) };
    out
}

/// `out = activation(gate(x)) · up(x)`, in the form that a layer of `kind` reads. Uses the current threads.
///
/// # Panics
/// If the layers differ in shape, or as [`Linear::forward`].
pub fn forward_gated(
    gate: &Linear,
    up: &Linear,
    activation: Activation,
    x: &Activations,
    kind: ActivationKind,
    out: &mut Activations,
) {
    assert!(
        (gate.in_features, gate.out_features) == (up.in_features, up.out_features),
        "a gate of [{}, {}] with an up projection of [{}, {}]",
        gate.out_features,
        gate.in_features,
        up.out_features,
        up.in_features
    );
    let (rows, width) = (x.rows(), gate.out_features);
    let (path, tiles) = (gate.path(), width.div_ceil(TILE));
    let places = out.reset(kind, rows, width);
    for linear in [gate, up] {
        assert_eq!(x.width, linear.in_features, "inputs of a row");
        assert!(x.is(linear.activation_kind()), "inputs as {:?}", linear.activation_kind());
    }
    for_passes(rows, tiles, |rows, tile| {
        let features = TILE.min(width - tile * TILE);
        GATED.with_borrow_mut(|both| {
            let [gates, ups] = both;
            let products = [(gate, gates), (up, ups)].map(|(linear, products)| {
                products.resize(ROWS_PER_PASS, [0.0; TILE]);
                let target = Target {
                    start: products.as_mut_ptr().cast(),
                    stride: TILE,
                    features,
                    bias: linear.tile_bias(tile),
                    add: false,
                };
                // SAFETY: this thread's own rows, as many as a pass has.
                unsafe { put_tile(path, linear, tile, x, rows.clone(), &target) };
                &mut products[..rows.len()]
            });
            let [gates, ups] = products.map(|products| products.chunks_mut(ROWS_PER_GATE));
            for ((first, gates), ups) in rows.step_by(ROWS_PER_GATE).zip(gates).zip(ups) {
                gated(activation, gates.as_flattened_mut(), ups.as_flattened());
                // What is beyond the last feature stays out of sums.
                gates.iter_mut().for_each(|gates| gates[features..].fill(0.0));
                // SAFETY: this group of these rows belongs to this task alone: a tile of features is a group of
                // the next layer's inputs.
                unsafe { places.put_group(first, tile, gates) };
            }
        });
    });
    // SAFETY: all groups are there, and no task is left.
    unsafe { places.settle_rows(rows) };
}

thread_local! {
    /// Products of a tile of a gate and of its up projection, with the rows of a pass.
    static GATED: RefCell<[Vec<[f32; TILE]>; 2]> = RefCell::default();
}

/// Rows whose gate is computed together: they stay in L1.
const ROWS_PER_GATE: usize = 32;
