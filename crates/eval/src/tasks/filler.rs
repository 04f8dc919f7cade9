//! Sentences that say nothing, and words.

use super::draw::Draw;

/// Things.
pub(super) const NOUNS: [&str; 48] = [
    "apple", "anchor", "basket", "bridge", "button", "candle", "carpet", "castle", "cherry",
    "clock", "copper", "curtain", "desk", "drum", "engine", "feather", "fence", "flute", "garden",
    "glove", "hammer", "harbor", "island", "jacket", "kettle", "ladder", "lantern", "lemon",
    "magnet", "marble", "mirror", "needle", "orange", "paddle", "pencil", "pepper", "pillow",
    "ribbon", "rocket", "saddle", "shovel", "spoon", "ticket", "tunnel", "violin", "wagon",
    "whistle", "window",
];

/// First names.
pub(super) const NAMES: [&str; 24] = [
    "Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jacob",
    "Karen", "Leon", "Maria", "Nora", "Oscar", "Paula", "Quinn", "Rosa", "Simon", "Tara", "Uwe",
    "Vera", "Walter", "Yara",
];

/// Towns.
pub(super) const TOWNS: [&str; 16] = [
    "Lisbon", "Oslo", "Vienna", "Dublin", "Prague", "Athens", "Warsaw", "Madrid", "Berlin",
    "Geneva", "Milan", "Porto", "Turin", "Bergen", "Ghent", "Basel",
];

const ADJECTIVES: [&str; 12] = [
    "quiet", "old", "narrow", "bright", "wooden", "empty", "distant", "small", "gentle", "dusty",
    "heavy", "plain",
];

const SCENES: [&str; 10] = [
    "stood beside the {}",
    "was painted like a {}",
    "belonged near the {}",
    "looked smaller than the {}",
    "was kept with the {}",
    "lay under the {}",
    "was carried past the {}",
    "reminded them of a {}",
    "was older than the {}",
    "had been made for the {}",
];

/// Sentences of about as many characters.
pub(super) fn sentences(draw: &mut Draw, characters: usize) -> Vec<String> {
    let (mut all, mut length) = (Vec::new(), 0);
    while length < characters {
        let scene = draw.one(&SCENES).replace("{}", draw.one(&NOUNS));
        let sentence = format!("The {} {} {scene}.", draw.one(&ADJECTIVES), draw.one(&NOUNS));
        length += sentence.len() + 1;
        all.push(sentence);
    }
    all
}
