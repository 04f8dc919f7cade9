//! Arrays: the definition.

use super::{BYTES, Bytes, Table};
use crate::simd::{LANES, Portable, Simd};

type F = [f32; LANES];
type I = [i32; LANES];

/// In order of significance.
#[inline(always)]
pub(super) fn bytes(v: I) -> [u8; BYTES] {
    // SAFETY: as long, and any bytes are bytes.
    unsafe { std::mem::transmute::<I, [u8; BYTES]>(v.map(i32::to_le)) }
}

#[inline(always)]
pub(super) fn of_bytes(v: [u8; BYTES]) -> I {
    // SAFETY: as long, and any bytes are numbers.
    unsafe { std::mem::transmute::<[u8; BYTES], I>(v) }.map(i32::from_le)
}

#[inline(always)]
fn halves(v: I) -> [i16; 32] {
    // SAFETY: as above.
    unsafe { std::mem::transmute::<I, [i16; 32]>(v.map(i32::to_le)) }.map(i16::from_le)
}

#[inline(always)]
fn of_halves(v: [i16; 32]) -> I {
    // SAFETY: as above.
    unsafe { std::mem::transmute::<[i16; 32], I>(v.map(i16::to_le)) }.map(i32::from_le)
}

/// A half after the other.
macro_rules! each16 {
    (|$($v:ident),*| $one:expr) => {{
        $(let $v = halves($v);)*
        let mut out = [0i16; 32];
        for l in 0..32 {
            $(let $v = $v[l];)*
            out[l] = $one;
        }
        of_halves(out)
    }};
}

/// A byte after the other: the one at `$i`.
macro_rules! each8 {
    (|$i:ident| $one:expr) => {{
        let mut out = [0u8; BYTES];
        for $i in 0..BYTES {
            out[$i] = $one;
        }
        of_bytes(out)
    }};
}

/// Elements of so many bytes in turns.
#[inline(always)]
fn zip<const SIZE: usize, const HIGH: bool>(a: I, b: I) -> I {
    let (a, b) = (bytes(a), bytes(b));
    each8!(|i| {
        let from = if i / SIZE % 2 == 0 { &a } else { &b };
        from[i / 16 * 16 + 8 * usize::from(HIGH) + i % 16 / (2 * SIZE) * SIZE + i % SIZE]
    })
}

/// `a · b + c`, rounded once: the product is exact in f64, and a sum that is rounded to odd there can be rounded again.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let other = sum - product;
    // What the sum lost.
    let error = (product - (sum - other)) + (c - other);
    let bits = sum.to_bits();
    let away = u64::from((error > 0.0) == (sum > 0.0));
    let towards = bits.wrapping_add(away.wrapping_mul(2)).wrapping_sub(1);
    let even = error.abs() > 0.0 && bits & 1 == 0;
    f64::from_bits(if even { towards } else { bits }) as f32
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
    const PERMUTES: bool = false;
    const QUAD: usize = 4;
    const PREPARED: usize = BYTES;
    const ROWS: usize = 2;

    #[inline(always)]
    unsafe fn widen<const SIGNED: bool>(self, to: *mut u8, from: *const u8) {
        // SAFETY: by contract.
        unsafe { std::ptr::copy(from, to, 16) };
    }
    #[inline(always)]
    unsafe fn spread(self, from: *const u8) -> I {
        // SAFETY: by contract.
        [i32::from_le(unsafe { from.cast::<i32>().read_unaligned() }); LANES]
    }
    #[inline(always)]
    unsafe fn store_quads(self, to: *mut u8, v: I) {
        // SAFETY: by contract.
        unsafe { self.istore(to, v) };
    }
    #[inline(always)]
    unsafe fn load_quads(self, from: *const u8) -> I {
        // SAFETY: by contract.
        unsafe { self.iload(from) }
    }
    #[inline(always)]
    unsafe fn load_byte(self, from: *const u8, e: usize) -> I {
        // SAFETY: by contract.
        unsafe { self.iload(from) }.map(|x| i32::from(x.to_le_bytes()[e] as i8))
    }

    type W = [bool; 32];
    #[inline(always)]
    fn gt16(self, a: I, b: I) -> [bool; 32] {
        let (a, b) = (halves(a), halves(b));
        std::array::from_fn(|l| a[l] > b[l])
    }
    #[inline(always)]
    fn has16(self, a: I, bit: i16) -> [bool; 32] {
        halves(a).map(|a| a & bit != 0)
    }
    #[inline(always)]
    fn select16(self, mask: [bool; 32], yes: I, no: I) -> I {
        let (yes, no) = (halves(yes), halves(no));
        of_halves(std::array::from_fn(|l| if mask[l] { yes[l] } else { no[l] }))
    }
    methods! {
        fused(a: F, b: F, c: F) -> F = {
            let mut out = [0.0; LANES];
            for l in 0..LANES {
                out[l] = fused(a[l], b[l], c[l]);
            }
            out
        };
        dot_halves(sums: I, a: I, b: I) -> I = Portable.iadd(sums, Portable.madd16(a, b));
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
        merge(mask: I, a: I, b: I) -> I = std::array::from_fn(|l| a[l] & mask[l] | b[l] & !mask[l]);
        pack32(a: I, b: I) -> I = of_halves(std::array::from_fn(|i| {
            let from = if i % 8 < 4 { &a } else { &b };
            from[i / 8 * 4 + i % 4].clamp(i16::MIN.into(), i16::MAX.into()) as i16
        }));
        pack16(a: I, b: I) -> I = {
            let (a, b) = (halves(a), halves(b));
            each8!(|i| {
                let from = if i % 16 < 8 { &a } else { &b };
                from[i / 16 * 8 + i % 8].clamp(i8::MIN.into(), i8::MAX.into()) as u8
            })
        };
        equal8(a: I, b: I) -> u64 = {
            let (a, b) = (bytes(a), bytes(b));
            (0..BYTES).fold(0, |all, i| all | u64::from(a[i] == b[i]) << i)
        };
        shuffle(v: I, at: I) -> I = {
            let (v, at) = (bytes(v), bytes(at));
            each8!(|i| v[i / 16 * 16 + usize::from(at[i] % 16)])
        };
        table(table: &Table) -> [I; 4] = [of_bytes(table.0.map(|level| level as u8)); 4];
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
        // SAFETY: as long, and any bytes are bytes.
        of_bytes(unsafe { std::mem::transmute::<[[u8; 16]; 4], [u8; BYTES]>(out) })
    }
    #[inline(always)]
    unsafe fn store_quarters(self, to: *mut u8, stride: usize, v: I) {
        for (i, quarter) in bytes(v).as_chunks::<16>().0.iter().enumerate() {
            // SAFETY: by contract.
            unsafe { to.add(i * stride).cast::<[u8; 16]>().write_unaligned(*quarter) };
        }
    }
    #[inline(always)]
    unsafe fn load_signed(self, from: *const u8) -> I {
        // SAFETY: by contract.
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(i32::from)
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
                (a, b, c) = (a & 0x80ff_ff00 | 0x3f00_0000, b & 0x80ff_0000 | 0x3f00_0000, c & 0x81ff_ffff | 0x3e00_0000);
            }
            let [a, b, c] = [a, b, c].map(f32::from_bits);
            let (got, want) = (super::fused(a, b, c), a.mul_add(b, c));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{a:e} {b:e} {c:e}: {got:e} {want:e}");
        }
    }
}
