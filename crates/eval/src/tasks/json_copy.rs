//! One of several JSON objects, written again.

use serde_json::json;

use super::draw::Draw;
use super::{Sample, Shape, filler, one_line};
use crate::metrics::Metric;

pub(super) fn sample(draw: &mut Draw, shape: Shape) -> Sample {
    const RECORD: usize = 108;
    let count = (shape.characters() / RECORD).clamp(1, 900);
    let ids = draw.codes(count, 3);
    let records: Vec<String> = ids
        .iter()
        .map(|id| {
            let tags = draw.some(2, &filler::NOUNS);
            let name = draw.one(&filler::NAMES);
            let town = draw.one(&filler::TOWNS);
            let years = draw.number(20, 79);
            json!({"id": id, "name": name, "age": years, "town": town, "tags": tags}).to_string()
        })
        .collect();
    let asked = shape.place(count);
    let lines = ids.iter().zip(&records).map(|(id, record)| format!("Record {id}: {record}"));
    let lines: Vec<String> = lines.collect();
    let text = format!("{}\n\nAgain:\nRecord {}:", lines.join("\n"), ids[asked]);
    one_line(text, records[asked].clone(), Metric::Json, 80)
}
