//! HOT PATH. 64 levels in three instructions: a byte permutation brings the bytes around their codes
//! together, a multishift cuts the codes out, and another permutation looks the levels up.

use std::arch::x86_64::*;

use super::{Order, ROW_GROUP, table};

/// See [`super::segment`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub(super) fn segment(bits: u8, order: Order, codes: &[u8], rows: usize, out: &mut [u8]) {
    match (order, bits) {
        (Order::Keys, 1) => keys::<1>(codes, rows, out),
        (Order::Keys, 2) => keys::<2>(codes, rows, out),
        (Order::Keys, 3) => keys::<3>(codes, rows, out),
        (Order::Keys, 4) => keys::<4>(codes, rows, out),
        (Order::Keys, 5) => keys::<5>(codes, rows, out),
        (Order::Keys, _) => keys::<6>(codes, rows, out),
        (Order::Values, 1) => values::<1>(codes, out),
        (Order::Values, 2) => values::<2>(codes, out),
        (Order::Values, 3) => values::<3>(codes, out),
        (Order::Values, 4) => values::<4>(codes, out),
        (Order::Values, 5) => values::<5>(codes, out),
        (Order::Values, _) => values::<6>(codes, out),
    }
}

/// Where the second register of codes begins: the end of the rows that are permuted together.
const fn second(bits: usize) -> usize {
    match bits {
        1 | 2 => 0,
        3 | 4 => 32 * bits - 64,
        // Eight rows at a time.
        _ => 16 * bits - 64,
    }
}

/// For 16 rows and coefficients 4k to 4k + 3: 32-bit lane t gets the four bytes around the codes of
/// row t.
const fn key_bytes(bits: usize, k: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let row = if bits > 4 { i / 4 % 8 } else { i / 4 };
        let at = 2 * bits * row + (4 * bits * k / 8 + i % 4) % (2 * bits);
        out[i] = if at < 64 { at } else { 64 + at - second(bits) } as u8;
        i += 1;
    }
    out
}

/// Which bits of a 64-bit lane each byte takes: two rows of four codes.
const fn key_shifts(bits: usize, k: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        out[i] = (i / 4 % 2 * 32 + 4 * bits * k % 8 + bits * (i % 4)) as u8;
        i += 1;
    }
    out
}

const fn all_key_bytes(bits: usize) -> [[u8; 64]; 4] {
    [key_bytes(bits, 0), key_bytes(bits, 1), key_bytes(bits, 2), key_bytes(bits, 3)]
}

const fn all_key_shifts(bits: usize) -> [[u8; 64]; 4] {
    [key_shifts(bits, 0), key_shifts(bits, 1), key_shifts(bits, 2), key_shifts(bits, 3)]
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
#[inline]
fn keys<const BITS: usize>(codes: &[u8], rows: usize, out: &mut [u8]) {
    let groups = rows / ROW_GROUP;
    assert!(codes.len() >= groups * 32 * BITS && out.len() >= groups * 256);
    let (bytes, shifts) = (const { all_key_bytes(BITS) }, const { all_key_shifts(BITS) });
    let offset = _mm512_set1_epi8(-128);
    // SAFETY: codes of a group are 32 · BITS bytes from 32 · BITS · g on, in which all loads lie;
    // the outputs of quad k and group g are 64 bytes at 64 (k · groups + g), below 256 · groups.
    unsafe {
        let table = _mm512_xor_si512(_mm512_loadu_epi8(table(BITS as u8).as_ptr()), offset);
        for k in 0..4 {
            let bytes = _mm512_loadu_epi8(bytes[k].as_ptr().cast());
            let shifts = _mm512_loadu_epi8(shifts[k].as_ptr().cast());
            for g in 0..groups {
                let at = codes.as_ptr().add(32 * BITS * g);
                let pair = |at: *const u8| {
                    let first = _mm512_loadu_epi8(at.cast());
                    let second = _mm512_loadu_epi8(at.add(const { second(BITS) }).cast());
                    _mm512_permutex2var_epi8(first, bytes, second)
                };
                let near = match BITS {
                    1 => {
                        let all = _mm512_zextsi256_si512(_mm256_loadu_epi8(at.cast()));
                        _mm512_permutexvar_epi8(bytes, all)
                    }
                    2 => _mm512_permutexvar_epi8(bytes, _mm512_loadu_epi8(at.cast())),
                    3 | 4 => pair(at),
                    _ => _mm512_mask_blend_epi64(0xF0, pair(at), pair(at.add(16 * BITS))),
                };
                let codes = _mm512_multishift_epi64_epi8(shifts, near);
                let levels = _mm512_permutexvar_epi8(codes, table);
                _mm512_storeu_epi8(out.as_mut_ptr().add(64 * (k * groups + g)).cast(), levels);
            }
        }
    }
}

/// For four rows: 64-bit lane c gets, of every row, the two bytes around the codes of coefficients 2c
/// and 2c + 1.
const fn value_bytes(bits: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let (pair, row) = (i / 8, i / 2 % 4);
        out[i] = (2 * bits * row + (2 * bits * pair / 8 + i % 2) % (2 * bits)) as u8;
        i += 1;
    }
    out
}

const fn value_shifts(bits: usize) -> [u8; 64] {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let (pair, second, row) = (i / 8, i / 4 % 2, i % 4);
        out[i] = (16 * row + 2 * bits * pair % 8 + bits * second) as u8;
        i += 1;
    }
    out
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
#[inline]
fn values<const BITS: usize>(codes: &[u8], out: &mut [u8]) {
    let (bytes, shifts) = (const { value_bytes(BITS) }, const { value_shifts(BITS) });
    // SAFETY: chunks are 8 · BITS and 64 bytes long; the mask covers the bytes of the former.
    unsafe {
        let table = _mm512_loadu_epi8(table(BITS as u8).as_ptr());
        let bytes = _mm512_loadu_epi8(bytes.as_ptr().cast());
        let shifts = _mm512_loadu_epi8(shifts.as_ptr().cast());
        let outs = out.chunks_exact_mut(64);
        for (codes, out) in codes.chunks_exact(8 * BITS).zip(outs) {
            let all = _mm512_maskz_loadu_epi8((1 << (8 * BITS)) - 1, codes.as_ptr().cast());
            let near = _mm512_permutexvar_epi8(bytes, all);
            let codes = _mm512_multishift_epi64_epi8(shifts, near);
            let levels = _mm512_permutexvar_epi8(codes, table);
            _mm512_storeu_epi8(out.as_mut_ptr().cast(), levels);
        }
    }
}
