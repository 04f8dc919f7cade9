//! What the HTTP side needs to know about texts and tokens.

use std::borrow::Cow;

use kvasir_engine::TokenId;
use kvasir_model::ModelError;
use serde_json::{Map, Value};

/// Tokenizer and chat template of the model being served.
pub trait TextModel: Send + Sync + 'static {
    /// Tokens of a text; `add_special` adds what the model expects around a raw text (BOS).
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, ModelError>;
    /// Text of tokens; bytes that are not UTF-8 become U+FFFD.
    fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String;
    /// The bytes a token stands for in a text, or `None` outside the vocabulary.
    fn token_bytes(&self, token: TokenId) -> Option<Cow<'_, [u8]>>;
    /// A token as the vocabulary spells it, or `None` outside the vocabulary.
    fn token_piece(&self, token: TokenId) -> Option<Cow<'_, str>>;
    /// Number of tokens; ids are below it.
    fn vocab_size(&self) -> usize;
    /// Longest prompt + output in tokens.
    fn max_model_len(&self) -> usize;
    /// The prompt for a conversation. [`ModelError::Template`] if there is no template or it
    /// refuses the messages.
    fn render_chat(&self, chat: &ChatPrompt<'_>) -> Result<String, ModelError>;
}

/// A conversation, as a chat template sees it. Every message is an object with a `role`; its
/// `content`, if any, is a string.
#[derive(Debug, Clone, Copy)]
pub struct ChatPrompt<'a> {
    /// The messages, first to last.
    pub messages: &'a [Value],
    /// End with the header of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Leave the last message open, to be continued.
    pub continue_final_message: bool,
    /// Descriptions of tools.
    pub tools: Option<&'a [Value]>,
    /// Documents for retrieval templates.
    pub documents: Option<&'a [Value]>,
    /// Further variables of the template.
    pub kwargs: &'a Map<String, Value>,
}
