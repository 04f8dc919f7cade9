//! The requests of a load. The same seed gives the same requests on every machine.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::corpus::Corpus;
use crate::error::{EvalError, Result};
use crate::quality::{Encode, Workload};
use crate::random::random_tokens;

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dataset {
    /// Random tokens.
    Random {
        /// Tokens of each prompt.
        input_len: usize,
    },
    /// Random tokens of which the first are one of a few prefixes, in turn.
    PrefixRepetition {
        /// Tokens of each prompt, prefix included.
        input_len: usize,
        /// Tokens of a prefix.
        prefix_len: usize,
        /// Different prefixes.
        num_prefixes: usize,
    },
    /// Passages of a corpus in random order, as in [`Workload::Retrieval`]: prompts share content but
    /// hardly a prefix.
    Retrieval {
        /// Passages in a prompt.
        passages: usize,
        /// Passages to draw from.
        passages_total: usize,
        /// Tokens of a passage. Blocks of passages are equal where this is a multiple of the block size.
        passage_len: usize,
        /// Whose texts begin with the passages.
        corpus: Corpus,
    },
    /// A file of objects, a line each: `prompt` is a text or a list of token ids, `output_tokens` says how
    /// many to generate if it is there. Lines come in order, and again from the first when they run out.
    Jsonl {
        /// The file.
        path: PathBuf,
    },
}

/// What to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids, special ones included.
    Tokens(Vec<u32>),
    /// Text that a tokenizer turns into token ids, with the special ones that it adds.
    Text(String),
}

/// One request of a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// Tokens to generate.
    pub output_len: usize,
}

/// How many requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadSize {
    /// Requests.
    pub num_prompts: usize,
    /// Tokens to generate for each that does not say.
    pub output_len: usize,
    /// Of everything random.
    pub seed: u64,
}

impl Dataset {
    /// As the command line and reports call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Random { .. } => "random",
            Self::PrefixRepetition { .. } => "prefix-repetition",
            Self::Retrieval { .. } => "retrieval",
            Self::Jsonl { .. } => "jsonl",
        }
    }

    /// The requests of a load. Random tokens are below `vocab_size`.
    ///
    /// # Errors
    /// Settings that make no sense; a file that cannot be read; too few long texts; what `encode` says.
    pub fn requests(
        &self,
        size: LoadSize,
        vocab_size: usize,
        encode: &mut Encode<'_>,
    ) -> Result<Vec<LoadRequest>> {
        let LoadSize { num_prompts, output_len, seed } = size;
        // Seeds far apart: neighbours of one load are not those of the next.
        let seed_of = |i: usize| seed.wrapping_mul(1 << 20).wrapping_add(i as u64 + 1);
        let random = |len, i| random_tokens(len, vocab_size, seed_of(i));
        let request = |tokens| LoadRequest { prompt: Prompt::Tokens(tokens), output_len };
        match self {
            Self::Random { input_len } => {
                Ok((0..num_prompts).map(|i| request(random(*input_len, i))).collect())
            }
            Self::PrefixRepetition { input_len, prefix_len, num_prefixes } => {
                let Some(rest) = input_len.checked_sub(*prefix_len).filter(|rest| *rest > 0) else {
                    let what = format!(
                        "a prompt of {input_len} tokens has no token of its own after a prefix of \
                         {prefix_len}"
                    );
                    return Err(EvalError::Settings { what });
                };
                // Numbers that no request of a load reaches.
                let prefixes: Vec<_> =
                    (0..*num_prefixes).map(|i| random(*prefix_len, (1 << 19) + i)).collect();
                let in_turn = prefixes.iter().cycle().take(num_prompts).enumerate();
                Ok(in_turn
                    .map(|(i, p)| request([p.as_slice(), &random(rest, i)].concat()))
                    .collect())
            }
            Self::Retrieval { passages, passages_total, passage_len, corpus } => {
                let workload = Workload::Retrieval {
                    contexts: num_prompts,
                    passages: *passages,
                    passages_total: *passages_total,
                    passage_len: *passage_len,
                    seed,
                };
                workload.check(1)?;
                let prompts = workload.contexts(encode, &corpus.texts()?, 0)?;
                let cut = |mut tokens: Vec<u32>| {
                    tokens.truncate(workload.context_len());
                    request(tokens)
                };
                Ok(prompts.into_iter().map(cut).collect())
            }
            Self::Jsonl { path } => {
                let lines = read(path, output_len)?;
                Ok(lines.iter().cycle().take(num_prompts).cloned().collect())
            }
        }
    }
}

impl LoadRequest {
    /// Token ids of the prompt.
    ///
    /// # Errors
    /// What `encode` says of a text.
    pub fn tokens(&self, encode: &mut Encode<'_>) -> Result<Vec<u32>> {
        match &self.prompt {
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Text(text) => encode(text, true),
        }
    }
}

#[derive(Deserialize)]
struct Line {
    prompt: LinePrompt,
    output_tokens: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum LinePrompt {
    Text(String),
    Tokens(Vec<u32>),
}

fn read(path: &Path, output_len: usize) -> Result<Vec<LoadRequest>> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| EvalError::Io { path: path.to_owned(), source })?;
    let mut requests = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |what: String| EvalError::Corpus { path: path.to_owned(), line: i + 1, what };
        let line: Line = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
        let output_len = line.output_tokens.unwrap_or(output_len);
        if output_len == 0 {
            return Err(bad("'output_tokens' must be at least 1".to_owned()));
        }
        let prompt = match line.prompt {
            LinePrompt::Text(text) => Prompt::Text(text),
            LinePrompt::Tokens(tokens) => Prompt::Tokens(tokens),
        };
        requests.push(LoadRequest { prompt, output_len });
    }
    if requests.is_empty() {
        return Err(EvalError::TooShort { what: format!("{} has no prompts", path.display()) });
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: LoadSize = LoadSize { num_prompts: 7, output_len: 5, seed: 3 };

    /// Token ids are bytes, after a BOS of 256.
    fn encode(text: &str, add_special: bool) -> Result<Vec<u32>> {
        let bos = add_special.then_some(256);
        Ok(bos.into_iter().chain(text.bytes().map(u32::from)).collect())
    }

    fn requests(dataset: &Dataset, size: LoadSize) -> Result<Vec<LoadRequest>> {
        dataset.requests(size, 1000, &mut encode)
    }

    fn tokens(dataset: &Dataset, size: LoadSize) -> Vec<Vec<u32>> {
        let requests = requests(dataset, size).unwrap();
        requests.iter().map(|request| request.tokens(&mut encode).unwrap()).collect()
    }

    #[test]
    fn a_seed_fixes_every_dataset_and_more_requests_keep_the_first() {
        let retrieval = Dataset::Retrieval {
            passages: 2,
            passages_total: 4,
            passage_len: 32,
            corpus: Corpus::Embedded,
        };
        let repetition =
            Dataset::PrefixRepetition { input_len: 64, prefix_len: 50, num_prefixes: 3 };
        for dataset in [Dataset::Random { input_len: 64 }, repetition, retrieval] {
            let first = tokens(&dataset, SIZE);
            assert_eq!(first.len(), 7);
            assert!(first.iter().all(|prompt| prompt.len() == 64), "{dataset:?}");
            assert_eq!(first, tokens(&dataset, LoadSize { num_prompts: 9, ..SIZE })[..7]);
            assert_ne!(first, tokens(&dataset, LoadSize { seed: 4, ..SIZE }));
            assert!(requests(&dataset, SIZE).unwrap().iter().all(|r| r.output_len == 5));
        }
    }

    #[test]
    fn prefixes_come_in_turn_and_the_rest_differs() {
        let dataset = Dataset::PrefixRepetition { input_len: 12, prefix_len: 8, num_prefixes: 3 };
        let prompts = tokens(&dataset, SIZE);
        for (i, a) in prompts.iter().enumerate() {
            for (j, b) in prompts.iter().enumerate().skip(i + 1) {
                assert_eq!(a[..8] == b[..8], i % 3 == j % 3, "{i} {j}");
                assert_ne!(a[8..], b[8..]);
            }
        }
        let all = Dataset::PrefixRepetition { input_len: 8, prefix_len: 8, num_prefixes: 3 };
        let error = requests(&all, SIZE).unwrap_err().to_string();
        assert_eq!(error, "a prompt of 8 tokens has no token of its own after a prefix of 8");
    }

    #[test]
    fn retrieval_prompts_are_passages_with_bos_in_the_first_place() {
        let dataset = |passages| Dataset::Retrieval {
            passages,
            passages_total: 4,
            passage_len: 32,
            corpus: Corpus::Embedded,
        };
        let texts = Corpus::Embedded.texts().unwrap();
        for prompt in tokens(&dataset(3), SIZE) {
            assert_eq!((prompt.len(), prompt[0]), (96, 256));
            for passage in prompt.chunks(32) {
                let known = |text: &&String| {
                    text.bytes().map(u32::from).skip(1).take(31).eq(passage[1..].iter().copied())
                };
                assert_eq!(texts.iter().filter(known).count(), 1);
            }
        }
        assert!(requests(&dataset(5), SIZE).is_err());
    }

    #[test]
    fn lines_of_a_file_come_in_order_and_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        let dataset = Dataset::Jsonl { path: path.clone() };
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write("{\"prompt\":\"ab\",\"output_tokens\":2}\n\n{\"prompt\":[7,8],\"x\":1}\n");
        let found = requests(&dataset, LoadSize { num_prompts: 3, ..SIZE }).unwrap();
        let text = LoadRequest { prompt: Prompt::Text("ab".into()), output_len: 2 };
        let ids = LoadRequest { prompt: Prompt::Tokens(vec![7, 8]), output_len: 5 };
        assert_eq!(found, [text.clone(), ids, text]);
        assert_eq!(found[0].tokens(&mut encode).unwrap(), [256, 97, 98]);
        for (content, message) in [
            ("", "has no prompts"),
            ("{\"prompt\":\"a\"}\n{\"text\":\"a\"}", "line 2: missing field `prompt`"),
            ("{\"prompt\":[-1]}", "line 1: data did not match"),
            ("{\"prompt\":\"a\",\"output_tokens\":0}", "line 1: 'output_tokens' must be"),
        ] {
            write(content);
            let error = requests(&dataset, SIZE).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
