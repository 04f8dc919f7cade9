//! Texts to measure on: those that come with the program, `.txt` files (one text) and `.jsonl` files (an
//! object a line, its text in `context` or `text`; LongBench's `NEWLINE_CHAR` is read as a line break).

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use crate::error::{EvalError, Result};

/// How [`Corpus::Embedded`] is written.
const EMBEDDED: &str = "embedded";

/// Which texts to measure on, as a user names them: `embedded`, or else a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Corpus {
    /// The texts that come with the program.
    Embedded,
    /// A file; one that is called `embedded` is written `./embedded`.
    File(PathBuf),
}

impl Corpus {
    /// Every text, in order.
    ///
    /// # Errors
    /// As [`read`].
    pub fn texts(&self) -> Result<Vec<String>> {
        match self {
            Self::Embedded => Ok(embedded()),
            Self::File(path) => read(path),
        }
    }
}

impl FromStr for Corpus {
    type Err = Infallible;

    fn from_str(name: &str) -> Result<Self, Infallible> {
        Ok(if name == EMBEDDED { Self::Embedded } else { Self::File(PathBuf::from(name)) })
    }
}

impl fmt::Display for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str(EMBEDDED),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Every text that comes with the program, in order.
pub fn embedded() -> Vec<String> {
    kvasir_model::corpus::embedded().iter().map(|text| text.text.to_owned()).collect()
}

#[derive(Deserialize)]
struct Row {
    context: Option<String>,
    text: Option<String>,
}

/// Reads every text of a file, in order.
///
/// # Errors
/// An unreadable file; a line that is no JSON object, or has neither field, by its number.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read_to_string(path)
        .map_err(|source| EvalError::Io { path: path.to_owned(), source })?;
    if path.extension().is_none_or(|e| e != "jsonl") {
        return Ok(vec![bytes]);
    }
    let lines = bytes.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let bad = |what: String| EvalError::Corpus { path: path.to_owned(), line: i + 1, what };
            let row: Row = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
            let text = row.context.or(row.text);
            let text = text.ok_or_else(|| bad("neither 'context' nor 'text'".to_owned()))?;
            Ok(text.replace("NEWLINE_CHAR", "\n"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_corpora() {
        let parse = |name: &str| name.parse::<Corpus>().unwrap();
        assert_eq!(parse("embedded"), Corpus::Embedded);
        assert_eq!(parse("./embedded"), Corpus::File("./embedded".into()));
        for name in ["embedded", "a/b.jsonl"] {
            assert_eq!(parse(name).to_string(), name);
        }
    }

    #[test]
    fn the_embedded_corpus_has_texts() {
        let texts = Corpus::Embedded.texts().unwrap();
        assert!(!texts.is_empty() && texts.iter().all(|text| !text.trim().is_empty()));
        assert!(Corpus::File("/no/such/file".into()).texts().is_err());
    }

    #[test]
    fn jsonl_takes_either_field_and_breaks_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, "{\"context\":\"a NEWLINE_CHAR b\",\"x\":1}\n\n{\"text\":\"c\"}\n")
            .unwrap();
        assert_eq!(read(&path).unwrap(), ["a \n b", "c"]);
        std::fs::write(&path, "{\"text\":\"c\"}\n{\"x\":1}\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.ends_with("line 2: neither 'context' nor 'text'"), "{error}");
        std::fs::write(&path, "{\"text\":").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 1: EOF"));
    }

    #[test]
    fn other_files_are_one_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        assert_eq!(read(&path).unwrap(), ["one\ntwo\n"]);
        assert!(matches!(read(&dir.path().join("none.txt")), Err(EvalError::Io { .. })));
    }
}
