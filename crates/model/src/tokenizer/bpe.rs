//! Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) on the merges of the `tokenizers` crate.

use tokenizers::Model as _;
use tokenizers::models::bpe::BPE;

use super::byte_level;
use super::pre_tokenizer::PreTokenizer;
use super::vocab::Vocab;
use crate::error::{ModelError, Result};

/// Encodes text by merging pairs of byte strings in the order the merges are listed.
pub(super) struct BpeEncoder {
    pre_tokenizer: PreTokenizer,
    model: BPE,
}

impl BpeEncoder {
    /// `merges` are lines of two tokens with a space between, the most important first.
    ///
    /// # Errors
    /// A line that is not two tokens of the vocabulary whose concatenation is a third.
    pub(super) fn new(
        vocab: &Vocab,
        merges: &[String],
        pre_tokenizer: PreTokenizer,
    ) -> Result<Self> {
        let bad_merge = |at: usize, line: &str, why: &str| ModelError::BadKey {
            key: "tokenizer.ggml.merges".to_owned(),
            expected: "pairs of tokens that join to a token".to_owned(),
            found: format!("'{line}' at index {at}: {why}"),
        };
        let mut pairs = Vec::with_capacity(merges.len());
        let mut joined = String::new();
        for (at, line) in merges.iter().enumerate() {
            // A token may itself start with a space in vocabularies that are not byte-level.
            let space = line.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(i, _)| i);
            let Some((left, right)) =
                space.and_then(|i| Some((line.get(..i)?, line.get(i + 1..)?)))
            else {
                return Err(bad_merge(at, line, "no space between two tokens"));
            };
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            for token in [left, right, &joined] {
                if vocab.id(token).is_none() {
                    return Err(bad_merge(at, line, &format!("'{token}' is not a token")));
                }
            }
            pairs.push((left.to_owned(), right.to_owned()));
        }
        let tokens =
            vocab.ids().filter_map(|id| vocab.text(id).map(|text| (text.to_owned(), id))).collect();
        let model = BPE::builder()
            .vocab_and_merges::<tokenizers::models::bpe::Vocab>(tokens, pairs)
            .ignore_merges(pre_tokenizer.ignores_merges())
            // The cache is kept for each thread and never freed; without it a megabyte of text
            // still takes well under a second.
            .cache_capacity(0)
            .build()
            .map_err(|e| ModelError::Tokenizer { what: e.to_string() })?;
        Ok(Self { pre_tokenizer, model })
    }

    /// Appends the tokens of `text`.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let mut word = String::new();
        self.pre_tokenizer.split(text, &mut |part| {
            word.clear();
            byte_level::push_encoded(part, &mut word);
            let tokens = self
                .model
                .tokenize(&word)
                .map_err(|e| ModelError::Tokenizer { what: e.to_string() })?;
            out.extend(tokens.iter().map(|token| token.id));
            Ok(())
        })
    }
}
