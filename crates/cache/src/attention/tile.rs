//! One thread's buffers.

use std::sync::Arc;

use half::f16;
use kvasir_kernels::coded::ByteRows;
use kvasir_kernels::{BlockScratch, ManyRows, OnlineSoftmax, QueryLanes};

use super::coded::ByteTile;
use crate::codec::{Basis, LevelScratch};

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Tile {
    pub(super) keys: Vec<f32>, // [block_size, head_dim] or [block_size, width]
    pub(super) values: Vec<f32>, // the same
    /// Keys and values of codecs that are quick at f16.
    pub(super) halves: [Vec<f16>; 2], // [block_size, head_dim]
    /// Rows outside the pool that a query attends to.
    pub(super) ranges: Vec<(usize, usize)>,
    /// What a query sees of tokens that are gone.
    pub(super) seen: Vec<f32>, // [stride]
    /// Keys of fewer channels.
    pub(super) narrow: Vec<f16>, // [block_size, channels]
    pub(super) queries: Vec<f32>, // [rows, head_dim]
    /// Queries of the whole item at their own positions, once a block asked for them.
    pub(super) absolute: Vec<f32>, // [rows, head_dim]
    pub(super) folded: Vec<f32>,  // [rows, width]
    pub(super) scores: Vec<f32>,  // [rows, block_size]
    /// Coded rows before they are turned into plain ones.
    pub(super) coded: Vec<f32>, // [block_size, width]
    /// Bases of keys and of values as f32, kept while items use the same.
    pub(super) bases: [HeldBasis; 2],
    /// The same as bytes, for blocks that are turned back.
    pub(super) rows: [HeldRows; 2],
    /// Levels of a block that is turned back.
    pub(super) levels: LevelScratch,
    /// What the kernel needs for one block.
    pub(super) block: BlockScratch,
    /// The plain job whose queries are here.
    pub(super) job: Option<usize>,
    /// Whether its rows go through blocks side by side.
    pub(super) many: bool,
    pub(super) many_rows: ManyRows,
    /// Its queries, those of `queries` and of `absolute`, and whether they are there already.
    pub(super) lanes: [QueryLanes; 2],
    pub(super) loaded: [bool; 2],
    /// Over all ranges of an item, and over the one it is at.
    pub(super) sums: [Sums; 2],
    /// An item's rows when they are finished.
    pub(super) mixed: Vec<f32>, // [heads, rows, head_dim]
    /// What the byte products of the coded path need.
    pub(super) bytes: ByteTile,
    /// Time spent on decoding blocks since it was last asked for.
    pub(super) decode_nanos: u64,
}

/// The online softmax of some rows over some tokens: not normalised.
#[derive(Debug, Default)]
pub(super) struct Sums {
    pub(super) states: Vec<OnlineSoftmax>, // [rows]
    pub(super) values: Vec<f32>,           // [rows, stride]
}

impl Sums {
    /// Those of `rows` rows that have seen nothing; room for them only, if all are `written` before they are read.
    pub(super) fn reset(&mut self, rows: usize, stride: usize, written: bool) {
        if !written {
            self.states.clear();
            self.values.clear();
        }
        self.states.resize(rows, OnlineSoftmax::default());
        self.values.resize(rows * stride, 0.0);
    }
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

/// A basis as bytes, for heads of one size.
#[derive(Debug, Default)]
pub(super) struct HeldRows {
    of: Option<(Arc<Basis>, usize)>,
    pub(super) rows: ByteRows,
}

impl HeldRows {
    /// Takes in a basis unless it is the one that is held.
    #[inline]
    pub(super) fn load(&mut self, basis: &Arc<Basis>, dim: usize) {
        if !self.of.as_ref().is_some_and(|(held, d)| Arc::ptr_eq(held, basis) && *d == dim) {
            basis.rows_into(dim, &mut self.rows);
            self.of = Some((Arc::clone(basis), dim));
        }
    }
}

impl Tile {
    /// Makes room for items of up to `rows` query rows with sums of `stride`, so that a thread's first item allocates
    /// no more than its last.
    pub(super) fn reserve(&mut self, rows: usize, stride: usize, dim: usize, block_size: usize) {
        let grow = |buffer: &mut Vec<f32>, len: usize| {
            buffer.reserve(len.saturating_sub(buffer.len()));
        };
        grow(&mut self.queries, rows * dim);
        grow(&mut self.mixed, rows * dim);
        grow(&mut self.scores, rows * block_size);
        for sums in &mut self.sums {
            grow(&mut sums.values, rows * stride);
            sums.states.reserve(rows.saturating_sub(sums.states.len()));
        }
        self.block.reserve(block_size, dim);
    }

    /// Room for `rows` query rows, which go one by one until somebody says otherwise, against blocks of `block_size` rows of `width` channels.
    pub(super) fn resize(&mut self, rows: usize, dim: usize, width: usize, block_size: usize) {
        self.absolute.clear();
        self.many = false;
        self.keys.resize(block_size * width, 0.0);
        self.values.resize(block_size * width, 0.0);
        self.queries.resize(rows * dim, 0.0);
        self.scores.resize(rows * block_size, 0.0);
    }
}
