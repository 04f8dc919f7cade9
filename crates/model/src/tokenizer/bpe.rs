//! Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM).
//!
//! The algorithm is that of the `tokenizers` crate, which tests compare with. That crate keeps every token's text twice and a map of
//! strings each way; merges of ids on the vocabulary that is there anyway left a server of 151,936 tokens 46 MiB smaller.

use std::hash::{BuildHasher, RandomState};

use super::byte_level;
use super::merger::{Joins, Merger, NONE, Symbol};
use super::pre_tokenizer::PreTokenizer;
use super::vocab::Vocab;
use crate::error::{ModelError, Result};
use crate::gguf::Strings;

/// Encodes text by merging pairs of byte strings in the order the merges are listed.
pub(super) struct BpeEncoder {
    pre_tokenizer: PreTokenizer,
    merges: Merges,
}

/// Pairs of tokens and what they join to, the most important first.
struct Merges {
    /// `[left, right, joined]`
    pairs: Vec<[u32; 3]>,
    hasher: RandomState,
    /// Open addressing with linear probing, at most half full: `NONE`, or a rank.
    slots: Vec<u32>,
}

impl Merges {
    fn with_capacity(pairs: usize) -> Self {
        let slots = pairs.saturating_mul(2).next_power_of_two().max(16);
        Self {
            pairs: Vec::with_capacity(pairs),
            hasher: RandomState::new(),
            slots: vec![NONE; slots],
        }
    }

    /// Adds the next pair; of two that are the same the later one counts, as in the `tokenizers` crate.
    fn push(&mut self, pair: [u32; 3]) {
        let (rank, slot) = (self.pairs.len() as u32, self.slot_of(pair[0], pair[1]));
        self.pairs.push(pair);
        if let Some(slot) = self.slots.get_mut(slot) {
            *slot = rank;
        }
    }

    /// The slot of a pair, or the empty one where it would be put.
    fn slot_of(&self, left: u32, right: u32) -> usize {
        let mask = self.slots.len() - 1;
        let both = (u64::from(left) << 32) | u64::from(right);
        let mut slot = self.hasher.hash_one(both) as usize & mask;
        while let Some(rank) = self.slots.get(slot) {
            let pair = self.pairs.get(*rank as usize);
            if pair.is_none_or(|pair| pair[..2] == [left, right]) {
                break;
            }
            slot = (slot + 1) & mask;
        }
        slot
    }
}

impl Joins for Merges {
    fn join(&self, left: &Symbol, right: &Symbol) -> Option<(u32, u32)> {
        let rank = *self.slots.get(self.slot_of(left.id, right.id))?;
        Some((rank, self.pairs.get(rank as usize)?[2]))
    }
}

impl BpeEncoder {
    /// `merges` are lines of two tokens with a space between, the most important first.
    ///
    /// # Errors
    /// A line that is not two tokens of the vocabulary whose concatenation is a third.
    pub(super) fn new(vocab: &Vocab, lines: &Strings, pre_tokenizer: PreTokenizer) -> Result<Self> {
        let bad_merge = |at: usize, line: &str, why: &str| ModelError::BadKey {
            key: "tokenizer.ggml.merges".to_owned(),
            expected: "pairs of tokens that join to a token".to_owned(),
            found: format!("'{line}' at index {at}: {why}"),
        };
        let mut merges = Merges::with_capacity(lines.len());
        let mut joined = String::new();
        for (at, line) in lines.iter().enumerate() {
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
            let id = |token: &str| {
                let missing = || bad_merge(at, line, &format!("'{token}' is not a token"));
                vocab.id(token).ok_or_else(missing)
            };
            merges.push([id(left)?, id(right)?, id(&joined)?]);
        }
        Ok(Self { pre_tokenizer, merges })
    }

    /// Appends the tokens of `text`. What is no character of the vocabulary is left out.
    pub(super) fn encode(&self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let (mut word, mut merger) = (String::new(), Merger::default());
        self.pre_tokenizer.split(text, &mut |part| {
            word.clear();
            byte_level::push_encoded(part, &mut word);
            let whole = self.pre_tokenizer.ignores_merges().then(|| vocab.id(&word)).flatten();
            if let Some(id) = whole {
                out.push(id);
                return Ok(());
            }
            if u32::try_from(word.len()).is_err() {
                return Err(ModelError::Tokenizer {
                    what: "a word is longer than 4 GiB".to_owned(),
                });
            }
            merger.clear();
            for (at, c) in word.char_indices() {
                if let Some(id) = vocab.id(c.encode_utf8(&mut [0; 4])) {
                    merger.push(at as u32, c.len_utf8() as u32, id);
                }
            }
            merger.run(&self.merges);
            out.extend(merger.symbols().map(|symbol| symbol.id));
            Ok(())
        })
    }

    /// Bytes in memory, without the pre-tokenizer's patterns.
    pub(super) fn num_bytes(&self) -> usize {
        12 * self.merges.pairs.capacity() + 4 * self.merges.slots.capacity()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::Model as _;
    use tokenizers::models::bpe::BPE;

    use super::super::vocab::TokenKind;
    use super::*;

    proptest! {
        /// Random merges over few characters, so that many pairs compete; longer tokens are made of earlier ones.
        #[test]
        fn equals_the_tokenizers_crate(
            joins in proptest::collection::vec((0_usize..40, 0_usize..40), 0..40),
            texts in proptest::collection::vec("[abcd]{0,30}", 1..8),
        ) {
            let mut tokens: Vec<String> = ["a", "b", "c", "d"].map(str::to_owned).into();
            let mut pairs: Vec<(String, String)> = Vec::new();
            for (left, right) in joins {
                let (left, right) = (&tokens[left % tokens.len()], &tokens[right % tokens.len()]);
                let (joined, pair) = (format!("{left}{right}"), (left.clone(), right.clone()));
                if !tokens.contains(&joined) {
                    tokens.push(joined);
                }
                pairs.push(pair);
            }
            let mut vocab = Vocab::with_capacity(tokens.len());
            for token in &tokens {
                vocab.push(token, token.as_bytes(), TokenKind::Normal).unwrap();
            }
            let lines: Strings = pairs.iter().map(|(left, right)| format!("{left} {right}")).collect();
            let pre_tokenizer = PreTokenizer::from_name("gpt-2").unwrap();
            let ours = BpeEncoder::new(&vocab, &lines, pre_tokenizer).unwrap();
            let ids = tokens.iter().cloned().zip(0..).collect();
            let theirs = BPE::builder()
                .vocab_and_merges::<tokenizers::models::bpe::Vocab>(ids, pairs)
                .build()
                .unwrap();
            for text in texts {
                let mut found = Vec::new();
                ours.encode(&vocab, &text, &mut found).unwrap();
                let expected = theirs.tokenize(&text).unwrap();
                let expected: Vec<u32> = expected.into_iter().map(|token| token.id).collect();
                prop_assert_eq!(found, expected, "{:?} of {:?}", text, lines);
            }
        }
    }
}
