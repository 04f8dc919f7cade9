//! Registers of every instruction set behind one interface, so that a kernel is written once.
//!
//! A *vector* here always has 16 lanes of 32 bits, whatever the processor's registers: with AVX-512 it is one
//! register, with AVX2 two, elsewhere an array. So the order of sums, and the layout of weights, is that of all sets, and
//! what a lane computes is equal bit for bit wherever multiply-add is one instruction.
//!
//! A kernel is an `#[inline(always)]` function generic over [`Simd`] that takes the set as a value; [`compiled!`]
//! makes a copy for each set it names and picks one at run time. Everything that such a function calls must be
//! `#[inline(always)]` too, and so must what a closure would do: a function that is not inlined is compiled without the
//! set's instructions, and calls each of them.

// Registers are indexed: iterators would hide that, and are compiled without the set's instructions. A set is a value, from which vectors
// are made.
#![allow(clippy::needless_range_loop, clippy::wrong_self_convention)]

/// Methods of a set that are some instructions, or none.
macro_rules! methods {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {
        $(#[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $ret {
            #[allow(unused_unsafe)]
            // SAFETY: having `self` means that the processor has the set.
            unsafe { $body }
        })*
    };
}

/// The same that read or write.
macro_rules! memory {
    ($($name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:expr;)*) => {
        $(#[inline(always)]
        unsafe fn $name(self, $($arg: $ty),*) $(-> $ret)? {
            // SAFETY: as above, and the memory is by contract.
            unsafe { $body }
        })*
    };
}

/// Both registers of a vector of AVX2 by the same expression.
#[cfg(target_arch = "x86_64")]
macro_rules! both {
    (|$($v:ident),*| $one:expr) => {
        [
            { $(let $v = $v[0];)* $one },
            { $(let $v = $v[1];)* $one },
        ]
    };
}

pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod bytes;
mod lanes;
mod portable;
#[cfg(target_arch = "x86_64")]
mod sse2;
#[cfg(test)]
mod tests;
pub(crate) mod tile;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::{Avx2, AvxVnni};
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::{Avx512, Avx512Bf16, Avx512Icl, Avx512Vnni};
pub(crate) use lanes::Lanes;
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use sse2::Sse2;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Vectors of an instruction set. Having the value means that the processor has the instructions.
pub(crate) trait Simd: Copy {
    /// Vectors that registers hold: 32, 8 or 4.
    const REGISTERS: usize;
    /// Whether they are 32.
    const WIDE: bool = Self::REGISTERS == 32;
    /// 16 numbers.
    type F: Copy;
    /// 64 bytes of integers, of 8, 16 or 32 bits.
    type I: Copy;
    /// 16 yes or no.
    type M: Copy;

    /// 16 zeros.
    fn zero(self) -> Self::F;
    /// 16 times the same.
    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// 16 numbers are readable.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// # Safety
    /// 16 numbers are writable.
    unsafe fn store(self, to: *mut f32, v: Self::F);
    /// The first `n` lanes; the others are 0.
    ///
    /// # Safety
    /// `n` numbers are readable.
    unsafe fn load_first(self, from: *const f32, n: usize) -> Self::F;
    /// # Safety
    /// `n` numbers are writable.
    unsafe fn store_first(self, to: *mut f32, v: Self::F, n: usize);
    /// 16 numbers of half precision.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_f16(self, from: *const u16) -> Self::F;
    /// Rounds to half precision, ties to even.
    ///
    /// # Safety
    /// 16 of them are writable.
    unsafe fn store_f16(self, to: *mut u16, v: Self::F);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once where the set has FMA.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a · b − c`, as [`Self::fma`].
    fn fms(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where they cannot be compared.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where they cannot be compared.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `p · 2^n` for whole numbers n from -126 to 127.
    fn scale(self, p: Self::F, n: Self::F) -> Self::F;

    /// `a < b`.
    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    /// Lane i is bit i.
    fn mask(self, bits: u16) -> Self::M;
    /// Of `yes` where the mask is set, else of `no`.
    fn select(self, mask: Self::M, yes: Self::F, no: Self::F) -> Self::F;

    /// The sum of all lanes: halves, quarters, pairs, as [`crate::gemm::sum_lanes`].
    fn sum(self, v: Self::F) -> f32;
    /// The largest lane, of numbers that can be compared.
    fn largest(self, v: Self::F) -> f32;

    /// To the nearest integers, ties to even; `i32::MIN` for what is out of range or no number.
    fn to_int(self, v: Self::F) -> Self::I;
    fn from_int(self, v: Self::I) -> Self::F;
    fn bits(self, v: Self::F) -> Self::I;
    fn from_bits(self, v: Self::I) -> Self::F;

    fn izero(self) -> Self::I;
    /// 16 times the same 32 bits.
    fn isplat(self, x: i32) -> Self::I;
    /// # Safety
    /// 64 bytes are readable.
    unsafe fn iload(self, from: *const u8) -> Self::I;
    /// # Safety
    /// 64 bytes are writable.
    unsafe fn istore(self, to: *mut u8, v: Self::I);
    /// The low bytes of the 16 lanes.
    ///
    /// # Safety
    /// 16 bytes are writable.
    unsafe fn store_low_bytes(self, to: *mut u8, v: Self::I);
    /// The low halves of the 16 lanes.
    ///
    /// # Safety
    /// 16 of them are writable.
    unsafe fn store_low_halves(self, to: *mut u16, v: Self::I);
    /// 16 numbers of 16 bits, each in the low half of a lane; the others are 0.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_halves(self, from: *const u16) -> Self::I;
    /// 16 bytes with sign as 32 bits each.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn load_signed(self, from: *const u8) -> Self::I;
    /// Of each 16 bytes of `v`, those that the low four bits of `at` name. (The highest bit of a byte of `at` must be 0.)
    fn shuffle(self, v: Self::I, at: Self::I) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a + b` of 32 bits.
    fn iadd(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a − b` of 32 bits.
    fn isub(self, a: Self::I, b: Self::I) -> Self::I;
    /// The larger of 32 bits without sign.
    fn imax_u(self, a: Self::I, b: Self::I) -> Self::I;
    /// Shifts of 32 bits by a constant: to the left, to the right with zeros, and with the sign.
    fn shl(self, a: Self::I, n: u32) -> Self::I;
    fn shr(self, a: Self::I, n: u32) -> Self::I;
    fn sar(self, a: Self::I, n: u32) -> Self::I;
    /// The same of 16 bits.
    fn shl16(self, a: Self::I, n: u32) -> Self::I;
    fn shr16(self, a: Self::I, n: u32) -> Self::I;
    /// `a + b` of 16 bits.
    fn add16(self, a: Self::I, b: Self::I) -> Self::I;
    /// The largest of the lanes without sign, and the sum of the lanes, of four vectors.
    fn fold4_max_u(self, v: [Self::I; 4]) -> [u32; 4];
    fn fold4_add(self, v: [Self::I; 4]) -> [i32; 4];

    /// Four bytes for each of 16 lanes as products of bytes take them.
    type Quads: Copy;
    /// Bytes without sign.
    fn quads_u(self, v: Self::I) -> Self::Quads;
    /// Bytes with a sign.
    fn quads_i(self, v: Self::I) -> Self::Quads;
    /// `sums + u · i`, summed over the four bytes of each lane. Exact.
    fn dot_quads(self, sums: Self::I, u: Self::Quads, i: Self::Quads) -> Self::I;

    /// Bytes with a sign, stored 128 larger, as products with bytes from -127 to 127 take them.
    type Bytes: Copy;
    /// Whether [`Self::dot_bytes`] takes them as they are stored, so that sums must begin at -128 times the sum of the others.
    const SUMS_AS_STORED: bool;
    fn bytes(self, stored: Self::I) -> Self::Bytes;
    /// `sums + a · b`, summed over the four bytes of each lane. Exact.
    fn dot_bytes(self, sums: Self::I, a: Self::Bytes, b: Self::I) -> Self::I;

    /// Products of codes of at most five bits (0 to 31) with bytes (-127 to 127), over half a group: 32-bit sums, or pairs of
    /// 16-bit ones. Begins with zeros; takes up to 4 quads, or 2 of codes of six bits.
    fn dot_codes(self, sums: Self::I, codes: Self::I, bytes: Self::I) -> Self::I;
    /// 32-bit sums with such sums added.
    fn add_codes(self, sums: Self::I, codes: Self::I) -> Self::I;
    /// `begin + first · step₀ + last · step₁` of two such sums. Wraps.
    fn join_codes(self, first: Self::I, last: Self::I, steps: &Steps, begin: Self::I) -> Self::I;

    /// Two bf16 for each of 16 lanes as products take them.
    type Pairs: Copy;
    fn pairs(self, v: Self::I) -> Self::Pairs;
    /// `sums + a · b`: first the products of the high halves, then of the low ones; `vdpbf16ps` where the set has it, which
    /// gives the same but for numbers that are not normal.
    fn dot_pairs(self, sums: Self::F, a: Self::Pairs, b: Self::Pairs) -> Self::F;
    /// Rounded to bf16 (ties to even), each in the low half of a lane; the others are 0. NaN stays one.
    fn round_bf16(self, v: Self::F) -> Self::I;
}

/// What the sums of the two halves of a group are multiplied with: numbers of 16 bits, in the forms that sets load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(crate) struct Steps {
    /// In the halves of 32 bits.
    both: i32,
    /// One by one, without sign.
    each: [i32; 2],
}

impl Steps {
    /// Of the first half and of the last, which have no sign.
    #[inline(always)]
    pub(crate) fn new(each: [i32; 2]) -> Self {
        Self { both: each[0] | each[1] << 16, each }
    }

    #[inline(always)]
    pub(crate) fn each(self) -> [i32; 2] {
        self.each
    }
}

/// Sets that look up words, where products of bf16 want them.
pub(crate) trait WordTables: Simd {
    /// Of 32 words the ones that the low five bits of each 16-bit lane name.
    fn lookup16(self, table: Self::I, indices: Self::I) -> Self::I;
}

/// Makes copies of a kernel for the instruction sets named, best first, and picks the first that may be used; arrays
/// ([`Portable`]) serve where none of them is.
///
/// `compiled! { fn name[declared generics][their names](args…) -> ret = body for [Set, …]; }` makes `name(isa, args…)`; the body is
/// `#[inline(always)] fn body<S: Simd, declared generics>(set: S, args…) -> ret`.
macro_rules! compiled {
    ($(#[$meta:meta])* $vis:vis fn $name:ident ($($args:tt)*) $(-> $ret:ty)? = $body:ident for [$($set:ident),*];) => {
        $crate::simd::compiled! {
            $(#[$meta])* $vis fn $name [] [] ($($args)*) $(-> $ret)? = $body for [$($set),*];
        }
    };
    ($(#[$meta:meta])* $vis:vis fn $name:ident [$($declared:tt)*] $used:tt ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident for [$($set:ident),*];) => {
        $(#[$meta])*
        #[inline]
        $vis fn $name <$($declared)*> (isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            $crate::simd::each_set! { isa [$($set),*] [$($declared)*] $used ($($arg: $ty),*) [$($ret)?] $body }
            // Nothing is left where the target guarantees a set.
            #[allow(unreachable_code)]
            {
                let _ = isa;
                $crate::simd::call!($body, $crate::simd::Portable, $used, ($($arg),*))
            }
        }
    };
}
pub(crate) use compiled;

/// [`compiled!`], for one set after the other.
macro_rules! each_set {
    ($isa:ident [] $($rest:tt)*) => {};
    // What is left: no other set may be used, and every x86-64 processor has it.
    ($isa:ident [Sse2] $declared:tt $used:tt ($($arg:ident : $ty:ty),*) $ret:tt $body:ident) => {
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY: part of x86-64.
            let set = unsafe { $crate::simd::Sse2::new() };
            return $crate::simd::call!($body, set, $used, ($($arg),*));
        }
    };
    ($isa:ident [$set:ident $(, $more:ident)*] $declared:tt $used:tt ($($arg:ident : $ty:ty),*) $ret:tt $body:ident) => {
        #[cfg(target_arch = "x86_64")]
        if $isa.has($crate::isa::Set::$set) {
            $crate::simd::on_set! { $set $declared $used ($($arg: $ty),*) $ret $body }
            // SAFETY: an `Isa` names only sets that the processor has.
            return unsafe { $crate::simd::call!(on_set, $used, ($($arg),*)) };
        }
        $crate::simd::each_set! { $isa [$($more),*] $declared $used ($($arg: $ty),*) $ret $body }
    };
}
pub(crate) use each_set;

/// Calls a function with the generics that [`compiled!`] was given, after the set if one comes first.
macro_rules! call {
    ($f:ident, $set:expr, [$($used:ident),*], ($($arg:ident),*)) => { $f::<_, $($used),*>($set, $($arg),*) };
    ($f:ident, [$($used:ident),*], ($($arg:ident),*)) => { $f::<$($used),*>($($arg),*) };
}
pub(crate) use call;

/// The function `on_set`: a body compiled for one set.
#[cfg(target_arch = "x86_64")]
macro_rules! on_set {
    (Avx2 $($rest:tt)*) => { $crate::simd::on_set! { @ "avx2,fma,f16c", Avx2 $($rest)* } };
    (AvxVnni $($rest:tt)*) => { $crate::simd::on_set! { @ "avx2,fma,f16c,avxvnni", AvxVnni $($rest)* } };
    (Avx512 $($rest:tt)*) => { $crate::simd::on_set! { @ "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c", Avx512 $($rest)* } };
    (Avx512Vnni $($rest:tt)*) => {
        $crate::simd::on_set! { @ "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c", Avx512Vnni $($rest)* }
    };
    (Avx512Icl $($rest:tt)*) => {
        $crate::simd::on_set! { @ "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,fma,f16c", Avx512Icl $($rest)* }
    };
    (Avx512Bf16 $($rest:tt)*) => {
        $crate::simd::on_set! { @ "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,f16c", Avx512Bf16 $($rest)* }
    };
    (@ $features:literal, $set:ident [$($declared:tt)*] $used:tt ($($arg:ident : $ty:ty),*) [$($ret:ty)?] $body:ident) => {
        /// # Safety
        /// The processor has the set.
        #[target_feature(enable = $features)]
        #[allow(clippy::too_many_arguments)]
        unsafe fn on_set<$($declared)*>($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: by contract.
            let set = unsafe { $crate::simd::$set::new() };
            $crate::simd::call!($body, set, $used, ($($arg),*))
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use on_set;

/// A shift count, a constant where it matters.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn count(n: u32) -> std::arch::x86_64::__m128i {
    // SAFETY: part of x86-64.
    unsafe { std::arch::x86_64::_mm_cvtsi32_si128(n as i32) }
}

/// Where [`prefetch`] brings bytes to.
pub(crate) const L1: bool = true;
pub(crate) const L2: bool = false;

/// Asks for bytes to be brought into a cache, some 4 KiB after `at`: memory answers in about 400 cycles.
#[inline(always)]
pub(crate) fn prefetch<const TO: bool>(at: *const u8, bytes: usize) {
    /// How far ahead.
    const AHEAD: usize = 4096;
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let at = at.wrapping_add(AHEAD + line).cast();
        // SAFETY: a prefetch never faults, wherever it points.
        unsafe {
            if TO == L1 {
                _mm_prefetch::<_MM_HINT_T0>(at);
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at);
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, bytes, AHEAD);
}
