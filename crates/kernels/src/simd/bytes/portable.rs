//! Arrays: the definition.

use super::{BYTES, Bytes, Table};
use crate::simd::{LANES, Portable};

type F = [f32; LANES];
type I = [i32; LANES];

/// Numbers as others, in order of significance.
macro_rules! cast {
    ($v:expr, $from:ty, $to:ty) => {{
        let (mut v, mut out): ($from, $to) = ($v, [0; _]);
        if cfg!(target_endian = "big") {
            v.iter_mut().for_each(|x| *x = x.to_le());
        }
        // SAFETY: both are 64 bytes of numbers.
        unsafe {
            std::ptr::copy_nonoverlapping(v.as_ptr().cast::<u8>(), out.as_mut_ptr().cast(), BYTES)
        };
        if cfg!(target_endian = "big") {
            out.iter_mut().for_each(|x| *x = x.to_le());
        }
        out
    }};
}

#[inline(always)]
pub(super) fn bytes(v: I) -> [u8; BYTES] {
    cast!(v, I, [u8; BYTES])
}

#[inline(always)]
pub(super) fn of_bytes(v: [u8; BYTES]) -> I {
    cast!(v, [u8; BYTES], I)
}

#[inline(always)]
fn halves(v: I) -> [i16; 32] {
    cast!(v, I, [i16; 32])
}

#[inline(always)]
fn of_halves(v: [i16; 32]) -> I {
    cast!(v, [i16; 32], I)
}

/// A number after the other.
macro_rules! each {
    ($of:ty, |$i:ident| $one:expr) => {{
        let mut out = [<$of>::default(); _];
        for ($i, out) in out.iter_mut().enumerate() {
            *out = $one;
        }
        out
    }};
}

/// A half after the other.
macro_rules! each16 {
    (|$($v:ident),*| $one:expr) => {{
        $(let $v = halves($v);)*
        of_halves(each!(i16, |l| {
            $(let $v = $v[l];)*
            $one
        }))
    }};
}

/// A byte after the other: the one at `$i`.
macro_rules! each8 {
    (|$i:ident| $one:expr) => {{
        let out: [u8; BYTES] = each!(u8, |$i| $one);
        of_bytes(out)
    }};
}

/// Elements of so many bytes in turns.
#[inline(always)]
fn zip<const SIZE: usize, const HIGH: bool>(a: I, b: I) -> I {
    let (a, b) = (bytes(a), bytes(b));
    each8!(|i| {
        let from = if (i / SIZE).is_multiple_of(2) { &a } else { &b };
        from[i / 16 * 16 + 8 * usize::from(HIGH) + i % 16 / (2 * SIZE) * SIZE + i % SIZE]
    })
}

/// `sums + a · b`, two neighbours added.
#[inline(always)]
fn add_products(mut sums: I, a: &[i16; 32], b: &[i16; 32]) -> I {
    let (a, b) = (a.as_chunks::<8>().0, b.as_chunks::<8>().0);
    for (sums, (a, b)) in sums.as_chunks_mut::<4>().0.iter_mut().zip(a.iter().zip(b)) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE2 is part of x86-64, and all that is read or written is 16 bytes long.
        unsafe {
            use std::arch::x86_64::*;
            let a = _mm_loadu_si128(a.as_ptr().cast());
            let products = _mm_madd_epi16(a, _mm_loadu_si128(b.as_ptr().cast()));
            let sum = _mm_add_epi32(_mm_loadu_si128(sums.as_ptr().cast()), products);
            _mm_storeu_si128(sums.as_mut_ptr().cast(), sum);
        }
        #[cfg(not(target_arch = "x86_64"))]
        for (l, sum) in sums.iter_mut().enumerate() {
            let product = |e: usize| i32::from(a[2 * l + e]) * i32::from(b[2 * l + e]);
            *sum = sum.wrapping_add(product(0)).wrapping_add(product(1));
        }
    }
    sums
}

/// `a · b + c`, rounded once: the product is exact in f64, and a sum that is rounded to odd there can be rounded again.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let other = sum - product;
    // What the sum lost.
    let error = (product - (sum - other)) + (c - other);
    let inexact = u64::from(error < 0.0) | u64::from(error > 0.0);
    // Cut off, with a last bit that says whether anything was.
    let bits = sum.to_bits();
    let beyond = (error.to_bits() ^ bits) >> 63 & inexact;
    f64::from_bits(bits.wrapping_sub(beyond) | inexact) as f32
}

macro_rules! methods {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {
        $(#[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $ret {
            $body
        })*
    };
}

macro_rules! zips {
    ($($name:ident $size:literal)*) => {
        $(#[inline(always)]
        fn $name<const HIGH: bool>(self, a: I, b: I) -> I {
            zip::<$size, HIGH>(a, b)
        })*
    };
}

impl Bytes for Portable {
    const VECTORS: bool = false;
    const PERMUTES: bool = false;
    const QUAD: usize = 8;
    const PREPARED: usize = 2 * BYTES;
    const ROWS: usize = 2;

    /// The even bytes and the odd ones, 16 bits each: all targets have products of these.
    type Quad = [[i16; 32]; 2];
    #[inline(always)]
    fn quad_u(self, v: I) -> Self::Quad {
        let words = halves(v);
        [each!(i16, |l| words[l] & 255), each!(i16, |l| words[l] >> 8 & 255)]
    }
    #[inline(always)]
    fn quad_i(self, v: I) -> Self::Quad {
        let words = halves(v);
        [each!(i16, |l| words[l] << 8 >> 8), each!(i16, |l| words[l] >> 8)]
    }
    #[inline(always)]
    fn dot(self, sums: I, u: Self::Quad, i: Self::Quad) -> I {
        add_products(add_products(sums, &u[0], &i[0]), &u[1], &i[1])
    }
    #[inline(always)]
    unsafe fn widen<const SIGNED: bool>(self, to: *mut u8, from: *const u8) {
        for i in 0..16 {
            // SAFETY: by contract.
            unsafe {
                let byte = *from.add(i);
                let wide = if SIGNED { i16::from(byte as i8) } else { i16::from(byte) };
                // The even bytes of a quad, then the odd ones.
                to.cast::<i16>().add(i / 4 * 4 + i % 2 * 2 + i % 4 / 2).write_unaligned(wide);
            }
        }
    }
    #[inline(always)]
    unsafe fn spread(self, from: *const u8) -> Self::Quad {
        // SAFETY: by contract.
        let [even, odd] = unsafe { from.cast::<[i32; 2]>().read_unaligned() };
        // Numbers are in the processor's order.
        let words = |x: i32| {
            // SAFETY: as long, and any numbers will do.
            unsafe { std::mem::transmute::<[i32; LANES], [i16; 32]>([x; LANES]) }
        };
        [words(even), words(odd)]
    }
    #[inline(always)]
    unsafe fn store_quads(self, to: *mut u8, v: Self::Quad) {
        // SAFETY: by contract.
        unsafe { to.cast::<Self::Quad>().write_unaligned(v) };
    }
    #[inline(always)]
    unsafe fn load_quads(self, from: *const u8) -> Self::Quad {
        // SAFETY: by contract.
        unsafe { from.cast::<Self::Quad>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_byte(self, from: *const u8, e: usize) -> I {
        // SAFETY: by contract.
        let words = unsafe { self.load_quads(from) }[e % 2];
        each!(i32, |l| i32::from(words[2 * l + e / 2]))
    }

    type W = [bool; 32];
    #[inline(always)]
    fn gt16(self, a: I, b: I) -> [bool; 32] {
        let (a, b) = (halves(a), halves(b));
        each!(bool, |l| a[l] > b[l])
    }
    #[inline(always)]
    fn has16(self, a: I, bit: i16) -> [bool; 32] {
        let a = halves(a);
        each!(bool, |l| a[l] & bit != 0)
    }
    #[inline(always)]
    fn select16(self, mask: [bool; 32], yes: I, no: I) -> I {
        let (yes, no) = (halves(yes), halves(no));
        of_halves(each!(i16, |l| if mask[l] { yes[l] } else { no[l] }))
    }
    methods! {
        fused(a: F, b: F, c: F) -> F = each!(f32, |l| fused(a[l], b[l], c[l]));
        dot_halves(sums: I, a: I, b: I) -> I = add_products(sums, &halves(a), &halves(b));
        sub16(a: I, b: I) -> I = each16!(|a, b| a.wrapping_sub(b));
        adds16(a: I, b: I) -> I = each16!(|a, b| a.saturating_add(b));
        subs16(a: I, b: I) -> I = each16!(|a, b| a.saturating_sub(b));
        adds16_u(a: I, b: I) -> I = each16!(|a, b| (a as u16).saturating_add(b as u16) as i16);
        min16_u(a: I, b: I) -> I = each16!(|a, b| (a as u16).min(b as u16) as i16);
        max16_u(a: I, b: I) -> I = each16!(|a, b| (a as u16).max(b as u16) as i16);
        abs16(a: I) -> I = each16!(|a| a.unsigned_abs() as i16);
        mul16(a: I, b: I) -> I = each16!(|a, b| a.wrapping_mul(b));
        mulhrs16(a: I, b: I) -> I =
            each16!(|a, b| ((i32::from(a) * i32::from(b) + (1 << 14)) >> 15) as i16);
        merge(mask: I, a: I, b: I) -> I = each!(i32, |l| a[l] & mask[l] | b[l] & !mask[l]);
        pack32(a: I, b: I) -> I = {
            let mut out = [0; 32];
            for (q, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                for l in 0..4 {
                    out[l] = a[4 * q + l].clamp(i16::MIN.into(), i16::MAX.into()) as i16;
                    out[4 + l] = b[4 * q + l].clamp(i16::MIN.into(), i16::MAX.into()) as i16;
                }
            }
            of_halves(out)
        };
        pack16(a: I, b: I) -> I = {
            let (a, b, mut out) = (halves(a), halves(b), [0; BYTES]);
            for (q, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                for l in 0..8 {
                    out[l] = a[8 * q + l].clamp(i8::MIN.into(), i8::MAX.into()) as u8;
                    out[8 + l] = b[8 * q + l].clamp(i8::MIN.into(), i8::MAX.into()) as u8;
                }
            }
            of_bytes(out)
        };
        equal8(a: I, b: I) -> u64 = {
            let (a, b) = (bytes(a), bytes(b));
            (0..BYTES).fold(0, |all, i| all | u64::from(a[i] == b[i]) << i)
        };
        swap32(v: I) -> I = each!(i32, |l| v[l ^ 1]);
        swap64(v: I) -> I = each!(i32, |l| v[l ^ 2]);
        table(table: &Table) -> [I; 4] = [each8!(|i| table.0[i] as u8); 4];
        permute(v: I, at: I) -> I = {
            let (v, at) = (bytes(v), bytes(at));
            each8!(|i| v[usize::from(at[i] % 64)])
        };
        permute2(a: I, b: I, at: I) -> I = {
            let (a, b, at) = (bytes(a), bytes(b), bytes(at));
            each8!(|i| if at[i] & 64 == 0 { a } else { b }[usize::from(at[i] % 64)])
        };
        multishift(v: I, at: I) -> I = {
            let (v, at) = (bytes(v), bytes(at));
            each8!(|i| {
                let word = v.as_chunks::<8>().0[i / 8];
                u64::from_le_bytes(word).rotate_right(u32::from(at[i] % 64)) as u8
            })
        };
    }
    #[inline(always)]
    fn look_up<const N: usize>(self, table: [I; 4], at: I) -> I {
        self.permute(table[0], at)
    }
    zips! { zip8 1 zip16 2 zip32 4 zip64 8 }
    #[inline(always)]
    unsafe fn load_half(self, from: *const u8) -> I {
        let mut out = [0; BYTES];
        // SAFETY: by contract.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), BYTES / 2) };
        of_bytes(out)
    }
    #[inline(always)]
    unsafe fn load_quarters(self, from: *const u8, stride: usize) -> I {
        let mut out = [[0u8; 16]; 4];
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: by contract.
            *out = unsafe { from.add(i * stride).cast::<[u8; 16]>().read_unaligned() };
        }
        each8!(|i| out[i / 16][i % 16])
    }
    #[inline(always)]
    unsafe fn store_quarters(self, to: *mut u8, stride: usize, v: I) {
        for (i, quarter) in bytes(v).as_chunks::<16>().0.iter().enumerate() {
            // SAFETY: by contract.
            unsafe { to.add(i * stride).cast::<[u8; 16]>().write_unaligned(*quarter) };
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn fused_is_what_the_processor_or_libm_makes() {
        let mut x = 1u64;
        let mut next = || {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 32) as u32
        };
        for i in 0..2_000_000 {
            let (mut a, mut b, mut c) = (next(), next(), next());
            if i % 2 == 0 {
                // Of like sizes, so that sums cancel and halves of units meet.
                (a, b, c) = (
                    a & 0x80ff_ff00 | 0x3f00_0000,
                    b & 0x80ff_0000 | 0x3f00_0000,
                    c & 0x81ff_ffff | 0x3e00_0000,
                );
            }
            let [a, b, c] = [a, b, c].map(f32::from_bits);
            let (got, want) = (super::fused(a, b, c), a.mul_add(b, c));
            assert!(
                got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                "{a:e} {b:e} {c:e}: {got:e} {want:e}"
            );
        }
    }
}
