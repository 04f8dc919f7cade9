//! HOT PATH. `vdpbf16ps`: up to 8 rows × 48 coefficients in registers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{LANES, Lanes};

/// Rows and registers of coefficients in a tile: 24 sums.
const ROWS: usize = 8;
const WIDE: usize = 3;

/// See [`super::Transform::load`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn load(columns: &[f16], weights: &[f32], out: &mut [Lanes]) {
    let width = weights.len();
    // One channel's lanes beside the other's, as pairs.
    let beside: [i16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as i16);
    // SAFETY: 64 bytes.
    let beside = unsafe { _mm512_loadu_si512(beside.as_ptr().cast()) };
    let pairs = width / 2;
    for (k, channels) in columns.chunks_exact(2 * width).enumerate() {
        let (even, odd) = channels.split_at(width);
        let weights = [_mm512_set1_ps(weights[2 * k]), _mm512_set1_ps(weights[2 * k + 1])];
        let lanes = even.as_chunks::<LANES>().0.iter().zip(odd.as_chunks::<LANES>().0);
        for ((even, odd), out) in lanes.zip(out[k..].iter_mut().step_by(pairs)) {
            // SAFETY: 16 numbers each, and 16 pairs.
            unsafe {
                let even = _mm512_cvtph_ps(_mm256_loadu_si256(even.as_ptr().cast()));
                let odd = _mm512_cvtph_ps(_mm256_loadu_si256(odd.as_ptr().cast()));
                let rounded = _mm512_cvtne2ps_pbh(
                    _mm512_mul_ps(odd, weights[1]),
                    _mm512_mul_ps(even, weights[0]),
                );
                let rounded = std::mem::transmute::<__m512bh, __m512i>(rounded);
                let rounded = _mm512_permutexvar_epi16(beside, rounded);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), rounded);
            }
        }
    }
}

/// `out = x - means` in bf16, rows of `means` again and again. Whole registers.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn round(x: &[f32], means: &[f32], out: &mut [bf16]) {
    let (x, means) = (x.as_chunks::<LANES>().0, means.as_chunks::<LANES>().0);
    let out = out.as_chunks_mut::<LANES>().0;
    for (x, out) in x.chunks(means.len()).zip(out.chunks_mut(means.len())) {
        for ((x, mean), out) in x.iter().zip(means).zip(out) {
            // SAFETY: 16 numbers each.
            unsafe {
                let x = _mm512_sub_ps(_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(mean.as_ptr()));
                let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
                _mm256_storeu_si256(out.as_mut_ptr().cast(), rounded);
            }
        }
    }
}

/// `out = x · matrixᵀ`. `matrix`: `[width / 16, width / 2]`; `x`, `out`: rows of `width`.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn multiply(matrix: &[Lanes], width: usize, x: &[bf16], out: &mut [f32]) {
    let rows = x.len() / width;
    assert!(matrix.len() == width / LANES * (width / 2) && out.len() == rows * width);
    for first in (0..width / LANES).step_by(WIDE) {
        let lanes = &matrix[first * (width / 2)..];
        let out = &mut out[first * LANES..];
        match width / LANES - first {
            1 => columns::<1>(lanes, width, rows, x, out),
            2 => columns::<2>(lanes, width, rows, x, out),
            _ => columns::<WIDE>(lanes, width, rows, x, out),
        }
    }
}

/// `N` registers of coefficients of all rows.
#[target_feature(enable = "avx512f,avx512bf16")]
fn columns<const N: usize>(
    matrix: &[Lanes],
    width: usize,
    rows: usize,
    x: &[bf16],
    out: &mut [f32],
) {
    assert!(matrix.len() >= N * (width / 2) && x.len() == rows * width);
    assert!(rows == 0 || out.len() >= (rows - 1) * width + N * LANES);
    let mut row = 0;
    while row < rows {
        let (x, out) = (x[row * width..].as_ptr(), out[row * width..].as_mut_ptr());
        // SAFETY: the asserts above; as many rows are left.
        unsafe {
            if rows - row >= ROWS {
                tile::<ROWS, N>(matrix.as_ptr(), width, x, out);
                row += ROWS;
            } else {
                tile::<1, N>(matrix.as_ptr(), width, x, out);
                row += 1;
            }
        }
    }
}

/// `M` rows and `N` registers of coefficients.
///
/// # Safety
/// `matrix`: `[N, width / 2]`; `x`: `M` rows of `width`; `out`: the first 16 N numbers of as many.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile<const M: usize, const N: usize>(
    matrix: *const Lanes,
    width: usize,
    x: *const bf16,
    out: *mut f32,
) {
    let pairs = width / 2;
    let x: *const i32 = x.cast();
    let mut sums = [[_mm512_setzero_ps(); N]; M];
    // SAFETY: pair k of row i and of column j, all below the shapes; unaligned loads and stores.
    unsafe {
        for k in 0..pairs {
            let mut lanes = [_mm512_setzero_si512(); N];
            for (j, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_loadu_si512(matrix.add(j * pairs + k).cast());
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(x.add(i * pairs + k).read_unaligned());
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_dpbf16_ps(
                        *sum,
                        std::mem::transmute::<__m512i, __m512bh>(lanes),
                        std::mem::transmute::<__m512i, __m512bh>(x),
                    );
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(out.add(i * width + j * LANES), *sum);
            }
        }
    }
}
