//! Files in LongBench's format (arXiv 2308.14508): an object a line with `context`, `input`, `answers`, `dataset` and, for classes,
//! `all_classes`. The dataset's name says what is asked and how answers are scored. What is asked is in words of our own.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;

use serde::Deserialize;

use super::{EMPTY, Question, Sample};
use crate::error::{EvalError, Result};
use crate::metrics::Metric;

/// A file, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Longbench {
    /// The file.
    pub path: PathBuf,
    /// Most samples; they are spread evenly over the file.
    pub samples: usize,
    /// Tokens of a context, about (four characters each): of longer ones the middle is left out, as published.
    pub context_tokens: usize,
}

/// A line.
#[derive(Debug, Deserialize)]
struct Row {
    context: String,
    #[serde(default)]
    input: String,
    #[serde(default)]
    answers: Vec<String>,
    dataset: String,
    #[serde(default)]
    all_classes: Option<Vec<String>>,
}

/// What a dataset wants.
struct Kind {
    name: &'static str,
    family: &'static str,
    metric: Metric,
    max_tokens: usize,
    /// `{}` is the input.
    asked: &'static str,
}

const SUMMARY: &str = "Write a summary of the text above.";
const QUESTION: &str = "Answer this question by the text above, with as few words as you can: {}";

const KINDS: [Kind; 16] = [
    kind("narrativeqa", "qa", Metric::F1, 128, QUESTION),
    kind("qasper", "qa", Metric::F1, 128, QUESTION),
    kind("multifieldqa_en", "qa", Metric::F1, 64, QUESTION),
    kind("hotpotqa", "qa", Metric::F1, 32, QUESTION),
    kind("2wikimqa", "qa", Metric::F1, 32, QUESTION),
    kind("musique", "qa", Metric::F1, 32, QUESTION),
    kind("gov_report", "summarization", Metric::RougeL, 512, SUMMARY),
    kind("qmsum", "summarization", Metric::RougeL, 512, "Answer by the meeting above: {}"),
    kind("multi_news", "summarization", Metric::RougeL, 512, SUMMARY),
    kind("samsum", "few-shot", Metric::RougeL, 128, "{}"),
    kind("trec", "few-shot", Metric::Classes, 64, "{}"),
    kind("triviaqa", "few-shot", Metric::F1, 32, "{}"),
    kind(
        "passage_retrieval_en",
        "synthetic",
        Metric::Paragraph,
        32,
        "Which of the paragraphs above does this summarise? Answer with \"Paragraph\" and its number.\n\n{}",
    ),
    kind(
        "passage_count",
        "synthetic",
        Metric::Count,
        32,
        "How many different paragraphs are there above? Answer with the number alone.",
    ),
    kind("lcc", "code", Metric::Edit, 64, "{}"),
    kind("repobench-p", "code", Metric::Edit, 64, "{}"),
];

const fn kind(
    name: &'static str,
    family: &'static str,
    metric: Metric,
    max_tokens: usize,
    asked: &'static str,
) -> Kind {
    Kind { name, family, metric, max_tokens, asked }
}

/// The samples of a file.
///
/// # Errors
/// [`EvalError::Io`]; [`EvalError::Corpus`], with the line: one that is no object with a context, one without answers, a
/// dataset that is not known; [`EvalError::TooShort`] for a file without a line.
pub fn read(file: &Longbench) -> Result<Vec<Sample>> {
    let Longbench { path, samples, context_tokens } = file;
    let io = |source| EvalError::Io { path: path.clone(), source };
    let opened = File::open(path).map_err(io)?;
    let mut rows = Vec::new();
    for (line, text) in (1..).zip(BufReader::new(opened).lines()) {
        let wrong = |what| EvalError::Corpus { path: path.clone(), line, what };
        let text = text.map_err(io)?;
        if text.trim().is_empty() {
            continue;
        }
        let row: Row = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if row.answers.iter().all(|answer| answer.trim().is_empty()) {
            return Err(wrong("no answers".to_owned()));
        }
        let Some(kind) = KINDS.iter().find(|kind| kind.name == row.dataset) else {
            let known = KINDS.map(|kind| kind.name).join(", ");
            return Err(wrong(format!("dataset '{}' is none of {known}", row.dataset)));
        };
        rows.push(sample(row, kind, rows.len(), 4 * context_tokens));
    }
    if rows.is_empty() {
        return Err(EvalError::TooShort { what: format!("{} has no samples", path.display()) });
    }
    let (wanted, all) = ((*samples).min(rows.len()), rows.len());
    let mut rows: Vec<Option<Sample>> = rows.into_iter().map(Some).collect();
    Ok((0..wanted).filter_map(|i| rows[i * all / wanted].take()).collect())
}

fn sample(row: Row, kind: &Kind, number: usize, characters: usize) -> Sample {
    let context = without_middle(&row.context.replace("NEWLINE_CHAR", "\n"), characters);
    let asked = kind.asked.replace("{}", &row.input);
    let few_shot = kind.family == "few-shot";
    let question = match kind.family {
        // These go on as the text does.
        "code" | "few-shot" => Question::Text(format!("{context}\n{asked}")),
        _ => Question::Message(format!("{context}\n\n{asked}")),
    };
    Sample {
        id: format!("{}-{number}", kind.name),
        dataset: kind.name.to_owned(),
        family: kind.family.to_owned(),
        question,
        answers: row.answers,
        classes: row.all_classes.unwrap_or_default(),
        metric: Some(kind.metric),
        first_line: few_shot,
        max_tokens: kind.max_tokens,
        ..EMPTY
    }
}

/// The first and the last half of as many characters.
fn without_middle(text: &str, characters: usize) -> String {
    let count = text.chars().count();
    if count <= characters {
        return text.to_owned();
    }
    let first: String = text.chars().take(characters / 2).collect();
    let last: String = text.chars().skip(count - characters / 2).collect();
    format!("{first}{last}")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn file(folder: &Path, lines: &str) -> Longbench {
        let path = folder.join("some.jsonl");
        std::fs::write(&path, lines).unwrap();
        Longbench { path, samples: 2, context_tokens: 10 }
    }

    #[test]
    fn datasets_say_what_is_asked_and_how_it_is_scored() {
        let folder = tempfile::tempdir().unwrap();
        let row = |dataset: &str, classes: &str| {
            format!(
                r#"{{"context":"{}","input":"Who?","answers":["Ann"],"dataset":"{dataset}","all_classes":{classes}}}"#,
                "ab".repeat(50)
            )
        };
        let lines = [row("hotpotqa", "null"), row("lcc", "null"), row("trec", r#"["Ann","Bo"]"#)];
        let mut wanted = file(folder.path(), &lines.join("\n\n"));
        // Every second of three: the first and the second.
        let found = read(&wanted).unwrap();
        assert_eq!([&*found[0].id, &found[1].id], ["hotpotqa-0", "lcc-1"]);
        let Question::Message(text) = &found[0].question else { panic!() };
        assert!(text.starts_with(&"ab".repeat(20)) && text.ends_with("you can: Who?"), "{text}");
        assert_eq!(text.split("\n\n").next().map(str::len), Some(40));
        assert_eq!(found[1].question, Question::Text(format!("{}\nWho?", "ab".repeat(20))));
        wanted.samples = 9;
        let found = read(&wanted).unwrap();
        assert_eq!(found.len(), 3);
        assert_eq!(found[2].score("Ann or Bo"), Some(0.5));
        assert_eq!(found[0].score("ann!"), Some(1.0));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let good = r#"{"context":"x","answers":["y"],"dataset":"lcc"}"#;
        for (line, expected) in [
            (r#"{"context":"x","answers":[],"dataset":"lcc"}"#, "line 2: no answers"),
            (r#"{"context":"x","dataset":"lcc"}"#, "line 2: no answers"),
            (
                r#"{"context":"x","answers":["y"],"dataset":"mine"}"#,
                "line 2: dataset 'mine' is none of narrativeqa, ",
            ),
            (r#"{"answers":["y"],"dataset":"lcc"}"#, "line 2: missing field `context`"),
            ("{", "line 2: EOF"),
        ] {
            let error = read(&file(folder.path(), &format!("{good}\n{line}"))).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let empty = read(&file(folder.path(), "\n")).unwrap_err().to_string();
        assert!(empty.ends_with("has no samples"), "{empty}");
        let missing = Longbench { path: folder.path().join("none"), samples: 1, context_tokens: 1 };
        assert!(read(&missing).is_err());
    }
}
