//! The vocabulary: the text, the kind and the raw bytes of every token, and text to id.
//!
//! A vocabulary has up to 262,144 tokens of a few bytes each, so the strings lie in two arenas and
//! the index holds only ids: 2 MiB for Gemma 3, where a `HashMap<String, u32>` takes 14.

use std::hash::{BuildHasher, RandomState};

use crate::error::{ModelError, Result};

/// What a token is for, as `tokenizer.ggml.token_type` numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// 1: text.
    Normal,
    /// 2: stands for text that no token covers.
    Unknown,
    /// 3: steers the model and is not part of its text (`<|im_end|>`).
    Control,
    /// 4: text that is matched before anything else.
    UserDefined,
    /// 5 and everything else: never used.
    Unused,
    /// 6: one byte, written `<0xXX>`.
    Byte,
}

impl TokenKind {
    /// Control and unknown tokens: left out of a text with the special tokens skipped.
    pub(super) fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::Unknown)
    }

    /// Is the token's text matched in the input before the rest is encoded?
    pub(super) fn is_matched_first(self) -> bool {
        matches!(self, Self::Control | Self::Unknown | Self::UserDefined)
    }
}

/// Byte strings one after the other in a single allocation.
#[derive(Default)]
struct Arena {
    data: Vec<u8>,
    ends: Vec<u32>,
}

impl Arena {
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.data.extend_from_slice(bytes);
        let end = u32::try_from(self.data.len()).map_err(|_| ModelError::Tokenizer {
            what: "the vocabulary's text is longer than 4 GiB".to_owned(),
        })?;
        self.ends.push(end);
        Ok(())
    }

    fn get(&self, id: u32) -> Option<&[u8]> {
        let at = usize::try_from(id).ok()?;
        let end = *self.ends.get(at)? as usize;
        let start = match at.checked_sub(1) {
            Some(before) => *self.ends.get(before)? as usize,
            None => 0,
        };
        self.data.get(start..end)
    }
}

/// All tokens of a model.
pub(super) struct Vocab {
    texts: Arena,
    bytes: Arena,
    kinds: Vec<TokenKind>,
    hasher: RandomState,
    /// Open addressing with linear probing, at most half full; `EMPTY` or an id.
    slots: Vec<u32>,
    max_text_bytes: usize,
}

const EMPTY: u32 = u32::MAX;

impl Vocab {
    /// An empty vocabulary that will hold `num_tokens` tokens.
    pub(super) fn with_capacity(num_tokens: usize) -> Self {
        let num_slots = num_tokens.saturating_mul(2).next_power_of_two().max(16);
        Self {
            texts: Arena::default(),
            bytes: Arena::default(),
            kinds: Vec::with_capacity(num_tokens),
            hasher: RandomState::new(),
            slots: vec![EMPTY; num_slots],
            max_text_bytes: 0,
        }
    }

    /// Adds the next token. `bytes` is what it contributes to a text. Of two tokens with the same
    /// text the later one is found, as in llama.cpp.
    ///
    /// # Errors
    /// More tokens than the capacity, or 4 GiB of text.
    pub(super) fn push(&mut self, text: &str, bytes: &[u8], kind: TokenKind) -> Result<()> {
        let id = self.kinds.len();
        if id >= self.slots.len() / 2 {
            return Err(ModelError::Tokenizer {
                what: format!("more than {id} tokens in a vocabulary announced as smaller"),
            });
        }
        self.texts.push(text.as_bytes())?;
        self.bytes.push(bytes)?;
        self.kinds.push(kind);
        self.max_text_bytes = self.max_text_bytes.max(text.len());
        if !text.is_empty() {
            let slot = self.slot_of(text.as_bytes());
            if let (Some(slot), Ok(id)) = (self.slots.get_mut(slot), u32::try_from(id)) {
                *slot = id;
            }
        }
        Ok(())
    }

    /// The slot that holds the token with this text, or the empty slot where it would be put.
    fn slot_of(&self, text: &[u8]) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = self.hasher.hash_one(text) as usize & mask;
        while let Some(&id) = self.slots.get(slot) {
            if id == EMPTY || self.texts.get(id) == Some(text) {
                break;
            }
            slot = (slot + 1) & mask;
        }
        slot
    }

    /// The id of the token written `text`.
    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.slots.get(self.slot_of(text.as_bytes())).copied().filter(|id| *id != EMPTY)
    }

    /// How the vocabulary writes a token.
    pub(super) fn text(&self, id: u32) -> Option<&str> {
        std::str::from_utf8(self.texts.get(id)?).ok()
    }

    /// What a token contributes to a text.
    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.get(id)
    }

    /// What a token is for; `Unused` for an id outside the vocabulary.
    pub(super) fn kind(&self, id: u32) -> TokenKind {
        let kind = usize::try_from(id).ok().and_then(|at| self.kinds.get(at));
        kind.copied().unwrap_or(TokenKind::Unused)
    }

    /// Bytes in memory.
    pub(super) fn num_bytes(&self) -> usize {
        let arenas = [&self.texts, &self.bytes];
        let arenas = arenas.map(|arena| arena.data.capacity() + 4 * arena.ends.capacity());
        arenas.iter().sum::<usize>() + self.kinds.capacity() + 4 * self.slots.capacity()
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// All ids in ascending order.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        0..u32::try_from(self.kinds.len()).unwrap_or(u32::MAX)
    }

    /// Length of the longest token text.
    pub(super) fn max_text_bytes(&self) -> usize {
        self.max_text_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_every_token_and_nothing_else() {
        let words: Vec<String> = (0..1000).map(|i| format!("w{i}")).collect();
        let mut vocab = Vocab::with_capacity(words.len());
        for word in &words {
            vocab.push(word, word.as_bytes(), TokenKind::Normal).unwrap();
        }
        for (id, word) in (0_u32..).zip(&words) {
            assert_eq!(vocab.id(word), Some(id));
            assert_eq!(vocab.text(id), Some(word.as_str()));
        }
        assert_eq!(vocab.id("w1000"), None);
        assert_eq!(vocab.id(""), None);
        assert_eq!(vocab.text(1000), None);
        assert_eq!(vocab.kind(1000), TokenKind::Unused);
    }

    #[test]
    fn of_equal_texts_the_last_is_found() {
        let mut vocab = Vocab::with_capacity(2);
        vocab.push("a", b"a", TokenKind::Normal).unwrap();
        vocab.push("a", b"a", TokenKind::Control).unwrap();
        assert_eq!(vocab.id("a"), Some(1));
    }

    #[test]
    fn refuses_more_tokens_than_it_has_slots_for() {
        let mut vocab = Vocab::with_capacity(8);
        for i in 0..8 {
            vocab.push(&i.to_string(), b"", TokenKind::Normal).unwrap();
        }
        assert!(vocab.push("9", b"", TokenKind::Normal).is_err());
    }
}
