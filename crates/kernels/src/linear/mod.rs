//! Linear layers.
//!
//! Weights stay packed as the file has them (codes of 2 to 8 bits, f16, bf16, f32), or are rounded to
//! bf16. Inputs are rounded once
//! per row and shared by all layers that read them: to bytes with a step for each 16, where weights are codes, to bf16, or not at
//! all ([`ActivationKind`]). Bytes are fastest wherever there are products of them; which of the others is depends on the processor.
//!
//! Row invariant, on every path.

mod activations;
mod bytes;
mod k_packed;
mod k_quads;
mod k_source;
mod operands;
mod pack;
mod packed;
mod pairs;
mod product;
mod quads;
mod tiles;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;

pub use activations::{ActivationKind, Activations};
pub use k_packed::{IQ4_LEVELS, KFormat, KGroup, MXFP4_LEVELS, SUPERBLOCK};
pub use packed::{CodeFormat, GROUP, GroupCodes};

use crate::activation::{Activation, gated};
use crate::isa::Isa;
use crate::threads::{Disjoint, num_threads, parallel_for};
use packed::{Packed, Stored, TILE};
use product::{Target, multiply_tile};
use tiles::Unit;

/// Rows per pass over the weights: their inputs stay in L2 while tiles pass by.
const ROWS_PER_PASS: usize = 256;

/// Most rows for which several tiles are one task.
const FEW_ROWS: usize = pairs::ROWS;

/// Tasks of a thread in a loop over few rows: enough to even out what is left at the end.
const TASKS_PER_THREAD: usize = 6;

/// `y = x Wᵀ + b` with `W: [out_features, in_features]`.
#[derive(Debug)]
pub struct Linear {
    weight: Packed,
    bias: Option<Vec<f32>>,
    in_features: usize,
    out_features: usize,
}

/// What weights that are numbers are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatFormat {
    /// With inputs in f32 not rounded again; with inputs in bf16 rounded to it when they are multiplied.
    F16,
    /// With inputs in bf16, f32 or tiles.
    Bf16,
    /// With inputs in f32.
    F32,
}

impl FloatFormat {
    /// Whether there are products with inputs of a kind.
    pub fn takes(self, inputs: ActivationKind) -> bool {
        match self {
            Self::F16 => matches!(inputs, ActivationKind::F32 | ActivationKind::Bf16),
            Self::Bf16 => inputs != ActivationKind::Bytes,
            Self::F32 => inputs == ActivationKind::F32,
        }
    }

    fn stored(self) -> Stored {
        match self {
            Self::F16 => Stored::F16,
            Self::Bf16 => Stored::Bf16,
            Self::F32 => Stored::F32,
        }
    }
}

/// What becomes of the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Put {
    Set,
    Add,
}

impl Linear {
    /// Weights as numbers, used as they are or rounded to what they are held in. `open(rows)` makes some rows readable, which it is asked for from any thread of
    /// the current rayon pool; `read(row, first, out)` then reads weights of a row from input `first` on.
    ///
    /// # Errors
    /// What `open` returns.
    ///
    /// # Panics
    /// If inputs are bytes, of which there are no products with numbers, or tiles with weights that are not bf16; or a bias has another length than `out_features`.
    pub fn from_floats<E: Send, R: Fn(usize, usize, &mut [f32])>(
        (held, inputs): (FloatFormat, ActivationKind),
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
        open: impl Fn(Range<usize>) -> Result<R, E> + Sync,
    ) -> Result<Self, E> {
        assert!(held.takes(inputs), "{held:?} with inputs as {inputs}");
        let weight = Packed::from_floats(held.stored(), inputs, (in_features, out_features), open)?;
        Ok(Self { weight, bias: None, in_features, out_features }.with_bias(bias))
    }

    /// Weights in f32, used as they are. `weight`: `[out_features, in_features]`; `bias`: `[out_features]`.
    ///
    /// # Panics
    /// If the lengths disagree: shapes are checked where tensors are read.
    pub fn new(
        weight: &[f32],
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
    ) -> Self {
        let form = (FloatFormat::F32, ActivationKind::F32);
        Self::of_slice(form, weight, bias, (in_features, out_features))
    }

    /// Weights rounded to bf16, for inputs in bf16 or f32. As [`Self::new`] otherwise.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn bf16(
        inputs: ActivationKind,
        weight: &[f32],
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
    ) -> Self {
        let inputs = if inputs == ActivationKind::Bytes { ActivationKind::Bf16 } else { inputs };
        Self::of_slice((FloatFormat::Bf16, inputs), weight, bias, (in_features, out_features))
    }

    /// As [`Self::from_floats`], of weights that are in memory.
    ///
    /// # Panics
    /// As [`Self::new`] and [`Self::from_floats`].
    pub fn of_slice(
        form: (FloatFormat, ActivationKind),
        weight: &[f32],
        bias: Option<Vec<f32>>,
        (in_features, out_features): (usize, usize),
    ) -> Self {
        assert_eq!(weight.len(), in_features * out_features, "weight of {out_features} rows");
        let open = |_: Range<usize>| {
            let read = |row: usize, first: usize, out: &mut [f32]| {
                out.copy_from_slice(&weight[row * in_features + first..][..out.len()]);
            };
            Ok::<_, Infallible>(read)
        };
        let Ok(linear) = Self::from_floats(form, bias, in_features, out_features, open);
        linear
    }

    /// Weights in groups of codes, kept as they are, for inputs of some kind (bf16 instead of bytes if the format has no products with those);
    /// scales and minimums are rounded to f16. `open` and `read` as in [`Self::from_floats`], `first` and `out` in groups of [`GROUP`] inputs. `None` if a scale or a
    /// minimum is out of f16's range of normal numbers.
    ///
    /// # Errors
    /// What `open` returns.
    ///
    /// # Panics
    /// If `in_features` is not whole groups, or a bias has another length than `out_features`.
    pub fn from_codes<E: Send, R: Fn(usize, usize, &mut [GroupCodes])>(
        (format, inputs): (CodeFormat, ActivationKind),
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
        open: impl Fn(Range<usize>) -> Result<R, E> + Sync,
    ) -> Result<Option<Self>, E> {
        assert!(in_features.is_multiple_of(GROUP), "{in_features} inputs in groups of {GROUP}");
        let inputs = if format.takes(inputs) { inputs } else { ActivationKind::Bf16 };
        let packed = Packed::from_codes(format, inputs, (in_features, out_features), open)?;
        Ok(packed
            .map(|weight| Self { weight, bias: None, in_features, out_features }.with_bias(bias)))
    }

    /// Weights of a K type, kept as they are, for inputs of some kind but tiles, of which there are no products with them. `open` and `read` as in
    /// [`Self::from_codes`]. With inputs in bytes or f32 no weight is rounded; with inputs in bf16 weights of formats with
    /// a scale for 16 are rounded to bf16 when they are multiplied. `None` if a group's number is none: one that f16 cannot hold.
    ///
    /// # Errors
    /// What `open` returns.
    ///
    /// # Panics
    /// If `in_features` is not whole blocks of the format, inputs are tiles, or a bias has another length than `out_features`.
    pub fn from_k<E: Send, R: Fn(usize, usize, &mut [KGroup])>(
        (format, inputs): (KFormat, ActivationKind),
        bias: Option<Vec<f32>>,
        in_features: usize,
        out_features: usize,
        open: impl Fn(Range<usize>) -> Result<R, E> + Sync,
    ) -> Result<Option<Self>, E> {
        let block = format.block_inputs();
        assert!(in_features.is_multiple_of(block), "{in_features} inputs in blocks of {block}");
        assert!(inputs != ActivationKind::Tiles, "codes of a K type with tiles");
        let packed = Packed::from_k(format, inputs, (in_features, out_features), open)?;
        Ok(packed
            .map(|weight| Self { weight, bias: None, in_features, out_features }.with_bias(bias)))
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
        self.weight.bytes.len() + 4 * self.bias.as_ref().map_or(0, Vec::len)
    }

    /// Bytes of a matrix held as numbers.
    pub fn bytes_of_floats(held: FloatFormat, in_features: usize, out_features: usize) -> usize {
        Packed::num_bytes(held.stored(), (in_features, out_features))
    }

    /// Bytes of a matrix of codes.
    pub fn bytes_of_codes(format: CodeFormat, in_features: usize, out_features: usize) -> usize {
        Packed::num_bytes(Stored::Codes(format), (in_features, out_features))
    }

    /// Bytes of a matrix of a K type.
    pub fn bytes_of_k(format: KFormat, in_features: usize, out_features: usize) -> usize {
        Packed::num_bytes(Stored::K(format), (in_features, out_features))
    }

    /// Keeps the weights in memory, whatever else wants it.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn lock(&self) -> std::io::Result<()> {
        self.weight.bytes.lock()
    }

    /// The form in which this layer reads its inputs.
    pub fn activation_kind(&self) -> ActivationKind {
        self.weight.inputs
    }

    /// What is multiplied with what, in words: `codes × bytes`.
    pub fn form(&self) -> String {
        let weights = match self.weight.stored {
            Stored::Codes(_) | Stored::K(_) => "codes",
            Stored::Bf16 => "bf16",
            Stored::F16 => "f16",
            Stored::F32 => "f32",
        };
        format!("{weights} × {}", self.activation_kind())
    }

    /// One row of the weight: an embedding, when the matrix is an embedding table. `out`: `[in_features]`.
    ///
    /// # Panics
    /// If `row` is not below `out_features`, or `out` has another length.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.out_features && out.len() == self.in_features, "row {row}");
        self.weight.row_into(row, out);
    }

    /// `out = x Wᵀ + b`. `out`: `[x.rows(), out_features]`. Uses the current threads.
    ///
    /// # Panics
    /// If `x` has rows of another length or kind, or `out` other rows.
    pub fn forward(&self, x: &Activations, out: &mut [f32]) {
        forward_on(Isa::best(), [self], x, [out], Put::Set);
    }

    /// `out += x Wᵀ + b`; see [`Self::forward`].
    ///
    /// # Panics
    /// As [`Self::forward`].
    pub fn forward_add(&self, x: &Activations, out: &mut [f32]) {
        forward_on(Isa::best(), [self], x, [out], Put::Add);
    }

    /// The part of the bias that belongs to a tile.
    fn tile_bias(&self, tile: usize) -> Option<&[f32]> {
        let bias = self.bias.as_ref()?;
        Some(&bias[tile * TILE..bias.len().min((tile + 1) * TILE)])
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
    forward_on(Isa::best(), linears, x, outs, Put::Set);
}

fn forward_on<const N: usize>(
    isa: Isa,
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
    for_passes((isa, x), tiles.iter().sum(), |unit, rows, mut tile| {
        let mut which = 0;
        while tile >= tiles[which] {
            tile -= tiles[which];
            which += 1;
        }
        forward_tile((isa, unit), linears[which], tile, x, rows, &outs[which], how);
    });
}

/// Calls `body(unit, rows, tile)` for every tile and pass of some inputs, on the current threads.
fn for_passes(
    (isa, x): (Isa, &Activations),
    tiles: usize,
    body: impl Fn(&Unit, Range<usize>, usize) + Sync,
) {
    let rows = x.rows();
    let passes = rows.div_ceil(ROWS_PER_PASS);
    // Few rows are done with a tile in less than a microsecond: taking a task would cost a part of that.
    let most =
        if rows <= FEW_ROWS { passes * tiles / (TASKS_PER_THREAD * num_threads()) } else { 1 };
    let per_task = most.max(1);
    parallel_for((passes * tiles).div_ceil(per_task), |task, _| {
        let unit = Unit::new(isa, x.kind(), rows);
        for tile in task * per_task..(passes * tiles).min((task + 1) * per_task) {
            let first = tile / tiles * ROWS_PER_PASS;
            body(&unit, first..rows.min(first + ROWS_PER_PASS), tile % tiles);
        }
    });
}

/// One tile of features for some rows.
fn forward_tile(
    on: (Isa, &Unit),
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
    unsafe { multiply_tile(on, &linear.weight, tile, x, rows, &target) };
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
    let (isa, tiles) = (Isa::best(), width.div_ceil(TILE));
    let places = out.reset(kind, rows, width);
    for linear in [gate, up] {
        assert_eq!(x.width, linear.in_features, "inputs of a row");
        assert!(x.is(linear.activation_kind()), "inputs as {:?}", linear.activation_kind());
    }
    for_passes((isa, x), tiles, |unit, rows, tile| {
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
                unsafe {
                    multiply_tile((isa, unit), &linear.weight, tile, x, rows.clone(), &target)
                };
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
