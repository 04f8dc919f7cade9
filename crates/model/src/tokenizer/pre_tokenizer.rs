//! Splitting a text into the words that byte-level BPE merges within.
//!
//! The patterns are those of llama.cpp's `llama-vocab.cpp`. They end in `\s+(?!\S)|\s+`: a run of
//! whitespace leaves its last character to the word after it. A look-ahead needs a backtracking
//! engine, whose time depends on the pattern and which stops at a limit; the patterns here say
//! `\s+`, run on the `regex` crate, which is linear for every text, and [`Splitter::next_match`]
//! gives the last character back.

use regex::Regex;

use crate::error::{ModelError, Result};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const LLAMA3: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";

/// The pre-tokenizers this build has, as `tokenizer.ggml.pre` names them.
const KNOWN: &[(&str, PreTokenizerKind)] = &[
    ("default", PreTokenizerKind::Default),
    ("gpt-2", PreTokenizerKind::Gpt2),
    ("smollm", PreTokenizerKind::SmolLm),
    ("qwen2", PreTokenizerKind::Qwen2),
    ("deepseek-r1-qwen", PreTokenizerKind::Qwen2),
    ("llama-bpe", PreTokenizerKind::Llama3),
    ("llama-v3", PreTokenizerKind::Llama3),
    ("llama3", PreTokenizerKind::Llama3),
    ("tekken", PreTokenizerKind::Tekken),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizerKind {
    Default,
    Gpt2,
    SmolLm,
    Qwen2,
    Llama3,
    Tekken,
}

/// Which matches give their last character back.
#[derive(Debug, Clone, Copy)]
enum GiveBack {
    /// None: the pattern has no `\s+(?!\S)`.
    No,
    /// Every run of whitespace before something else.
    Whitespace,
    /// The same, but a run that ends a line is whole (`\s*[\r\n]+` comes first in the pattern).
    WhitespaceWithinLine,
}

struct Splitter {
    regex: Regex,
    give_back: GiveBack,
}

impl Splitter {
    fn new(pattern: &str, give_back: GiveBack) -> Result<Self> {
        let regex = Regex::new(pattern)
            .map_err(|e| ModelError::Tokenizer { what: format!("pre-tokenizer pattern: {e}") })?;
        Ok(Self { regex, give_back })
    }

    /// Start and end of the first match at or after byte `from`.
    fn next_match(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        let found = self.regex.find_at(text, from)?;
        let (start, mut end) = (found.start(), found.end());
        let whole_lines = match self.give_back {
            GiveBack::No => return Some((start, end)),
            GiveBack::Whitespace => false,
            GiveBack::WhitespaceWithinLine => true,
        };
        let last = found.as_str().chars().next_back();
        if let Some(last) = last
            && end < text.len()
            && last.is_whitespace()
            && !(whole_lines && matches!(last, '\r' | '\n'))
            && found.len() > last.len_utf8()
            && found.as_str().chars().all(char::is_whitespace)
        {
            end -= last.len_utf8();
        }
        Some((start, end))
    }
}

/// Splits texts into words.
pub(super) struct PreTokenizer {
    /// Applied one after the other: each splits the pieces the one before left, matches and gaps
    /// alike, and sees nothing outside its piece.
    splitters: Vec<Splitter>,
    kind: PreTokenizerKind,
}

impl PreTokenizer {
    /// The pre-tokenizer that `tokenizer.ggml.pre` names.
    ///
    /// # Errors
    /// A name this build does not have.
    pub(super) fn from_name(name: &str) -> Result<Self> {
        let Some((_, kind)) = KNOWN.iter().find(|(known, _)| *known == name) else {
            let known: Vec<&str> = KNOWN.iter().map(|(known, _)| *known).collect();
            return Err(ModelError::Tokenizer {
                what: format!(
                    "tokenizer.ggml.pre: unknown pre-tokenizer '{name}' (known: {})",
                    known.join(", ")
                ),
            });
        };
        let parts: &[(&str, GiveBack)] = match kind {
            PreTokenizerKind::Default => &[
                (r"[\p{P}\$\+<=>\^~\|]+", GiveBack::No),
                (GPT2, GiveBack::Whitespace),
                (r"\p{N}+", GiveBack::No),
                (r"[0-9][0-9][0-9]", GiveBack::No),
            ],
            PreTokenizerKind::Gpt2 => &[(GPT2, GiveBack::Whitespace)],
            PreTokenizerKind::SmolLm => &[(r"\p{N}", GiveBack::No), (GPT2, GiveBack::Whitespace)],
            PreTokenizerKind::Qwen2 => &[(QWEN2, GiveBack::WhitespaceWithinLine)],
            PreTokenizerKind::Llama3 => &[(LLAMA3, GiveBack::WhitespaceWithinLine)],
            PreTokenizerKind::Tekken => &[(TEKKEN, GiveBack::WhitespaceWithinLine)],
        };
        let splitters =
            parts.iter().map(|(p, g)| Splitter::new(p, *g)).collect::<Result<Vec<_>>>()?;
        Ok(Self { splitters, kind: *kind })
    }

    /// Is a word that is a token taken whole, even where the merges would not build it?
    pub(super) fn ignores_merges(&self) -> bool {
        matches!(self.kind, PreTokenizerKind::Llama3 | PreTokenizerKind::Tekken)
    }

    /// Does llama.cpp start a text with BOS when the file does not say?
    pub(super) fn adds_bos(&self) -> bool {
        matches!(self.kind, PreTokenizerKind::Llama3 | PreTokenizerKind::Tekken)
    }

    /// Calls `word` with the words of `text`, in order; together they are the text. Linear time.
    pub(super) fn split(&self, text: &str, word: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        split_with(&self.splitters, text, word)
    }
}

fn split_with(
    splitters: &[Splitter],
    text: &str,
    word: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let Some((splitter, rest)) = splitters.split_first() else {
        return if text.is_empty() { Ok(()) } else { word(text) };
    };
    let mut at = 0;
    while let Some((start, end)) = splitter.next_match(text, at) {
        // Every pattern matches at least one character; an empty match would never end.
        if end <= at {
            break;
        }
        split_with(rest, text.get(at..start).unwrap_or_default(), word)?;
        split_with(rest, text.get(start..end).unwrap_or_default(), word)?;
        at = end;
    }
    split_with(rest, text.get(at..).unwrap_or_default(), word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(name: &str, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        let pre = PreTokenizer::from_name(name).unwrap();
        pre.split(text, &mut |w| {
            out.push(w.to_owned());
            Ok(())
        })
        .unwrap();
        assert_eq!(out.concat(), text);
        out
    }

    #[test]
    fn gpt2_leaves_the_last_space_to_the_word() {
        assert_eq!(words("gpt-2", "a   b  "), ["a", "  ", " b", "  "]);
        assert_eq!(words("gpt-2", "a\n\nb"), ["a", "\n", "\n", "b"]);
        assert_eq!(words("gpt-2", "it's 42%!"), ["it", "'s", " 42", "%!"]);
        assert_eq!(words("gpt-2", " \u{3000}x"), [" ", "\u{3000}", "x"]);
    }

    #[test]
    fn smollm_splits_digits_first_so_a_space_before_one_stays_alone() {
        assert_eq!(words("smollm", "In 2024, x"), ["In", " ", "2", "0", "2", "4", ",", " x"]);
        assert_eq!(words("smollm", "a  1"), ["a", "  ", "1"]);
    }

    #[test]
    fn llama3_keeps_line_ends_whole_and_digits_by_threes() {
        assert_eq!(words("llama-bpe", "a\n\n  b"), ["a", "\n\n", " ", " b"]);
        assert_eq!(words("llama-bpe", "x 12345 I'LL"), ["x", " ", "123", "45", " I", "'LL"]);
        assert_eq!(words("llama-bpe", "ok!\n\nGo"), ["ok", "!\n\n", "Go"]);
        assert_eq!(words("llama3", " \n \n x"), [" \n \n", " x"]);
    }

    #[test]
    fn qwen2_takes_digits_one_by_one() {
        assert_eq!(words("qwen2", "v 12"), ["v", " ", "1", "2"]);
    }

    #[test]
    fn default_separates_punctuation_and_digits_by_threes() {
        assert_eq!(words("default", "a+b 1234"), ["a", "+", "b", " ", "123", "4"]);
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = PreTokenizer::from_name("klingon").err().unwrap().to_string();
        assert!(error.contains("'klingon'") && error.contains("llama-bpe"), "{error}");
    }
}
