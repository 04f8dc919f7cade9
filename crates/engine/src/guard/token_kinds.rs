//! What kind of text tokens are, by a table over the vocabulary.

use kvasir_model::Tokenizer;

use crate::request::TokenId;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// With a digit.
    Digits,
    /// Neither letters nor digits, and not only spaces.
    Symbols,
    Other,
}

/// See the module's documentation. One byte a token.
#[derive(Debug)]
pub(crate) struct TokenKinds(Vec<Kind>);

impl TokenKinds {
    pub(crate) fn new(tokenizer: &Tokenizer) -> Self {
        let ids = 0..tokenizer.vocab_size() as TokenId;
        Self::of(ids.map(|id| tokenizer.token_bytes(id).unwrap_or_default()))
    }

    /// Of the bytes of all tokens, in order.
    pub(super) fn of<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Self {
        let kind = |bytes: &[u8]| {
            // What is no ASCII is taken for letters.
            let is_letter = |b: &u8| b.is_ascii_alphabetic() || !b.is_ascii();
            if bytes.iter().any(u8::is_ascii_digit) {
                Kind::Digits
            } else if bytes.iter().any(is_letter) || bytes.iter().all(u8::is_ascii_whitespace) {
                Kind::Other
            } else {
                Kind::Symbols
            }
        };
        Self(tokens.map(kind).collect())
    }

    /// How many tokens have digits, and how many are symbols.
    pub(crate) fn count(&self, tokens: &[TokenId]) -> [usize; 2] {
        let of = |kind: Kind| {
            tokens.iter().filter(|token| self.0.get(**token as usize) == Some(&kind)).count()
        };
        [of(Kind::Digits), of(Kind::Symbols)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_by_hand() {
        let texts = ["a1", " word", "\n\n", " {\"", "é", "", "::"];
        let kinds = TokenKinds::of(texts.map(str::as_bytes).into_iter());
        assert_eq!(kinds.count(&[0, 1, 2, 3, 4, 5, 6, 0]), [2, 2]);
        assert_eq!(kinds.count(&[99]), [0, 0], "outside the vocabulary");
    }
}
