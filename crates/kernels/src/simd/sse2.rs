//! SSE2, which every x86-64 processor has: a vector is four registers of four lanes. What later sets do in one instruction is put
//! together here. There is no FMA: products are rounded before they are added.

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Simd, Steps, count};

/// What the target guarantees.
#[derive(Clone, Copy)]
pub(crate) struct Sse2(());

type F = [__m128; 4];
type I = [__m128i; 4];

/// All registers by the same expression.
macro_rules! all {
    (|$($v:ident),*| $one:expr) => {
        [
            { $(let $v = $v[0];)* $one },
            { $(let $v = $v[1];)* $one },
            { $(let $v = $v[2];)* $one },
            { $(let $v = $v[3];)* $one },
        ]
    };
}

/// `yes` where a mask is set, else `no`.
#[inline(always)]
fn pick(mask: __m128, yes: __m128, no: __m128) -> __m128 {
    // SAFETY: part of x86-64.
    unsafe { _mm_or_ps(_mm_and_ps(mask, yes), _mm_andnot_ps(mask, no)) }
}

/// The larger without sign.
#[inline(always)]
fn larger(a: __m128i, b: __m128i) -> __m128i {
    // SAFETY: part of x86-64.
    unsafe {
        let sign = _mm_set1_epi32(i32::MIN);
        let mask = _mm_cmpgt_epi32(_mm_xor_si128(a, sign), _mm_xor_si128(b, sign));
        _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b))
    }
}

/// The low halves of the lanes of two registers.
#[inline(always)]
fn low_halves(a: __m128i, b: __m128i) -> __m128i {
    // SAFETY: part of x86-64.
    unsafe {
        // With sign, so that packing does not saturate.
        let [a, b] = [_mm_slli_epi32::<16>(a), _mm_slli_epi32::<16>(b)];
        _mm_packs_epi32(_mm_srai_epi32::<16>(a), _mm_srai_epi32::<16>(b))
    }
}

/// Numbers of half precision, in the low halves of lanes: exponent and fraction are shifted to their places, and multiplied
/// with 2^112, by which the biases differ; so what is not normal comes right too.
#[inline(always)]
fn widened(halves: __m128i) -> __m128 {
    // SAFETY: part of x86-64.
    unsafe {
        let sign = _mm_slli_epi32::<16>(_mm_and_si128(halves, _mm_set1_epi32(0x8000)));
        let magnitude = _mm_slli_epi32::<13>(_mm_and_si128(halves, _mm_set1_epi32(0x7fff)));
        let number = _mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(5.192_297e33));
        // Infinite, or no number.
        let special = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x0f7f_ffff));
        let special = _mm_and_si128(special, _mm_set1_epi32(0x7f80_0000));
        let bits = _mm_or_si128(_mm_castps_si128(number), _mm_or_si128(sign, special));
        _mm_castsi128_ps(bits)
    }
}

/// Folds the lanes of each of four vectors.
macro_rules! fold4 {
    ($v:expr, $op:expr) => {{
        let v: [I; 4] = $v;
        let op = $op;
        let mut quarters = [_mm_setzero_si128(); 4];
        for i in 0..4 {
            quarters[i] = op(op(v[i][0], v[i][2]), op(v[i][1], v[i][3]));
        }
        let [a, b, c, d] = quarters;
        let ab = op(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
        let cd = op(_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
        let all = op(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
        std::mem::transmute::<__m128i, _>(all)
    }};
}

/// The sum, or the largest, of the lanes: halves, quarters, pairs.
macro_rules! fold {
    ($v:expr, $op:ident, $single:ident) => {{
        let v: F = $v;
        let quarter = $op($op(v[0], v[2]), $op(v[1], v[3]));
        let pair = $op(quarter, _mm_movehl_ps(quarter, quarter));
        _mm_cvtss_f32($single(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }};
}

impl Sse2 {
    /// # Safety
    /// None is needed: every x86-64 processor has the set.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

impl Simd for Sse2 {
    const REGISTERS: usize = 4;
    type F = F;
    type I = I;
    /// Lanes of ones or of zeros.
    type M = F;

    memory! {
        load(from: *const f32) -> F =
            [_mm_loadu_ps(from), _mm_loadu_ps(from.add(4)), _mm_loadu_ps(from.add(8)), _mm_loadu_ps(from.add(12))];
        store(to: *mut f32, v: F) = {
            for (i, v) in v.into_iter().enumerate() {
                _mm_storeu_ps(to.add(4 * i), v);
            }
        };
        load_first(from: *const f32, n: usize) -> F = {
            let mut lanes = [0.0; LANES];
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n.min(LANES));
            Sse2(()).load(lanes.as_ptr())
        };
        store_first(to: *mut f32, v: F, n: usize) = {
            let mut lanes = [0.0; LANES];
            Sse2(()).store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n.min(LANES));
        };
        load_f16(from: *const u16) -> F = {
            let halves = Sse2(()).load_halves(from);
            all!(|halves| widened(halves))
        };
        store_f16(to: *mut u16, v: F) = {
            let mut lanes = [0.0; LANES];
            Sse2(()).store(lanes.as_mut_ptr(), v);
            for (i, x) in lanes.into_iter().enumerate() {
                to.add(i).write_unaligned(f16::from_f32(x).to_bits());
            }
        };
        iload(from: *const u8) -> I = {
            let from: *const __m128i = from.cast();
            [_mm_loadu_si128(from), _mm_loadu_si128(from.add(1)), _mm_loadu_si128(from.add(2)), _mm_loadu_si128(from.add(3))]
        };
        istore(to: *mut u8, v: I) = {
            for (i, v) in v.into_iter().enumerate() {
                _mm_storeu_si128(to.cast::<__m128i>().add(i), v);
            }
        };
        store_low_bytes(to: *mut u8, v: I) = {
            let low = _mm_set1_epi32(255);
            let v = all!(|v| _mm_and_si128(v, low));
            let bytes = _mm_packus_epi16(_mm_packs_epi32(v[0], v[1]), _mm_packs_epi32(v[2], v[3]));
            _mm_storeu_si128(to.cast(), bytes);
        };
        store_low_halves(to: *mut u16, v: I) = {
            _mm_storeu_si128(to.cast(), low_halves(v[0], v[1]));
            _mm_storeu_si128(to.add(8).cast(), low_halves(v[2], v[3]));
        };
        load_halves(from: *const u16) -> I = {
            let (a, b) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            let zero = _mm_setzero_si128();
            [_mm_unpacklo_epi16(a, zero), _mm_unpackhi_epi16(a, zero), _mm_unpacklo_epi16(b, zero), _mm_unpackhi_epi16(b, zero)]
        };
        load_signed(from: *const u8) -> I = {
            let v = _mm_loadu_si128(from.cast());
            let (a, b) = (_mm_unpacklo_epi8(v, v), _mm_unpackhi_epi8(v, v));
            let fours = [_mm_unpacklo_epi16(a, a), _mm_unpackhi_epi16(a, a), _mm_unpacklo_epi16(b, b), _mm_unpackhi_epi16(b, b)];
            all!(|fours| _mm_srai_epi32::<24>(fours))
        };
    }
    methods! {
        shuffle(v: I, at: I) -> I = {
            // There is no instruction for it.
            let mut both = [[0u8; 64]; 2];
            for (bytes, from) in both.iter_mut().zip([v, at]) {
                for (to, from) in bytes.chunks_exact_mut(16).zip(from) {
                    _mm_storeu_si128(to.as_mut_ptr().cast(), from);
                }
            }
            let [v, at] = both;
            let out: [u8; 64] = std::array::from_fn(|i| v[i / 16 * 16 + usize::from(at[i] % 16)]);
            std::array::from_fn(|i| _mm_loadu_si128(out.as_ptr().add(16 * i).cast()))
        };
        zero() -> F = [_mm_setzero_ps(); 4];
        splat(x: f32) -> F = [_mm_set1_ps(x); 4];
        add(a: F, b: F) -> F = all!(|a, b| _mm_add_ps(a, b));
        sub(a: F, b: F) -> F = all!(|a, b| _mm_sub_ps(a, b));
        mul(a: F, b: F) -> F = all!(|a, b| _mm_mul_ps(a, b));
        div(a: F, b: F) -> F = all!(|a, b| _mm_div_ps(a, b));
        fma(a: F, b: F, c: F) -> F = all!(|a, b, c| _mm_add_ps(_mm_mul_ps(a, b), c));
        fms(a: F, b: F, c: F) -> F = all!(|a, b, c| _mm_sub_ps(_mm_mul_ps(a, b), c));
        max(a: F, b: F) -> F = all!(|a, b| _mm_max_ps(a, b));
        min(a: F, b: F) -> F = all!(|a, b| _mm_min_ps(a, b));
        // Adding and taking away 2^23 rounds a magnitude to an integer, and everything that is larger is one.
        round(a: F) -> F = all!(|a| {
            let (most, sign) = (_mm_set1_ps(8_388_608.0), _mm_set1_ps(-0.0));
            let magnitude = _mm_andnot_ps(sign, a);
            let rounded = _mm_sub_ps(_mm_add_ps(magnitude, most), most);
            let small = _mm_cmplt_ps(magnitude, most);
            pick(small, _mm_or_ps(rounded, _mm_and_ps(sign, a)), a)
        });
        scale(p: F, n: F) -> F = all!(|p, n| {
            let exponent = _mm_add_epi32(_mm_cvtps_epi32(n), _mm_set1_epi32(127));
            _mm_mul_ps(p, _mm_castsi128_ps(_mm_slli_epi32::<23>(exponent)))
        });
        lt(a: F, b: F) -> F = all!(|a, b| _mm_cmplt_ps(a, b));
        mask(bits: u16) -> F = {
            let lanes = _mm_setr_epi32(1, 2, 4, 8);
            let bits = [0, 4, 8, 12].map(|from| i32::from(bits >> from));
            all!(|bits| {
                let own = _mm_and_si128(_mm_set1_epi32(bits), lanes);
                _mm_castsi128_ps(_mm_cmpeq_epi32(own, lanes))
            })
        };
        select(mask: F, yes: F, no: F) -> F = all!(|mask, yes, no| pick(mask, yes, no));
        sum(v: F) -> f32 = fold!(v, _mm_add_ps, _mm_add_ss);
        largest(v: F) -> f32 = fold!(v, _mm_max_ps, _mm_max_ss);
        to_int(v: F) -> I = all!(|v| _mm_cvtps_epi32(v));
        from_int(v: I) -> F = all!(|v| _mm_cvtepi32_ps(v));
        bits(v: F) -> I = all!(|v| _mm_castps_si128(v));
        from_bits(v: I) -> F = all!(|v| _mm_castsi128_ps(v));
        izero() -> I = [_mm_setzero_si128(); 4];
        isplat(x: i32) -> I = [_mm_set1_epi32(x); 4];
        and(a: I, b: I) -> I = all!(|a, b| _mm_and_si128(a, b));
        or(a: I, b: I) -> I = all!(|a, b| _mm_or_si128(a, b));
        xor(a: I, b: I) -> I = all!(|a, b| _mm_xor_si128(a, b));
        iadd(a: I, b: I) -> I = all!(|a, b| _mm_add_epi32(a, b));
        isub(a: I, b: I) -> I = all!(|a, b| _mm_sub_epi32(a, b));
        imax_u(a: I, b: I) -> I = all!(|a, b| larger(a, b));
        shl(a: I, n: u32) -> I = all!(|a| _mm_sll_epi32(a, count(n)));
        shr(a: I, n: u32) -> I = all!(|a| _mm_srl_epi32(a, count(n)));
        sar(a: I, n: u32) -> I = all!(|a| _mm_sra_epi32(a, count(n)));
        shl16(a: I, n: u32) -> I = all!(|a| _mm_sll_epi16(a, count(n)));
        shr16(a: I, n: u32) -> I = all!(|a| _mm_srl_epi16(a, count(n)));
        add16(a: I, b: I) -> I = all!(|a, b| _mm_add_epi16(a, b));
        fold4_max_u(v: [I; 4]) -> [u32; 4] = fold4!(v, larger);
        fold4_add(v: [I; 4]) -> [i32; 4] = fold4!(v, |a, b| _mm_add_epi32(a, b));
    }

    /// The even bytes and the odd ones, 16 bits each.
    type Quads = [I; 2];
    type Bytes = [I; 2];
    const SUMS_AS_STORED: bool = false;
    methods! {
        quads_u(v: I) -> [I; 2] = [
            all!(|v| _mm_and_si128(v, _mm_set1_epi16(255))),
            all!(|v| _mm_srli_epi16::<8>(v)),
        ];
        quads_i(v: I) -> [I; 2] = [
            all!(|v| _mm_srai_epi16::<8>(_mm_slli_epi16::<8>(v))),
            all!(|v| _mm_srai_epi16::<8>(v)),
        ];
        dot_quads(sums: I, u: [I; 2], i: [I; 2]) -> I = {
            let [[u, v], [i, j]] = [u, i];
            let even = all!(|sums, u, i| _mm_add_epi32(sums, _mm_madd_epi16(u, i)));
            all!(|even, v, j| _mm_add_epi32(even, _mm_madd_epi16(v, j)))
        };
        bytes(stored: I) -> [I; 2] = {
            let signed = all!(|stored| _mm_xor_si128(stored, _mm_set1_epi8(-128)));
            [
                all!(|signed| _mm_srai_epi16::<8>(_mm_slli_epi16::<8>(signed))),
                all!(|signed| _mm_srai_epi16::<8>(signed)),
            ]
        };
        dot_bytes(sums: I, a: [I; 2], b: I) -> I = {
            let [a, c] = a;
            let even = all!(|sums, a, b| {
                _mm_add_epi32(sums, _mm_madd_epi16(a, _mm_srai_epi16::<8>(_mm_slli_epi16::<8>(b))))
            });
            all!(|even, c, b| _mm_add_epi32(even, _mm_madd_epi16(c, _mm_srai_epi16::<8>(b))))
        };
        dot_codes(sums: I, codes: I, bytes: I) -> I = {
            let even = all!(|sums, codes, bytes| {
                let codes = _mm_and_si128(codes, _mm_set1_epi16(255));
                _mm_add_epi32(sums, _mm_madd_epi16(codes, _mm_srai_epi16::<8>(_mm_slli_epi16::<8>(bytes))))
            });
            all!(|even, codes, bytes| {
                let odd = _mm_madd_epi16(_mm_srli_epi16::<8>(codes), _mm_srai_epi16::<8>(bytes));
                _mm_add_epi32(even, odd)
            })
        };
        add_codes(sums: I, codes: I) -> I = all!(|sums, codes| _mm_add_epi32(sums, codes));
        // Sums of half a group of codes fit 16 bits.
        join_codes(first: I, last: I, steps: &Steps, begin: I) -> I = {
            let steps = _mm_set1_epi32(steps.both);
            all!(|first, last, begin| {
                let first = _mm_and_si128(first, _mm_set1_epi32(0xffff));
                let both = _mm_or_si128(first, _mm_slli_epi32::<16>(last));
                _mm_add_epi32(begin, _mm_madd_epi16(both, steps))
            })
        };
    }

    /// High halves, low halves, as numbers.
    type Pairs = [F; 2];
    methods! {
        pairs(v: I) -> [F; 2] = [
            all!(|v| _mm_castsi128_ps(_mm_and_si128(v, _mm_set1_epi32(0xffff_0000_u32 as i32)))),
            all!(|v| _mm_castsi128_ps(_mm_slli_epi32::<16>(v))),
        ];
        dot_pairs(sums: F, a: [F; 2], b: [F; 2]) -> F = {
            let [[a, c], [b, d]] = [a, b];
            let high = all!(|a, b, sums| _mm_add_ps(_mm_mul_ps(a, b), sums));
            all!(|c, d, high| _mm_add_ps(_mm_mul_ps(c, d), high))
        };
        round_bf16(v: F) -> I = all!(|v| {
            let bits = _mm_castps_si128(v);
            let odd = _mm_and_si128(_mm_srli_epi32::<16>(bits), _mm_set1_epi32(1));
            let up = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
            // NaN, made quiet, so that it does not become infinite.
            let quiet = _mm_or_si128(bits, _mm_set1_epi32(0x0040_0000));
            let nan = _mm_cmpunord_ps(v, v);
            _mm_srli_epi32::<16>(_mm_castps_si128(pick(nan, _mm_castsi128_ps(quiet), _mm_castsi128_ps(up))))
        });
    }
}
