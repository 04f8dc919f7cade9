//! HOT PATH. AVX-512 tiles; contracts as their callers in `gemm` state them.

use std::arch::x86_64::*;

use super::LANES;

/// See [`super::tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn tile_avx512<const MR: usize, const NR: usize>(
    k: usize,
    x: *const f32,
    ldx: usize,
    w: *const f32,
    ldw: usize,
    out: *mut f32,
    ldo: usize,
) {
    // SAFETY: all loads are of elements < k of rows < MR / NR (masked at the end), readable by
    // contract; the stores are the MR × NR outputs.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); NR]; MR];
        let mut kk = 0;
        while kk + LANES <= k {
            let mut ws = [_mm512_setzero_ps(); NR];
            for j in 0..NR {
                ws[j] = _mm512_loadu_ps(w.add(j * ldw + kk));
            }
            for i in 0..MR {
                let xi = _mm512_loadu_ps(x.add(i * ldx + kk));
                for j in 0..NR {
                    sums[i][j] = _mm512_fmadd_ps(xi, ws[j], sums[i][j]);
                }
            }
            kk += LANES;
        }
        if kk < k {
            let mask: __mmask16 = (1u16 << (k - kk)) - 1;
            let mut ws = [_mm512_setzero_ps(); NR];
            for j in 0..NR {
                ws[j] = _mm512_maskz_loadu_ps(mask, w.add(j * ldw + kk));
            }
            for i in 0..MR {
                let xi = _mm512_maskz_loadu_ps(mask, x.add(i * ldx + kk));
                for j in 0..NR {
                    sums[i][j] = _mm512_fmadd_ps(xi, ws[j], sums[i][j]);
                }
            }
        }
        for i in 0..MR {
            if NR == 4 {
                let row = sum4(sums[i][0], sums[i][1 % NR], sums[i][2 % NR], sums[i][3 % NR]);
                _mm_storeu_ps(out.add(i * ldo), row);
            } else {
                for j in 0..NR {
                    *out.add(i * ldo + j) = sum1(sums[i][j]);
                }
            }
        }
    }
}

/// Halves, quarters, pairs: the order of `sum_lanes`.
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn quarter(v: __m512) -> __m128 {
    let half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
    _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
}

#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn sum1(v: __m512) -> f32 {
    let q = quarter(v);
    let pair = _mm_add_ps(q, _mm_movehl_ps(q, q));
    _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
}

/// Four sums at once by a transposition; lane order as in `sum1`.
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn sum4(a: __m512, b: __m512, c: __m512, d: __m512) -> __m128 {
    let (a, b, c, d) = (quarter(a), quarter(b), quarter(c), quarter(d));
    // Columns of the 4 × 4 matrix: t0 = lane 0 of each, ...
    let ab_lo = _mm_unpacklo_ps(a, b);
    let ab_hi = _mm_unpackhi_ps(a, b);
    let cd_lo = _mm_unpacklo_ps(c, d);
    let cd_hi = _mm_unpackhi_ps(c, d);
    let t0 = _mm_movelh_ps(ab_lo, cd_lo);
    let t1 = _mm_movehl_ps(cd_lo, ab_lo);
    let t2 = _mm_movelh_ps(ab_hi, cd_hi);
    let t3 = _mm_movehl_ps(cd_hi, ab_hi);
    // (lane0 + lane2) + (lane1 + lane3)
    _mm_add_ps(_mm_add_ps(t0, t2), _mm_add_ps(t1, t3))
}

/// `acc[i, d] += Σ_j p[i, j] · v[j, d]` for MR rows and columns `d..d + 16 · NV`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn acc_avx512<const MR: usize, const NV: usize>(
    k: usize,
    p: *const f32,
    ldp: usize,
    v: *const f32,
    ldv: usize,
    acc: *mut f32,
    lda: usize,
) {
    // SAFETY: the caller guarantees MR rows, k inner elements and 16 · NV columns.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); NV]; MR];
        for i in 0..MR {
            for c in 0..NV {
                sums[i][c] = _mm512_loadu_ps(acc.add(i * lda + c * LANES));
            }
        }
        for j in 0..k {
            let mut vs = [_mm512_setzero_ps(); NV];
            for c in 0..NV {
                vs[c] = _mm512_loadu_ps(v.add(j * ldv + c * LANES));
            }
            for i in 0..MR {
                let pi = _mm512_set1_ps(*p.add(i * ldp + j));
                for c in 0..NV {
                    sums[i][c] = _mm512_fmadd_ps(pi, vs[c], sums[i][c]);
                }
            }
        }
        for i in 0..MR {
            for c in 0..NV {
                _mm512_storeu_ps(acc.add(i * lda + c * LANES), sums[i][c]);
            }
        }
    }
}
