//! The register tile that matrix products, attention and transforms share: R rows against NV vectors, one chain of
//! multiply-adds over the summed dimension in order, whatever R and NV are.

use super::bytes::Bytes;
use super::{LANES, Lanes, Simd};
use crate::isa::Isa;
use crate::peak::bf16_is_fast;

/// What a multiply-add is of. Operands are words of 32 bits: a number, or two of 16 bits.
pub(crate) trait Product<S: Simd>: Copy {
    /// 16 words, ready for products.
    type V: Copy;

    /// Elements of the summed dimension that a word has.
    fn depth(self) -> usize;
    /// # Safety
    /// 16 words are readable.
    unsafe fn load(self, s: S, from: *const f32) -> Self::V;
    /// 16 times the same word.
    ///
    /// # Safety
    /// It is readable.
    unsafe fn splat(self, s: S, from: *const f32) -> Self::V;
    /// `sums + a · b`.
    fn add(self, s: S, sums: S::F, a: Self::V, b: Self::V) -> S::F;
    /// Puts the first `n` of 16 numbers into a row of words, from element `i` on.
    ///
    /// # Safety
    /// The row has that many elements.
    unsafe fn put(self, s: S, row: *mut f32, i: usize, v: S::F, n: usize);
}

/// Products of f32.
#[derive(Clone, Copy)]
pub(crate) struct Single;

/// Products of two bf16: first of the second elements, then of the first ones. Sums stay in f32.
#[derive(Clone, Copy)]
pub(crate) struct Pairs;

/// Products of two numbers of 16 bits with a sign. Sums are integers of 32 bits, as bits.
#[derive(Clone, Copy)]
pub(crate) struct Integers;

impl<S: Simd> Product<S> for Single {
    type V = S::F;

    #[inline(always)]
    fn depth(self) -> usize {
        1
    }

    #[inline(always)]
    unsafe fn load(self, s: S, from: *const f32) -> S::F {
        // SAFETY: by contract.
        unsafe { s.load(from) }
    }

    #[inline(always)]
    unsafe fn splat(self, s: S, from: *const f32) -> S::F {
        // SAFETY: by contract.
        s.splat(unsafe { *from })
    }

    #[inline(always)]
    fn add(self, s: S, sums: S::F, a: S::F, b: S::F) -> S::F {
        s.fma(a, b, sums)
    }

    #[inline(always)]
    unsafe fn put(self, s: S, row: *mut f32, i: usize, v: S::F, n: usize) {
        // SAFETY: by contract.
        unsafe {
            match n {
                LANES => s.store(row.add(i), v),
                _ => s.store_first(row.add(i), v, n),
            }
        }
    }
}

impl<S: Simd> Product<S> for Pairs {
    type V = S::Pairs;

    #[inline(always)]
    fn depth(self) -> usize {
        2
    }

    #[inline(always)]
    unsafe fn load(self, s: S, from: *const f32) -> S::Pairs {
        // SAFETY: by contract.
        s.pairs(unsafe { s.iload(from.cast()) })
    }

    #[inline(always)]
    unsafe fn splat(self, s: S, from: *const f32) -> S::Pairs {
        // SAFETY: by contract.
        s.pairs(s.isplat(unsafe { *from.cast() }))
    }

    #[inline(always)]
    fn add(self, s: S, sums: S::F, a: S::Pairs, b: S::Pairs) -> S::F {
        s.dot_pairs(sums, a, b)
    }

    #[inline(always)]
    unsafe fn put(self, s: S, row: *mut f32, i: usize, v: S::F, n: usize) {
        // SAFETY: by contract.
        unsafe { put_halves(s, row, i, s.round_bf16(v), n) };
    }
}

impl<S: Bytes> Product<S> for Integers {
    type V = S::I;

    #[inline(always)]
    fn depth(self) -> usize {
        2
    }

    #[inline(always)]
    unsafe fn load(self, s: S, from: *const f32) -> S::I {
        // SAFETY: by contract.
        unsafe { s.iload(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(self, s: S, from: *const f32) -> S::I {
        // SAFETY: by contract.
        s.isplat(unsafe { *from.cast() })
    }

    #[inline(always)]
    fn add(self, s: S, sums: S::F, a: S::I, b: S::I) -> S::F {
        s.from_bits(s.dot_halves(s.bits(sums), a, b))
    }

    #[inline(always)]
    unsafe fn put(self, s: S, row: *mut f32, i: usize, v: S::F, n: usize) {
        // SAFETY: by contract.
        unsafe { put_halves(s, row, i, s.to_int(v), n) };
    }
}

/// The low halves of the first `n` lanes into a row of halves, from `i` on.
///
/// # Safety
/// The row has that many.
#[inline(always)]
unsafe fn put_halves<S: Simd>(s: S, row: *mut f32, i: usize, v: S::I, n: usize) {
    // SAFETY: by contract, and a whole vector in between.
    unsafe {
        let to = row.cast::<u16>().add(i);
        if n == LANES {
            return s.store_low_halves(to, v);
        }
        let mut halves = [0u16; LANES];
        s.store_low_halves(halves.as_mut_ptr(), v);
        to.copy_from_nonoverlapping(halves.as_ptr(), n);
    }
}

/// Where a tile's vectors come from, `STEP` words of the summed dimension at a time.
pub(crate) trait Vectors<S: Simd, P: Product<S>, const NV: usize, const STEP: usize>:
    Copy
{
    /// Vectors of words `k .. k + STEP`.
    ///
    /// # Safety
    /// They exist.
    unsafe fn load(self, s: S, p: P, k: usize) -> [[P::V; NV]; STEP];
}

/// A matrix of words in memory.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) from: *const f32,
    /// Words from one step of the summed dimension to the next.
    pub(crate) step: usize,
    /// Words from one vector to the next.
    pub(crate) pitch: usize,
}

impl<S: Simd, P: Product<S>, const NV: usize> Vectors<S, P, NV, 1> for Matrix {
    #[inline(always)]
    unsafe fn load(self, s: S, p: P, k: usize) -> [[P::V; NV]; 1] {
        // SAFETY: by contract.
        unsafe {
            let at = self.from.add(k * self.step);
            let mut out = [p.load(s, at); NV];
            for v in 1..NV {
                out[v] = p.load(s, at.add(v * self.pitch));
            }
            [out]
        }
    }
}

/// What is done beside products, a little at every step.
pub(crate) trait Meanwhile {
    fn step(&mut self);
}

impl Meanwhile for () {
    #[inline(always)]
    fn step(&mut self) {}
}

/// The same number, of which compilers know nothing: so they compute what follows from it here. In front of the loops
/// around, where they would like to do it for all tiles at once, they run out of registers.
#[inline(always)]
pub(crate) fn here(x: usize) -> usize {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    {
        let mut x = x;
        // SAFETY: no instruction at all.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) x, options(nomem, nostack, preserves_flags));
        }
        x
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    x
}

/// `sums + Σ_k x[r, k] · vectors[k]` over words `begin .. end`, a whole number of steps. `x`: R rows, what lies between them,
/// and between the words of a row.
///
/// # Safety
/// Words and vectors exist.
#[inline(always)]
pub(crate) unsafe fn accumulate<S: Simd, P, L, const STEP: usize, const R: usize, const NV: usize>(
    (s, p): (S, P),
    vectors: L,
    (begin, end): (usize, usize),
    (x, stride, step): (*const f32, usize, usize),
    meanwhile: &mut impl Meanwhile,
    mut sums: [[S::F; NV]; R],
) -> [[S::F; NV]; R]
where
    P: Product<S>,
    L: Vectors<S, P, NV, STEP>,
{
    let (mut k, stride) = (begin, here(stride));
    while k < end {
        meanwhile.step();
        // SAFETY: by contract.
        unsafe {
            let vs = vectors.load(s, p, k);
            for i in 0..STEP {
                for r in 0..R {
                    let x = p.splat(s, x.add(r * stride + (k + i) * step));
                    for v in 0..NV {
                        sums[r][v] = p.add(s, sums[r][v], vs[i][v], x);
                    }
                }
            }
        }
        k += STEP;
    }
    sums
}

/// R rows of NV vectors every `stride`, to begin sums with.
///
/// # Safety
/// They are readable.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd, const R: usize, const NV: usize>(
    s: S,
    from: *const f32,
    stride: usize,
) -> [[S::F; NV]; R] {
    let (mut sums, stride) = ([[s.zero(); NV]; R], here(stride));
    for r in 0..R {
        for v in 0..NV {
            // SAFETY: by contract.
            sums[r][v] = unsafe { s.load(from.add(r * stride + v * LANES)) };
        }
    }
    sums
}

/// Stores sums: R rows of NV vectors every `stride`.
///
/// # Safety
/// They are writable.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd, const R: usize, const NV: usize>(
    s: S,
    sums: [[S::F; NV]; R],
    to: *mut f32,
    stride: usize,
) {
    let stride = here(stride);
    for r in 0..R {
        for v in 0..NV {
            // SAFETY: by contract.
            unsafe { s.store(to.add(r * stride + v * LANES), sums[r][v]) };
        }
    }
}

/// Vectors of a tile of so many rows: as many as leave registers for operands. With many rows, tiles of 6 read least.
#[inline(always)]
pub(crate) const fn at_once<S: Lanes>(rows: usize) -> usize {
    let rows = if rows > 6 { 6 } else { rows };
    match S::SUMS / if rows == 0 { 1 } else { rows } {
        0 => 1,
        most => most,
    }
}

/// Runs `$call` with the constant `$R` set to each of the sizes, largest first, while as many rows are left and as
/// many sums of `$NV` vectors a row fit registers; 1 is among the sizes.
macro_rules! by_rows {
    ($S:ty, $NV:expr, $rows:expr, [$($size:literal),*], |$R:ident, $first:ident| $call:expr) => {{
        let rows = $rows;
        let mut $first = 0;
        $(if $size == 1 || $size * $NV <= <$S as $crate::simd::Lanes>::SUMS {
            while rows - $first >= $size {
                const $R: usize = $size;
                {
                    let $first = $crate::simd::tile::here($first);
                    $call;
                }
                $first += $size;
            }
        })*
    }};
}
pub(crate) use by_rows;

/// Covers rows and vectors with tiles: runs `$call` with the constants `$R` and `$NV` for each.
macro_rules! tiles {
    ($S:ty, $rows:expr, $vectors:expr, |$R:ident, $first:ident, $NV:ident, $v:ident| $call:expr) => {{
        let (rows, vectors) = ($rows, $vectors);
        let wide = $crate::simd::tile::at_once::<$S>(rows);
        let mut $v = 0;
        while $v < vectors {
            let left = vectors - $v;
            if left >= 4 && wide >= 4 {
                const $NV: usize = 4;
                $crate::simd::tile::by_rows!($S, $NV, rows, [6, 4, 3, 2, 1], |$R, $first| $call);
                $v += $NV;
            } else if left >= 2 && wide >= 2 {
                const $NV: usize = 2;
                $crate::simd::tile::by_rows!(
                    $S,
                    $NV,
                    rows,
                    [12, 8, 6, 4, 3, 2, 1],
                    |$R, $first| $call
                );
                $v += $NV;
            } else {
                const $NV: usize = 1;
                $crate::simd::tile::by_rows!(
                    $S,
                    $NV,
                    rows,
                    [12, 8, 6, 4, 3, 2, 1],
                    |$R, $first| $call
                );
                $v += $NV;
            }
        }
    }};
}
pub(crate) use tiles;

/// Whether products of two bf16 are there, and as fast as they should be. No other place decides it.
#[inline]
pub(crate) fn has_bf16(isa: Isa) -> bool {
    bf16_is_fast(isa)
}

/// Compiles a function for both kinds of products: `name(isa, pairs, args…)`. Its body is
/// `fn body<S: Lanes>(set: S, kind: impl Product<S>, args…)`.
macro_rules! by_kind {
    ($(#[$meta:meta])* $vis:vis fn $name:ident ($($arg:ident : $ty:ty),* $(,)?) = $body:ident;) => {
        $(#[$meta])*
        #[inline]
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::isa::Isa, pairs: bool, $($arg: $ty),*) {
            $crate::simd::compiled! {
                #[allow(clippy::too_many_arguments)]
                fn of_single(kind: $crate::simd::tile::Single, $($arg: $ty),*) = $body for [Avx512, Avx2, Sse2];
            }
            $crate::simd::compiled! {
                #[allow(clippy::too_many_arguments)]
                fn of_pairs(kind: $crate::simd::tile::Pairs, $($arg: $ty),*) = $body for [Avx512Bf16, Sse2];
            }
            match pairs {
                true => of_pairs(isa, $crate::simd::tile::Pairs, $($arg),*),
                false => of_single(isa, $crate::simd::tile::Single, $($arg),*),
            }
        }
    };
}
pub(crate) use by_kind;
