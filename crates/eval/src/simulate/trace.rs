//! When requests come, how long they are, and which blocks of their prompts are equal.
//!
//! Files are in the format of Mooncake's published traces (arXiv 2407.00079): an object a line with `timestamp` in milliseconds,
//! `input_length`, `output_length` and `hash_ids`, a name for each block of the prompt that is equal only where all before it are too.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::pool::BlockId;
use crate::error::{EvalError, Result};

/// Tokens of a block in published traces.
const PUBLISHED_BLOCK: usize = 512;

/// Longest prompt or answer that is taken for one.
const MOST_TOKENS: usize = 1 << 24;

/// A request of a load.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceRequest {
    /// Seconds from the beginning.
    pub arrival: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub output_tokens: usize,
    /// Names of blocks of the prompt.
    pub blocks: Vec<u64>,
    /// Tokens in each of these.
    pub block_tokens: usize,
}

impl TraceRequest {
    /// Names of the full blocks of `block_size` tokens. Of a prompt without names all are its own.
    pub(super) fn names(&self, block_size: usize) -> Vec<BlockId> {
        let name = |block: usize| {
            // What ends within a named block is equal where that is.
            let last = (block + 1) * block_size - 1;
            let named = self.blocks.get(last / self.block_tokens.max(1))?;
            let mut hasher = DefaultHasher::new();
            (named, block).hash(&mut hasher);
            Some(hasher.finish())
        };
        (0..self.prompt_tokens / block_size.max(1)).map_while(name).collect()
    }
}

/// A line.
#[derive(Debug, Deserialize)]
struct Row {
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Reads a trace.
///
/// # Errors
/// [`EvalError::Io`]; [`EvalError::Corpus`] with the line; [`EvalError::TooShort`] for a file without one.
pub fn read_trace(path: &Path) -> Result<Vec<TraceRequest>> {
    let io = |source| EvalError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let mut requests = Vec::new();
    for (line, text) in (1..).zip(BufReader::new(file).lines()) {
        let wrong = |what: String| EvalError::Corpus { path: path.to_owned(), line, what };
        let text = text.map_err(io)?;
        if text.trim().is_empty() {
            continue;
        }
        let row: Row = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if row.input_length == 0 || !row.timestamp.is_finite() || row.timestamp < 0.0 {
            return Err(wrong("a request needs a prompt and a time".to_owned()));
        }
        if row.input_length.max(row.output_length) > MOST_TOKENS {
            return Err(wrong(format!("a request of more than {MOST_TOKENS} tokens")));
        }
        requests.push(TraceRequest {
            arrival: row.timestamp / 1000.0,
            prompt_tokens: row.input_length,
            output_tokens: row.output_length.max(1),
            blocks: row.hash_ids,
            block_tokens: PUBLISHED_BLOCK,
        });
    }
    if requests.is_empty() {
        return Err(EvalError::TooShort { what: format!("{} has no requests", path.display()) });
    }
    requests.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
    Ok(requests)
}

/// A load that is known token by token: prompts with the tokens to generate, and when they come.
pub fn of_requests(
    prompts: &[(Vec<u32>, usize)],
    due: &[Duration],
    block_size: usize,
) -> Vec<TraceRequest> {
    let of = |((tokens, output), due): (&(Vec<u32>, usize), &Duration)| {
        let mut hasher = DefaultHasher::new();
        let name = |block: &[u32]| {
            block.hash(&mut hasher);
            hasher.finish()
        };
        TraceRequest {
            arrival: due.as_secs_f64(),
            prompt_tokens: tokens.len(),
            output_tokens: *output,
            blocks: tokens.chunks_exact(block_size.max(1)).map(name).collect(),
            block_tokens: block_size,
        }
    };
    prompts.iter().zip(due).map(of).collect()
}

/// Blocks by different blocks, of some requests' blocks by name: 1 if all differ. O(blocks).
pub fn block_sharing(requests: &[Vec<u64>]) -> f64 {
    let all: usize = requests.iter().map(Vec::len).sum();
    let distinct: HashSet<u64> = requests.iter().flatten().copied().collect();
    all.max(1) as f64 / distinct.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_beginnings_have_equal_names() {
        let a: Vec<u32> = (0..100).collect();
        let mut b = a.clone();
        b[70] = 7;
        let requests =
            of_requests(&[(a, 3), (b, 4)], &[Duration::ZERO, Duration::from_millis(1500)], 32);
        let [a, b] = [0, 1].map(|i| requests[i].names(32));
        assert_eq!((a.len(), b.len()), (3, 3));
        assert_eq!(a[..2], b[..2]);
        assert_ne!(a[2], b[2]);
        assert_eq!((requests[1].arrival, requests[1].output_tokens), (1.5, 4));
        // Blocks of half the size are equal where the whole ones are.
        let [a, b] = [0, 1].map(|i| requests[i].names(16));
        assert_eq!(a[..4], b[..4]);
        assert_eq!(a.len(), 6);
    }

    #[test]
    fn files_are_read_and_what_is_wrong_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        let good = r#"{"timestamp": 2500, "input_length": 1030, "output_length": 9, "hash_ids": [4, 5, 6]}"#;
        std::fs::write(&path, format!("{good}\n\n{}", good.replace("2500", "0"))).unwrap();
        let found = read_trace(&path).unwrap();
        assert_eq!(found.iter().map(|r| r.arrival).collect::<Vec<_>>(), [0.0, 2.5]);
        assert_eq!(found[0].names(512).len(), 2);
        assert_eq!(found[0].names(32).len(), 32);
        for (line, expected) in [
            ("{", "line 1: EOF"),
            (
                r#"{"timestamp": 1, "input_length": 0, "output_length": 9}"#,
                "line 1: a request needs",
            ),
            (
                r#"{"timestamp": 1, "input_length": 99999999999, "output_length": 9}"#,
                "line 1: a request of more than 16777216",
            ),
            ("", "has no requests"),
        ] {
            std::fs::write(&path, line).unwrap();
            let error = read_trace(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
