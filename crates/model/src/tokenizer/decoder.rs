//! Tokens to text one at a time.

use super::Tokenizer;

/// Turns a growing sequence of tokens into text, giving out only whole characters.
///
/// The pieces that [`push`](Self::push) and [`flush`](Self::flush) return, put together, are
/// [`Tokenizer::decode`] of all the tokens, for every sequence of ids.
#[derive(Debug, Clone)]
pub struct TokenDecoder {
    skip_special: bool,
    /// A space that the first byte of the text may be is dropped.
    strip_space: bool,
    /// The start of a character whose other bytes have not come yet: at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl TokenDecoder {
    /// Decodes a text from its first token on.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self { skip_special, strip_space: tokenizer.strips_leading_space(), pending: Vec::new() }
    }

    /// Decodes tokens that continue a text, such as what a model generates after a prompt: a space
    /// at the start belongs to the text and stays.
    pub fn continuing(skip_special: bool) -> Self {
        Self { skip_special, strip_space: false, pending: Vec::new() }
    }

    /// Adds a token and returns the characters that are now complete. Bytes that cannot become
    /// UTF-8 any more are U+FFFD, one for each maximal invalid sequence. An id outside the
    /// vocabulary adds nothing.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        let mut bytes = tokenizer.piece(id, self.skip_special);
        if self.strip_space
            && let Some(first) = bytes.first()
        {
            self.strip_space = false;
            if *first == b' ' {
                bytes = bytes.get(1..).unwrap_or_default();
            }
        }
        if self.pending.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            return text.to_owned();
        }
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }

    /// Ends the text: an unfinished character becomes U+FFFD. The decoder then stands at the end of
    /// an empty text and can be used on.
    pub fn flush(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            // Only the last sequence can be a character that is merely unfinished.
            let at_end = done + invalid.len() == self.pending.len();
            let unfinished = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if at_end && unfinished {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            done += invalid.len();
        }
        self.pending.drain(..done);
        text
    }
}
