//! HOT PATH. Products with `vdpbf16ps`: 32 features × up to 6 rows in registers.
//!
//! Codes are small integers, which bf16 holds exactly: only the inputs are rounded. A group's sum of
//! products is scaled in f32 and added to the row's sum, group after group; narrow batches (codes turned
//! in registers) and wide ones (a tile of codes turned once) do the same operations in the same order.

// Registers are indexed; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::packed::{CodeFormat, GROUP, HALF, PAIRS, TILE};
use super::super::product::{ROWS, Rows, Target};
use super::{by_rows, prefetch, put, widen};

/// Bytes of a group of a turned tile.
pub(in crate::linear) const GROUP_BYTES: usize = 2 * TILE * GROUP;

/// What codes are looked up in.
#[derive(Clone, Copy)]
struct Table {
    /// bf16 of the 16 codes of a 4-bit format, twice: a permutation looks at five bits of a lane.
    four: __m512i,
    /// Low and high bytes of bf16 of 0 to 127.
    bytes: [[__m512i; 2]; 2],
}

/// [`Table::bytes`].
static BYTES: [[[u8; 64]; 2]; 2] = {
    let mut bytes = [[[0; 64]; 2]; 2];
    let mut i = 0;
    while i < 128 {
        let bits = (i as f32).to_bits() >> 16;
        bytes[0][i / 64][i % 64] = bits as u8;
        bytes[1][i / 64][i % 64] = (bits >> 8) as u8;
        i += 1;
    }
    bytes
};

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
#[inline]
fn code_table(lowest: i8) -> Table {
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let codes = _mm512_add_epi32(lanes, _mm512_set1_epi32(i32::from(lowest)));
    let codes = _mm512_cvtepi32_ps(codes);
    let both = _mm512_cvtne2ps_pbh(codes, codes);
    // SAFETY: both are 64 bytes of any bits.
    let four = unsafe { std::mem::transmute::<__m512bh, __m512i>(both) };
    // SAFETY: a register each.
    let load = |half: &[u8; 64]| unsafe { _mm512_loadu_si512(half.as_ptr().cast()) };
    Table { four, bytes: BYTES.each_ref().map(|table| table.each_ref().map(load)) }
}

/// bf16 of 64 codes of 8 bits: of the low bytes of 16-bit lanes, and of the high ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
#[inline]
fn widen_bytes(codes: __m512i, table: &Table) -> [__m512i; 2] {
    let [low, high] = table.bytes;
    let lowest = _mm512_set1_epi8(-128);
    let magnitude = _mm512_abs_epi8(codes);
    let l = _mm512_permutex2var_epi8(low[0], magnitude, low[1]);
    let h = _mm512_permutex2var_epi8(high[0], magnitude, high[1]);
    // The table looks at seven bits: 128 is 0x4300.
    let h = _mm512_mask_mov_epi8(h, _mm512_cmpeq_epi8_mask(codes, lowest), _mm512_set1_epi8(0x43));
    // h | codes & 0x80
    let h = _mm512_ternarylogic_epi32::<0xf8>(h, codes, lowest);
    let below = _mm512_set1_epi16(0xff);
    // (a & below) | (b & !below)
    let even = _mm512_ternarylogic_epi32::<0xca>(below, l, _mm512_slli_epi16::<8>(h));
    let odd = _mm512_ternarylogic_epi32::<0xca>(below, _mm512_srli_epi16::<8>(l), h);
    [even, odd]
}

/// Turns the codes of a group into bf16: `[pairs, halves]` registers.
///
/// # Safety
/// `codes` must be readable as far as a group of the format goes, and aligned to 64 bytes; `out` takes
/// [`GROUP_BYTES`] and is aligned.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
#[inline]
unsafe fn turn_group<const BITS: usize>(codes: *const u8, table: &Table, out: *mut u8) {
    // SAFETY: register z of half h is at 64 (h · registers + z); pairs stay below 16.
    unsafe {
        let registers = BITS; // 4 or 8
        for h in 0..2 {
            for z in 0..registers {
                let v = _mm512_load_si512(codes.add(64 * (h * registers + z)).cast());
                if BITS == 4 {
                    let lanes = [
                        v,
                        _mm512_srli_epi16::<4>(v),
                        _mm512_srli_epi16::<8>(v),
                        _mm512_srli_epi16::<12>(v),
                    ];
                    for s in 0..4 {
                        let bf16 = _mm512_permutexvar_epi16(lanes[s], table.four);
                        _mm512_store_si512(out.add(64 * (2 * (4 * z + s) + h)).cast(), bf16);
                    }
                } else {
                    for (s, bf16) in widen_bytes(v, table).into_iter().enumerate() {
                        let at = out.add(64 * (2 * (2 * z + s) + h));
                        _mm512_store_si512(at.cast(), bf16);
                    }
                }
            }
        }
    }
}

/// The sums of products of one group: `acc[row][half]`, from `acc` on.
///
/// # Safety
/// `weights` has a turned group; `x` has MR rows of stride `ldx` with [`GROUP`] inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
#[inline]
unsafe fn group_products<const MR: usize>(
    weights: *const u8,
    x: *const u16,
    ldx: usize,
    acc: &mut [[__m512; 2]; MR],
) {
    // SAFETY: by contract.
    unsafe {
        for pair in 0..PAIRS {
            let at = weights.add(128 * pair);
            let w: [__m512bh; 2] = [
                std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(at.cast())),
                std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(at.add(64).cast())),
            ];
            for i in 0..MR {
                let xs =
                    _mm512_set1_epi32(x.add(i * ldx + 2 * pair).cast::<i32>().read_unaligned());
                let xs = std::mem::transmute::<__m512i, __m512bh>(xs);
                acc[i][0] = _mm512_dpbf16_ps(acc[i][0], w[0], xs);
                acc[i][1] = _mm512_dpbf16_ps(acc[i][1], w[1], xs);
            }
        }
    }
}

/// A tile of codes as it is stored, against few rows.
///
/// # Safety
/// `tile` has `rows.num_groups` groups of the format, aligned to 64 bytes; `rows` and `out` have MR rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
unsafe fn narrow<const MR: usize, const BITS: usize, const MIN: bool>(
    format: CodeFormat,
    tile: *const u8,
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    /// Written before it is read.
    #[repr(align(64))]
    struct Turned(MaybeUninit<[u8; GROUP_BYTES]>);
    let mut turned = Turned(MaybeUninit::uninit());
    let turned = turned.0.as_mut_ptr().cast::<u8>();
    let table = code_table(format.lowest);
    let (group_bytes, code_bytes) = (format.group_bytes(), format.code_bytes());
    // SAFETY: group g lies at g · group_bytes; codes, scales and minimums are inside it.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        for g in 0..rows.num_groups {
            let group = tile.add(g * group_bytes);
            prefetch(group, group_bytes);
            turn_group::<BITS>(group, &table, turned);
            let mut acc = [[_mm512_setzero_ps(); 2]; MR];
            group_products::<MR>(turned, rows.bits.add(g * GROUP), rows.stride, &mut acc);
            let scale = widen(group.add(code_bytes));
            for i in 0..MR {
                for h in 0..2 {
                    sums[i][h] = _mm512_fmadd_ps(acc[i][h], scale[h], sums[i][h]);
                }
            }
            if MIN {
                let min = widen(group.add(code_bytes + 2 * TILE));
                for i in 0..MR {
                    let sum = _mm512_set1_ps(*rows.sums.add(i * rows.num_groups + g));
                    for h in 0..2 {
                        sums[i][h] = _mm512_fmadd_ps(min[h], sum, sums[i][h]);
                    }
                }
            }
        }
        put(&sums, out);
    }
}

/// A turned tile against rows.
///
/// # Safety
/// `weights` has `rows.num_groups` turned groups, aligned; `scales` as many times `[2, TILE]`; `rows` and
/// `out` have MR rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
unsafe fn wide<const MR: usize, const MIN: bool>(
    weights: *const u8,
    scales: *const f32,
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        for g in 0..rows.num_groups {
            let mut acc = [[_mm512_setzero_ps(); 2]; MR];
            let group = weights.add(g * GROUP_BYTES);
            group_products::<MR>(group, rows.bits.add(g * GROUP), rows.stride, &mut acc);
            let scales = scales.add(g * 2 * TILE);
            for h in 0..2 {
                let scale = _mm512_loadu_ps(scales.add(h * HALF));
                for i in 0..MR {
                    sums[i][h] = _mm512_fmadd_ps(acc[i][h], scale, sums[i][h]);
                }
            }
            if MIN {
                for h in 0..2 {
                    let min = _mm512_loadu_ps(scales.add(TILE + h * HALF));
                    for i in 0..MR {
                        let sum = _mm512_set1_ps(*rows.sums.add(i * rows.num_groups + g));
                        sums[i][h] = _mm512_fmadd_ps(min, sum, sums[i][h]);
                    }
                }
            }
        }
        put(&sums, out);
    }
}

/// A tile of bf16 weights against rows: one chain of sums over all inputs.
///
/// # Safety
/// As [`wide`], without scales.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
unsafe fn plain<const MR: usize>(weights: *const u8, rows: &Rows<'_>, out: &Target<'_>) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; MR];
        for g in 0..rows.num_groups {
            let group = weights.add(g * GROUP_BYTES);
            if MR <= 2 {
                prefetch(group, GROUP_BYTES);
            }
            group_products::<MR>(group, rows.bits.add(g * GROUP), rows.stride, &mut sums);
        }
        put(&sums, out);
    }
}

/// A tile as it is stored against rows: few of them, if it has codes.
///
/// # Safety
/// The processor has AVX-512 with BF16; `tile` is a whole tile of the format (`None`: bf16) with as many
/// groups as the rows have; `out` has the rows.
pub(in crate::linear) unsafe fn multiply_stored(
    format: Option<CodeFormat>,
    tile: &[u8],
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let tile = tile.as_ptr();
    for (first, n) in rows.blocks(ROWS) {
        let (rows, out) = (&rows.part(first, n), &out.from(first));
        // SAFETY: by contract.
        unsafe {
            match format {
                None => by_rows!(n, plain::<_>(tile, rows, out)),
                Some(f) => match (f.bits, f.has_min) {
                    (4, true) => by_rows!(n, narrow::<_, 4, true>(f, tile, rows, out)),
                    (4, false) => by_rows!(n, narrow::<_, 4, false>(f, tile, rows, out)),
                    (_, true) => by_rows!(n, narrow::<_, 8, true>(f, tile, rows, out)),
                    (_, false) => by_rows!(n, narrow::<_, 8, false>(f, tile, rows, out)),
                },
            }
        }
    }
}

/// Turns a tile of codes. `weights`: [`GROUP_BYTES`] a group, aligned to 64 bytes; `scales`: `[groups, 2,
/// TILE]`.
///
/// # Safety
/// The processor has AVX-512 with BF16; `tile` is a whole tile of the format; both outputs are long enough.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
pub(in crate::linear) unsafe fn turn_tile(
    format: CodeFormat,
    tile: &[u8],
    weights: &mut [u8],
    scales: &mut [f32],
) {
    let table = code_table(format.lowest);
    let groups = tile.chunks_exact(format.group_bytes());
    let outs = weights.chunks_exact_mut(GROUP_BYTES).zip(scales.chunks_exact_mut(2 * TILE));
    for (group, (weights, scales)) in groups.zip(outs) {
        // SAFETY: a group's codes, scales and minimums are inside its bytes; chunks have the lengths.
        unsafe {
            match format.bits {
                4 => turn_group::<4>(group.as_ptr(), &table, weights.as_mut_ptr()),
                _ => turn_group::<8>(group.as_ptr(), &table, weights.as_mut_ptr()),
            }
            for part in 0..1 + usize::from(format.has_min) {
                let wide = widen(group.as_ptr().add(format.code_bytes() + 2 * TILE * part));
                for h in 0..2 {
                    _mm512_storeu_ps(scales.as_mut_ptr().add(TILE * part + HALF * h), wide[h]);
                }
            }
        }
    }
}

/// A turned tile against rows.
///
/// # Safety
/// The processor has AVX-512 with BF16; `weights` and `scales` are as [`turn_tile`] leaves them, with as
/// many groups as the rows have; `out` has the rows.
pub(in crate::linear) unsafe fn multiply_turned(
    has_min: bool,
    weights: &[u8],
    scales: &[f32],
    rows: &Rows<'_>,
    out: &Target<'_>,
) {
    let (weights, scales) = (weights.as_ptr(), scales.as_ptr());
    for (first, n) in rows.blocks(ROWS) {
        let (rows, out) = (&rows.part(first, n), &out.from(first));
        // SAFETY: by contract.
        unsafe {
            if has_min {
                by_rows!(n, wide::<_, true>(weights, scales, rows, out));
            } else {
                by_rows!(n, wide::<_, false>(weights, scales, rows, out));
            }
        }
    }
}

/// See [`super::super::activations`]: groups to bf16.
///
/// # Safety
/// The processor has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,fma")]
#[inline]
pub(in crate::linear) unsafe fn round_groups(
    x: &[[f32; GROUP]],
    bits: &mut [[u16; GROUP]],
    sums: &mut [f32],
) {
    for ((x, bits), sum) in x.iter().zip(bits).zip(sums) {
        // SAFETY: both are 32 long.
        unsafe {
            let (first, last) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
            let rounded = _mm512_cvtne2ps_pbh(last, first);
            let rounded = std::mem::transmute::<__m512bh, __m512i>(rounded);
            _mm512_storeu_si512(bits.as_mut_ptr().cast(), rounded);
            let odd = _mm512_and_si512(rounded, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            let even = _mm512_slli_epi32::<16>(rounded);
            let lanes = _mm512_add_ps(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd));
            *sum = _mm512_reduce_add_ps(lanes);
        }
    }
}
