//! What matrix products and attention need beside [`Simd`]: transpositions, conversions, and four vectors folded at a
//! time. Methods that have a body are the definition; sets replace what they do better.

use super::{LANES, Portable, Simd};

/// See the module.
pub(crate) trait Lanes: Simd {
    /// Sums that a register tile may have, so that its operands have registers too.
    const SUMS: usize;

    /// Four numbers in the first lanes; the others may be anything.
    fn four(self, x: [f32; 4]) -> Self::F;

    /// The largest lane of each of four vectors, in the first lanes, as [`Simd::largest`].
    #[inline(always)]
    fn largest4(self, v: [Self::F; 4]) -> Self::F {
        let [a, b, c, d] = v;
        self.four([self.largest(a), self.largest(b), self.largest(c), self.largest(d)])
    }

    /// The sum of each of four vectors, in the first lanes, as [`Simd::sum`].
    #[inline(always)]
    fn sum4(self, v: [Self::F; 4]) -> Self::F {
        let [a, b, c, d] = v;
        self.four([self.sum(a), self.sum(b), self.sum(c), self.sum(d)])
    }

    /// 4 words of 16 rows: lane `t` of the `c`-th result is word `c` of row `t`. Rows from `n` on are the last again.
    ///
    /// # Safety
    /// `rows` points to 4 words of `n.min(16)` rows, `stride` apart; `n` > 0.
    #[inline(always)]
    unsafe fn words4(self, rows: *const u32, stride: usize, n: usize) -> [Self::I; 4] {
        let mut columns = [[0u32; LANES]; 4];
        let mut out = [self.izero(); 4];
        for t in 0..LANES {
            for (c, column) in columns.iter_mut().enumerate() {
                // SAFETY: by contract.
                column[t] = unsafe { rows.add(t.min(n - 1) * stride + c).read_unaligned() };
            }
        }
        for c in 0..4 {
            // SAFETY: a whole vector.
            out[c] = unsafe { self.iload(columns[c].as_ptr().cast()) };
        }
        out
    }

    /// 8 numbers of half precision of 16 rows, as [`Self::words4`].
    ///
    /// # Safety
    /// As for [`Self::words4`], with 8 halves.
    #[inline(always)]
    unsafe fn halves8(self, rows: *const u16, stride: usize, n: usize) -> [Self::F; 8] {
        let mut columns = [[0u16; LANES]; 8];
        let mut out = [self.zero(); 8];
        for t in 0..LANES {
            for (c, column) in columns.iter_mut().enumerate() {
                // SAFETY: by contract.
                column[t] = unsafe { rows.add(t.min(n - 1) * stride + c).read_unaligned() };
            }
        }
        for c in 0..8 {
            // SAFETY: a whole vector.
            out[c] = unsafe { self.load_f16(columns[c].as_ptr()) };
        }
        out
    }

    /// Two vectors rounded to bf16, lane by lane in pairs: `low` in the low halves.
    #[inline(always)]
    fn join(self, low: Self::F, high: Self::F) -> Self::I {
        self.or(self.round_bf16(low), self.shl(self.round_bf16(high), 16))
    }

    /// 32 numbers of half precision rounded to bf16.
    #[inline(always)]
    fn narrowed(self, v: Self::I) -> Self::I {
        let mut halves = [0u16; 2 * LANES];
        // SAFETY: whole vectors of halves.
        unsafe {
            self.istore(halves.as_mut_ptr().cast(), v);
            for half in halves.as_chunks_mut::<LANES>().0 {
                let rounded = self.round_bf16(self.load_f16(half.as_ptr()));
                self.store_low_halves(half.as_mut_ptr(), rounded);
            }
            self.iload(halves.as_ptr().cast())
        }
    }

    /// 16 bytes with a sign.
    ///
    /// # Safety
    /// They are readable.
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const i8) -> Self::I {
        let mut words = [0i32; LANES];
        for (l, word) in words.iter_mut().enumerate() {
            // SAFETY: by contract.
            *word = i32::from(unsafe { from.add(l).read() });
        }
        // SAFETY: a whole vector.
        unsafe { self.iload(words.as_ptr().cast()) }
    }

    /// 16 codes of `BITS` bits (2 or 4), lowest bits first, as numbers.
    #[inline(always)]
    fn spread<const BITS: usize>(self, codes: u64) -> Self::I {
        let mut words = [0i32; LANES];
        for (l, word) in words.iter_mut().enumerate() {
            *word = (codes >> (BITS * l)) as i32 & ((1 << BITS) - 1);
        }
        // SAFETY: a whole vector.
        unsafe { self.iload(words.as_ptr().cast()) }
    }
}

impl Lanes for Portable {
    const SUMS: usize = 2;

    #[inline(always)]
    fn four(self, x: [f32; 4]) -> Self::F {
        let mut out = [0.0; LANES];
        out[..4].copy_from_slice(&x);
        out
    }
}

#[cfg(target_arch = "x86_64")]
mod x86;
