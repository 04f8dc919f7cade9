//! HOT PATH. What the products of [`super::pairs`] are of, and where weights come from: as they are stored, or turned before.

use super::packed::{HALF, PAIRS, TILE};
use super::product::Rows;
use crate::simd::{L2, Simd, WordTables, prefetch};

/// What products are of.
pub(super) trait Product<S: Simd>: Copy {
    /// Weights of a pair of inputs and 16 features.
    type Weights: Copy;
    /// A pair of inputs.
    type Inputs: Copy;
    /// What codes of 4 bits are looked up in.
    type Table: Copy;
    /// Bytes of weights in memory.
    const BYTES: usize;

    /// Of codes that count from `lowest`.
    fn table(self, s: S, lowest: i32) -> Self::Table;
    /// Of codes of 4 bits in the lowest bits of both halves of each lane, whatever else is there.
    fn of_codes(self, s: S, table: Self::Table, codes: S::I) -> Self::Weights;

    /// Of the second and the first input, which bf16 holds exactly.
    fn of_numbers(self, s: S, second: S::F, first: S::F) -> Self::Weights;
    /// The same of any numbers, rounded to bf16 where inputs are bf16.
    fn of_any(self, s: S, second: S::F, first: S::F) -> Self::Weights;
    /// Of bf16, as they are stored.
    fn of_words(self, s: S, words: S::I) -> Self::Weights;
    /// # Safety
    /// [`Self::BYTES`] are readable.
    unsafe fn load(self, s: S, from: *const u8) -> Self::Weights;
    /// # Safety
    /// [`Self::BYTES`] are writable.
    unsafe fn store(self, s: S, to: *mut u8, weights: Self::Weights);
    /// Inputs `k` and `k + 1` of a row.
    ///
    /// # Safety
    /// They are there, in the form that this takes.
    unsafe fn inputs(self, s: S, rows: &Rows<'_>, row: usize, k: usize) -> Self::Inputs;
    fn dot(self, s: S, sums: S::F, weights: Self::Weights, inputs: Self::Inputs) -> S::F;
}

/// Pairs of bf16.
#[derive(Clone, Copy)]
pub(super) struct Words;

const HIGH: i32 = 0xffff_0000_u32 as i32;

impl<S: WordTables> Product<S> for Words {
    type Weights = S::Pairs;
    type Inputs = S::Pairs;
    /// bf16 of the codes.
    type Table = S::I;
    const BYTES: usize = size_of::<S::Pairs>();

    #[inline(always)]
    fn table(self, s: S, lowest: i32) -> S::I {
        let mut words = [0u16; 32];
        for (i, word) in words.iter_mut().enumerate() {
            *word = half::bf16::from_f32((i as i32 % 16 + lowest) as f32).to_bits().to_le();
        }
        // SAFETY: 64 bytes.
        unsafe { s.iload(words.as_ptr().cast()) }
    }

    #[inline(always)]
    fn of_codes(self, s: S, table: S::I, codes: S::I) -> S::Pairs {
        s.pairs(s.lookup16(table, codes))
    }

    #[inline(always)]
    fn of_numbers(self, s: S, second: S::F, first: S::F) -> S::Pairs {
        let second = s.and(s.bits(second), s.isplat(HIGH));
        s.pairs(s.or(second, s.shr(s.bits(first), 16)))
    }

    #[inline(always)]
    fn of_any(self, s: S, second: S::F, first: S::F) -> S::Pairs {
        s.pairs(s.or(s.round_bf16(first), s.shl(s.round_bf16(second), 16)))
    }

    #[inline(always)]
    fn of_words(self, s: S, words: S::I) -> S::Pairs {
        s.pairs(words)
    }

    #[inline(always)]
    unsafe fn load(self, _s: S, from: *const u8) -> S::Pairs {
        // SAFETY: by contract; whatever they are, they were stored there.
        unsafe { from.cast::<S::Pairs>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, _s: S, to: *mut u8, weights: S::Pairs) {
        // SAFETY: by contract.
        unsafe { to.cast::<S::Pairs>().write_unaligned(weights) }
    }

    #[inline(always)]
    unsafe fn inputs(self, s: S, rows: &Rows<'_>, row: usize, k: usize) -> S::Pairs {
        // SAFETY: by contract.
        let both = unsafe { rows.bits.add(row * rows.stride + k).cast::<i32>().read_unaligned() };
        s.pairs(s.isplat(both))
    }

    #[inline(always)]
    fn dot(self, s: S, sums: S::F, weights: S::Pairs, inputs: S::Pairs) -> S::F {
        s.dot_pairs(sums, weights, inputs)
    }
}

/// Two numbers.
#[derive(Clone, Copy)]
pub(super) struct Floats {
    /// Whether weights are rounded to bf16, since inputs are: every set gives the same bits.
    pub(super) rounds: bool,
}

impl<S: Simd> Product<S> for Floats {
    type Weights = [S::F; 2];
    type Inputs = [S::F; 2];
    /// The lowest code.
    type Table = S::I;
    const BYTES: usize = 128;

    #[inline(always)]
    fn table(self, s: S, lowest: i32) -> S::I {
        s.isplat(lowest)
    }

    #[inline(always)]
    fn of_codes(self, s: S, lowest: S::I, codes: S::I) -> [S::F; 2] {
        let mask = s.isplat(15);
        let (first, second) = (s.and(codes, mask), s.and(s.shr(codes, 16), mask));
        [s.from_int(s.iadd(second, lowest)), s.from_int(s.iadd(first, lowest))]
    }

    #[inline(always)]
    fn of_numbers(self, _s: S, second: S::F, first: S::F) -> [S::F; 2] {
        [second, first]
    }

    #[inline(always)]
    fn of_any(self, s: S, second: S::F, first: S::F) -> [S::F; 2] {
        match self.rounds {
            true => [second, first].map(|x| s.from_bits(s.shl(s.round_bf16(x), 16))),
            false => [second, first],
        }
    }

    #[inline(always)]
    fn of_words(self, s: S, words: S::I) -> [S::F; 2] {
        [s.from_bits(s.and(words, s.isplat(HIGH))), s.from_bits(s.shl(words, 16))]
    }

    #[inline(always)]
    unsafe fn load(self, s: S, from: *const u8) -> [S::F; 2] {
        // SAFETY: by contract.
        unsafe { [s.load(from.cast()), s.load(from.add(64).cast())] }
    }

    #[inline(always)]
    unsafe fn store(self, s: S, to: *mut u8, weights: [S::F; 2]) {
        // SAFETY: by contract.
        unsafe {
            s.store(to.cast(), weights[0]);
            s.store(to.add(64).cast(), weights[1]);
        }
    }

    #[inline(always)]
    unsafe fn inputs(self, s: S, rows: &Rows<'_>, row: usize, k: usize) -> [S::F; 2] {
        // SAFETY: by contract.
        unsafe {
            let x = rows.plain.add(row * rows.stride + k);
            [s.splat(*x.add(1)), s.splat(*x)]
        }
    }

    #[inline(always)]
    fn dot(self, s: S, sums: S::F, weights: [S::F; 2], inputs: [S::F; 2]) -> S::F {
        s.fma(weights[1], inputs[1], s.fma(weights[0], inputs[0], sums))
    }
}

/// Where the weights of a tile come from.
pub(super) trait Source<S: Simd, P: Product<S>>: Copy {
    /// Weights of a pair of inputs and half of the features.
    ///
    /// # Safety
    /// There is such a group.
    unsafe fn pair(self, s: S, p: P, group: usize, pair: usize, half: usize) -> P::Weights;

    /// The scale (`which` 0) or the minimum (1) of a group, where the format has them.
    ///
    /// # Safety
    /// There is such a group.
    unsafe fn factor(self, s: S, group: usize, which: usize, half: usize) -> S::F;

    /// Fetches what will be needed some groups later.
    fn fetch(self, group: usize);
}

/// In the form that products take: `[groups, PAIRS, halves]`; `factors`: `[groups, 2, TILE]`.
#[derive(Clone, Copy)]
pub(super) struct Turned {
    pub(super) weights: *const u8,
    pub(super) factors: *const f32,
}

impl<S: Simd, P: Product<S>> Source<S, P> for Turned {
    #[inline(always)]
    unsafe fn pair(self, s: S, p: P, group: usize, pair: usize, half: usize) -> P::Weights {
        // SAFETY: by contract.
        unsafe { p.load(s, self.weights.add(((group * PAIRS + pair) * 2 + half) * P::BYTES)) }
    }

    #[inline(always)]
    unsafe fn factor(self, s: S, group: usize, which: usize, half: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { s.load(self.factors.add((group * 2 + which) * TILE + HALF * half)) }
    }

    #[inline(always)]
    fn fetch(self, _group: usize) {}
}

/// bf16 as they are stored.
#[derive(Clone, Copy)]
pub(super) struct StoredWords(pub(super) *const u8);

impl<S: Simd, P: Product<S>> Source<S, P> for StoredWords {
    #[inline(always)]
    unsafe fn pair(self, s: S, p: P, group: usize, pair: usize, half: usize) -> P::Weights {
        // SAFETY: by contract.
        p.of_words(s, unsafe { s.iload(self.0.add(((group * PAIRS + pair) * 2 + half) * 64)) })
    }

    #[inline(always)]
    unsafe fn factor(self, s: S, _group: usize, _which: usize, _half: usize) -> S::F {
        s.zero()
    }

    #[inline(always)]
    fn fetch(self, group: usize) {
        prefetch::<L2>(self.0.wrapping_add(group * PAIRS * 128), PAIRS * 128);
    }
}

/// f16 as they are stored.
#[derive(Clone, Copy)]
pub(super) struct StoredHalves(pub(super) *const u8);

impl<S: Simd, P: Product<S>> Source<S, P> for StoredHalves {
    #[inline(always)]
    unsafe fn pair(self, s: S, p: P, group: usize, pair: usize, half: usize) -> P::Weights {
        let at = self.0.wrapping_add(((group * PAIRS + pair) * 2 + half) * 64);
        // SAFETY: by contract.
        unsafe { p.of_any(s, s.load_f16(at.cast()), s.load_f16(at.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn factor(self, s: S, _group: usize, _which: usize, _half: usize) -> S::F {
        s.zero()
    }

    #[inline(always)]
    fn fetch(self, group: usize) {
        prefetch::<L2>(self.0.wrapping_add(group * PAIRS * 128), PAIRS * 128);
    }
}

/// f32 as they are stored.
#[derive(Clone, Copy)]
pub(super) struct StoredFloats(pub(super) *const u8);

impl<S: Simd, P: Product<S>> Source<S, P> for StoredFloats {
    #[inline(always)]
    unsafe fn pair(self, s: S, p: P, group: usize, pair: usize, half: usize) -> P::Weights {
        // SAFETY: by contract.
        let [second, first] = unsafe {
            Floats { rounds: false }.load(s, self.0.add(((group * PAIRS + pair) * 2 + half) * 128))
        };
        p.of_numbers(s, second, first)
    }

    #[inline(always)]
    unsafe fn factor(self, s: S, _group: usize, _which: usize, _half: usize) -> S::F {
        s.zero()
    }

    #[inline(always)]
    fn fetch(self, group: usize) {
        prefetch::<L2>(self.0.wrapping_add(group * PAIRS * 256), PAIRS * 256);
    }
}

/// Codes as they are stored.
#[derive(Clone, Copy)]
pub(super) struct StoredCodes<T, const BITS: usize> {
    pub(super) tile: *const u8,
    pub(super) group_bytes: usize,
    pub(super) code_bytes: usize,
    pub(super) table: T,
}

impl<S: Simd, P: Product<S>, const BITS: usize> Source<S, P> for StoredCodes<P::Table, BITS> {
    #[inline(always)]
    unsafe fn pair(self, s: S, p: P, group: usize, pair: usize, half: usize) -> P::Weights {
        // Codes of a lane of 16 bits, and which of them this is.
        let in_lane = 16 / BITS;
        let (register, place) = (half * BITS + pair / in_lane, (pair % in_lane) * BITS);
        // SAFETY: registers of a group are inside it.
        let v = unsafe { s.iload(self.tile.add(group * self.group_bytes + 64 * register)) };
        if BITS == 4 {
            return p.of_codes(s, self.table, s.shr16(v, place as u32));
        }
        // With sign.
        let first = s.sar(s.shl(v, 24 - place as u32), 24);
        let second = s.sar(s.shl(v, 8 - place as u32), 24);
        p.of_numbers(s, s.from_int(second), s.from_int(first))
    }

    #[inline(always)]
    unsafe fn factor(self, s: S, group: usize, which: usize, half: usize) -> S::F {
        let at = group * self.group_bytes + self.code_bytes + 2 * (which * TILE + HALF * half);
        // SAFETY: scales and minimums follow the codes.
        unsafe { s.load_f16(self.tile.add(at).cast()) }
    }

    #[inline(always)]
    fn fetch(self, group: usize) {
        prefetch::<L2>(self.tile.wrapping_add(group * self.group_bytes), self.group_bytes);
    }
}
