//! HOT PATH. The register tile of sums of integers that all products of this module are: some rows, of which four bytes
//! at a time go to all lanes, with some vectors.

use std::mem::MaybeUninit;

use crate::simd::bytes::Bytes;
use crate::trellis::levels::{KeyLevels, ValueLevels};

/// What is multiplied.
pub(super) trait Product<S: Bytes>: Copy {
    /// An operand of one vector, and one of a row in all lanes.
    type Operand: Copy;
    /// # Safety
    /// Step `k` and vector `n` must be there.
    unsafe fn vector(self, set: S, k: usize, n: usize) -> Self::Operand;
    /// # Safety
    /// Step `k` and row `r` must be there.
    unsafe fn row(self, set: S, k: usize, r: usize) -> Self::Operand;
    /// Sums with products of the two.
    fn add(set: S, sums: S::I, vector: Self::Operand, row: Self::Operand) -> S::I;
}

/// Adds the products of `R` rows with `N` vectors in `K` steps from `k` on.
///
/// # Safety
/// They must be there.
#[inline(always)]
pub(super) unsafe fn add_products<
    S: Bytes,
    P: Product<S>,
    const R: usize,
    const N: usize,
    const K: usize,
>(
    set: S,
    product: P,
    k: usize,
    mut sums: [[S::I; N]; R],
) -> [[S::I; N]; R] {
    for k in k..k + K {
        // SAFETY: by contract.
        unsafe {
            let mut vectors = [product.vector(set, k, 0); N];
            for (n, vector) in vectors.iter_mut().enumerate().skip(1) {
                *vector = product.vector(set, k, n);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let row = product.row(set, k, r);
                for (sums, vector) in sums.iter_mut().zip(vectors) {
                    *sums = P::add(set, *sums, vector, row);
                }
            }
        }
    }
    sums
}

/// Rows of quads as [`widened`] leaves them.
#[derive(Clone, Copy)]
pub(super) struct QuadRows {
    /// The first.
    pub(super) at: *const u8,
    /// Bytes from one to the next.
    pub(super) stride: usize,
}

impl QuadRows {
    /// From row `row` and quad `quad` on.
    #[inline(always)]
    pub(super) fn from<S: Bytes>(self, row: usize, quad: usize) -> Self {
        Self { at: self.at.wrapping_add(row * self.stride + quad * S::QUAD), ..self }
    }
}

/// Buffers that need not be cleared.
#[repr(C, align(64))]
pub(super) struct Buffer<const N: usize>(MaybeUninit<[u8; N]>);

impl<const N: usize> Buffer<N> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    #[inline(always)]
    pub(super) fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// Rows of `len` bytes (a multiple of 16), with sign or without, as [`Bytes::spread`] reads them: where they are, or
/// in `to`.
///
/// # Safety
/// `rows` rows, `from.stride` bytes apart, must be there; `to`: room for twice as many bytes.
#[inline(always)]
pub(super) unsafe fn widened<S: Bytes, const SIGNED: bool>(
    set: S,
    from: QuadRows,
    rows: usize,
    len: usize,
    to: *mut u8,
) -> QuadRows {
    if S::QUAD == 4 {
        return from;
    }
    let stride = len / 4 * S::QUAD;
    for row in 0..rows {
        for i in (0..len).step_by(16) {
            // SAFETY: by contract.
            unsafe {
                let to = to.add(row * stride + i / 4 * S::QUAD);
                set.widen::<SIGNED>(to, from.at.add(row * from.stride + i));
            }
        }
    }
    QuadRows { at: to, stride }
}

/// Vectors of bytes.
pub(super) trait Vectors<S: Bytes>: Copy {
    /// # Safety
    /// Step `k` and vector `n` must be there.
    unsafe fn load(self, set: S, k: usize, n: usize) -> S::Quad;
}

/// Vectors as [`Bytes::store_quads`] writes them, those of a step one after the other.
#[derive(Clone, Copy)]
pub(super) struct Prepared {
    pub(super) at: *const u8,
    /// Vectors from one step to the next.
    pub(super) step: usize,
}

impl<S: Bytes> Vectors<S> for Prepared {
    #[inline(always)]
    unsafe fn load(self, set: S, k: usize, n: usize) -> S::Quad {
        // SAFETY: by contract.
        unsafe { set.load_quads(self.at.add((k * self.step + n) * S::PREPARED)) }
    }
}

impl<S: Bytes, const BITS: usize> Vectors<S> for KeyLevels<S, BITS> {
    #[inline(always)]
    unsafe fn load(self, set: S, k: usize, _: usize) -> S::Quad {
        set.quad_u(self.levels(k))
    }
}

impl<S: Bytes, const BITS: usize> Vectors<S> for ValueLevels<S, BITS> {
    #[inline(always)]
    unsafe fn load(self, set: S, k: usize, _: usize) -> S::Quad {
        // SAFETY: by contract.
        set.quad_i(unsafe { self.levels(k) })
    }
}

/// Products of bytes: rows that have a sign with vectors that have none, or the other way round.
#[derive(Clone, Copy)]
pub(super) struct Quads<V, const SIGNED_ROWS: bool> {
    pub(super) rows: QuadRows,
    pub(super) vectors: V,
}

impl<S: Bytes, V: Vectors<S>, const SIGNED_ROWS: bool> Product<S> for Quads<V, SIGNED_ROWS> {
    type Operand = S::Quad;

    #[inline(always)]
    unsafe fn vector(self, set: S, k: usize, n: usize) -> S::Quad {
        // SAFETY: by contract.
        unsafe { self.vectors.load(set, k, n) }
    }

    #[inline(always)]
    unsafe fn row(self, set: S, k: usize, r: usize) -> S::Quad {
        // SAFETY: by contract.
        unsafe { set.spread(self.rows.at.add(r * self.rows.stride + k * S::QUAD)) }
    }

    #[inline(always)]
    fn add(set: S, sums: S::I, vector: S::Quad, row: S::Quad) -> S::I {
        match SIGNED_ROWS {
            true => set.dot(sums, vector, row),
            false => set.dot(sums, row, vector),
        }
    }
}

/// Products of two neighbouring numbers of 16 bits with sign.
#[derive(Clone, Copy)]
pub(super) struct Halves {
    /// Rows, one after the other, of so many pairs.
    pub(super) rows: *const i16,
    pub(super) pairs: usize,
    /// Vectors, those of a step one after the other, and bytes from one step to the next.
    pub(super) vectors: *const u8,
    pub(super) step: usize,
}

impl<S: Bytes> Product<S> for Halves {
    type Operand = S::I;

    #[inline(always)]
    unsafe fn vector(self, set: S, k: usize, n: usize) -> S::I {
        // SAFETY: by contract.
        unsafe { set.iload(self.vectors.add(k * self.step + 64 * n)) }
    }

    #[inline(always)]
    unsafe fn row(self, set: S, k: usize, r: usize) -> S::I {
        // SAFETY: by contract.
        set.isplat(unsafe {
            self.rows.add(2 * (r * self.pairs + k)).cast::<i32>().read_unaligned()
        })
    }

    #[inline(always)]
    fn add(set: S, sums: S::I, vector: S::I, row: S::I) -> S::I {
        set.dot_halves(sums, vector, row)
    }
}

/// As many of `left` rows as are taken together, of at most `most`: passes take about as many each.
#[inline(always)]
pub(super) fn part(left: usize, most: usize) -> usize {
    left.div_ceil(left.div_ceil(most))
}

/// Calls `$f::<S, R>` for the number of rows, which is 1 to [`Bytes::ROWS`], or to `$most` if that is less.
macro_rules! by_rows {
    ($n:expr, $S:ident, $f:ident $args:tt) => {
        if $S::ROWS > 6 {
            $crate::coded::tile::by_rows!(@ $n, [9 8 7 6 5 4 3 2], $S, $f $args)
        } else if $S::ROWS > 4 {
            $crate::coded::tile::by_rows!(@ $n, [6 5 4 3 2], $S, $f $args)
        } else {
            $crate::coded::tile::by_rows!(@ $n, [4 3 2], $S, $f $args)
        }
    };
    (@ $n:expr, [$($r:literal)*], $S:ident, $f:ident $args:tt) => {
        match $n {
            $($r => $f::<$S, $r> $args,)*
            _ => $f::<$S, 1> $args,
        }
    };
}
pub(super) use by_rows;
