//! Open questions: no answer is right, but answers have a length.

use super::draw::Draw;
use super::{EMPTY, Question, Sample, filler};

const ASKED: [&str; 16] = [
    "In one sentence: what is a {a} for?",
    "Write a short story about a {a} and a {b}.",
    "Name three things that are found beside a {a}.",
    "Tell {name} in two sentences how a {a} differs from a {b}.",
    "What would you do with a {a} and a {b} in {town}? Give three ideas.",
    "Answer with one sentence: is a {a} heavier than a {b}?",
    "Write a short poem about a {a}.",
    "Write one line for a postcard from {town}.",
    "Explain to a child what a {a} is for, and how it differs from a {b}.",
    "Suggest a name for a shop in {town} that sells a {a} and a {b}.",
    "Write a letter from {name} to a friend in {town} about a lost {a}.",
    "Complete the sentence: {name} went to {town} to buy a {a}, but",
    "{name} wants to learn to make a {a}. What are the steps?",
    "Which is more useful on a journey to {town}, a {a} or a {b}? Answer briefly.",
    "Describe a day in {town}, beginning with a {a}.",
    "Give {name} one piece of advice on choosing a {a}.",
];

/// Most tokens of an answer.
const MOST: usize = 256;

pub(super) fn sample(draw: &mut Draw, index: usize) -> Sample {
    let words = draw.some(2, &filler::NOUNS);
    let text = ASKED[index % ASKED.len()]
        .replace("{a}", words[0])
        .replace("{b}", words[1])
        .replace("{name}", draw.one(&filler::NAMES))
        .replace("{town}", draw.one(&filler::TOWNS));
    Sample { question: Question::Message(text), max_tokens: MOST, ..EMPTY }
}
