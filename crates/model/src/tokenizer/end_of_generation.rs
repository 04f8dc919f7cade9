//! Which tokens end a generation.

use super::vocab::{TokenKind, Vocab};

/// Control tokens that end a turn or a text, whatever the file declares: models name one token as
/// `eos` and were often trained to stop at another. The list is llama.cpp's.
const TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|EOT|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "</s>",
    "<eos>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    // Code models go on to the next file after these.
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// The declared tokens, in their order, then those known by their text; none twice.
pub(super) fn end_of_generation_ids(
    vocab: &Vocab,
    declared: impl IntoIterator<Item = u32>,
) -> Vec<u32> {
    let by_text = TEXTS
        .iter()
        .filter_map(|text| vocab.id(text))
        .filter(|id| vocab.kind(*id) == TokenKind::Control);
    let mut ids = Vec::new();
    for id in declared.into_iter().chain(by_text) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}
