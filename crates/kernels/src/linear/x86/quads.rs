//! HOT PATH. Products of codes and bytes with `vpdpbusd`: 32 features × up to 6 rows in registers.
//!
//! Codes are counted from the lowest of the format, so that they have no sign; what that adds is a multiple
//! of the sum of the inputs, from which sums start. Sums over inputs of one scale are integers, exact;
//! they are scaled in f32, those of a group put together, and added to the row's sum, group after group, in the same
//! order whether a tile was turned before (wide) or on the way (narrow).

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::super::activations::{BYTE, GroupSums, SMALLEST, STEPS};
use super::super::packed::{CodeFormat, GROUP, HALF, QUADS, TILE};
use super::super::product::{Block, Rows};
use super::{by_rows, prefetch, store, widen};

/// Bytes of a group of a turned tile: `[quads, halves]` registers.
pub(in crate::linear) const GROUP_BYTES: usize = TILE * GROUP;

/// Quads of inputs that share a scale.
const STEP_QUADS: usize = QUADS / STEPS;

/// Integer sums, over inputs of one scale.
type Sums<const MR: usize> = [[__m512i; 2]; MR];

/// Sums in f32.
type Floats<const MR: usize> = [[__m512; 2]; MR];

/// Where sums over the inputs of scale `s` start: at the inputs' sum times the lowest code, which is -(1 << SHIFT), or
/// at 0.
///
/// # Safety
/// The processor has AVX-512; `rows` has MR rows and a scale `s`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
#[inline]
unsafe fn start<const MR: usize, const SHIFT: u32>(rows: &Rows<'_>, s: usize) -> Sums<MR> {
    let mut acc = [[_mm512_setzero_si512(); 2]; MR];
    if SHIFT > 0 {
        for i in 0..MR {
            // SAFETY: by contract.
            let minus = unsafe { *rows.minus.add(i * rows.num_groups * STEPS + s) };
            let minus = _mm512_set1_epi32(minus);
            acc[i] = [_mm512_slli_epi32::<SHIFT>(minus); 2];
        }
    }
    acc
}

/// Adds the products of one quad.
///
/// # Safety
/// The processor has VNNI; `x` has MR rows of stride `ldx` with 4 inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
#[inline]
unsafe fn add_quad<const MR: usize>(
    weights: [__m512i; 2],
    x: *const i8,
    ldx: usize,
    acc: &mut Sums<MR>,
) {
    for i in 0..MR {
        // SAFETY: by contract.
        let xs = _mm512_set1_epi32(unsafe { x.add(i * ldx).cast::<i32>().read_unaligned() });
        acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], weights[0], xs);
        acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], weights[1], xs);
    }
}

/// Puts the sums of scale `s` to those of its group.
///
/// # Safety
/// The processor has AVX-512; `rows` has MR rows and a scale `s`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
#[inline]
unsafe fn add_step<const MR: usize>(
    acc: &Sums<MR>,
    rows: &Rows<'_>,
    s: usize,
    group: &mut Floats<MR>,
) {
    for i in 0..MR {
        // SAFETY: by contract.
        let step = unsafe { *rows.scales.add(i * rows.num_groups * STEPS + s) };
        let step = _mm512_set1_ps(step);
        for h in 0..2 {
            let sum = _mm512_cvtepi32_ps(acc[i][h]);
            group[i][h] = if s.is_multiple_of(STEPS) {
                _mm512_mul_ps(sum, step)
            } else {
                _mm512_fmadd_ps(sum, step, group[i][h])
            };
        }
    }
}

/// Takes the sums of group `g` into those of the rows.
///
/// # Safety
/// The processor has AVX-512; `rows` has MR rows and a group `g`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
#[inline]
unsafe fn add_group<const MR: usize>(
    group: &Floats<MR>,
    scale: [__m512; 2],
    min: Option<[__m512; 2]>,
    rows: &Rows<'_>,
    g: usize,
    sums: &mut Floats<MR>,
) {
    for i in 0..MR {
        // SAFETY: by contract.
        let sum = unsafe { *rows.sums.add(i * rows.num_groups + g) };
        let sum = _mm512_set1_ps(sum);
        for h in 0..2 {
            sums[i][h] = _mm512_fmadd_ps(group[i][h], scale[h], sums[i][h]);
            if let Some(min) = min {
                sums[i][h] = _mm512_fmadd_ps(min[h], sum, sums[i][h]);
            }
        }
    }
}

/// A tile of codes as it is stored, against few rows.
///
/// # Safety
/// The processor has VNNI; `tile` has `rows.num_groups` groups of the format, aligned to 64 bytes; `rows`
/// has MR rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn narrow<const MR: usize, const BITS: usize, const MIN: bool, const SHIFT: u32>(
    format: CodeFormat,
    tile: *const u8,
    rows: &Rows<'_>,
    out: &mut Block,
) {
    let (group_bytes, code_bytes) = (format.group_bytes(), format.code_bytes());
    let low = _mm512_set1_epi8(15);
    // SAFETY: group g lies at g · group_bytes; codes, scales and minimums are inside it.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        for g in 0..rows.num_groups {
            let group = tile.add(g * group_bytes);
            prefetch(group, group_bytes);
            let x = rows.bytes.add(g * GROUP);
            let mut scaled = [[_mm512_setzero_ps(); 2]; MR];
            for s in 0..STEPS {
                let mut acc = start::<MR, SHIFT>(rows, g * STEPS + s);
                for quad in (s * STEP_QUADS..(s + 1) * STEP_QUADS).step_by(2) {
                    let x = x.add(4 * quad);
                    if BITS == 4 {
                        let at = group.add(64 * quad);
                        let [a, b] = [0, 64].map(|half| _mm512_load_si512(at.add(half).cast()));
                        let lows = [_mm512_and_si512(a, low), _mm512_and_si512(b, low)];
                        add_quad::<MR>(lows, x, rows.stride, &mut acc);
                        let (a, b) = (_mm512_srli_epi16::<4>(a), _mm512_srli_epi16::<4>(b));
                        let highs = [_mm512_and_si512(a, low), _mm512_and_si512(b, low)];
                        add_quad::<MR>(highs, x.add(4), rows.stride, &mut acc);
                    } else {
                        for next in 0..2 {
                            let at = group.add(128 * (quad + next));
                            let half = |half| _mm512_load_si512(at.add(half).cast());
                            let weights = [half(0), half(64)];
                            add_quad::<MR>(weights, x.add(4 * next), rows.stride, &mut acc);
                        }
                    }
                }
                add_step::<MR>(&acc, rows, g * STEPS + s, &mut scaled);
            }
            let scale = widen(group.add(code_bytes));
            let min = if MIN { Some(widen(group.add(code_bytes + 2 * TILE))) } else { None };
            add_group::<MR>(&scaled, scale, min, rows, g, &mut sums);
        }
        store(&sums, out);
    }
}

/// A turned tile against rows.
///
/// # Safety
/// The processor has VNNI; `weights` has `rows.num_groups` turned groups, aligned; `scales` as many times `[2,
/// TILE]`; `rows` has MR rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn wide<const MR: usize, const MIN: bool, const SHIFT: u32>(
    weights: *const u8,
    scales: *const f32,
    rows: &Rows<'_>,
    out: &mut Block,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        for g in 0..rows.num_groups {
            let (group, x) = (weights.add(g * GROUP_BYTES), rows.bytes.add(g * GROUP));
            let mut scaled = [[_mm512_setzero_ps(); 2]; MR];
            for s in 0..STEPS {
                let mut acc = start::<MR, SHIFT>(rows, g * STEPS + s);
                for quad in s * STEP_QUADS..(s + 1) * STEP_QUADS {
                    let at = group.add(128 * quad);
                    let weights = [0, 64].map(|half| _mm512_load_si512(at.add(half).cast()));
                    add_quad::<MR>(weights, x.add(4 * quad), rows.stride, &mut acc);
                }
                add_step::<MR>(&acc, rows, g * STEPS + s, &mut scaled);
            }
            let pair = |at: *const f32| [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(HALF))];
            let scales = scales.add(g * 2 * TILE);
            let min = if MIN { Some(pair(scales.add(TILE))) } else { None };
            add_group::<MR>(&scaled, pair(scales), min, rows, g, &mut sums);
        }
        store(&sums, out);
    }
}

/// Calls a kernel that is generic over the number of rows and what the format is like.
macro_rules! by_format {
    ($format:expr, $rows:expr, $kernel:ident ($($arg:expr),*)) => {
        match ($format.bits, $format.lowest != 0, $format.has_min) {
            (4, false, true) => by_rows!($rows, $kernel::<_, 4, true, 0>($($arg),*)),
            (4, false, false) => by_rows!($rows, $kernel::<_, 4, false, 0>($($arg),*)),
            (4, true, true) => by_rows!($rows, $kernel::<_, 4, true, 3>($($arg),*)),
            (4, true, false) => by_rows!($rows, $kernel::<_, 4, false, 3>($($arg),*)),
            (_, _, true) => by_rows!($rows, $kernel::<_, 8, true, 7>($($arg),*)),
            (_, _, false) => by_rows!($rows, $kernel::<_, 8, false, 7>($($arg),*)),
        }
    };
}

/// A tile as it is stored against up to 6 rows.
///
/// # Safety
/// The processor has AVX-512 with VNNI; `tile` is a whole tile of a format that counts from its lowest
/// code, with as many groups as the rows have.
pub(in crate::linear) unsafe fn multiply_stored(
    format: CodeFormat,
    tile: &[u8],
    rows: &Rows<'_>,
    out: &mut Block,
) {
    let (n, tile) = (rows.num_rows, tile.as_ptr());
    // SAFETY: by contract.
    unsafe { by_format!(format, n, narrow(format, tile, rows, out)) }
}

/// Turns a tile of codes. `weights`: [`GROUP_BYTES`] a group, aligned to 64 bytes; `scales`: `[groups, 2,
/// TILE]`.
///
/// # Safety
/// The processor has AVX-512; `tile` is a whole tile of the format; both outputs are long enough.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
pub(in crate::linear) unsafe fn turn_tile(
    format: CodeFormat,
    tile: &[u8],
    weights: &mut [u8],
    scales: &mut [f32],
) {
    let low = _mm512_set1_epi8(15);
    let groups = tile.chunks_exact(format.group_bytes());
    let outs = weights.chunks_exact_mut(GROUP_BYTES).zip(scales.chunks_exact_mut(2 * TILE));
    for (group, (weights, scales)) in groups.zip(outs) {
        // SAFETY: a group's codes, scales and minimums are inside its bytes; chunks have the lengths.
        unsafe {
            let (from, to) = (group.as_ptr(), weights.as_mut_ptr());
            if format.bits == 4 {
                for register in 0..QUADS {
                    let (z, half) = (register / 2, register % 2);
                    let v = _mm512_load_si512(from.add(64 * register).cast());
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(v), low);
                    let at = to.add(64 * (4 * z + half));
                    _mm512_store_si512(at.cast(), _mm512_and_si512(v, low));
                    _mm512_store_si512(at.add(128).cast(), high);
                }
            } else {
                std::ptr::copy_nonoverlapping(from, to, GROUP_BYTES);
            }
            for part in 0..1 + usize::from(format.has_min) {
                let wide = widen(from.add(format.code_bytes() + 2 * TILE * part));
                for h in 0..2 {
                    _mm512_storeu_ps(scales.as_mut_ptr().add(TILE * part + HALF * h), wide[h]);
                }
            }
        }
    }
}

/// A turned tile against up to 6 rows.
///
/// # Safety
/// The processor has AVX-512 with VNNI; `weights` and `scales` are as [`turn_tile`] leaves them, of a format that
/// counts from its lowest code, with as many groups as the rows have.
pub(in crate::linear) unsafe fn multiply_turned(
    format: CodeFormat,
    weights: &[u8],
    scales: &[f32],
    rows: &Rows<'_>,
    out: &mut Block,
) {
    let (n, weights, scales) = (rows.num_rows, weights.as_ptr(), scales.as_ptr());
    // SAFETY: by contract.
    unsafe {
        match (format.has_min, format.lowest) {
            (true, 0) => by_rows!(n, wide::<_, true, 0>(weights, scales, rows, out)),
            (false, 0) => by_rows!(n, wide::<_, false, 0>(weights, scales, rows, out)),
            (true, -8) => by_rows!(n, wide::<_, true, 3>(weights, scales, rows, out)),
            (false, -8) => by_rows!(n, wide::<_, false, 3>(weights, scales, rows, out)),
            (true, _) => by_rows!(n, wide::<_, true, 7>(weights, scales, rows, out)),
            (false, _) => by_rows!(n, wide::<_, false, 7>(weights, scales, rows, out)),
        }
    }
}

/// See [`super::super::activations`]: groups to bytes.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
pub(in crate::linear) unsafe fn round_groups(
    x: &[[f32; GROUP]],
    bytes: &mut [[i8; GROUP]],
    out: GroupSums<'_>,
) {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let GroupSums { scales, sums, minus } = out;
    let rest = scales.iter_mut().zip(sums).zip(minus);
    for ((x, bytes), ((scale, sum), minus)) in x.iter().zip(bytes).zip(rest) {
        // SAFETY: a group is two registers of f32, each with a scale, and two halves of one of bytes.
        unsafe {
            let parts = [0, 16].map(|i| _mm512_loadu_ps(x.as_ptr().add(i)));
            let [a, b] = parts.map(|v| _mm512_and_si512(_mm512_castps_si512(v), magnitude));
            // As integers, so that a NaN is larger than anything. The halves of a register: a's and b's.
            let largest = firsts(_mm512_castsi512_ps(fold::<true>(a, b)));
            let finite = _mm_cmp_ps_mask::<_CMP_LE_OQ>(largest, _mm_set1_ps(f32::MAX));
            let large = _mm_cmp_ps_mask::<_CMP_GT_OQ>(largest, _mm_set1_ps(SMALLEST));
            let inverse = _mm_maskz_div_ps(finite & large, _mm_set1_ps(127.0), largest);
            let worth = _mm_set1_ps(BYTE);
            let step = _mm_mask_mul_ps(_mm_set1_ps(f32::NAN), finite, largest, worth);
            let inverses =
                [_mm512_broadcastss_ps(inverse), _mm512_broadcastss_ps(_mm_movehdup_ps(inverse))];
            let round = |v, inverse| {
                let v = _mm512_mul_ps(v, inverse);
                // NaN becomes 0.
                _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask::<_CMP_ORD_Q>(v, v), v)
            };
            let (a, b) = (round(parts[0], inverses[0]), round(parts[1], inverses[1]));
            let at = bytes.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(at, _mm512_cvtepi32_epi8(a));
            _mm_storeu_si128(at.add(1), _mm512_cvtepi32_epi8(b));
            let total = firsts(_mm512_castsi512_ps(fold::<false>(a, b)));
            let total = _mm_castps_si128(total);
            let worth = _mm_mul_ps(_mm_cvtepi32_ps(total), step);
            *sum = _mm_cvtss_f32(_mm_add_ss(worth, _mm_movehdup_ps(worth)));
            _mm_storel_epi64(scale.as_mut_ptr().cast(), _mm_castps_si128(step));
            let none = _mm_setzero_si128();
            _mm_storel_epi64(minus.as_mut_ptr().cast(), _mm_sub_epi32(none, total));
        }
    }
}

/// The first lanes of a register's halves, side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn firsts(v: __m512) -> __m128 {
    _mm_unpacklo_ps(_mm512_castps512_ps128(v), _mm512_extractf32x4_ps::<2>(v))
}

/// The largest, or the sum, of a's lanes in all lanes of the lower half, of b's in the upper one.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[inline]
fn fold<const MAX: bool>(a: __m512i, b: __m512i) -> __m512i {
    let op = |x, y| if MAX { _mm512_max_epu32(x, y) } else { _mm512_add_epi32(x, y) };
    let low = _mm512_shuffle_i64x2::<0x44>(a, b);
    let high = _mm512_shuffle_i64x2::<0xee>(a, b);
    let eights = op(low, high);
    let fours = op(eights, _mm512_shuffle_i64x2::<0xb1>(eights, eights));
    let twos = op(fours, _mm512_shuffle_epi32::<0x4e>(fours));
    op(twos, _mm512_shuffle_epi32::<0xb1>(twos))
}
