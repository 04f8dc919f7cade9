//! HOT PATH. Products of codes and bytes with `vpdpbusd`: 32 features × up to 4 rows in registers.
//!
//! Codes are counted from the lowest of the format, so that they have no sign; what that adds is a multiple
//! of the sum of the inputs, from which sums start. Sums over the halves of a group are integers, exact. Those of
//! 4-bit codes fit 16 bits: `vpdpwssd` puts the halves together, times their steps, in one instruction; 8-bit
//! ones need two in f32. A group's sum is scaled and added to the row's, group after group; minimums follow for two groups at a
//! time, as products of bf16. The unit of the row comes last. All that is in the same order whether a tile was turned before
//! (wide) or on the way (narrow).
//!
//! `vpdpbusd` and f32 arithmetic share two of the four vector units, so what counts is how many others there are of that kind: 10.5
//! instructions for 8 products of codes.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::super::bytes::STEPS;
use super::super::packed::{CodeFormat, GROUP, HALF, QUADS, TILE};
use super::super::product::{Rows, Target};
use super::{prefetch, put, widen};

/// Most rows of a register block: sums over two halves and all of it of 4 × 2 registers, weights and an input fill
/// 27 of 32.
pub(in crate::linear) const ROWS: usize = 4;

/// Bytes of a group of a turned tile: `[quads, halves]` registers.
pub(in crate::linear) const GROUP_BYTES: usize = TILE * GROUP;

/// Scales of a turned tile: `[groups, TILE]`, then pairs of minimums as bf16: `[groups / 2, TILE]`.
pub(in crate::linear) fn num_scales(groups: usize) -> usize {
    (groups + groups.div_ceil(2)) * TILE
}

/// Quads of inputs that share a step.
const STEP_QUADS: usize = QUADS / STEPS;

/// Integer sums over half a group.
type Sums<const MR: usize> = [[__m512i; 2]; MR];

/// Sums in f32.
type Floats<const MR: usize> = [[__m512; 2]; MR];

/// Where sums over the halves of group `g` start: at the inputs' sum times the lowest code, which is -(1 << SHIFT), or
/// at 0.
///
/// # Safety
/// The processor has AVX-512; `rows` has MR rows and a group `g`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
#[inline]
unsafe fn start<const MR: usize, const SHIFT: u32>(rows: &Rows<'_>, g: usize) -> [Sums<MR>; STEPS] {
    let mut acc = [[[_mm512_setzero_si512(); 2]; MR]; STEPS];
    if SHIFT > 0 {
        for i in 0..MR {
            // SAFETY: by contract.
            let minus = unsafe { (*rows.headers.add(i * rows.num_groups + g)).minus };
            for s in 0..STEPS {
                let minus = _mm512_set1_epi32(minus[s]);
                acc[s][i] = [_mm512_slli_epi32::<SHIFT>(minus); 2];
            }
        }
    }
    acc
}

/// Adds the products of one quad.
///
/// # Safety
/// The processor has VNNI; `x` has MR rows of stride `ldx` with 4 inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
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

/// Takes the sums over the halves of group `g` into those of the rows.
///
/// # Safety
/// The processor has VNNI; `rows` has MR rows and a group `g`; sums of 4-bit codes are below 2¹⁵.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
#[inline]
unsafe fn add_group<const MR: usize, const BITS: usize>(
    acc: &[Sums<MR>; STEPS],
    scale: [__m512; 2],
    rows: &Rows<'_>,
    g: usize,
    sums: &mut Floats<MR>,
) {
    for i in 0..MR {
        // SAFETY: by contract.
        let steps = unsafe { (*rows.headers.add(i * rows.num_groups + g)).steps };
        if BITS == 4 {
            let [first, last] = steps.map(|step| i32::from(step as u16));
            let steps = _mm512_set1_epi32(first | last << 16);
            for h in 0..2 {
                let last = _mm512_slli_epi32::<16>(acc[1][i][h]);
                let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, acc[0][i][h], last);
                let sum = _mm512_dpwssd_epi32(_mm512_setzero_si512(), both, steps);
                sums[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[h], sums[i][h]);
            }
        } else {
            let steps = steps.map(|step| _mm512_set1_ps(f32::from(step)));
            for h in 0..2 {
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[0][i][h]), steps[0]);
                let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[1][i][h]), steps[1], sum);
                sums[i][h] = _mm512_fmadd_ps(sum, scale[h], sums[i][h]);
            }
        }
    }
}

/// Adds the minimums of a pair of groups, `mins`, times the sums of their inputs.
///
/// # Safety
/// The processor has BF16; `rows` has MR rows and as many pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
#[inline]
unsafe fn add_mins<const MR: usize>(
    mins: [__m512i; 2],
    rows: &Rows<'_>,
    pair: usize,
    sums: &mut Floats<MR>,
) {
    for i in 0..MR {
        let at = i * rows.num_groups.next_multiple_of(2) + 2 * pair;
        // SAFETY: by contract.
        let both = unsafe { rows.byte_sums.add(at).cast::<i32>().read_unaligned() };
        let both = bf16s(_mm512_set1_epi32(both));
        for h in 0..2 {
            sums[i][h] = _mm512_dpbf16_ps(sums[i][h], bf16s(mins[h]), both);
        }
    }
}

/// A register as bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
#[inline]
fn bf16s(v: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of any bits.
    unsafe { std::mem::transmute(v) }
}

/// Minimums of two groups as pairs of bf16, by halves.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
#[inline]
fn pair_mins(first: [__m512; 2], last: [__m512; 2]) -> [__m512i; 2] {
    let rounded = |v: __m512| {
        // SAFETY: both are 32 bytes of any bits.
        let v = unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)) };
        _mm512_cvtepu16_epi32(v)
    };
    [0, 1].map(|h| {
        let last = _mm512_slli_epi32::<16>(rounded(last[h]));
        _mm512_or_si512(rounded(first[h]), last)
    })
}

/// Sums in their rows' units.
///
/// # Safety
/// The processor has AVX-512; `rows` has MR rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
#[inline]
unsafe fn finish<const MR: usize>(sums: &mut Floats<MR>, rows: &Rows<'_>) {
    for i in 0..MR {
        // SAFETY: by contract.
        let unit = _mm512_set1_ps(unsafe { *rows.units.add(i) });
        sums[i] = sums[i].map(|sum| _mm512_mul_ps(sum, unit));
    }
}

/// A tile of codes as it is stored, against few rows.
///
/// # Safety
/// The processor has VNNI and BF16; `tile` has `rows.num_groups` groups of the format, aligned to 64 bytes;
/// `rows` and `out` have MR rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
unsafe fn narrow<const MR: usize, const BITS: usize, const MIN: bool, const SHIFT: u32>(
    format: CodeFormat,
    tile: *const u8,
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let (group_bytes, code_bytes) = (format.group_bytes(), format.code_bytes());
    let low = _mm512_set1_epi8(15);
    // SAFETY: group g lies at g · group_bytes; codes, scales and minimums are inside it.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        let min_of = |g: usize| widen(tile.add(g * group_bytes + code_bytes + 2 * TILE));
        for g in 0..rows.num_groups {
            let group = tile.add(g * group_bytes);
            prefetch(group, group_bytes);
            let x = rows.bytes.add(g * GROUP);
            let mut acc = start::<MR, SHIFT>(rows, g);
            for quad in (0..QUADS).step_by(2) {
                let (x, acc) = (x.add(4 * quad), &mut acc[quad / STEP_QUADS]);
                if BITS == 4 {
                    let at = group.add(64 * quad);
                    let [a, b] = [0, 64].map(|half| _mm512_load_si512(at.add(half).cast()));
                    let lows = [_mm512_and_si512(a, low), _mm512_and_si512(b, low)];
                    add_quad::<MR>(lows, x, rows.stride, acc);
                    let (a, b) = (_mm512_srli_epi16::<4>(a), _mm512_srli_epi16::<4>(b));
                    let highs = [_mm512_and_si512(a, low), _mm512_and_si512(b, low)];
                    add_quad::<MR>(highs, x.add(4), rows.stride, acc);
                } else {
                    for next in 0..2 {
                        let at = group.add(128 * (quad + next));
                        let half = |half| _mm512_load_si512(at.add(half).cast());
                        let weights = [half(0), half(64)];
                        add_quad::<MR>(weights, x.add(4 * next), rows.stride, acc);
                    }
                }
            }
            add_group::<MR, BITS>(&acc, widen(group.add(code_bytes)), rows, g, &mut sums);
            if MIN && g % 2 == 1 {
                add_mins::<MR>(pair_mins(min_of(g - 1), min_of(g)), rows, g / 2, &mut sums);
            } else if MIN && g + 1 == rows.num_groups {
                let none = [_mm512_setzero_ps(); 2];
                add_mins::<MR>(pair_mins(min_of(g), none), rows, g / 2, &mut sums);
            }
        }
        finish(&mut sums, rows);
        put(&sums, out);
    }
}

/// A turned tile against rows.
///
/// # Safety
/// The processor has VNNI and BF16; `weights` has `rows.num_groups` turned groups, aligned; `scales` what
/// [`num_scales`] says; `rows` and `out` have MR rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
unsafe fn wide<const MR: usize, const BITS: usize, const MIN: bool, const SHIFT: u32>(
    weights: *const u8,
    scales: *const f32,
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        let mins = scales.add(rows.num_groups * TILE);
        for g in 0..rows.num_groups {
            let (group, x) = (weights.add(g * GROUP_BYTES), rows.bytes.add(g * GROUP));
            let mut acc = start::<MR, SHIFT>(rows, g);
            for quad in 0..QUADS {
                let at = group.add(128 * quad);
                let weights = [0, 64].map(|half| _mm512_load_si512(at.add(half).cast()));
                add_quad::<MR>(weights, x.add(4 * quad), rows.stride, &mut acc[quad / STEP_QUADS]);
            }
            let at = scales.add(g * TILE);
            let scale = [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(HALF))];
            add_group::<MR, BITS>(&acc, scale, rows, g, &mut sums);
            if MIN && (g % 2 == 1 || g + 1 == rows.num_groups) {
                let at = mins.add(g / 2 * TILE);
                let mins = [0, HALF].map(|half| _mm512_loadu_si512(at.add(half).cast()));
                add_mins::<MR>(mins, rows, g / 2, &mut sums);
            }
        }
        finish(&mut sums, rows);
        put(&sums, out);
    }
}

/// Calls a kernel that is generic over the number of rows and what the format is like, for a few rows at a time.
macro_rules! by_format {
    ($format:expr, $rows:expr, $out:expr, $kernel:ident ($($arg:expr),*)) => {{
        let format = $format;
        match (format.bits, format.lowest != 0, format.has_min) {
            (4, false, true) => by_few!($rows, $out, $kernel::<4, true, 0>($($arg),*)),
            (4, false, false) => by_few!($rows, $out, $kernel::<4, false, 0>($($arg),*)),
            (4, true, true) => by_few!($rows, $out, $kernel::<4, true, 3>($($arg),*)),
            (4, true, false) => by_few!($rows, $out, $kernel::<4, false, 3>($($arg),*)),
            (_, _, true) => by_few!($rows, $out, $kernel::<8, true, 7>($($arg),*)),
            (_, _, false) => by_few!($rows, $out, $kernel::<8, false, 7>($($arg),*)),
        }
    }};
}

/// Calls a kernel with blocks of up to [`ROWS`] rows.
macro_rules! by_few {
    ($rows:expr, $out:expr, $kernel:ident::<$bits:tt, $min:tt, $shift:tt>($($arg:expr),*)) => {
        for (first, n) in $rows.blocks(ROWS) {
            let (rows, out) = (&$rows.part(first, n), &$out.from(first));
            match n {
                1 => $kernel::<1, $bits, $min, $shift>($($arg,)* rows, out),
                2 => $kernel::<2, $bits, $min, $shift>($($arg,)* rows, out),
                3 => $kernel::<3, $bits, $min, $shift>($($arg,)* rows, out),
                _ => $kernel::<4, $bits, $min, $shift>($($arg,)* rows, out),
            }
        }
    };
}

/// A tile as it is stored against few rows.
///
/// # Safety
/// The processor has AVX-512 with VNNI and BF16; `tile` is a whole tile of a format that counts from its lowest
/// code, with as many groups as the rows have; `out` has the rows.
pub(in crate::linear) unsafe fn multiply_stored(
    format: CodeFormat,
    tile: &[u8],
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let tile = tile.as_ptr();
    // SAFETY: by contract.
    unsafe { by_format!(format, rows, out, narrow(format, tile)) }
}

/// Turns a tile of codes. `weights`: [`GROUP_BYTES`] a group, aligned to 64 bytes; `scales`: [`num_scales`].
///
/// # Safety
/// The processor has AVX-512 with BF16; `tile` is a whole tile of the format; both outputs are long enough.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")]
pub(in crate::linear) unsafe fn turn_tile(
    format: CodeFormat,
    tile: &[u8],
    weights: &mut [u8],
    scales: &mut [f32],
) {
    let low = _mm512_set1_epi8(15);
    let group_bytes = format.group_bytes();
    let groups = tile.len() / group_bytes;
    let (scales, mins) = scales.split_at_mut(groups * TILE);
    let outs = weights.chunks_exact_mut(GROUP_BYTES).zip(scales.chunks_exact_mut(TILE));
    for (group, (weights, scales)) in tile.chunks_exact(group_bytes).zip(outs) {
        // SAFETY: a group's codes and scales are inside its bytes; chunks have the lengths.
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
            let scale = widen(from.add(format.code_bytes()));
            for h in 0..2 {
                _mm512_storeu_ps(scales.as_mut_ptr().add(HALF * h), scale[h]);
            }
        }
    }
    if !format.has_min {
        return;
    }
    for (pair, mins) in tile.chunks(2 * group_bytes).zip(mins.chunks_exact_mut(TILE)) {
        let at = format.code_bytes() + 2 * TILE;
        // SAFETY: minimums of a group are the last of its bytes.
        unsafe {
            let first = widen(pair.as_ptr().add(at));
            let last = if pair.len() > group_bytes {
                widen(pair.as_ptr().add(group_bytes + at))
            } else {
                [_mm512_setzero_ps(); 2]
            };
            for (h, both) in pair_mins(first, last).into_iter().enumerate() {
                _mm512_storeu_si512(mins.as_mut_ptr().add(HALF * h).cast(), both);
            }
        }
    }
}

/// A turned tile against rows.
///
/// # Safety
/// The processor has AVX-512 with VNNI and BF16; `weights` and `scales` are as [`turn_tile`] leaves them, of a format that
/// counts from its lowest code, with as many groups as the rows have; `out` has the rows.
pub(in crate::linear) unsafe fn multiply_turned(
    format: CodeFormat,
    weights: &[u8],
    scales: &[f32],
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let (weights, scales) = (weights.as_ptr(), scales.as_ptr());
    // SAFETY: by contract.
    unsafe { by_format!(format, rows, out, wide(weights, scales)) }
}
