//! Products of weights and values.

use std::arch::x86_64::*;

use super::super::{LANES, Part, ROWS};
use super::{Element, Fetch, by_rows};

/// See [`super::super::portable::mix_on`]; `next` is fetched meanwhile.
pub(in crate::attention) fn mix<T: Element>(
    part: &Part,
    weights: &[f32],
    factors: &[f32; ROWS],
    values: &[T],
    sums: &mut [f32],
    stride: usize,
    next: &[u8],
) {
    let &Part { dim, n, tokens, from, to, .. } = part;
    assert!(dim.is_multiple_of(LANES) && n > 0 && stride >= dim && to <= tokens);
    assert!(weights.len() >= n * tokens && values.len() >= to * dim);
    assert!(sums.len() >= (n - 1) * stride + dim);
    let shape = Shape { dim, tokens, from, to, stride };
    let mut next = Fetch::new(next, to.saturating_sub(from));
    let mut d = 0;
    while d < dim {
        let four = d + 4 * LANES <= dim;
        by_rows!(n, [6, 4, 3, 2, 1], |R, first| {
            // SAFETY: the processor has AVX-512; the asserts cover tokens `from .. to` of one or four vectors from
            // channel `d` on, and rows `first .. first + R` of weights and sums.
            unsafe {
                let weights = weights.as_ptr().add(first * tokens);
                let factors = factors.as_ptr().add(first);
                let values = values.as_ptr().add(d);
                let sums = sums.as_mut_ptr().add(first * stride + d);
                if four {
                    mix_tile::<T, R, 4>(&shape, weights, factors, values, sums, &mut next);
                } else {
                    mix_tile::<T, R, 1>(&shape, weights, factors, values, sums, &mut next);
                }
            }
        });
        d += if four { 4 * LANES } else { LANES };
    }
}

struct Shape {
    dim: usize,
    tokens: usize,
    from: usize,
    to: usize,
    stride: usize,
}

/// R rows against NV vectors of values.
///
/// # Safety
/// The processor must have AVX-512; pointers are good for the tokens, rows and vectors that shape, R and NV say.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
unsafe fn mix_tile<T: Element, const R: usize, const NV: usize>(
    shape: &Shape,
    weights: *const f32,
    factors: *const f32,
    values: *const T,
    sums: *mut f32,
    next: &mut Fetch,
) {
    let &Shape { dim, tokens, from, to, stride } = shape;
    // SAFETY: forwarded from the caller.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); NV]; R];
        for r in 0..R {
            let factor = _mm512_set1_ps(*factors.add(r));
            for v in 0..NV {
                let sum = _mm512_loadu_ps(sums.add(r * stride + v * LANES));
                acc[r][v] = _mm512_mul_ps(sum, factor);
            }
        }
        for t in from..to {
            next.step();
            let mut vs = [_mm512_setzero_ps(); NV];
            for v in 0..NV {
                vs[v] = T::load(values.add(t * dim + v * LANES));
            }
            for r in 0..R {
                let weight = _mm512_set1_ps(*weights.add(r * tokens + t));
                for v in 0..NV {
                    acc[r][v] = _mm512_fmadd_ps(weight, vs[v], acc[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..NV {
                _mm512_storeu_ps(sums.add(r * stride + v * LANES), acc[r][v]);
            }
        }
    }
}
