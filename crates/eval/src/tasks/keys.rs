//! One of many numbers, each of a name of its own.

use super::draw::Draw;
use super::{Sample, Shape, filler, one_line};
use crate::metrics::Metric;

pub(super) fn sample(draw: &mut Draw, shape: Shape) -> Sample {
    const LINE: usize = 42;
    let count = (shape.characters() / LINE).clamp(2, filler::TOWNS.len() * filler::NOUNS.len());
    let values = draw.codes(count, 4);
    let mut names: Vec<String> = Vec::with_capacity(count);
    while names.len() < count {
        let name = format!("{} {}", draw.one(&filler::TOWNS), draw.one(&filler::NOUNS));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let lines = names.iter().zip(&values);
    let lines: Vec<String> =
        lines.map(|(name, value)| format!("The number of the {name} is {value}.")).collect();
    let asked = shape.place(count);
    let text = format!("{}\n\nAgain: The number of the {} is", lines.join("\n"), names[asked]);
    one_line(text, values[asked].to_string(), Metric::FirstNumber, 8)
}
