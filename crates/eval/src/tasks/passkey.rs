//! One number in a long text that is about something else.

use super::draw::Draw;
use super::{Sample, Shape, filler, one_line};
use crate::metrics::Metric;

pub(super) fn sample(draw: &mut Draw, shape: Shape) -> Sample {
    const ASKED: usize = 180;
    let key = draw.number(10_000, 99_999);
    let mut sentences = filler::sentences(draw, shape.characters().saturating_sub(ASKED));
    let said = format!("The pass key is {key}. Remember it, {key} is the pass key.");
    sentences.insert(shape.place(sentences.len() + 1), said);
    let text = format!(
        "A pass key is hidden in this text.\n\n{}\n\nWhat is the pass key? The pass key is",
        sentences.join(" ")
    );
    one_line(text, key.to_string(), Metric::FirstNumber, 8)
}
