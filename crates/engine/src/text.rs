//! Text of one sequence: detokenising, stop strings across token borders, and what may be shown already.

use std::sync::Arc;

use kvasir_model::{TokenDecoder, Tokenizer};

use crate::request::TokenId;
use crate::sampling_params::SamplingParams;

/// Turns tokens into text that will not be taken back.
#[derive(Debug)]
pub(crate) struct TextStream {
    decoder: TokenDecoder,
    /// For its stop strings.
    params: Arc<SamplingParams>,
    /// Text not shown yet: it ends with what may be the beginning of a stop string.
    pending: String,
}

/// What a token added.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Shown {
    /// Text that became certain.
    pub(crate) text: String,
    /// The stop string that was met.
    pub(crate) stopped_by: Option<String>,
}

impl TextStream {
    pub(crate) fn new(params: Arc<SamplingParams>) -> Self {
        let decoder = TokenDecoder::continuing(params.skip_special_tokens);
        Self { decoder, params, pending: String::new() }
    }

    /// Adds a token. With `may_stop` unset (`min_tokens`) stop strings are plain text.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, may_stop: bool) -> Shown {
        let added = self.decoder.push(tokenizer, token);
        self.add(&added, may_stop)
    }

    fn add(&mut self, added: &str, may_stop: bool) -> Shown {
        self.pending.push_str(added);
        if !may_stop {
            return Shown { text: std::mem::take(&mut self.pending), stopped_by: None };
        }
        // The earliest stop string wins, of those at one place the first in the list.
        let found = self
            .params
            .stop
            .iter()
            .filter_map(|stop| self.pending.find(stop.as_str()).map(|at| (at, stop)))
            .min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = found {
            let end = if self.params.include_stop_str_in_output { at + stop.len() } else { at };
            let text = self.pending[..end].to_owned();
            let stopped_by = Some(stop.clone());
            self.pending.clear();
            return Shown { text, stopped_by };
        }
        let keep = self.held_back();
        let rest = self.pending.split_off(self.pending.len() - keep);
        Shown { text: std::mem::replace(&mut self.pending, rest), stopped_by: None }
    }

    /// Bytes at the end of the pending text that begin some stop string.
    fn held_back(&self) -> usize {
        let longest = |stop: &String| {
            let most = self.pending.len().min(stop.len().saturating_sub(1));
            (1..=most).rev().find(|n| self.pending.as_bytes().ends_with(&stop.as_bytes()[..*n]))
        };
        self.params.stop.iter().filter_map(longest).max().unwrap_or(0)
    }

    /// The rest, when the sequence ends without a stop string.
    pub(crate) fn flush(&mut self) -> String {
        let rest = self.decoder.flush();
        self.pending.push_str(&rest);
        std::mem::take(&mut self.pending)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(stop: &[&str], include: bool) -> TextStream {
        let stop = stop.iter().map(|s| (*s).to_owned()).collect();
        let include_stop_str_in_output = include;
        let params = SamplingParams { stop, include_stop_str_in_output, ..Default::default() };
        TextStream::new(Arc::new(params))
    }

    #[test]
    fn a_stop_string_over_three_tokens_is_never_shown() {
        let mut text = stream(&["<end>"], false);
        assert_eq!(text.add("one <e", true).text, "one ");
        assert_eq!(text.add("n", true).text, "");
        let last = text.add("d> two", true);
        assert_eq!(last, Shown { text: String::new(), stopped_by: Some("<end>".to_owned()) });
        assert_eq!(text.flush(), "");
    }

    #[test]
    fn what_only_looked_like_a_stop_string_appears() {
        let mut text = stream(&["\n\n"], false);
        assert_eq!(text.add("a\n", true).text, "a");
        assert_eq!(text.add("b\n", true).text, "\nb");
        assert_eq!(text.flush(), "\n");
    }

    #[test]
    fn the_stop_string_can_be_kept() {
        let mut text = stream(&["xy", "y"], true);
        let shown = text.add("axyb", true);
        assert_eq!((shown.text.as_str(), shown.stopped_by.as_deref()), ("axy", Some("xy")));
    }

    #[test]
    fn stops_do_not_count_before_the_minimum() {
        let mut text = stream(&["b"], false);
        assert_eq!(text.add("abc", false), Shown { text: "abc".to_owned(), stopped_by: None });
        assert!(text.add("b", true).stopped_by.is_some());
    }

    proptest! {
        /// However a text is cut, the same is shown, up to the first stop string.
        #[test]
        fn cutting_does_not_matter(parts in prop::collection::vec("[abé]{0,4}", 0..12)) {
            let all: String = parts.concat();
            let stops = ["aba", "éb"];
            let end = stops.iter().filter_map(|s| all.find(s)).min();
            let mut text = stream(&stops, false);
            let mut shown = String::new();
            let mut stopped = false;
            for part in &parts {
                let got = text.add(part, true);
                shown.push_str(&got.text);
                if got.stopped_by.is_some() {
                    stopped = true;
                    break;
                }
            }
            if !stopped {
                shown.push_str(&text.flush());
            }
            prop_assert_eq!(stopped, end.is_some());
            prop_assert_eq!(shown.as_str(), &all[..end.unwrap_or(all.len())]);
        }
    }
}
