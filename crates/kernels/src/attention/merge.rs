//! Joins the online softmax of two ranges of tokens.

use super::weigh::exp2_of_one;
use crate::isa::{dispatch, mul_add};
use crate::softmax::OnlineSoftmax;

/// Takes the states and sums of other tokens into those of `states` and `sums`. Both are relative
/// to their own maximum and not normalised, `[rows, stride]`. What saw nothing adds nothing, and what is
/// taken into a row that has seen nothing comes out as it was, bit for bit.
///
/// Fold ranges in order of position: the result depends on the order.
///
/// # Panics
/// If `stride` is 0.
pub fn merge_rows(
    states: &mut [OnlineSoftmax],
    sums: &mut [f32],
    other_states: &[OnlineSoftmax],
    other_sums: &[f32],
    stride: usize,
) {
    let rows = states.iter_mut().zip(sums.chunks_exact_mut(stride));
    let others = other_states.iter().zip(other_sums.chunks_exact(stride));
    for ((state, sums), (other, other_sums)) in rows.zip(others) {
        let max = state.max.max(other.max);
        if max == f32::NEG_INFINITY {
            continue;
        }
        let weight = |m: f32| exp2_of_one((m - max) * std::f32::consts::LOG2_E);
        let (own, new) = (weight(state.max), weight(other.max));
        *state = OnlineSoftmax { max, sum: state.sum * own + other.sum * new };
        join(sums, own, other_sums, new);
    }
}

dispatch! {
    /// `a = a · fa + b · fb`.
    fn join / join_on(a: &mut [f32], fa: f32, b: &[f32], fb: f32) = join_body;
}

#[inline(always)]
fn join_body<const FMA: bool>(a: &mut [f32], fa: f32, b: &[f32], fb: f32) {
    for (a, b) in a.iter_mut().zip(b) {
        *a = mul_add::<FMA>(*a, fa, *b * fb);
    }
}
