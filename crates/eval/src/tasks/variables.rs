//! The value of a variable that was copied from another (after RULER's variable tracking, arXiv 2404.06654).

use super::draw::Draw;
use super::{Sample, Shape, filler, one_line};
use crate::metrics::Metric;

pub(super) fn sample(draw: &mut Draw, shape: Shape) -> Sample {
    const LINE: usize = 20;
    const SHOWN: usize = 4;
    const ENDS: usize = 160;
    let count = (shape.characters().saturating_sub(ENDS) / LINE)
        .clamp(4, filler::NOUNS.len() * filler::NAMES.len());
    let values = draw.codes(count / 2, 3);
    let mut names: Vec<String> = Vec::with_capacity(count);
    while names.len() < count {
        let name =
            format!("{}_{}", draw.one(&filler::NOUNS), draw.one(&filler::NAMES).to_lowercase());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    // In pairs: a value, and a copy of it.
    let lines: Vec<String> = names
        .chunks(2)
        .zip(&values)
        .map(|pair| match pair {
            ([first, second], value) => format!("{first} = {value}\n{second} = {first}"),
            (rest, value) => format!("{} = {value}", rest.join("")),
        })
        .collect();
    let asked = shape.place(lines.len());
    // Shown for some of the others, so that what is asked for is clear.
    let shown = (0..lines.len()).filter(|i| *i != asked && names.get(2 * i + 1).is_some());
    let shown = shown.step_by(lines.len().div_ceil(SHOWN));
    let shown: Vec<String> =
        shown.map(|i| format!("The value of {} is {}.", names[2 * i + 1], values[i])).collect();
    let asked_for = &names[2 * asked + 1];
    let text = format!("{}\n\n{}\nThe value of {asked_for} is", lines.join("\n"), shown.join("\n"));
    one_line(text, values[asked].to_string(), Metric::FirstNumber, 8)
}
