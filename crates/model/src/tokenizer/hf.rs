//! A tokenizer from a folder of Hugging Face files.

use std::path::Path;

use serde_json::Value;

use super::end_of_generation::end_of_generation_ids;
use super::gguf::byte_of;
use super::vocab::{TokenKind, Vocab};
use super::{AddToken, Encoder, Tokenizer, byte_level, spm};
use crate::error::{ModelError, Result};

/// A vocabulary with ids far beyond its size would make us fill the gap.
const MAX_UNUSED_IDS: usize = 1 << 20;

/// How `tokenizer.json` turns a token into text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decoding {
    ByteLevel,
    /// `▁` is a space and `<0xXX>` a byte.
    Pieces {
        strip_leading_space: bool,
    },
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they are, `tokenizer_config.json` (`bos_token`,
    /// `eos_token`, `add_bos_token`, `add_eos_token`, `chat_template`), `chat_template.jinja`,
    /// `generation_config.json` and `config.json` (`bos_token_id`, `eos_token_id`).
    ///
    /// # Errors
    /// A file that cannot be read or parsed, a tokenizer that is neither byte-level nor
    /// SentencePiece-like, a named token that is not in the vocabulary.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let source =
            std::fs::read(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        let wrong =
            |what: String| ModelError::Tokenizer { what: format!("{}: {what}", path.display()) };
        let json: Value = serde_json::from_slice(&source).map_err(|e| wrong(e.to_string()))?;
        let mut encoder =
            tokenizers::Tokenizer::from_bytes(&source).map_err(|e| wrong(e.to_string()))?;
        // A server measures its prompts itself; a limit left over from training must not cut them.
        encoder.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
        encoder.with_padding(None);
        let decoding = decoding_of(&json).ok_or_else(|| {
            wrong("its decoder is neither byte-level nor SentencePiece-like".to_owned())
        })?;
        let vocab = read_vocab(&encoder, decoding).map_err(|e| wrong(e.to_string()))?;

        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let generation = read_json(&dir.join("generation_config.json"))?.unwrap_or(Value::Null);
        let model = read_json(&dir.join("config.json"))?.unwrap_or(Value::Null);
        let named = |key: &str| -> Result<Option<u32>> {
            let Some(text) = token_text(config.get(key)) else { return Ok(None) };
            vocab.id(text).map(Some).ok_or_else(|| ModelError::BadKey {
                key: format!("tokenizer_config.json: {key}"),
                expected: "a token of the vocabulary".to_owned(),
                found: format!("'{text}'"),
            })
        };
        let in_vocab = |id: &u32| (*id as usize) < vocab.len();
        let listed = |file: &Value, key: &str| -> Vec<u32> {
            token_ids(file.get(key)).into_iter().filter(in_vocab).collect()
        };
        let bos_id = named("bos_token")?
            .or_else(|| listed(&generation, "bos_token_id").first().copied())
            .or_else(|| listed(&model, "bos_token_id").first().copied());
        let mut ends: Vec<u32> = named("eos_token")?.into_iter().collect();
        ends.extend(listed(&generation, "eos_token_id"));
        ends.extend(listed(&model, "eos_token_id"));

        let add = |key: &str| match config.get(key).and_then(Value::as_bool) {
            Some(true) => AddToken::Yes,
            Some(false) => AddToken::No,
            None => AddToken::AsEncoded,
        };
        Ok(Self {
            bos_id,
            eos_ids: end_of_generation_ids(&vocab, ends),
            add_bos: add("add_bos_token"),
            add_eos: add("add_eos_token"),
            strip_leading_space: decoding == Decoding::Pieces { strip_leading_space: true },
            chat_template: read_chat_template(dir, &config)?,
            encoder: Encoder::Json(Box::new(encoder)),
            vocab,
        })
    }
}

fn read_vocab(encoder: &tokenizers::Tokenizer, decoding: Decoding) -> Result<Vocab> {
    let mut tokens: Vec<(String, u32)> = encoder.get_vocab(true).into_iter().collect();
    let added = encoder.get_added_tokens_decoder();
    // An added token takes the id of another one where the vocabulary has gaps; it is the one that
    // the id is read as.
    tokens.sort_unstable_by_key(|(text, id)| {
        (*id, added.get(id).is_none_or(|token| token.content != *text))
    });
    tokens.dedup_by_key(|(_, id)| *id);
    let size = tokens.last().map_or(0, |(_, id)| *id as usize + 1);
    if size > tokens.len() + MAX_UNUSED_IDS {
        return Err(ModelError::Tokenizer {
            what: format!("token id {} in a vocabulary of {} tokens", size - 1, tokens.len()),
        });
    }
    let mut vocab = Vocab::with_capacity(size);
    let mut bytes = Vec::new();
    for (text, id) in &tokens {
        while vocab.len() < *id as usize {
            vocab.push("", b"", TokenKind::Unused)?;
        }
        bytes.clear();
        let kind = match added.get(id) {
            Some(token) if token.special => TokenKind::Control,
            Some(_) => TokenKind::UserDefined,
            None => TokenKind::Normal,
        };
        let byte = byte_of(text);
        match (kind, decoding, byte) {
            (TokenKind::Normal, Decoding::ByteLevel, _) => {
                byte_level::push_decoded(text, &mut bytes);
            }
            (TokenKind::Normal, Decoding::Pieces { .. }, Some(byte)) => bytes.push(byte),
            (TokenKind::Normal | TokenKind::UserDefined, Decoding::Pieces { .. }, _) => {
                bytes.extend_from_slice(text.replace(spm::SPACE, " ").as_bytes());
            }
            _ => bytes.extend_from_slice(text.as_bytes()),
        }
        let kind = match (kind, decoding) {
            (TokenKind::Normal, Decoding::Pieces { .. }) if byte.is_some() => TokenKind::Byte,
            _ => kind,
        };
        vocab.push(text, &bytes, kind)?;
    }
    Ok(vocab)
}

/// What the `decoder` of a `tokenizer.json` does, or its `pre_tokenizer` if it has none.
fn decoding_of(json: &Value) -> Option<Decoding> {
    fn parts<'j>(part: &'j Value, list: &str) -> Vec<&'j Value> {
        match part.get(list).and_then(Value::as_array) {
            Some(parts) => parts.iter().collect(),
            None => vec![part],
        }
    }
    let decoders = json.get("decoder").map(|d| parts(d, "decoders")).unwrap_or_default();
    let splitters =
        json.get("pre_tokenizer").map(|p| parts(p, "pretokenizers")).unwrap_or_default();
    let is = |part: &Value, ty: &str| part.get("type").and_then(Value::as_str) == Some(ty);
    let has = |parts: &[&Value], ty: &str| parts.iter().any(|part| is(part, ty));
    if has(&decoders, "ByteLevel")
        || (json.get("decoder").is_none_or(Value::is_null) && has(&splitters, "ByteLevel"))
    {
        return Some(Decoding::ByteLevel);
    }
    for part in &decoders {
        if is(part, "Metaspace") {
            let never = part.get("prepend_scheme").and_then(Value::as_str) == Some("never")
                || part.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
            return Some(Decoding::Pieces { strip_leading_space: !never });
        }
    }
    let replaces_space = decoders.iter().any(|part| {
        is(part, "Replace")
            && part.pointer("/pattern/String").and_then(Value::as_str) == Some("\u{2581}")
    });
    let strip_leading_space = decoders
        .iter()
        .any(|part| is(part, "Strip") && part.get("start").and_then(Value::as_u64) == Some(1));
    replaces_space.then_some(Decoding::Pieces { strip_leading_space })
}

/// `"</s>"` or `{"content": "</s>", ...}`.
fn token_text(value: Option<&Value>) -> Option<&str> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// `2` or `[2, 3]`.
fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The file `chat_template.jinja`, or `chat_template` of the configuration: a string, or a list of
/// named ones of which `default` is meant.
fn read_chat_template(dir: &Path, config: &Value) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    match std::fs::read_to_string(&path) {
        Ok(source) => return Ok(Some(source)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(ModelError::Io { path, source }),
    }
    Ok(match config.get("chat_template") {
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str())
            .map(str::to_owned),
        Some(Value::String(source)) => Some(source.clone()),
        _ => None,
    })
}

fn read_json(path: &Path) -> Result<Option<Value>> {
    let source = match std::fs::read(path) {
        Ok(source) => source,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ModelError::Io { path: path.to_owned(), source }),
    };
    serde_json::from_slice(&source)
        .map(Some)
        .map_err(|e| ModelError::Tokenizer { what: format!("{}: {e}", path.display()) })
}
