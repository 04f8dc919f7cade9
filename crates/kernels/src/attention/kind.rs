//! What differs between products of f32, of two bf16 and of two integers: how rows that are stored become operands.

use half::f16;

use super::LANES;
use crate::simd::Lanes;
use crate::simd::bytes::Bytes;
use crate::simd::tile::{Integers, Meanwhile, Pairs, Product, Single, Vectors, accumulate};

/// What rows are stored as.
pub(super) trait Element: Copy {
    fn widen(self) -> f32;

    /// A vector.
    ///
    /// # Safety
    /// 16 elements are readable.
    unsafe fn load<S: Lanes>(s: S, from: *const Self) -> S::F;

    /// The largest magnitude of each of four rows of `dim` elements, whole vectors; a NaN is larger than anything.
    ///
    /// # Safety
    /// All are readable.
    unsafe fn largest4<S: Bytes + Lanes>(s: S, rows: [*const Self; 4], dim: usize) -> [f32; 4];

    /// 8 channels of 16 tokens, as [`Lanes::halves8`].
    ///
    /// # Safety
    /// As there.
    unsafe fn channels8<S: Lanes>(s: S, rows: *const Self, stride: usize, n: usize) -> [S::F; 8];

    /// The same in 4 pairs of bf16.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn pairs4<S: Lanes>(s: S, rows: *const Self, stride: usize, n: usize) -> [S::I; 4] {
        // SAFETY: by contract.
        let [a, b, c, d, e, f, g, h] = unsafe { Self::channels8(s, rows, stride, n) };
        [s.join(a, b), s.join(c, d), s.join(e, f), s.join(g, h)]
    }
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, from: *const Self) -> S::F {
        // SAFETY: by contract.
        unsafe { s.load(from) }
    }

    #[inline(always)]
    unsafe fn largest4<S: Bytes + Lanes>(s: S, rows: [*const Self; 4], dim: usize) -> [f32; 4] {
        let mut most = [s.izero(); 4];
        for r in 0..4 {
            for c in (0..dim).step_by(LANES) {
                // SAFETY: by contract. As bits magnitudes are in the order of numbers.
                let x = unsafe { s.iload(rows[r].add(c).cast()) };
                most[r] = s.imax_u(most[r], s.and(x, s.isplat(0x7fff_ffff)));
            }
        }
        let [a, b, c, d] = s.fold4_max_u(most);
        [f32::from_bits(a), f32::from_bits(b), f32::from_bits(c), f32::from_bits(d)]
    }

    #[inline(always)]
    unsafe fn channels8<S: Lanes>(s: S, rows: *const Self, stride: usize, n: usize) -> [S::F; 8] {
        let rows: *const u32 = rows.cast();
        // SAFETY: by contract.
        let [a, b, c, d] = unsafe { s.words4(rows, stride, n) };
        // SAFETY: by contract.
        let [e, f, g, h] = unsafe { s.words4(rows.add(4), stride, n) };
        let (low, high) = ([a, b, c, d], [e, f, g, h]);
        let mut out = [s.zero(); 8];
        for c in 0..4 {
            out[c] = s.from_bits(low[c]);
            out[4 + c] = s.from_bits(high[c]);
        }
        out
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, from: *const Self) -> S::F {
        // SAFETY: by contract.
        unsafe { s.load_f16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn largest4<S: Bytes + Lanes>(s: S, rows: [*const Self; 4], dim: usize) -> [f32; 4] {
        let mut most = [s.izero(); 4];
        for r in 0..4 {
            for c in (0..dim).step_by(2 * LANES) {
                // SAFETY: by contract.
                let x = unsafe {
                    let at = rows[r].add(c).cast();
                    // Where half a vector is left it stands for both.
                    if c + LANES < dim { s.iload(at) } else { s.load_halves(at.cast()) }
                };
                most[r] = s.max16_u(most[r], s.and(x, s.isplat(0x7fff_7fff)));
            }
            // Both halves of 32 bits in one, whose order is theirs.
            most[r] = s.max16_u(most[r], s.shr(most[r], 16));
            most[r] = s.and(most[r], s.isplat(0xffff));
        }
        let [a, b, c, d] = s.fold4_max_u(most);
        let halves = [a as u16, b as u16, c as u16, d as u16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut out = [0.0; LANES];
        // SAFETY: whole vectors.
        unsafe { s.store(out.as_mut_ptr(), s.load_f16(halves.as_ptr())) };
        [out[0], out[1], out[2], out[3]]
    }

    #[inline(always)]
    unsafe fn channels8<S: Lanes>(s: S, rows: *const Self, stride: usize, n: usize) -> [S::F; 8] {
        // SAFETY: by contract.
        unsafe { s.halves8(rows.cast(), stride, n) }
    }

    #[inline(always)]
    unsafe fn pairs4<S: Lanes>(s: S, rows: *const Self, stride: usize, n: usize) -> [S::I; 4] {
        // SAFETY: by contract; the stride is even, as 8 channels are.
        let [a, b, c, d] = unsafe { s.words4(rows.cast(), stride / 2, n) };
        [s.narrowed(a), s.narrowed(b), s.narrowed(c), s.narrowed(d)]
    }
}

/// R rows of NV vectors of sums.
type Sums<S, const R: usize, const NV: usize> = [[<S as crate::simd::Simd>::F; NV]; R];

/// What products are of, and how rows meet them.
pub(super) trait Kind<S: Lanes>: Product<S> {
    /// Whether numbers are whole, with a worth beside them ([`super::integers`]).
    const WHOLE: bool;

    /// Products of R query rows with 16 NV keys as they are stored, `[tokens, dim]`, transposed in registers.
    /// `dim` is a multiple of 8; `queries` are in words, `dim / depth` a row.
    ///
    /// # Safety
    /// Keys and queries exist.
    unsafe fn stored_keys<const R: usize, const NV: usize>(
        self,
        s: S,
        keys: (*const f16, usize),
        queries: *const f32,
        meanwhile: &mut impl Meanwhile,
    ) -> Sums<S, R, NV>;

    /// Adds products of R rows of weights with NV vectors of values as they are stored to `sums`: words `begin .. end`
    /// of the tokens. `weights`: rows of words, and what lies between them.
    ///
    /// # Safety
    /// Weights and values exist.
    unsafe fn stored_values<const R: usize, const NV: usize>(
        self,
        s: S,
        values: StoredValues,
        range: (usize, usize),
        weights: (*const f32, usize),
        meanwhile: &mut impl Meanwhile,
        sums: Sums<S, R, NV>,
    ) -> Sums<S, R, NV>;

    /// Puts vectors of elements `i` and `i + 1` of the summed dimension, `i` even, to where their words are, a word every `step`.
    ///
    /// # Safety
    /// A vector of each word is writable.
    unsafe fn put_two(self, s: S, out: *mut f32, i: usize, step: usize, two: [S::F; 2]);
}

/// [`Kind::WHOLE`] of a kind that has no name.
#[inline(always)]
pub(super) fn whole<S: Lanes, K: Kind<S>>(_: S, _: K) -> bool {
    K::WHOLE
}

/// What rows become without knowing more of them than a vector.
pub(super) trait Tiled<S: Lanes>: Kind<S> {
    /// 8 channels of 16 tokens into a tile of words, `[dim / depth, tokens]`. Tokens from `n` on are the last again.
    ///
    /// # Safety
    /// As for [`Lanes::halves8`]; `out` takes a vector of each row.
    unsafe fn put_keys<T: Element>(
        self,
        s: S,
        rows: (*const T, usize),
        n: usize,
        out: (*mut f32, usize),
    );

    /// A vector of one word's tokens: the second is there if `both`.
    ///
    /// # Safety
    /// 16 elements are readable of each token, and 16 words writable.
    unsafe fn put_values<T: Element>(
        self,
        s: S,
        first: *const T,
        dim: usize,
        both: bool,
        out: *mut f32,
    );
}

/// Keys `[tokens, dim]` in f16, or in integers of 16 bits, transposed on the way.
#[derive(Clone, Copy)]
struct Transposed {
    keys: *const f16,
    dim: usize,
}

impl<S: Lanes, const NV: usize> Vectors<S, Single, NV, 8> for Transposed {
    #[inline(always)]
    unsafe fn load(self, s: S, _: Single, k: usize) -> [[S::F; NV]; 8] {
        let mut out = [[s.zero(); NV]; 8];
        for v in 0..NV {
            // SAFETY: by contract.
            let channels = unsafe {
                let rows = self.keys.add(v * LANES * self.dim + k);
                f16::channels8(s, rows, self.dim, LANES)
            };
            for c in 0..8 {
                out[c][v] = channels[c];
            }
        }
        out
    }
}

impl<S: Lanes, const NV: usize> Vectors<S, Pairs, NV, 4> for Transposed {
    #[inline(always)]
    unsafe fn load(self, s: S, _: Pairs, k: usize) -> [[S::Pairs; NV]; 4] {
        let mut out = [[s.pairs(s.izero()); NV]; 4];
        for v in 0..NV {
            // SAFETY: by contract.
            let pairs = unsafe {
                let rows = self.keys.add(v * LANES * self.dim + 2 * k);
                f16::pairs4(s, rows, self.dim, LANES)
            };
            for c in 0..4 {
                out[c][v] = s.pairs(pairs[c]);
            }
        }
        out
    }
}

impl<S: Bytes + Lanes, const NV: usize> Vectors<S, Integers, NV, 4> for Transposed {
    #[inline(always)]
    unsafe fn load(self, s: S, _: Integers, k: usize) -> [[S::I; NV]; 4] {
        let mut out = [[s.izero(); NV]; 4];
        for v in 0..NV {
            // SAFETY: by contract; the stride is even, as 8 channels are.
            let pairs = unsafe {
                let rows = self.keys.add(v * LANES * self.dim + 2 * k);
                s.words4(rows.cast(), self.dim / 2, LANES)
            };
            for c in 0..4 {
                out[c][v] = pairs[c];
            }
        }
        out
    }
}

/// Values `[tokens, dim]` in f16, or in integers of 16 bits, from one channel on.
#[derive(Clone, Copy)]
pub(super) struct StoredValues {
    pub(super) from: *const f16,
    pub(super) dim: usize,
    /// Tokens that are there.
    pub(super) tokens: usize,
}

impl<S: Lanes, const NV: usize> Vectors<S, Single, NV, 1> for StoredValues {
    #[inline(always)]
    unsafe fn load(self, s: S, _: Single, k: usize) -> [[S::F; NV]; 1] {
        let mut out = [s.zero(); NV];
        for v in 0..NV {
            // SAFETY: by contract.
            out[v] = unsafe { f16::load(s, self.from.add(k * self.dim + v * LANES)) };
        }
        [out]
    }
}

impl<S: Lanes, const NV: usize> Vectors<S, Pairs, NV, 1> for StoredValues {
    #[inline(always)]
    unsafe fn load(self, s: S, _: Pairs, k: usize) -> [[S::Pairs; NV]; 1] {
        let mut out = [s.pairs(s.izero()); NV];
        let both = 2 * k + 1 < self.tokens;
        for v in 0..NV {
            // SAFETY: by contract.
            unsafe {
                let first = self.from.add(2 * k * self.dim + v * LANES);
                let second = if both { f16::load(s, first.add(self.dim)) } else { s.zero() };
                out[v] = s.pairs(s.join(f16::load(s, first), second));
            }
        }
        [out]
    }
}

// Blocks with values of this form are read from tiles; kinds are alike in what they can read.
impl<S: Bytes, const NV: usize> Vectors<S, Integers, NV, 1> for StoredValues {
    #[inline(always)]
    unsafe fn load(self, s: S, _: Integers, k: usize) -> [[S::I; NV]; 1] {
        let mut out = [s.izero(); NV];
        let both = 2 * k + 1 < self.tokens;
        for v in 0..NV {
            // SAFETY: by contract.
            unsafe {
                let first = self.from.add(2 * k * self.dim + v * LANES);
                let second =
                    if both { s.load_halves(first.add(self.dim).cast()) } else { s.izero() };
                out[v] = s.or(s.load_halves(first.cast()), s.shl(second, 16));
            }
        }
        [out]
    }
}

/// What all kinds do by [`accumulate`], with vectors of their own.
macro_rules! stored {
    () => {
        #[inline(always)]
        unsafe fn stored_keys<const R: usize, const NV: usize>(
            self,
            s: S,
            (keys, dim): (*const f16, usize),
            queries: *const f32,
            meanwhile: &mut impl Meanwhile,
        ) -> Sums<S, R, NV> {
            let words = dim / <Self as Product<S>>::depth(self);
            let (keys, sums) = (Transposed { keys, dim }, [[s.zero(); NV]; R]);
            // SAFETY: by contract.
            unsafe { accumulate((s, self), keys, (0, words), (queries, words, 1), meanwhile, sums) }
        }

        #[inline(always)]
        unsafe fn stored_values<const R: usize, const NV: usize>(
            self,
            s: S,
            values: StoredValues,
            range: (usize, usize),
            weights: (*const f32, usize),
            meanwhile: &mut impl Meanwhile,
            sums: Sums<S, R, NV>,
        ) -> Sums<S, R, NV> {
            // SAFETY: by contract.
            unsafe {
                let weights = (weights.0, weights.1, 1);
                accumulate((s, self), values, range, weights, meanwhile, sums)
            }
        }
    };
}

impl<S: Lanes> Kind<S> for Single {
    const WHOLE: bool = false;
    stored! {}

    #[inline(always)]
    unsafe fn put_two(self, s: S, out: *mut f32, i: usize, step: usize, two: [S::F; 2]) {
        // SAFETY: by contract.
        unsafe {
            s.store(out.add(i * step), two[0]);
            s.store(out.add((i + 1) * step), two[1]);
        }
    }
}

impl<S: Lanes> Tiled<S> for Single {
    #[inline(always)]
    unsafe fn put_keys<T: Element>(
        self,
        s: S,
        (rows, stride): (*const T, usize),
        n: usize,
        (out, tokens): (*mut f32, usize),
    ) {
        // SAFETY: by contract.
        unsafe {
            let channels = T::channels8(s, rows, stride, n);
            for c in 0..8 {
                s.store(out.add(c * tokens), channels[c]);
            }
        }
    }

    #[inline(always)]
    unsafe fn put_values<T: Element>(
        self,
        s: S,
        first: *const T,
        _dim: usize,
        _both: bool,
        out: *mut f32,
    ) {
        // SAFETY: by contract.
        unsafe { s.store(out, T::load(s, first)) }
    }
}

impl<S: Lanes> Kind<S> for Pairs {
    const WHOLE: bool = false;
    stored! {}

    #[inline(always)]
    unsafe fn put_two(self, s: S, out: *mut f32, i: usize, step: usize, two: [S::F; 2]) {
        // SAFETY: by contract.
        unsafe { s.istore(out.add(i / 2 * step).cast(), s.join(two[0], two[1])) };
    }
}

impl<S: Lanes> Tiled<S> for Pairs {
    #[inline(always)]
    unsafe fn put_keys<T: Element>(
        self,
        s: S,
        (rows, stride): (*const T, usize),
        n: usize,
        (out, tokens): (*mut f32, usize),
    ) {
        // SAFETY: by contract.
        unsafe {
            let pairs = T::pairs4(s, rows, stride, n);
            for c in 0..4 {
                s.istore(out.add(c * tokens).cast(), pairs[c]);
            }
        }
    }

    #[inline(always)]
    unsafe fn put_values<T: Element>(
        self,
        s: S,
        first: *const T,
        dim: usize,
        both: bool,
        out: *mut f32,
    ) {
        // SAFETY: by contract.
        unsafe {
            let second = if both { T::load(s, first.add(dim)) } else { s.zero() };
            s.istore(out.cast(), s.join(T::load(s, first), second));
        }
    }
}

impl<S: Bytes + Lanes> Kind<S> for Integers {
    const WHOLE: bool = true;
    stored! {}

    #[inline(always)]
    unsafe fn put_two(self, s: S, out: *mut f32, i: usize, step: usize, two: [S::F; 2]) {
        // SAFETY: by contract.
        unsafe { s.istore(out.add(i / 2 * step).cast(), whole_pairs(s, two)) };
    }
}

/// Two vectors of numbers that 16 bits hold, rounded to integers, lane by lane in pairs.
#[inline(always)]
pub(super) fn whole_pairs<S: Lanes>(s: S, [low, high]: [S::F; 2]) -> S::I {
    let (low, high) = (s.to_int(low), s.to_int(high));
    s.or(s.and(low, s.isplat(0xffff)), s.shl(high, 16))
}
