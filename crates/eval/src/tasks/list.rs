//! A list, written again in its order.

use super::draw::Draw;
use super::{Sample, Shape, filler, one_line};
use crate::metrics::Metric;

/// Items of the list that is asked for.
const ITEMS: usize = 8;

pub(super) fn sample(draw: &mut Draw, shape: Shape) -> Sample {
    const LINE: usize = 80;
    let people = (shape.characters() / LINE).clamp(1, filler::NAMES.len() * filler::TOWNS.len());
    let mut names: Vec<String> = Vec::with_capacity(people);
    while names.len() < people {
        let name = format!("{} of {}", draw.one(&filler::NAMES), draw.one(&filler::TOWNS));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let lists: Vec<Vec<&str>> = (0..people).map(|_| draw.some(ITEMS, &filler::NOUNS)).collect();
    let written = |(name, items): (&String, &Vec<&str>)| format!("{name}: {}", items.join(", "));
    let asked = shape.place(people);
    let all: Vec<String> = names.iter().zip(&lists).map(written).collect();
    let text = format!("{}\n\nAgain:\n{}:", all.join("\n"), names[asked]);
    Sample {
        answers: lists[asked].iter().map(|item| (*item).to_owned()).collect(),
        ..one_line(text, String::new(), Metric::InOrder, 5 * ITEMS)
    }
}
