use super::*;
use crate::isa::Set;

/// Deterministic values in -1..1 (an LCG; no dependency needed for that).
pub(crate) fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) as f32 / (1u64 << 30) as f32) - 1.0
        })
        .collect()
}

#[test]
fn gemm_nt_equals_the_definition_on_every_isa() {
    for isa in Isa::available() {
        for (m, n, k) in [(1, 1, 1), (1, 4, 16), (6, 4, 64), (7, 9, 33), (13, 3, 100), (5, 8, 5)] {
            let (ldx, ldw, ldo) = (k + 3, k + 1, n + 2);
            let x = values(m * ldx, 1);
            let w = values(n * ldw, 2);
            let mut out = vec![f32::NAN; m * ldo];
            gemm_nt_on(isa, (m, n, k), &x, ldx, &w, ldw, &mut out, ldo);
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k)
                        .map(|kk| f64::from(x[i * ldx + kk]) * f64::from(w[j * ldw + kk]))
                        .sum();
                    let got = f64::from(out[i * ldo + j]);
                    assert!((got - exact).abs() < 1e-4, "{isa} {m}x{n}x{k}: {got} {exact}");
                }
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_the_batch() {
    for isa in Isa::available() {
        let (n, k) = (22, 97);
        let x = values(17 * k, 3);
        let w = values(n * k, 4);
        let mut together = vec![0.0; 17 * n];
        gemm_nt_on(isa, (17, n, k), &x, k, &w, k, &mut together, n);
        for i in 0..17 {
            let mut alone = vec![0.0; n];
            gemm_nt_on(isa, (1, n, k), &x[i * k..], k, &w, k, &mut alone, n);
            assert_eq!(alone, together[i * n..(i + 1) * n], "{isa} row {i}");
        }
        let (v, begin) = (values(k * n, 5), values(17 * n, 6));
        let mut together = begin.clone();
        gemm_nn_acc_on(isa, (17, n, k), &x, k, &v, n, &mut together, n);
        for i in 0..17 {
            let mut alone = begin[i * n..(i + 1) * n].to_vec();
            gemm_nn_acc_on(isa, (1, n, k), &x[i * k..], k, &v, n, &mut alone, n);
            assert_eq!(alone, together[i * n..(i + 1) * n], "{isa} row {i} of sums");
        }
    }
}

#[test]
fn fused_paths_agree_bit_for_bit() {
    for isa in Isa::available().into_iter().filter(|isa| isa.has(Set::Avx2)) {
        for (m, n, k) in [(7, 8, 71), (13, 7, 48), (2, 35, 5)] {
            let (x, w) = (values(m * k, 5), values(n * k, 6));
            let (mut a, mut b) = (vec![0.0; m * n], vec![0.0; m * n]);
            gemm_nt_on(Isa::best(), (m, n, k), &x, k, &w, k, &mut a, n);
            gemm_nt_on(isa, (m, n, k), &x, k, &w, k, &mut b, n);
            assert_eq!(a, b, "{isa}");
            let (mut a, mut b) = (values(m * n, 7), values(m * n, 7));
            let v = values(k * n, 8);
            gemm_nn_acc_on(Isa::best(), (m, n, k), &x, k, &v, n, &mut a, n);
            gemm_nn_acc_on(isa, (m, n, k), &x, k, &v, n, &mut b, n);
            assert_eq!(a, b, "{isa}");
        }
    }
}

#[test]
fn gemm_nn_acc_equals_the_definition_on_every_isa() {
    for isa in Isa::available() {
        for (m, n, k) in [(1, 64, 1), (7, 64, 32), (6, 128, 5), (3, 20, 9), (5, 9, 3), (19, 113, 2)]
        {
            let (p, v) = (values(m * k, 7), values(k * n, 8));
            let start = values(m * n, 9);
            let mut acc = start.clone();
            gemm_nn_acc_on(isa, (m, n, k), &p, k, &v, n, &mut acc, n);
            for i in 0..m {
                for d in 0..n {
                    let exact: f64 = f64::from(start[i * n + d])
                        + (0..k)
                            .map(|j| f64::from(p[i * k + j]) * f64::from(v[j * n + d]))
                            .sum::<f64>();
                    let got = f64::from(acc[i * n + d]);
                    assert!((got - exact).abs() < 1e-4, "{isa} {m}x{n}x{k}: {got} {exact}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "w is")]
fn short_operands_are_refused() {
    let mut out = [0.0; 4];
    gemm_nt((2, 2, 4), &[0.0; 8], 4, &[0.0; 7], 4, &mut out, 2);
}
