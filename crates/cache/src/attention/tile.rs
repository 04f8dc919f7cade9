//! One thread's buffers.

use std::sync::Arc;

use kvasir_kernels::OnlineSoftmax;

use crate::codec::Basis;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Tile {
    pub(super) keys: Vec<f32>, // [block_size, head_dim] or [block_size, width]
    pub(super) values: Vec<f32>, // the same
    pub(super) queries: Vec<f32>, // [rows, head_dim]
    /// Queries of the whole item at their own positions, once a block asked for them.
    pub(super) absolute: Vec<f32>, // [rows, head_dim]
    pub(super) folded: Vec<f32>, // [rows, width]
    pub(super) scores: Vec<f32>, // [rows, block_size]
    /// Sums of the coded path, plain channels before coded ones: `[rows, head_dim + width]`.
    pub(super) sums: Vec<f32>,
    pub(super) states: Vec<OnlineSoftmax>,
    /// Coded rows before they are turned into plain ones.
    pub(super) coded: Vec<f32>, // [block_size, width]
    /// Bases of keys and of values as f32, kept while items use the same.
    pub(super) bases: [HeldBasis; 2],
    /// Time spent on decoding blocks since it was last asked for.
    pub(super) decode_nanos: u64,
}

/// A basis as f32.
#[derive(Debug, Default)]
pub(super) struct HeldBasis {
    of: Option<Arc<Basis>>,
    pub(super) columns: Vec<f32>, // [channels, coefficients]
}

impl HeldBasis {
    /// Takes in a basis unless it is the one that is held.
    #[inline]
    pub(super) fn load(&mut self, basis: &Arc<Basis>) {
        if !self.of.as_ref().is_some_and(|held| Arc::ptr_eq(held, basis)) {
            basis.columns_into(&mut self.columns);
            self.of = Some(Arc::clone(basis));
        }
    }
}

impl Tile {
    /// Room for `rows` query rows against blocks of `block_size` rows of `width` channels.
    pub(super) fn resize(&mut self, rows: usize, dim: usize, width: usize, block_size: usize) {
        self.absolute.clear();
        self.keys.resize(block_size * width, 0.0);
        self.values.resize(block_size * width, 0.0);
        self.queries.resize(rows * dim, 0.0);
        self.scores.resize(rows * block_size, 0.0);
        self.states.resize(rows, OnlineSoftmax::default());
        self.states.fill(OnlineSoftmax::default());
    }
}
