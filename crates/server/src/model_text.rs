//! A real model behind [`TextModel`].

use std::borrow::Cow;
use std::sync::Arc;

use kvasir_engine::TokenId;
use kvasir_model::chat_template::to_value;
use kvasir_model::{ChatTemplate, Model, ModelError, RenderOptions, Tokenizer};

use crate::text_model::{ChatPrompt, TextModel};

/// Tokenizer and chat template of a loaded model, and the length the engine was configured for.
#[derive(Debug, Clone)]
pub struct ModelText {
    /// Texts to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Conversations to texts.
    pub chat_template: Arc<ChatTemplate>,
    /// Longest prompt + output in tokens ([`kvasir_engine::Engine::max_model_len`]).
    pub max_model_len: usize,
}

impl ModelText {
    /// The tokenizer and template that came with `model`.
    pub fn new(model: &Model, max_model_len: usize) -> Self {
        Self {
            tokenizer: model.tokenizer().clone(),
            chat_template: model.chat_template().clone(),
            max_model_len,
        }
    }
}

impl TextModel for ModelText {
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
        let kwargs = chat.kwargs.iter();
        let options = RenderOptions {
            add_generation_prompt: chat.add_generation_prompt,
            continue_final_message: chat.continue_final_message,
            tools: chat.tools.map(|tools| to_value(&tools)),
            documents: chat.documents.map(|documents| to_value(&documents)),
            extra: kwargs.map(|(name, value)| (name.clone(), to_value(value))).collect(),
            ..RenderOptions::default()
        };
        self.chat_template.render(&chat.messages, &options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hands_everything_to_the_template() {
        let source = "{{ messages[0].content }}|{{ tools[0].name }}|{{ documents[0].x }}|\
                      {{ flag }}|{{ add_generation_prompt }}";
        let model = kvasir_model::testkit::tiny_model(1);
        let mut text = ModelText::new(&model, 64);
        text.chat_template = Arc::new(ChatTemplate::new(source, None, None).unwrap());
        let kwargs = json!({"flag": 7});
        let chat = ChatPrompt {
            messages: &[json!({"role": "user", "content": "hi"})],
            add_generation_prompt: true,
            continue_final_message: false,
            tools: Some(&[json!({"name": "f"})]),
            documents: Some(&[json!({"x": 1})]),
            kwargs: kwargs.as_object().unwrap(),
        };
        // Jinja2 writes booleans as Python does.
        assert_eq!(text.render_chat(&chat).unwrap().to_lowercase(), "hi|f|1|7|true");
    }

    #[test]
    fn tokens_of_a_tiny_model() {
        let model = kvasir_model::testkit::tiny_model(1);
        let text = ModelText::new(&model, 64);
        let tokens = text.encode("hi there", false).unwrap();
        assert_eq!(text.decode(&tokens, false), "hi there");
        assert_eq!(text.max_model_len(), 64);
        let outside = u32::try_from(text.vocab_size()).unwrap();
        assert!(text.token_bytes(0).is_some() && text.token_bytes(outside).is_none());
        assert!(text.token_piece(0).is_some() && text.token_piece(outside).is_none());
    }
}
