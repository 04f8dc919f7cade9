//! Questions with exact answers, made here in any number and length, and files of questions that others made.
//!
//! Every task is a file; a seed, a number and a length give the same sample on every machine. Generated prompts are texts to
//! continue, written so that a model of any size knows what comes next; LongBench's and open ones are messages to a chat.

mod arithmetic;
mod code;
mod draw;
mod filler;
mod json_copy;
mod keys;
mod list;
mod longbench;
mod open;
mod passkey;
mod variables;

pub use longbench::{Longbench, read as read_longbench};

use serde::{Deserialize, Serialize};

use crate::metrics::{Metric, Reference};
use draw::Draw;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// A text to go on with.
    Text(String),
    /// A message to a chat.
    Message(String),
}

/// One question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Its name, different from all others of a run.
    pub id: String,
    /// What its score is compared with the mean of.
    pub dataset: String,
    /// Datasets that are alike.
    pub family: String,
    /// The question.
    pub question: Question,
    /// Right answers.
    pub answers: Vec<String>,
    /// Every class, where there are classes.
    pub classes: Vec<String>,
    /// How an answer is scored; not at all if only its length matters.
    pub metric: Option<Metric>,
    /// Whether only the first line of an answer is read.
    pub first_line: bool,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Texts that end an answer.
    pub stop: Vec<String>,
}

impl Sample {
    /// The score of an answer, if it has one.
    pub fn score(&self, answer: &str) -> Option<f64> {
        let Self { answers, classes, first_line, .. } = self;
        let reference = Reference { answers, classes, first_line: *first_line };
        self.metric.map(|metric| metric.score(answer, reference))
    }
}

/// What a generated sample is to be like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Tokens of the prompt, about: of four characters each.
    pub tokens: usize,
    /// Where what is asked for stands, from 0 (the beginning) to 1.
    pub depth: f64,
}

impl Shape {
    fn characters(self) -> usize {
        self.tokens.saturating_mul(4)
    }

    /// A place among `n`.
    fn place(self, n: usize) -> usize {
        (self.depth * n.saturating_sub(1) as f64).round() as usize
    }
}

/// Tasks that are made here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Generated {
    /// One number in a long text.
    Passkey,
    /// One of many numbers.
    Keys,
    /// The value of a variable that was copied from others.
    Variables,
    /// A list, as it was.
    List,
    /// One of several JSON objects, as it was.
    JsonCopy,
    /// Sums in a row.
    Arithmetic,
    /// What a program prints.
    Code,
    /// Open questions, for the length of answers.
    Open,
}

impl Generated {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Passkey,
        Self::Keys,
        Self::Variables,
        Self::List,
        Self::JsonCopy,
        Self::Arithmetic,
        Self::Code,
        Self::Open,
    ];

    /// As in names of samples.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passkey => "passkey",
            Self::Keys => "keys",
            Self::Variables => "variables",
            Self::List => "list",
            Self::JsonCopy => "json-copy",
            Self::Arithmetic => "arithmetic",
            Self::Code => "code",
            Self::Open => "open",
        }
    }

    /// The task of a name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// Tokens of prompts, about, at which a small model does some samples and not all.
    pub fn lengths(self, quick: bool) -> &'static [usize] {
        let (few, all): (&[usize], &[usize]) = match self {
            Self::Passkey => (&[800], &[400, 1600]),
            Self::Keys => (&[400], &[100, 400, 1200]),
            Self::Variables => (&[100], &[100, 200]),
            Self::List => (&[100], &[100, 400]),
            Self::JsonCopy => (&[400], &[100, 400, 1200]),
            Self::Arithmetic => (&[100], &[100, 400]),
            Self::Code => (&[400], &[400, 1200]),
            // Questions have their own length.
            Self::Open => (&[0], &[0]),
        };
        if quick { few } else { all }
    }

    fn family(self) -> &'static str {
        match self {
            Self::Passkey | Self::Keys | Self::Variables => "retrieval",
            Self::List | Self::JsonCopy => "copying",
            Self::Arithmetic | Self::Code => "reasoning",
            Self::Open => "open",
        }
    }

    /// Sample number `index` of a seed. Tasks that run out of names at some thousands of tokens stay shorter than asked.
    pub fn sample(self, seed: u64, index: usize, shape: Shape) -> Sample {
        let mut draw = Draw::new(seed, self.name(), index);
        let mut sample = match self {
            Self::Passkey => passkey::sample(&mut draw, shape),
            Self::Keys => keys::sample(&mut draw, shape),
            Self::Variables => variables::sample(&mut draw, shape),
            Self::List => list::sample(&mut draw, shape),
            Self::JsonCopy => json_copy::sample(&mut draw, shape),
            Self::Arithmetic => arithmetic::sample(&mut draw, shape),
            Self::Code => code::sample(&mut draw, shape),
            Self::Open => open::sample(&mut draw, index),
        };
        sample.id = format!("{}-{index}", self.name());
        sample.dataset = self.name().to_owned();
        sample.family = self.family().to_owned();
        sample
    }
}

/// A text to go on with, answered in one line.
fn one_line(text: String, answer: String, metric: Metric, max_tokens: usize) -> Sample {
    Sample {
        question: Question::Text(text),
        answers: vec![answer],
        metric: Some(metric),
        first_line: true,
        max_tokens,
        stop: vec!["\n".to_owned()],
        ..EMPTY
    }
}

/// What the others are made from.
const EMPTY: Sample = Sample {
    id: String::new(),
    dataset: String::new(),
    family: String::new(),
    question: Question::Text(String::new()),
    answers: Vec::new(),
    classes: Vec::new(),
    metric: None,
    first_line: false,
    max_tokens: 0,
    stop: Vec::new(),
};

#[cfg(test)]
mod tests {
    use super::*;

    fn text(sample: &Sample) -> &str {
        match &sample.question {
            Question::Text(text) | Question::Message(text) => text,
        }
    }

    #[test]
    fn samples_are_the_same_for_a_seed_and_differ_otherwise() {
        let shape = Shape { tokens: 400, depth: 0.3 };
        for task in Generated::ALL {
            let [a, b] = [0, 1].map(|index| task.sample(7, index, shape));
            assert_eq!(a, task.sample(7, 0, shape));
            assert_ne!(a.question, b.question, "{}", task.name());
            assert_ne!(a.id, b.id);
            if task != Generated::Open {
                assert_ne!(a.question, task.sample(8, 0, shape).question, "{}", task.name());
            }
        }
    }

    #[test]
    fn prompts_are_about_as_long_as_asked_and_answers_are_right() {
        for task in Generated::ALL.into_iter().filter(|task| *task != Generated::Open) {
            for tokens in [200, 800, 2000] {
                for depth in [0.0, 0.5, 1.0] {
                    let sample = task.sample(3, 5, Shape { tokens, depth });
                    let characters = text(&sample).len();
                    let range = 4 * tokens * 7 / 10..4 * tokens * 13 / 10;
                    assert!(range.contains(&characters), "{}: {characters}, {tokens}", task.name());
                    let answer = sample.answers.join(", ");
                    assert_eq!(sample.score(&answer), Some(1.0), "{}: {answer}", task.name());
                    assert_eq!(sample.score("nothing of it"), Some(0.0), "{}", task.name());
                    assert!(sample.max_tokens > 0);
                }
            }
        }
    }

    #[test]
    fn very_long_prompts_end_where_names_do() {
        for task in Generated::ALL {
            let sample = task.sample(1, 0, Shape { tokens: 20_000, depth: 0.5 });
            let answer = sample.answers.join(", ");
            assert!(sample.score(&answer).is_none_or(|score| score == 1.0), "{}", task.name());
        }
    }

    #[test]
    fn depth_says_where_it_stands() {
        for task in [Generated::Passkey, Generated::Keys] {
            let at = |depth| {
                let sample = task.sample(3, 1, Shape { tokens: 1000, depth });
                let text = text(&sample);
                text.find(&sample.answers[0]).unwrap() as f64 / text.len() as f64
            };
            let [early, middle, late] = [0.0, 0.5, 1.0].map(at);
            assert!(early < 0.2 && (0.35..0.65).contains(&middle) && late > 0.8, "{}", task.name());
        }
    }
}
