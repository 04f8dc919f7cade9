//! What short programs print, after some that are shown with what they print.

use super::draw::Draw;
use super::{Sample, Shape, filler, one_line};
use crate::metrics::Metric;

/// A program, and what it prints.
fn program(draw: &mut Draw) -> (String, String) {
    let items = draw.some(4, &filler::NOUNS);
    let name = draw.one(&["items", "words", "names", "things"]);
    let list = items.iter().map(|item| format!("\"{item}\"")).collect::<Vec<_>>().join(", ");
    let (shown, printed) = match draw.below(3) {
        0 => (format!("{name}[0]"), items[0]),
        1 => (format!("{name}[-1]"), items[3]),
        _ => (format!("{name}[1]"), items[1]),
    };
    (format!(">>> {name} = [{list}]\n>>> print({shown})\n"), printed.to_owned())
}

pub(super) fn sample(draw: &mut Draw, shape: Shape) -> Sample {
    let mut text = String::new();
    while text.len() + 120 < shape.characters() {
        let (shown, printed) = program(draw);
        text.push_str(&format!("{shown}{printed}\n"));
    }
    let (shown, printed) = program(draw);
    text.push_str(&shown);
    one_line(text, printed, Metric::Found, 8)
}
