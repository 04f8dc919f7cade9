//! HOT PATH. The frame keys are stored in: rotated by their offset inside the block.
//!
//! With a query at position m and a block starting at p,
//! `(R_m q) · (R_{p+j} k) = (R_{m-p} q) · (R_j k)`: scores are those of ordinary RoPE, and equal
//! content has equal stored bytes wherever it stands.

use kvasir_kernels::{RopeTable, rotate_into};

/// The model's RoPE tables, held by distance.
#[derive(Debug)]
pub(crate) struct Frame {
    tables: Vec<RopeTable>,
}

/// Distances are added this many at a time, so that decoding rarely grows a table.
const GROWTH: usize = 1024;

impl Frame {
    pub(crate) fn new(tables: Vec<RopeTable>) -> Self {
        Self { tables }
    }

    /// Makes distances below `len` available to every table.
    pub(crate) fn grow(&mut self, len: usize) {
        for table in &mut self.tables {
            if table.len() < len {
                table.grow(len.next_multiple_of(GROWTH));
            }
        }
    }

    pub(crate) fn num_tables(&self) -> usize {
        self.tables.len()
    }

    /// What scores of a layer are multiplied with beside its own scale (YaRN).
    pub(crate) fn score_factor(&self, rope: Option<usize>) -> f32 {
        rope.map_or(1.0, |r| self.tables[r].score_factor())
    }

    /// The first pair from which on all turn by at most `angle` from one position to the next.
    pub(crate) fn slow_pairs(&self, rope: Option<usize>, angle: f32) -> usize {
        rope.map_or(0, |rope| self.tables[rope].slow_pairs(angle))
    }

    /// Cosines and sines of `len` distances from `first` on, `[len, head_dim / 2]` each; `None` for layers
    /// without positions.
    #[inline]
    pub(crate) fn span(
        &self,
        rope: Option<usize>,
        first: usize,
        len: usize,
    ) -> Option<(&[f32], &[f32])> {
        rope.map(|rope| self.tables[rope].span(first, len))
    }

    /// Rotates a key by its offset in the block, or a query by its distance from the block's start.
    /// `x`, `out`: `[head_dim]`.
    #[inline]
    pub(crate) fn rotate(&self, rope: Option<usize>, distance: usize, x: &[f32], out: &mut [f32]) {
        match rope {
            Some(rope) => {
                let (cos, sin) = self.tables[rope].at(distance);
                rotate_into(x, cos, sin, out);
            }
            None => out.copy_from_slice(x),
        }
    }

    /// Undoes a rotation by `distance`.
    pub(crate) fn rotate_back(
        &self,
        rope: Option<usize>,
        distance: usize,
        x: &[f32],
        out: &mut [f32],
    ) {
        let Some(rope) = rope else { return out.copy_from_slice(x) };
        let (cos, sin) = self.tables[rope].at(distance);
        let pairs = cos.len();
        for j in 0..pairs {
            let (a, b) = (x[j], x[j + pairs]);
            out[j] = a * cos[j] + b * sin[j];
            out[j + pairs] = b * cos[j] - a * sin[j];
        }
    }
}
