//! Tokenizer and chat template, as the server asks for them.

use std::borrow::Cow;
use std::sync::Arc;

use kvasir_engine::TokenId;
use kvasir_model::chat_template::to_value;
use kvasir_model::{ChatTemplate, ModelError, RenderOptions, Tokenizer};
use kvasir_server::{ChatPrompt, TextModel};

/// The texts of a model that is being served.
#[derive(Debug)]
pub(crate) struct ServedModel {
    tokenizer: Arc<Tokenizer>,
    template: Arc<ChatTemplate>,
    max_model_len: usize,
}

impl ServedModel {
    /// `max_model_len` is the engine's.
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        template: Arc<ChatTemplate>,
        max_model_len: usize,
    ) -> Self {
        Self { tokenizer, template, max_model_len }
    }
}

impl TextModel for ServedModel {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, ModelError> {
        self.tokenizer.encode(text, add_special)
    }

    fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        self.tokenizer.decode(tokens, skip_special)
    }

    fn token_bytes(&self, token: TokenId) -> Option<Cow<'_, [u8]>> {
        self.tokenizer.token_bytes(token).map(Cow::Borrowed)
    }

    fn token_piece(&self, token: TokenId) -> Option<Cow<'_, str>> {
        self.tokenizer.token_str(token).map(Cow::Borrowed)
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    fn render_chat(&self, chat: &ChatPrompt<'_>) -> Result<String, ModelError> {
        let mut options = RenderOptions::default();
        options.add_generation_prompt = chat.add_generation_prompt;
        options.continue_final_message = chat.continue_final_message;
        options.tools = chat.tools.map(|tools| to_value(&tools));
        options.documents = chat.documents.map(|documents| to_value(&documents));
        options.extra =
            chat.kwargs.iter().map(|(name, value)| (name.clone(), to_value(value))).collect();
        self.template.render(&chat.messages, &options)
    }
}
