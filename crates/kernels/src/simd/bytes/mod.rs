//! Vectors as bytes and as numbers of 16 bits: what coded blocks ([`crate::coded`], [`crate::trellis`]) need beside
//! [`Simd`].
//!
//! A *quarter* is 16 bytes of a vector. Most of these operations treat each quarter by itself, as AVX2 and AVX-512 do.

mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::{LANES, Simd};

/// Bytes of a vector.
pub(crate) const BYTES: usize = 64;

/// A table of levels, repeated to the length that look-ups take, whatever their number.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Table(pub(crate) [i8; BYTES]);

/// A table of up to 64 numbers of 16 bits, also by their bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Words {
    pub(crate) words: [i16; BYTES],
    low: Table,
    high: Table,
}

impl Words {
    pub(crate) const fn new(words: [i16; BYTES]) -> Self {
        let (mut low, mut high) = ([0; BYTES], [0; BYTES]);
        let mut i = 0;
        while i < BYTES {
            (low[i], high[i]) = (words[i] as i8, (words[i] >> 8) as i8);
            i += 1;
        }
        Self { words, low: Table(low), high: Table(high) }
    }
}

/// See the module's documentation.
pub(crate) trait Bytes: Simd {
    /// Whether all this is instructions. Where it is loops, code that takes one number after the other is faster.
    const VECTORS: bool;
    /// Whether [`Self::permute`], [`Self::permute2`] and [`Self::multishift`] are an instruction each. Elsewhere they are
    /// a hundred.
    const PERMUTES: bool;
    /// Bytes that [`Self::spread`] reads: four of products, widened where the set multiplies 16 bits.
    const QUAD: usize;
    /// Bytes that a vector takes as [`Self::store_quads`] writes it.
    const PREPARED: usize;
    /// Rows whose sums, one vector each, and what is multiplied fit the registers.
    const ROWS: usize;

    /// Four bytes for each of 16 lanes as products take them.
    type Quad: Copy;
    /// Bytes without sign, and with a sign.
    fn quad_u(self, v: Self::I) -> Self::Quad;
    fn quad_i(self, v: Self::I) -> Self::Quad;
    /// `sums + u · i`, summed over the four bytes of each lane. Exact.
    fn dot(self, sums: Self::I, u: Self::Quad, i: Self::Quad) -> Self::I;
    /// Makes four quads of 16 bytes, with sign or without, ready for [`Self::spread`].
    ///
    /// # Safety
    /// 16 bytes are readable, 4 [`Self::QUAD`] writable; they may be the same where `QUAD` is 4.
    unsafe fn widen<const SIGNED: bool>(self, to: *mut u8, from: *const u8);
    /// The quad that begins here, in all lanes; with sign or without as it was widened.
    ///
    /// # Safety
    /// [`Self::QUAD`] bytes are readable.
    unsafe fn spread(self, from: *const u8) -> Self::Quad;
    /// # Safety
    /// [`Self::PREPARED`] bytes are writable.
    unsafe fn store_quads(self, to: *mut u8, v: Self::Quad);
    /// # Safety
    /// [`Self::PREPARED`] bytes are readable.
    unsafe fn load_quads(self, from: *const u8) -> Self::Quad;
    /// Byte `e`, which has a sign, of each quad of a vector that [`Self::store_quads`] wrote.
    ///
    /// # Safety
    /// [`Self::PREPARED`] bytes are readable.
    unsafe fn load_byte(self, from: *const u8, e: usize) -> Self::I;

    /// `a · b + c`, rounded once on every set: on those without FMA it takes some ten instructions.
    fn fused(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `sums + a · b` of 16 bits with sign, two neighbours added. Wraps.
    fn dot_halves(self, sums: Self::I, a: Self::I, b: Self::I) -> Self::I;

    /// 32 yes or no.
    type W: Copy;
    /// 32 times the same 16 bits.
    #[inline(always)]
    fn splat16(self, x: i16) -> Self::I {
        self.isplat(i32::from(x as u16) << 16 | i32::from(x as u16))
    }
    /// `a − b` of 16 bits.
    fn sub16(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a + b` and `a − b` of 16 bits with sign, the nearest there is.
    fn adds16(self, a: Self::I, b: Self::I) -> Self::I;
    fn subs16(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a + b` of 16 bits without sign, the nearest there is.
    fn adds16_u(self, a: Self::I, b: Self::I) -> Self::I;
    /// The smaller and the larger of 16 bits without sign.
    fn min16_u(self, a: Self::I, b: Self::I) -> Self::I;
    fn max16_u(self, a: Self::I, b: Self::I) -> Self::I;
    /// The magnitude of 16 bits, without sign.
    fn abs16(self, a: Self::I) -> Self::I;
    /// The low half of `a · b` of 16 bits.
    fn mul16(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a · b / 2^15` of 16 bits with sign, to the nearest.
    fn mulhrs16(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a > b` of 16 bits with sign.
    fn gt16(self, a: Self::I, b: Self::I) -> Self::W;
    /// Whether 16 bits have this one, a power of two, set.
    fn has16(self, a: Self::I, bit: i16) -> Self::W;
    /// Of `yes` where the mask is set, else of `no`.
    fn select16(self, mask: Self::W, yes: Self::I, no: Self::I) -> Self::I;
    /// Bits of `a` where those of `mask` are set, else of `b`.
    fn merge(self, mask: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// 32 bits with sign to the nearest 16, 16 to the nearest 8: of each quarter of `a`, then of `b`.
    fn pack32(self, a: Self::I, b: Self::I) -> Self::I;
    fn pack16(self, a: Self::I, b: Self::I) -> Self::I;
    /// Numbers of 32 bits that 16 hold as 16 bits: those of `a`, then those of `b`.
    #[inline(always)]
    fn halves_of(self, a: Self::I, b: Self::I) -> Self::I {
        let mut halves = [0u16; 2 * LANES];
        // SAFETY: whole vectors of halves.
        unsafe {
            self.store_low_halves(halves.as_mut_ptr(), a);
            self.store_low_halves(halves.as_mut_ptr().add(LANES), b);
            self.iload(halves.as_ptr().cast())
        }
    }

    /// Elements of `a` and `b` in turns: those of the low half of each quarter, or of the high half.
    fn zip8<const HIGH: bool>(self, a: Self::I, b: Self::I) -> Self::I;
    fn zip16<const HIGH: bool>(self, a: Self::I, b: Self::I) -> Self::I;
    fn zip32<const HIGH: bool>(self, a: Self::I, b: Self::I) -> Self::I;
    fn zip64<const HIGH: bool>(self, a: Self::I, b: Self::I) -> Self::I;
    /// Neighbours of 32 bits, and of 64, in each other's place.
    fn swap32(self, v: Self::I) -> Self::I;
    fn swap64(self, v: Self::I) -> Self::I;
    /// 32 bytes, and as many zeros.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_half(self, from: *const u8) -> Self::I;
    /// Quarters `stride` bytes apart.
    ///
    /// # Safety
    /// All four are readable.
    unsafe fn load_quarters(self, from: *const u8, stride: usize) -> Self::I;
    /// # Safety
    /// All four are writable.
    unsafe fn store_quarters(self, to: *mut u8, stride: usize, v: Self::I);
    /// 32 bytes with sign as 16 bits each.
    ///
    /// # Safety
    /// They are readable.
    #[inline(always)]
    unsafe fn load_signed16(self, from: *const u8) -> Self::I {
        // SAFETY: by contract.
        unsafe { self.halves_of(self.load_signed(from), self.load_signed(from.add(LANES))) }
    }
    /// Which bytes are equal, as bits.
    fn equal8(self, a: Self::I, b: Self::I) -> u64;

    /// A table as [`Self::look_up`] takes it.
    fn table(self, table: &Table) -> [Self::I; 4];
    /// Elements of a table of `N`: 16, 32 or 64. Indices are smaller.
    fn look_up<const N: usize>(self, table: [Self::I; 4], at: Self::I) -> Self::I;
    /// Numbers of 16 bits of a table of `N`: 16, 32 or 64. Indices, of 16 bits, are smaller.
    #[inline(always)]
    fn look_up16<const N: usize>(self, table: &Words, at: Self::I) -> Self::I {
        // Where indices have their high bytes there is element 0, which goes away.
        let low = self.look_up::<N>(self.table(&table.low), at);
        let high = self.look_up::<N>(self.table(&table.high), at);
        self.or(self.and(low, self.splat16(255)), self.shl16(high, 8))
    }
    /// The bytes that the low six bits of `at` name; and of two vectors, seven bits.
    fn permute(self, v: Self::I, at: Self::I) -> Self::I;
    fn permute2(self, a: Self::I, b: Self::I, at: Self::I) -> Self::I;
    /// Of each eight bytes, the eight bits from each place that the low six bits of `at` name, circular.
    fn multishift(self, v: Self::I, at: Self::I) -> Self::I;
}
