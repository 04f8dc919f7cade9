//! A tokenizer from GGUF metadata (`tokenizer.ggml.*`), with the defaults of llama.cpp.

use super::bpe::BpeEncoder;
use super::end_of_generation::end_of_generation_ids;
use super::pre_tokenizer::PreTokenizer;
use super::special::SpecialMatcher;
use super::spm::{self, SpmEncoder};
use super::vocab::{TokenKind, Vocab};
use super::{AddToken, Encoder, Tokenizer, byte_level};
use crate::error::{ModelError, Result};
use crate::gguf::{Metadata, Value};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS_ID: &str = "tokenizer.ggml.bos_token_id";
const EOS_ID: &str = "tokenizer.ggml.eos_token_id";
const EOT_ID: &str = "tokenizer.ggml.eot_token_id";
const EOM_ID: &str = "tokenizer.ggml.eom_token_id";
const UNKNOWN_ID: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// How the tokens of a vocabulary are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    /// `gpt2`.
    ByteLevel,
    /// `llama`.
    SentencePiece,
}

impl Tokenizer {
    /// Builds the tokenizer a GGUF file describes: `tokenizer.ggml.model` `gpt2` (byte-level BPE)
    /// or `llama` (SentencePiece BPE with scores and byte fallback).
    ///
    /// # Errors
    /// Another model or pre-tokenizer; a key that is missing, of the wrong type or length, or out of
    /// range. The message names the key.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self> {
        let family = match metadata.require(MODEL, Metadata::str)? {
            "gpt2" => Family::ByteLevel,
            "llama" => Family::SentencePiece,
            other => {
                return Err(ModelError::Tokenizer {
                    what: format!("{MODEL}: unknown model '{other}' (known: gpt2, llama)"),
                });
            }
        };
        let vocab = read_vocab(metadata, family)?;
        let is_control = |id: u32| vocab.kind(id).is_special();

        // llama.cpp falls back to these ids for SentencePiece models that do not name them.
        let default_id =
            |id: u32| (family == Family::SentencePiece && is_control(id)).then_some(id);
        let unknown_id = token_id(metadata, UNKNOWN_ID, &vocab)?.or(default_id(0));
        let bos_id = token_id(metadata, BOS_ID, &vocab)?.or(default_id(1));
        let eos_id = token_id(metadata, EOS_ID, &vocab)?.or(default_id(2));
        let declared_ends =
            [eos_id, token_id(metadata, EOT_ID, &vocab)?, token_id(metadata, EOM_ID, &vocab)?];

        let special = SpecialMatcher::new(&vocab)?;
        let (encoder, adds_bos, strip_leading_space) = match family {
            Family::ByteLevel => {
                let name = metadata.str(PRE)?.unwrap_or("default");
                let pre_tokenizer = PreTokenizer::from_name(name)?;
                let adds_bos = pre_tokenizer.adds_bos();
                let merges = metadata.require(MERGES, Metadata::strings)?;
                let encoder = Box::new(BpeEncoder::new(&vocab, merges, pre_tokenizer)?);
                (Encoder::Bpe { encoder, special }, adds_bos, false)
            }
            Family::SentencePiece => {
                let add_space_prefix = metadata.bool(ADD_SPACE_PREFIX)?.unwrap_or(true);
                let scores = read_scores(metadata, vocab.len())?;
                let encoder =
                    Box::new(SpmEncoder::new(&vocab, scores, unknown_id, add_space_prefix));
                (Encoder::Spm { encoder, special }, true, add_space_prefix)
            }
        };

        let declared_add_bos = metadata.bool(ADD_BOS)?;
        if declared_add_bos == Some(true) && bos_id.is_none() {
            return Err(bad(ADD_BOS, &format!("false without '{BOS_ID}'"), "true"));
        }
        let add_eos = metadata.bool(ADD_EOS)?.unwrap_or(false);
        if add_eos && eos_id.is_none() {
            return Err(bad(ADD_EOS, &format!("false without '{EOS_ID}'"), "true"));
        }
        let add = |yes: bool| if yes { AddToken::Yes } else { AddToken::AsEncoded };
        let eos_ids = end_of_generation_ids(&vocab, declared_ends.into_iter().flatten());
        Ok(Self {
            encoder,
            bos_id,
            eos_ids,
            add_bos: add(declared_add_bos.unwrap_or(adds_bos)),
            add_eos: add(add_eos),
            strip_leading_space,
            chat_template: metadata.str(CHAT_TEMPLATE)?.map(str::to_owned),
            vocab,
        })
    }
}

fn read_vocab(metadata: &Metadata, family: Family) -> Result<Vocab> {
    let tokens = metadata.require(TOKENS, Metadata::strings)?;
    if tokens.is_empty() {
        return Err(bad(TOKENS, "at least one token", "none"));
    }
    let kinds = read_kinds(metadata, tokens.len())?;
    let mut vocab = Vocab::with_capacity(tokens.len());
    let mut bytes = Vec::new();
    for (at, text) in tokens.iter().enumerate() {
        let mut kind = kinds.as_ref().and_then(|kinds| kinds.get(at)).copied();
        if kinds.is_none() && family == Family::SentencePiece && byte_of(text).is_some() {
            kind = Some(TokenKind::Byte);
        }
        let kind = kind.unwrap_or(TokenKind::Normal);
        bytes.clear();
        match (kind, family) {
            (TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined, _) => {
                bytes.extend_from_slice(text.as_bytes());
            }
            (TokenKind::Unused, _) => {}
            (TokenKind::Byte, _) => {
                let byte = byte_of(text).ok_or_else(|| {
                    bad(TOKENS, "'<0xXX>' for every byte token", &format!("'{text}' at index {at}"))
                })?;
                bytes.push(byte);
            }
            (TokenKind::Normal, Family::ByteLevel) => byte_level::push_decoded(text, &mut bytes),
            (TokenKind::Normal, Family::SentencePiece) => {
                bytes.extend_from_slice(text.replace(spm::SPACE, " ").as_bytes());
            }
        }
        vocab.push(text, &bytes, kind)?;
    }
    Ok(vocab)
}

/// The byte that `<0xXX>` stands for.
pub(super) fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

fn read_kinds(metadata: &Metadata, num_tokens: usize) -> Result<Option<Vec<TokenKind>>> {
    let numbers: Vec<u64> = match metadata.get(TOKEN_TYPE) {
        None => return Ok(None),
        Some(Value::UintArray(types)) => types.clone(),
        Some(Value::IntArray(types)) => {
            types.iter().map(|ty| u64::try_from(*ty).unwrap_or(0)).collect()
        }
        Some(_) => return Err(bad(TOKEN_TYPE, "an array of integers", "another type")),
    };
    check_len(TOKEN_TYPE, numbers.len(), num_tokens)?;
    let kind = |number| match number {
        1 => TokenKind::Normal,
        2 => TokenKind::Unknown,
        3 => TokenKind::Control,
        4 => TokenKind::UserDefined,
        6 => TokenKind::Byte,
        _ => TokenKind::Unused,
    };
    Ok(Some(numbers.into_iter().map(kind).collect()))
}

fn read_scores(metadata: &Metadata, num_tokens: usize) -> Result<Vec<f32>> {
    let scores: Vec<f32> = match metadata.get(SCORES) {
        None => return Err(ModelError::MissingKey { key: SCORES.to_owned() }),
        Some(Value::FloatArray(scores)) => scores.iter().map(|score| *score as f32).collect(),
        Some(_) => return Err(bad(SCORES, "an array of floats", "another type")),
    };
    check_len(SCORES, scores.len(), num_tokens)?;
    match scores.iter().position(|score| score.is_nan()) {
        Some(at) => Err(bad(SCORES, "numbers", &format!("NaN at index {at}"))),
        None => Ok(scores),
    }
}

fn token_id(metadata: &Metadata, key: &str, vocab: &Vocab) -> Result<Option<u32>> {
    let Some(id) = metadata.usize(key)? else { return Ok(None) };
    match u32::try_from(id) {
        Ok(small) if id < vocab.len() => Ok(Some(small)),
        _ => Err(bad(key, &format!("a token id below {}", vocab.len()), &id.to_string())),
    }
}

fn check_len(key: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(bad(
        key,
        &format!("{expected} entries, as many as '{TOKENS}'"),
        &format!("{found} entries"),
    ))
}

fn bad(key: &str, expected: &str, found: &str) -> ModelError {
    ModelError::BadKey {
        key: key.to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
    }
}
