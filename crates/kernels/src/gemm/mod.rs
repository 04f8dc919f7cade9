//! HOT PATH (no allocation, locks or logging). Small dense products on one thread: the micro-kernels
//! under linear layers and attention.
//!
//! Both operands of [`gemm_nt`] are contiguous along the summed dimension, which is how weights
//! (`[out, in]`) and cached keys (`[tokens, head_dim]`) lie in memory, so nothing is packed. Each
//! output is 16 partial sums (one per lane, lane = index mod 16) that are added in a fixed tree: the
//! same for every tile shape, hence row invariance.

// Tiles are indexed by (row, column) of the register block; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use crate::isa::Isa;
use crate::simd::tile::{self, Matrix, Single, accumulate, by_rows, tiles};
use crate::simd::{LANES, Lanes, compiled};

/// `out[i, j] = Σ_k x[i, k] · w[j, k]` for `m` rows of `x` and `n` rows of `w`.
///
/// `x`: `[m, k]` with row stride `ldx`; `w`: `[n, k]` with row stride `ldw`; `out`: `[m, n]` with row
/// stride `ldo`. Cost 2·m·n·k operations.
///
/// # Panics
/// If a slice is shorter than its shape and stride say.
#[allow(clippy::too_many_arguments)]
#[inline]
pub fn gemm_nt(
    (m, n, k): (usize, usize, usize),
    x: &[f32],
    ldx: usize,
    w: &[f32],
    ldw: usize,
    out: &mut [f32],
    ldo: usize,
) {
    gemm_nt_on(Isa::best(), (m, n, k), x, ldx, w, ldw, out, ldo);
}

#[allow(clippy::too_many_arguments)]
fn gemm_nt_on(
    isa: Isa,
    (m, n, k): (usize, usize, usize),
    x: &[f32],
    ldx: usize,
    w: &[f32],
    ldw: usize,
    out: &mut [f32],
    ldo: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(x.len() >= (m - 1) * ldx + k, "x is {} long for [{m}, {k}] / {ldx}", x.len());
    assert!(w.len() >= (n - 1) * ldw + k, "w is {} long for [{n}, {k}] / {ldw}", w.len());
    assert!(out.len() >= (m - 1) * ldo + n, "out is {} long for [{m}, {n}] / {ldo}", out.len());
    // SAFETY: the three asserts above are the contract of `gemm_nt_raw`.
    unsafe {
        gemm_nt_raw(isa, (m, n, k), x.as_ptr(), ldx, w.as_ptr(), ldw, out.as_mut_ptr(), ldo);
    }
}

/// As [`gemm_nt`], on pointers, so that threads can fill disjoint columns of one output.
///
/// # Safety
/// `x`, `w` and `out` must be valid for the shapes and strides given, `out` must not overlap the
/// others, and nobody else may touch the elements written.
#[allow(clippy::too_many_arguments)]
#[inline]
pub(crate) unsafe fn gemm_nt_raw(
    isa: Isa,
    shape: (usize, usize, usize),
    x: *const f32,
    ldx: usize,
    w: *const f32,
    ldw: usize,
    out: *mut f32,
    ldo: usize,
) {
    nt_tiles(isa, shape, (x, ldx), (w, ldw), (out, ldo));
}

compiled! {
    /// Only for [`gemm_nt_raw`], whose contract is that of the pointers here.
    fn nt_tiles(shape: (usize, usize, usize), x: (*const f32, usize), w: (*const f32, usize), out: (*mut f32, usize)) = nt
        for [Avx512, Avx2, Sse2];
}

#[inline(always)]
fn nt<S: Lanes>(
    s: S,
    (m, n, k): (usize, usize, usize),
    (x, ldx): (*const f32, usize),
    (w, ldw): (*const f32, usize),
    (out, ldo): (*mut f32, usize),
) {
    /// Covers all rows with tiles of `$NR` columns while so many are left.
    macro_rules! columns {
        ($NR:literal, $j:ident) => {
            // Rows of `w` outermost: they stay in L1 while all of `x` (a few hundred KiB at most, L2) passes by.
            while n - $j >= $NR {
                by_rows!(S, $NR, m, [6, 4, 3, 2, 1], |R, i| {
                    // SAFETY: i + R <= m and j + NR <= n, so every address is inside the operands.
                    unsafe {
                        let (x, w) = (x.add(i * ldx), w.add($j * ldw));
                        nt_tile::<S, R, $NR>(s, k, (x, ldx), (w, ldw), (out.add(i * ldo + $j), ldo));
                    }
                });
                $j += $NR;
            }
        };
    }
    let mut j = 0;
    if S::WIDE {
        columns!(4, j);
    }
    if S::SUMS >= 4 {
        columns!(2, j);
    }
    columns!(1, j);
}

/// One register tile: R rows of `x` and NR of `w`, with their strides.
///
/// # Safety
/// As for [`gemm_nt_raw`] with m = R, n = NR.
#[inline(always)]
unsafe fn nt_tile<S: Lanes, const R: usize, const NR: usize>(
    s: S,
    k: usize,
    (x, ldx): (*const f32, usize),
    (w, ldw): (*const f32, usize),
    (out, ldo): (*mut f32, usize),
) {
    let (ldx, ldw) = (tile::here(ldx), tile::here(ldw));
    let mut sums = [[s.zero(); NR]; R];
    let whole = k - k % LANES;
    // SAFETY: all loads are of elements < k of rows < R or NR, and stores are the R × NR outputs.
    unsafe {
        for kk in (0..whole).step_by(LANES) {
            let mut ws = [s.zero(); NR];
            for j in 0..NR {
                ws[j] = s.load(w.add(j * ldw + kk));
            }
            for i in 0..R {
                let xi = s.load(x.add(i * ldx + kk));
                for j in 0..NR {
                    sums[i][j] = s.fma(xi, ws[j], sums[i][j]);
                }
            }
        }
        if whole < k {
            for j in 0..NR {
                let wj = s.load_first(w.add(j * ldw + whole), k - whole);
                for i in 0..R {
                    let xi = s.load_first(x.add(i * ldx + whole), k - whole);
                    sums[i][j] = s.fma(xi, wj, sums[i][j]);
                }
            }
        }
        for i in 0..R {
            let mut four = [s.zero(); 4];
            four[..NR].copy_from_slice(&sums[i]);
            if NR == 1 {
                *out.add(i * ldo) = s.sum(four[0]);
            } else {
                s.store_first(out.add(i * ldo), s.sum4(four), NR);
            }
        }
    }
}

/// Adds 16 lanes in the order of the AVX-512 reduction: halves, quarters, pairs.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: &[f32; LANES]) -> f32 {
    let mut sums = *lanes;
    for width in [8, 4, 2, 1] {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
    }
    sums[0]
}

/// `acc[i, d] += Σ_j p[i, j] · v[j, d]`, the sum over `j` taken in order.
///
/// `p`: `[m, k]` / `ldp`; `v`: `[k, n]` / `ldv`; `acc`: `[m, n]` / `lda`.
///
/// # Panics
/// If a slice is shorter than its shape and stride say.
#[allow(clippy::too_many_arguments)]
#[inline]
pub fn gemm_nn_acc(
    (m, n, k): (usize, usize, usize),
    p: &[f32],
    ldp: usize,
    v: &[f32],
    ldv: usize,
    acc: &mut [f32],
    lda: usize,
) {
    gemm_nn_acc_on(Isa::best(), (m, n, k), p, ldp, v, ldv, acc, lda);
}

#[allow(clippy::too_many_arguments)]
fn gemm_nn_acc_on(
    isa: Isa,
    (m, n, k): (usize, usize, usize),
    p: &[f32],
    ldp: usize,
    v: &[f32],
    ldv: usize,
    acc: &mut [f32],
    lda: usize,
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(p.len() >= (m - 1) * ldp + k, "p is {} long for [{m}, {k}] / {ldp}", p.len());
    assert!(v.len() >= (k - 1) * ldv + n, "v is {} long for [{k}, {n}] / {ldv}", v.len());
    assert!(acc.len() >= (m - 1) * lda + n, "acc is {} long for [{m}, {n}] / {lda}", acc.len());
    acc_tiles(isa, (m, n, k), p, ldp, v, ldv, acc, lda);
}

compiled! {
    #[allow(clippy::too_many_arguments)]
    fn acc_tiles(shape: (usize, usize, usize), p: &[f32], ldp: usize, v: &[f32], ldv: usize, acc: &mut [f32], lda: usize) = acc_body
        for [Avx512, Avx2, Sse2];
}

/// See [`gemm_nn_acc`], which checked the lengths.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn acc_body<S: Lanes>(
    s: S,
    (m, n, k): (usize, usize, usize),
    p: &[f32],
    ldp: usize,
    v: &[f32],
    ldv: usize,
    acc: &mut [f32],
    lda: usize,
) {
    let (p, v, acc) = (p.as_ptr(), v.as_ptr(), acc.as_mut_ptr());
    // SAFETY: rows < m, columns < n, inner < k.
    tiles!(S, m, n / LANES, |R, first, NV, at| unsafe {
        let v = Matrix { from: v.add(at * LANES), step: ldv, pitch: LANES };
        let acc = acc.add(first * lda + at * LANES);
        let sums = tile::load::<S, R, NV>(s, acc, lda);
        let p = (p.add(first * ldp), ldp, 1);
        let sums = accumulate((s, Single), v, (0, k), p, &mut (), sums);
        tile::store(s, sums, acc, lda);
    });
    let (whole, left) = (n - n % LANES, n % LANES);
    for i in (0..m).take(if left > 0 { m } else { 0 }) {
        // SAFETY: as above.
        unsafe {
            let acc = acc.add(i * lda + whole);
            let mut sums = s.load_first(acc, left);
            for j in 0..k {
                let v = s.load_first(v.add(j * ldv + whole), left);
                sums = s.fma(s.splat(*p.add(i * ldp + j)), v, sums);
            }
            s.store_first(acc, sums, left);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
