//! HOT PATH. Element-wise helpers.

/// `a += b`.
#[inline]
pub fn add_assign(a: &mut [f32], b: &[f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

/// `a *= factor`.
#[inline]
pub fn scale_in_place(a: &mut [f32], factor: f32) {
    for a in a {
        *a *= factor;
    }
}

/// `a = cap · tanh(a / cap)`: Gemma's soft cap of scores and logits.
pub fn soft_cap(a: &mut [f32], cap: f32) {
    for a in a {
        *a = cap * (*a / cap).tanh();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_cap_bounds_and_keeps_small_values() {
        let mut a = [0.01, 1000.0, -1000.0];
        soft_cap(&mut a, 30.0);
        assert!((a[0] - 0.01).abs() < 1e-6);
        assert_eq!(a[1], 30.0);
        assert_eq!(a[2], -30.0);
    }
}
