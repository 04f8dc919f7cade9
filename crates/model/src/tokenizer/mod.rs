//! Text to tokens and back.
//!
//! A [`Tokenizer`] comes from the metadata of a GGUF file, then it encodes as llama.cpp does with
//! `parse_special`, or from a folder with `tokenizer.json`, then as transformers does. Either way a
//! text is the concatenation of the bytes of its tokens ([`Tokenizer::token_bytes`]), which is what
//! [`Tokenizer::decode`] and [`TokenDecoder`] give back.

mod bpe;
mod byte_level;
mod decoder;
mod end_of_generation;
mod gguf;
mod hf;
#[cfg(test)]
mod hf_tests;
mod merger;
mod pre_tokenizer;
mod special;
mod spm;
#[cfg(test)]
mod tests;
mod vocab;

pub use decoder::TokenDecoder;

use bpe::BpeEncoder;
use special::{Fragment, SpecialMatcher};
use spm::SpmEncoder;
use vocab::Vocab;

use crate::error::{ModelError, Result};

/// A model's tokenizer. Shared between threads; nothing in it changes.
pub struct Tokenizer {
    vocab: Vocab,
    encoder: Encoder,
    bos_id: Option<u32>,
    /// All tokens that end a generation; the declared EOS first.
    eos_ids: Vec<u32>,
    add_bos: AddToken,
    add_eos: AddToken,
    strip_leading_space: bool,
    chat_template: Option<String>,
}

/// What `encode(.., add_special = true)` does with BOS at the start, or EOS at the end, of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AddToken {
    /// Make sure it is there.
    Yes,
    /// Make sure it was not added.
    No,
    /// As the post-processor of `tokenizer.json` left it.
    AsEncoded,
}

enum Encoder {
    Bpe { encoder: Box<BpeEncoder>, special: SpecialMatcher },
    Spm { encoder: Box<SpmEncoder>, special: SpecialMatcher },
    Json(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// Encodes `text`. Control, unknown and user-defined tokens written out in it become those
    /// tokens. With `add_special`, BOS is put first and EOS last if the model wants them; BOS is not
    /// doubled when the text already starts with it. Time is linear in the length of the text (up
    /// to a logarithm), except that a `tokenizer.json` may bring patterns of its own.
    ///
    /// # Errors
    /// A text that the vocabulary cannot express, or that a pattern of `tokenizer.json` gives up on.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let mut ids = match &self.encoder {
            Encoder::Bpe { encoder, special } => {
                let mut ids = Vec::with_capacity(text.len() / 3);
                for fragment in special.fragments(text) {
                    match fragment {
                        Fragment::Token(id) => ids.push(id),
                        Fragment::Text(text) => encoder.encode(&self.vocab, text, &mut ids)?,
                    }
                }
                ids
            }
            Encoder::Spm { encoder, special } => {
                let mut ids = Vec::with_capacity(text.len() / 3);
                let mut after_special = true;
                for fragment in special.fragments(text) {
                    match fragment {
                        Fragment::Token(id) => ids.push(id),
                        Fragment::Text(text) => {
                            encoder.encode(&self.vocab, text, after_special, &mut ids)?;
                        }
                    }
                    after_special = matches!(fragment, Fragment::Token(_));
                }
                ids
            }
            Encoder::Json(encoder) => encoder
                .encode_fast(text, add_special)
                .map_err(|e| ModelError::Tokenizer { what: e.to_string() })?
                .get_ids()
                .to_vec(),
        };
        if add_special {
            self.add_special_tokens(&mut ids, text);
        }
        Ok(ids)
    }

    fn add_special_tokens(&self, ids: &mut Vec<u32>, text: &str) {
        if let Some(bos) = self.bos_id {
            let written = self.token_str(bos).map_or(0, |bos| leading_count(text, bos));
            let encoded = ids.iter().take_while(|id| **id == bos).count();
            match self.add_bos {
                AddToken::Yes if encoded == 0 => ids.insert(0, bos),
                AddToken::No if encoded > written => {
                    ids.remove(0);
                }
                // The post-processor of a tokenizer.json does not look whether BOS is there.
                AddToken::Yes | AddToken::AsEncoded if written > 0 && encoded > written => {
                    ids.remove(0);
                }
                AddToken::Yes | AddToken::No | AddToken::AsEncoded => {}
            }
        }
        if let Some(eos) = self.eos_ids.first().copied() {
            let ends_with = ids.last() == Some(&eos);
            let written = self.token_str(eos).is_some_and(|eos| text.ends_with(eos));
            match self.add_eos {
                AddToken::Yes if !ends_with => ids.push(eos),
                AddToken::No if ends_with && !written => {
                    ids.pop();
                }
                AddToken::Yes | AddToken::No | AddToken::AsEncoded => {}
            }
        }
    }

    /// The text of `ids`: exactly their bytes one after the other, invalid UTF-8 replaced by
    /// U+FFFD, and one space at the start dropped if the model adds one there. `skip_special`
    /// leaves out the tokens for which [`Self::is_special`] holds. Ids outside the vocabulary add
    /// nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for id in ids {
            bytes.extend_from_slice(self.piece(*id, skip_special));
        }
        let text = match bytes.strip_prefix(b" ") {
            Some(rest) if self.strip_leading_space => rest,
            _ => &bytes,
        };
        String::from_utf8_lossy(text).into_owned()
    }

    /// The raw bytes that a token contributes to a text: a special token its name, a byte token its
    /// byte (which need not be UTF-8), an unused token none. `None` outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.vocab.bytes(id)
    }

    /// How the vocabulary writes a token (`Ġthe`, `▁the`, `<0x0A>`). For display and for
    /// [`Self::token_to_id`]; its text is [`Self::token_bytes`].
    pub fn token_str(&self, id: u32) -> Option<&str> {
        self.vocab.text(id)
    }

    /// The token that the vocabulary writes as `text`.
    pub fn token_to_id(&self, text: &str) -> Option<u32> {
        self.vocab.id(text)
    }

    /// Is `id` a control or unknown token, which is no part of the text a model writes?
    pub fn is_special(&self, id: u32) -> bool {
        self.vocab.kind(id).is_special()
    }

    /// Number of tokens; every id is below it. The model's logits may be more (padding).
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Bytes in memory; `None` for a `tokenizer.json`, whose structures belong to another crate. Patterns are left out: some hundred KiB.
    pub fn num_bytes(&self) -> Option<usize> {
        let encoder = match &self.encoder {
            Encoder::Bpe { encoder, special } => encoder.num_bytes() + special.num_bytes(),
            Encoder::Spm { encoder, special } => encoder.num_bytes() + special.num_bytes(),
            Encoder::Json(_) => return None,
        };
        Some(self.vocab.num_bytes() + encoder)
    }

    /// The token that starts a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// All tokens that end a generation: those the model declares (EOS, end of turn, end of
    /// message), the EOS first, then control tokens known to mean the same by their name.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The model's chat template (Jinja source).
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Does `decode` drop one space at the start of a text?
    fn strips_leading_space(&self) -> bool {
        self.strip_leading_space
    }

    fn piece(&self, id: u32, skip_special: bool) -> &[u8] {
        if skip_special && self.is_special(id) {
            return &[];
        }
        self.token_bytes(id).unwrap_or_default()
    }
}

/// How often `text` starts with `token`.
fn leading_count(text: &str, token: &str) -> usize {
    let mut count = 0;
    let mut rest = text;
    while let Some(after) = rest.strip_prefix(token).filter(|_| !token.is_empty()) {
        count += 1;
        rest = after;
    }
    count
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match &self.encoder {
            Encoder::Bpe { .. } => "byte-level BPE",
            Encoder::Spm { .. } => "SentencePiece BPE",
            Encoder::Json(_) => "tokenizer.json",
        };
        f.debug_struct("Tokenizer")
            .field("kind", &kind)
            .field("vocab_size", &self.vocab_size())
            .field("bos_id", &self.bos_id)
            .field("eos_ids", &self.eos_ids)
            .finish_non_exhaustive()
    }
}
