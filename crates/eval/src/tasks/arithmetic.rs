//! Sums in a row, after worked ones.

use super::draw::Draw;
use super::{Sample, Shape, one_line};
use crate::metrics::Metric;

/// A chain, and its result: one or two steps, never below 0.
fn chain(draw: &mut Draw) -> (String, usize) {
    let mut value = draw.number(1, 9);
    let mut text = value.to_string();
    for _ in 0..draw.number(1, 2) {
        let by = draw.number(1, 9);
        if by <= value && draw.below(2) == 0 {
            value -= by;
            text.push_str(&format!(" - {by}"));
        } else {
            value += by;
            text.push_str(&format!(" + {by}"));
        }
    }
    (text, value)
}

pub(super) fn sample(draw: &mut Draw, shape: Shape) -> Sample {
    let mut text = String::new();
    while text.len() + 16 < shape.characters() {
        let (asked, value) = chain(draw);
        text.push_str(&format!("{asked} = {value}\n"));
    }
    let (asked, value) = chain(draw);
    text.push_str(&format!("{asked} ="));
    one_line(text, value.to_string(), Metric::FirstNumber, 6)
}
