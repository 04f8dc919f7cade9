//! HOT PATH. Element-wise helpers.

use crate::isa::{dispatch, mul_add};
use crate::softmax::exp;

dispatch! {
    /// `a += b`.
    pub fn add_assign / add_assign_on(a: &mut [f32], b: &[f32]) = add_body;
}
dispatch! {
    /// `a *= factor`.
    pub fn scale_in_place / scale_in_place_on(a: &mut [f32], factor: f32) = scale_body;
}
dispatch! {
    /// `a = cap · tanh(a / cap)`: Gemma's soft cap of scores and logits.
    pub fn soft_cap / soft_cap_on(a: &mut [f32], cap: f32) = cap_body;
}

dispatch! {
    /// How many are not from `-most` to `most`; a NaN is not.
    pub fn num_beyond / num_beyond_on(a: &[f32], most: f32) -> usize = beyond_body;
}

#[inline(always)]
fn beyond_body<const FMA: bool>(a: &[f32], most: f32) -> usize {
    // Lanes as wide as the numbers vectorise.
    let within: u32 = a.iter().map(|a| u32::from(a.abs() <= most)).sum();
    a.len() - within as usize
}

#[inline(always)]
fn add_body<const FMA: bool>(a: &mut [f32], b: &[f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

#[inline(always)]
fn scale_body<const FMA: bool>(a: &mut [f32], factor: f32) {
    for a in a {
        *a *= factor;
    }
}

#[inline(always)]
fn cap_body<const FMA: bool>(a: &mut [f32], cap: f32) {
    for a in a {
        *a = cap * tanh::<FMA>(*a / cap);
    }
}

/// To about 2e-7 relative, branch free so that loops over it vectorise (coefficients of Cephes `tanhf`).
#[inline(always)]
fn tanh<const FMA: bool>(x: f32) -> f32 {
    let square = x * x;
    let mut p = -5.704_988_7e-3;
    p = mul_add::<FMA>(p, square, 2.063_909e-2);
    p = mul_add::<FMA>(p, square, -5.373_971_6e-2);
    p = mul_add::<FMA>(p, square, 1.333_144_2e-1);
    p = mul_add::<FMA>(p, square, -3.333_328e-1);
    let small = mul_add::<FMA>(p * square, x, x);
    let large = (1.0 - 2.0 / (exp::<FMA>(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { small } else { large }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn soft_cap_bounds_and_keeps_small_values() {
        for isa in Isa::available() {
            let mut a = [0.01, 1000.0, -1000.0, f32::NAN, f32::NEG_INFINITY];
            soft_cap_on(isa, &mut a, 30.0);
            assert!((a[0] - 0.01).abs() < 1e-8, "{isa} {}", a[0]);
            assert!(a[1] == 30.0 && a[2] == -30.0 && a[3].is_nan() && a[4] == -30.0, "{isa} {a:?}");
        }
    }

    #[test]
    fn what_is_beyond_is_counted() {
        for isa in Isa::available() {
            let mut a = vec![-2.0; 37];
            assert_eq!(num_beyond_on(isa, &a, 2.0), 0, "{isa}");
            (a[1], a[18], a[33], a[36]) = (f32::NAN, -2.1, f32::INFINITY, 2.1);
            assert_eq!(num_beyond_on(isa, &a, 2.0), 4, "{isa}");
        }
    }

    #[test]
    fn soft_cap_is_accurate() {
        let x: Vec<f32> = (-40_000..=40_000).map(|i| i as f32 * 0.01).collect();
        for isa in Isa::available() {
            let mut a = x.clone();
            soft_cap_on(isa, &mut a, 50.0);
            for (a, x) in a.iter().zip(&x) {
                let exact = 50.0 * (f64::from(*x) / 50.0).tanh();
                assert!(
                    (f64::from(*a) - exact).abs() <= exact.abs() * 5e-7,
                    "{isa} {x}: {a} {exact}"
                );
            }
        }
    }

    #[test]
    fn sums_and_products_are_of_elements() {
        for isa in Isa::available() {
            let mut a: Vec<f32> = (0..37).map(|i| i as f32).collect();
            add_assign_on(isa, &mut a, &[0.5; 37]);
            scale_in_place_on(isa, &mut a, 2.0);
            assert!(a.iter().enumerate().all(|(i, a)| *a == 2.0 * i as f32 + 1.0), "{isa} {a:?}");
        }
    }
}
