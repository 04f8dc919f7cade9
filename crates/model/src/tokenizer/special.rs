//! Finding the tokens that are matched in the text before anything is encoded.

use aho_corasick::{AhoCorasick, MatchKind};

use super::vocab::Vocab;
use crate::error::{ModelError, Result};

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    /// Text between such tokens; never empty.
    Text(&'t str),
    /// One such token.
    Token(u32),
}

/// Matches control, unknown and user-defined tokens.
pub(super) struct SpecialMatcher {
    /// `None` when the vocabulary has no such token.
    automaton: Option<AhoCorasick>,
    /// Token of each pattern of the automaton.
    ids: Vec<u32>,
}

impl SpecialMatcher {
    /// Collects the tokens of `vocab` that are matched first.
    ///
    /// # Errors
    /// Too many or too long tokens for the automaton.
    pub(super) fn new(vocab: &Vocab) -> Result<Self> {
        let (ids, texts): (Vec<u32>, Vec<&str>) = vocab
            .ids()
            .filter(|id| vocab.kind(*id).is_matched_first())
            .filter_map(|id| Some((id, vocab.text(id).filter(|text| !text.is_empty())?)))
            .unzip();
        if ids.is_empty() {
            return Ok(Self { automaton: None, ids });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|e| ModelError::Tokenizer { what: format!("special tokens: {e}") })?;
        Ok(Self { automaton: Some(automaton), ids })
    }

    /// Bytes in memory.
    pub(super) fn num_bytes(&self) -> usize {
        self.automaton.as_ref().map_or(0, AhoCorasick::memory_usage) + 4 * self.ids.capacity()
    }

    /// Splits `text` at these tokens: the leftmost first, and of those that start at the same place
    /// the longest. Linear time.
    ///
    /// llama.cpp gives the longest precedence over the whole text, which differs only for tokens
    /// that overlap without one being inside the other; tokenizers does as we do.
    pub(super) fn fragments<'t>(&self, text: &'t str) -> Vec<Fragment<'t>> {
        let mut fragments = Vec::new();
        let mut at = 0;
        if let Some(automaton) = &self.automaton {
            for found in automaton.find_iter(text) {
                let Some(id) = self.ids.get(found.pattern().as_usize()) else { continue };
                push_text(&mut fragments, text.get(at..found.start()));
                fragments.push(Fragment::Token(*id));
                at = found.end();
            }
        }
        push_text(&mut fragments, text.get(at..));
        fragments
    }
}

fn push_text<'t>(fragments: &mut Vec<Fragment<'t>>, text: Option<&'t str>) {
    if let Some(text) = text.filter(|text| !text.is_empty()) {
        fragments.push(Fragment::Text(text));
    }
}

#[cfg(test)]
mod tests {
    use super::super::vocab::TokenKind;
    use super::*;

    #[test]
    fn prefers_the_longest_token() {
        let mut vocab = Vocab::with_capacity(4);
        for (text, kind) in [
            ("<a>", TokenKind::Control),
            ("\n", TokenKind::UserDefined),
            ("\n\n", TokenKind::UserDefined),
            ("x", TokenKind::Normal),
        ] {
            vocab.push(text, text.as_bytes(), kind).unwrap();
        }
        let matcher = SpecialMatcher::new(&vocab).unwrap();
        assert_eq!(
            matcher.fragments("x\n\n\n<a>é"),
            [
                Fragment::Text("x"),
                Fragment::Token(2),
                Fragment::Token(1),
                Fragment::Token(0),
                Fragment::Text("é"),
            ]
        );
        assert_eq!(matcher.fragments(""), []);
    }

    #[test]
    fn a_vocabulary_without_such_tokens_leaves_the_text_whole() {
        let mut vocab = Vocab::with_capacity(1);
        vocab.push("x", b"x", TokenKind::Normal).unwrap();
        let matcher = SpecialMatcher::new(&vocab).unwrap();
        assert_eq!(matcher.fragments("<a>"), [Fragment::Text("<a>")]);
    }
}
