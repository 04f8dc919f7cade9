//! HOT PATH (no allocation, locks or logging). Small dense products on one thread: the micro-kernels
//! under linear layers and attention.
//!
//! Both operands of [`gemm_nt`] are contiguous along the summed dimension, which is how weights
//! (`[out, in]`) and cached keys (`[tokens, head_dim]`) lie in memory, so nothing is packed. Each
//! output is 16 partial sums (one per lane, lane = index mod 16) that are added in a fixed tree: the
//! same for every tile shape, hence row invariant.

// Tiles are indexed by (row, column) of the register block; iterators would hide that.
#![allow(clippy::needless_range_loop)]

use crate::isa::{Isa, Set, mul_add};

#[cfg(target_arch = "x86_64")]
mod x86;

/// Lanes of one partial sum; the AVX2 and baseline paths emulate 16 to sum in the same order.
const LANES: usize = 16;

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
    // SAFETY: the three asserts above are the contract of `gemm_nt_raw`, and `isa` is available.
    unsafe {
        gemm_nt_raw(isa, (m, n, k), x.as_ptr(), ldx, w.as_ptr(), ldw, out.as_mut_ptr(), ldo);
    }
}

/// As [`gemm_nt`], on pointers, so that threads can fill disjoint columns of one output.
///
/// # Safety
/// `x`, `w` and `out` must be valid for the shapes and strides given, `out` must not overlap the
/// others, nobody else may touch the elements written, and the processor must have `isa`.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn gemm_nt_raw(
    isa: Isa,
    (m, n, k): (usize, usize, usize),
    x: *const f32,
    ldx: usize,
    w: *const f32,
    ldw: usize,
    out: *mut f32,
    ldo: usize,
) {
    /// Rows of x in a tile: 6 × 4 sums + 4 weights + 1 input fill 29 of 32 registers.
    const MR: usize = 6;
    const NR: usize = 4;
    // Rows of `w` outermost: 4 of them stay in L1 while all of `x` (a few hundred KiB at most, L2)
    // passes by.
    let mut j = 0;
    while j < n {
        let nr = NR.min(n - j);
        let mut i = 0;
        while i < m {
            let mr = MR.min(m - i);
            // SAFETY: i + mr <= m and j + nr <= n, so every address is inside the operands.
            unsafe {
                let (x, w, out) = (x.add(i * ldx), w.add(j * ldw), out.add(i * ldo + j));
                match (mr, nr) {
                    (6, 4) => tile::<6, 4>(isa, k, x, ldx, w, ldw, out, ldo),
                    (5, 4) => tile::<5, 4>(isa, k, x, ldx, w, ldw, out, ldo),
                    (4, 4) => tile::<4, 4>(isa, k, x, ldx, w, ldw, out, ldo),
                    (3, 4) => tile::<3, 4>(isa, k, x, ldx, w, ldw, out, ldo),
                    (2, 4) => tile::<2, 4>(isa, k, x, ldx, w, ldw, out, ldo),
                    (1, 4) => tile::<1, 4>(isa, k, x, ldx, w, ldw, out, ldo),
                    _ => {
                        for ii in 0..mr {
                            for jj in 0..nr {
                                tile::<1, 1>(
                                    isa,
                                    k,
                                    x.add(ii * ldx),
                                    ldx,
                                    w.add(jj * ldw),
                                    ldw,
                                    out.add(ii * ldo + jj),
                                    ldo,
                                );
                            }
                        }
                    }
                }
            }
            i += mr;
        }
        j += nr;
    }
}

/// One register tile. Contract as [`gemm_nt_raw`] with m = MR, n = NR.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
unsafe fn tile<const MR: usize, const NR: usize>(
    isa: Isa,
    k: usize,
    x: *const f32,
    ldx: usize,
    w: *const f32,
    ldw: usize,
    out: *mut f32,
    ldo: usize,
) {
    // SAFETY: forwarded from the caller; the features were detected.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            isa if isa.has(Set::Avx512) => x86::tile_avx512::<MR, NR>(k, x, ldx, w, ldw, out, ldo),
            #[cfg(target_arch = "x86_64")]
            isa if isa.has(Set::Avx2) => tile_avx2::<MR, NR>(k, x, ldx, w, ldw, out, ldo),
            _ => tile_lanes::<false, MR, NR>(k, x, ldx, w, ldw, out, ldo),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::too_many_arguments)]
unsafe fn tile_avx2<const MR: usize, const NR: usize>(
    k: usize,
    x: *const f32,
    ldx: usize,
    w: *const f32,
    ldw: usize,
    out: *mut f32,
    ldo: usize,
) {
    // SAFETY: forwarded from the caller.
    unsafe { tile_lanes::<true, MR, NR>(k, x, ldx, w, ldw, out, ldo) }
}

/// The portable tile: lanes as arrays, which compilers turn into vectors. One output at a time,
/// because arrays of 24 sums would spill.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
unsafe fn tile_lanes<const FMA: bool, const MR: usize, const NR: usize>(
    k: usize,
    x: *const f32,
    ldx: usize,
    w: *const f32,
    ldw: usize,
    out: *mut f32,
    ldo: usize,
) {
    for i in 0..MR {
        for j in 0..NR {
            // SAFETY: rows i < MR and j < NR of k elements each are readable by contract.
            let (x, w) = unsafe {
                (
                    std::slice::from_raw_parts(x.add(i * ldx), k),
                    std::slice::from_raw_parts(w.add(j * ldw), k),
                )
            };
            let mut sums = [0.0f32; LANES];
            let (xs, ws) = (x.chunks_exact(LANES), w.chunks_exact(LANES));
            let (x_rest, w_rest) = (xs.remainder(), ws.remainder());
            for (x, w) in xs.zip(ws) {
                for l in 0..LANES {
                    sums[l] = mul_add::<FMA>(x[l], w[l], sums[l]);
                }
            }
            for (l, (x, w)) in x_rest.iter().zip(w_rest).enumerate() {
                sums[l] = mul_add::<FMA>(*x, *w, sums[l]);
            }
            // SAFETY: element (i, j) of the output is writable by contract.
            unsafe { *out.add(i * ldo + j) = sum_lanes(&sums) };
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
    match isa {
        #[cfg(target_arch = "x86_64")]
        isa if isa.has(Set::Avx512) && n.is_multiple_of(4 * LANES) => {
            const MR: usize = 6;
            let mut d = 0;
            while d < n {
                let mut i = 0;
                while i < m {
                    let mr = MR.min(m - i);
                    // SAFETY: the asserts above cover rows < m, columns < n, inner < k.
                    unsafe {
                        let (p, v) = (p.as_ptr().add(i * ldp), v.as_ptr().add(d));
                        let acc = acc.as_mut_ptr().add(i * lda + d);
                        match mr {
                            6 => x86::acc_avx512::<6, 4>(k, p, ldp, v, ldv, acc, lda),
                            5 => x86::acc_avx512::<5, 4>(k, p, ldp, v, ldv, acc, lda),
                            4 => x86::acc_avx512::<4, 4>(k, p, ldp, v, ldv, acc, lda),
                            3 => x86::acc_avx512::<3, 4>(k, p, ldp, v, ldv, acc, lda),
                            2 => x86::acc_avx512::<2, 4>(k, p, ldp, v, ldv, acc, lda),
                            _ => x86::acc_avx512::<1, 4>(k, p, ldp, v, ldv, acc, lda),
                        }
                    }
                    i += mr;
                }
                d += 4 * LANES;
            }
        }
        #[cfg(target_arch = "x86_64")]
        isa if isa.has(Set::Avx2) => {
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2(
                (m, n, k): (usize, usize, usize),
                p: &[f32],
                ldp: usize,
                v: &[f32],
                ldv: usize,
                acc: &mut [f32],
                lda: usize,
            ) {
                acc_rows::<true>((m, n, k), p, ldp, v, ldv, acc, lda);
            }
            // SAFETY: both sets imply AVX2 and FMA.
            unsafe { avx2((m, n, k), p, ldp, v, ldv, acc, lda) }
        }
        _ => acc_rows::<false>((m, n, k), p, ldp, v, ldv, acc, lda),
    }
}

#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn acc_rows<const FMA: bool>(
    (m, n, k): (usize, usize, usize),
    p: &[f32],
    ldp: usize,
    v: &[f32],
    ldv: usize,
    acc: &mut [f32],
    lda: usize,
) {
    for i in 0..m {
        let acc = &mut acc[i * lda..i * lda + n];
        for j in 0..k {
            let pj = p[i * ldp + j];
            for (a, v) in acc.iter_mut().zip(&v[j * ldv..j * ldv + n]) {
                *a = mul_add::<FMA>(pj, *v, *a);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
