//! Where the contexts of a measurement come from.

use super::draw::draw;
use crate::error::{EvalError, Result};

/// Turns a text into token ids, with the tokens that the tokenizer puts around texts or without.
pub type Encode<'a> = dyn FnMut(&str, bool) -> Result<Vec<u32>> + 'a;

/// A way to make contexts, and continuations to force after them, out of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// The beginnings of the first texts that are long enough, each continued as its text goes on.
    Continuation {
        /// Most contexts; a corpus with fewer long texts gives fewer.
        contexts: usize,
        /// Tokens of context.
        context_len: usize,
    },
    /// Prompts that put the same passages in different orders, so that they share content but no
    /// prefix. A passage is the beginning of one of the first texts that are long enough, encoded
    /// without special tokens. A prompt is different passages one after the other, in random order; it
    /// is continued as the text of its last passage goes on. If the tokenizer starts texts with BOS, it
    /// takes the place of the prompt's first token, so that passages stay aligned to blocks.
    Retrieval {
        /// Prompts.
        contexts: usize,
        /// Passages in a prompt.
        passages: usize,
        /// Passages to draw from.
        passages_total: usize,
        /// Tokens of a passage: a multiple of the block size.
        passage_len: usize,
        /// Of the order of passages. The same seed gives the same prompts on every machine.
        seed: u64,
    },
}

impl Workload {
    /// As the command line and reports call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Continuation { .. } => "continuation",
            Self::Retrieval { .. } => "retrieval",
        }
    }

    /// Tokens of every context.
    pub fn context_len(&self) -> usize {
        match *self {
            Self::Continuation { context_len, .. } => context_len,
            Self::Retrieval { passages, passage_len, .. } => passages.saturating_mul(passage_len),
        }
    }

    /// Finds what no corpus could make right.
    pub(crate) fn check(&self, block_size: usize) -> Result<()> {
        let what = match *self {
            Self::Continuation { contexts: 0, .. } | Self::Retrieval { contexts: 0, .. } => {
                "there is nothing to measure in 0 contexts".to_owned()
            }
            Self::Continuation { context_len: 0, .. }
            | Self::Retrieval { passages: 0, .. }
            | Self::Retrieval { passage_len: 0, .. } => {
                "a context needs at least one token".to_owned()
            }
            Self::Retrieval { passages, passages_total, .. } if passages > passages_total => {
                format!("{passages} different passages cannot be drawn from {passages_total}")
            }
            Self::Retrieval { passage_len, .. } if !passage_len.is_multiple_of(block_size) => {
                format!(
                    "passages of {passage_len} tokens do not end where blocks of {block_size} end: \
                     the passage length must be a multiple of the block size"
                )
            }
            Self::Continuation { .. } | Self::Retrieval { .. } => return Ok(()),
        };
        Err(EvalError::Settings { what })
    }

    /// Token ids of every context, the `continuation` tokens to force after it, and one token more, the
    /// last target, if its text has it.
    ///
    /// # Errors
    /// [`EvalError::TooShort`] if too few texts are long enough.
    pub(crate) fn contexts(
        &self,
        encode: &mut Encode<'_>,
        texts: &[String],
        continuation: usize,
    ) -> Result<Vec<Vec<u32>>> {
        match *self {
            Self::Continuation { contexts, context_len } => {
                let needed = context_len.saturating_add(continuation);
                let found = first_long(encode, texts, contexts, needed, true)?;
                if found.is_empty() {
                    let what = format!("no text of the corpus has {needed} tokens");
                    return Err(EvalError::TooShort { what });
                }
                Ok(found)
            }
            Self::Retrieval { contexts, passages, passages_total, passage_len, seed } => {
                let needed = passage_len.saturating_add(continuation);
                let articles = first_long(encode, texts, passages_total, needed, false)?;
                if articles.len() < passages_total {
                    let found = articles.len();
                    let what = format!(
                        "{passages_total} passages need as many texts of {needed} tokens; the \
                         corpus has {found}"
                    );
                    return Err(EvalError::TooShort { what });
                }
                let bos = leading_bos(encode)?;
                let orders = draw(seed, contexts, passages, passages_total);
                Ok(orders.iter().map(|order| prompt(&articles, order, passage_len, bos)).collect())
            }
        }
    }
}

/// Token ids of the first `count` texts that have `needed` tokens, cut to one token more than that.
fn first_long(
    encode: &mut Encode<'_>,
    texts: &[String],
    count: usize,
    needed: usize,
    add_special: bool,
) -> Result<Vec<Vec<u32>>> {
    let mut found = Vec::new();
    for text in texts {
        if found.len() == count {
            break;
        }
        let mut tokens = encode(text, add_special)?;
        if tokens.len() >= needed {
            tokens.truncate(needed.saturating_add(1));
            found.push(tokens);
        }
    }
    Ok(found)
}

/// The token that the tokenizer puts before every text, if it does.
fn leading_bos(encode: &mut Encode<'_>) -> Result<Option<u32>> {
    // Not the empty text: some vocabularies end a text with the same token.
    let (with, without) = (encode("a", true)?, encode("a", false)?);
    Ok(with.first().filter(|first| without.first() != Some(first)).copied())
}

/// The passages that `order` names, then the rest of the last one's article.
fn prompt(
    articles: &[Vec<u32>],
    order: &[usize],
    passage_len: usize,
    bos: Option<u32>,
) -> Vec<u32> {
    let passages = order.iter().flat_map(|article| &articles[*article][..passage_len]);
    let rest = order.last().map_or(&[][..], |article| &articles[*article][passage_len..]);
    let mut tokens: Vec<u32> = passages.chain(rest).copied().collect();
    if let (Some(first), Some(bos)) = (tokens.first_mut(), bos) {
        *first = bos;
    }
    tokens
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kvasir_model::gguf::{GgufFile, Value};
    use kvasir_model::testkit::tiny_gguf;
    use kvasir_model::{LoadOptions, Model};

    use super::*;

    const RETRIEVAL: Workload = Workload::Retrieval {
        contexts: 6,
        passages: 3,
        passages_total: 5,
        passage_len: 32,
        seed: 0,
    };
    const CONTINUATION: usize = 10;
    const BOS: u32 = 256;

    /// A model whose tokens are bytes, and whose tokenizer starts texts with BOS or does not.
    fn byte_model(add_bos: bool) -> Model {
        let file =
            tiny_gguf(1).metadata("tokenizer.ggml.add_bos_token", Value::Bool(add_bos)).build();
        let file = GgufFile::from_bytes(file, Path::new("tiny.gguf")).unwrap();
        Model::from_gguf(&file, &LoadOptions { threads: 1, ..LoadOptions::default() }).unwrap()
    }

    fn encoder(model: &Model) -> impl FnMut(&str, bool) -> Result<Vec<u32>> {
        |text, add_special| Ok(model.tokenizer().encode(text, add_special)?)
    }

    /// A text of `len` characters that no other `seed` has 4 in a row of.
    fn text(seed: usize, len: usize) -> String {
        (0..len).map(|i| char::from(b'A' + [seed, i % 26, i / 26][i % 3] as u8)).collect()
    }

    /// Six long texts with two short ones between them.
    fn texts() -> Vec<String> {
        let lens = [60, 41, 42, 80, 50, 10, 43, 70];
        lens.iter().enumerate().map(|(seed, len)| text(seed, *len)).collect()
    }

    fn contexts(workload: Workload, add_bos: bool) -> Vec<Vec<u32>> {
        let model = byte_model(add_bos);
        workload.contexts(&mut encoder(&model), &texts(), CONTINUATION).unwrap()
    }

    /// The token ids of `text`.
    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    /// Which texts the passages of a prompt come from, by their tokens.
    fn passages(prompt: &[u32]) -> Vec<usize> {
        let texts = texts();
        let passages = prompt[..96].chunks_exact(32).map(|passage| {
            // Its first token may be BOS.
            texts.iter().position(|t| t.len() > 41 && ids(&t[1..32]) == passage[1..]).unwrap()
        });
        passages.collect()
    }

    #[test]
    fn prompts_are_passages_of_the_first_long_texts_and_go_on_as_the_last() {
        let prompts = contexts(RETRIEVAL, false);
        assert_eq!(prompts.len(), 6);
        let mut seen = Vec::new();
        for prompt in &prompts {
            let of = passages(prompt);
            let mut distinct = of.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), 3, "{of:?}");
            // The continuation, and one token more where the text has it.
            let rest = &texts()[of[2]][32..];
            assert_eq!(prompt[96..], ids(rest)[..rest.len().min(CONTINUATION + 1)], "{of:?}");
            assert_eq!(prompt[0], ids(&texts()[of[0]])[0]);
            seen.extend(distinct);
        }
        seen.sort_unstable();
        seen.dedup();
        // Too short: texts 1 and 5. Not needed: text 7.
        assert_eq!(seen, [0, 2, 3, 4, 6]);
        // 32 + 10 tokens are enough; then there is no last target.
        assert!(prompts.iter().any(|prompt| prompt.len() == 96 + 10));
        assert!(prompts.iter().any(|prompt| prompt.len() == 96 + 11));
        assert_eq!(RETRIEVAL.context_len(), 96);
    }

    #[test]
    fn a_seed_fixes_the_prompts() {
        let seeded = |seed| Workload::Retrieval {
            contexts: 6,
            passages: 3,
            passages_total: 5,
            passage_len: 32,
            seed,
        };
        assert_eq!(contexts(seeded(0), false), contexts(RETRIEVAL, false));
        assert_ne!(contexts(seeded(1), false), contexts(RETRIEVAL, false));
    }

    #[test]
    fn bos_takes_the_place_of_the_first_token_only() {
        let plain = contexts(RETRIEVAL, false);
        let with_bos = contexts(RETRIEVAL, true);
        for (plain, with_bos) in plain.iter().zip(&with_bos) {
            assert_eq!(with_bos[0], BOS);
            assert_eq!(plain[1..], with_bos[1..]);
            assert!(!plain.contains(&BOS));
        }
    }

    #[test]
    fn continuations_are_texts_as_they_stand() {
        let workload = |contexts| Workload::Continuation { contexts, context_len: 40 };
        let plain = contexts(workload(9), false);
        let texts = texts();
        let expected = [0, 3, 4, 7].map(|i: usize| ids(&texts[i][..texts[i].len().min(51)]));
        assert_eq!(plain, expected);
        assert_eq!(contexts(workload(2), false), expected[..2]);
        // BOS comes first here, so that everything moves by one.
        let with_bos = contexts(workload(1), true);
        assert_eq!((with_bos[0][0], &with_bos[0][1..]), (BOS, &plain[0][..50]));
    }

    #[test]
    fn what_cannot_be_is_said() {
        let retrieval = |contexts, passages, passages_total, passage_len| Workload::Retrieval {
            contexts,
            passages,
            passages_total,
            passage_len,
            seed: 0,
        };
        for (workload, message) in [
            (retrieval(0, 4, 8, 128), "there is nothing to measure in 0 contexts"),
            (retrieval(8, 0, 8, 128), "a context needs at least one token"),
            (retrieval(8, 4, 8, 0), "a context needs at least one token"),
            (retrieval(8, 9, 8, 128), "9 different passages cannot be drawn from 8"),
            (retrieval(8, 4, 8, 100), "passages of 100 tokens do not end where blocks of 32 end"),
            (
                Workload::Continuation { contexts: 0, context_len: 512 },
                "there is nothing to measure in 0 contexts",
            ),
            (
                Workload::Continuation { contexts: 1, context_len: 0 },
                "a context needs at least one token",
            ),
        ] {
            let error = workload.check(32).unwrap_err();
            assert!(matches!(error, EvalError::Settings { .. }));
            assert!(error.to_string().starts_with(message), "{error}");
        }
        assert!(retrieval(8, 8, 8, 128).check(32).is_ok());
        // No block size that a cache takes, but no reason to divide by it either.
        assert!(retrieval(8, 4, 8, 128).check(0).is_err());
    }

    #[test]
    fn too_few_long_texts_are_an_error() {
        let model = byte_model(false);
        let error = |workload: Workload| {
            workload.contexts(&mut encoder(&model), &texts(), CONTINUATION).unwrap_err()
        };
        let all = |passage_len| Workload::Retrieval {
            contexts: 1,
            passages: 1,
            passages_total: 7,
            passage_len,
            seed: 0,
        };
        let found = error(all(32));
        assert!(matches!(found, EvalError::TooShort { .. }));
        assert_eq!(
            found.to_string(),
            "7 passages need as many texts of 42 tokens; the corpus has 6"
        );
        assert!(error(all(usize::MAX)).to_string().ends_with("the corpus has 0"));
        let long = Workload::Continuation { contexts: 1, context_len: 71 };
        assert_eq!(error(long).to_string(), "no text of the corpus has 81 tokens");
    }
}
