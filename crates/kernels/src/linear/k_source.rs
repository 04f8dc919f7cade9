//! HOT PATH. A tile of a K type as registers: codes of a quad of inputs, scales and minimums in f32.

use std::marker::PhantomData;

use super::k_packed::KFormat;
use super::operands::{Product, Source};
use super::packed::{GROUP, HALF, PAIRS, TILE};
use crate::simd::{L2, Simd, prefetch};

/// What a K type is like, for compilers.
pub(super) trait Format: Copy {
    const FORMAT: KFormat;
    const BITS: usize;
    /// Scales of a group.
    const SCALES: usize;
    const MIN: bool;
    /// What is multiplied counts from −(1 << shift), or 0.
    const SHIFT: u32;
    /// Bits of what is multiplied, counted so: of codes their own, of levels those of the range.
    const WIDTH: usize;
    /// What codes are worth that are not worth themselves.
    const LEVELS: Option<&'static [i8; 16]> = Self::FORMAT.levels();
    /// Bytes of the first plane of codes.
    const LOW_BYTES: usize = TILE * GROUP / 8 * if Self::BITS < 4 { 2 } else { 4 };
}

macro_rules! formats {
    ($($name:ident: $bits:literal bits, $scales:literal scales, $min:literal, $shift:literal, $width:literal;)*) => {
        $(
            #[derive(Clone, Copy)]
            pub(super) struct $name;
            impl Format for $name {
                const FORMAT: KFormat = KFormat::$name;
                const BITS: usize = $bits;
                const SCALES: usize = $scales;
                const MIN: bool = $min;
                const SHIFT: u32 = $shift;
                const WIDTH: usize = $width;
            }
        )*
    };
}
formats! {
    Q2: 2 bits, 2 scales, true, 0, 2;
    Q3: 3 bits, 2 scales, false, 2, 3;
    Q4: 4 bits, 1 scales, true, 0, 4;
    Q5: 5 bits, 1 scales, true, 0, 5;
    Q6: 6 bits, 2 scales, false, 5, 6;
    Q5_0: 5 bits, 1 scales, false, 4, 5;
    Q5_1: 5 bits, 1 scales, true, 0, 5;
    Iq4Xs: 4 bits, 1 scales, false, 7, 8;
    Iq4Nl: 4 bits, 1 scales, false, 7, 8;
    Mxfp4: 4 bits, 1 scales, false, 4, 5;
}

/// Evaluates `$body` with the format as the type `$F`.
macro_rules! by_k_format {
    ($format:expr, |$F:ident| $body:expr) => {
        by_k_format!(@ $format, $F, $body, Q2 Q3 Q4 Q5 Q6 Q5_0 Q5_1 Iq4Xs Iq4Nl Mxfp4)
    };
    (@ $format:expr, $F:ident, $body:expr, $($name:ident)*) => {
        match $format {
            $($crate::linear::k_packed::KFormat::$name => {
                type $F = $crate::linear::k_source::$name;
                $body
            })*
        }
    };
}
pub(super) use by_k_format;

/// Levels as products take them, four times.
#[repr(align(64))]
struct Levels([u8; 64]);

impl Levels {
    /// Of a format, counted from the lowest that its shift tells.
    const fn of<F: Format>() -> Self {
        let mut all = [0; 64];
        if let Some(levels) = F::LEVELS {
            let mut i = 0;
            while i < all.len() {
                all[i] = (levels[i % 16] as u8).wrapping_add(1 << F::SHIFT);
                i += 1;
            }
        }
        Self(all)
    }
}

/// A tile as it is stored.
#[derive(Clone, Copy)]
pub(super) struct StoredK<F> {
    tile: *const u8,
    of: PhantomData<F>,
}

impl<F: Format> StoredK<F> {
    #[inline(always)]
    pub(super) fn new(tile: *const u8) -> Self {
        Self { tile, of: PhantomData }
    }

    /// # Safety
    /// There is such a group.
    #[inline(always)]
    unsafe fn group(self, group: usize) -> *const u8 {
        // SAFETY: by contract.
        unsafe { self.tile.add(F::FORMAT.group_at(group)) }
    }

    /// Codes of a quad of inputs and half of the features, from the lowest one.
    ///
    /// # Safety
    /// There is such a group.
    #[inline(always)]
    pub(super) unsafe fn quad<S: Simd>(self, s: S, group: usize, quad: usize, half: usize) -> S::I {
        /// Bits of every byte that belong to this quad, `bits` wide, with their lowest at `to`.
        #[inline(always)]
        unsafe fn plane<S: Simd>(
            s: S,
            at: *const u8,
            (quad, half): (usize, usize),
            bits: usize,
            to: usize,
        ) -> S::I {
            let in_register = 8 / bits;
            let from = bits * (quad % in_register);
            // SAFETY: registers of a plane are inside it.
            let v = unsafe { s.iload(at.add(64 * (2 * (quad / in_register) + half))) };
            // Bits that come from the neighbouring byte are left out.
            let v = if from > to { s.shr16(v, (from - to) as u32) } else { v };
            let v = if from < to { s.shl16(v, (to - from) as u32) } else { v };
            let mask = (((1 << bits) - 1) << to) as u8;
            s.and(v, s.isplat(i32::from_le_bytes([mask; 4])))
        }
        let low_bits = if F::BITS < 4 { 2 } else { 4 };
        // SAFETY: by contract.
        unsafe {
            let group = self.group(group);
            let low = plane(s, group, (quad, half), low_bits, 0);
            if F::LEVELS.is_some() {
                let table = s.iload(const { &Levels::of::<F>() }.0.as_ptr());
                return s.shuffle(table, low);
            }
            if F::BITS == low_bits {
                return low;
            }
            let high = group.add(F::LOW_BYTES);
            s.or(low, plane(s, high, (quad, half), F::BITS - low_bits, low_bits))
        }
    }

    /// Scales (`what` 0) or minimums (1) of half of the features, for the group or for its half `which`.
    ///
    /// # Safety
    /// There is such a group, and the format has them.
    #[inline(always)]
    pub(super) unsafe fn number<S: Simd>(
        self,
        s: S,
        group: usize,
        (what, which): (usize, usize),
        half: usize,
    ) -> S::F {
        let number = 2 * (what * TILE + HALF * half);
        // SAFETY: numbers of a superblock are before its groups, bytes or numbers of a group after its codes.
        unsafe {
            if F::FORMAT.is_plain() {
                let at = F::FORMAT.code_bytes() + number;
                return s.load_f16(self.group(group).add(at).cast());
            }
            let block = self.tile.add(F::FORMAT.superblock_at(group));
            let by = s.load_f16(block.add(number).cast());
            let nibbles = F::FORMAT.has_nibbles();
            let place = if nibbles { which } else { what * F::SCALES + which };
            let at = F::FORMAT.code_bytes() + place * TILE + HALF * half;
            let mut bytes = s.load_signed(self.group(group).add(at));
            if nibbles {
                bytes = s.and(s.shr(bytes, 4 * what as u32), s.isplat(15));
            }
            s.mul(s.from_int(bytes), by)
        }
    }

    /// Fetches what will be needed some groups later.
    #[inline(always)]
    pub(super) fn fetch_group(self, group: usize) {
        prefetch::<L2>(self.tile.wrapping_add(F::FORMAT.group_at(group)), F::FORMAT.group_bytes());
    }
}

/// For inputs in bf16 or f32. Formats with one scale for 32 are multiplied as codes; of the others weights are, with inputs in bf16 rounded to it.
impl<S: Simd, P: Product<S>, F: Format> Source<S, P> for StoredK<F> {
    #[inline(always)]
    unsafe fn pair(self, s: S, p: P, group: usize, pair: usize, half: usize) -> P::Weights {
        // SAFETY: by contract.
        unsafe {
            let quad = self.quad(s, group, pair / 2, half);
            let shift = 16 * (pair % 2) as u32;
            let byte = s.isplat(255);
            let first = s.and(s.shr(quad, shift), byte);
            let second = s.and(s.shr(quad, shift + 8), byte);
            let minus = s.isplat(if F::SHIFT > 0 { 1 << F::SHIFT } else { 0 });
            let first = s.from_int(s.isub(first, minus));
            let second = s.from_int(s.isub(second, minus));
            if F::SCALES == 1 {
                return p.of_numbers(s, second, first);
            }
            let which = pair / (PAIRS / 2);
            let scale = self.number(s, group, (0, which), half);
            let (mut first, mut second) = (s.mul(scale, first), s.mul(scale, second));
            if F::MIN {
                let min = self.number(s, group, (1, which), half);
                (first, second) = (s.add(first, min), s.add(second, min));
            }
            p.of_any(s, second, first)
        }
    }

    #[inline(always)]
    unsafe fn factor(self, s: S, group: usize, which: usize, half: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { self.number(s, group, (which, 0), half) }
    }

    #[inline(always)]
    fn fetch(self, group: usize) {
        self.fetch_group(group);
    }
}
