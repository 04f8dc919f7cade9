//! What has been said.

use kvasir_model::{ChatTemplate, RenderOptions, Result};
use serde::Serialize;

/// A message as chat templates read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Message {
    role: &'static str,
    content: String,
}

impl Message {
    fn new(role: &'static str, content: &str) -> Self {
        Self { role, content: content.to_owned() }
    }
}

/// A system message, if any, and turns of user and assistant. Each prompt begins with the text of
/// the one before, so that the prefix cache holds all but the last turn.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    system: Option<String>,
    turns: Vec<Message>,
}

impl Conversation {
    /// An empty conversation.
    pub(crate) fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    /// Forgets all turns.
    pub(crate) fn reset(&mut self) {
        self.turns.clear();
    }

    /// Replaces the system message and forgets all turns, which were said under the old one.
    pub(crate) fn set_system(&mut self, system: Option<String>) {
        self.system = system;
        self.reset();
    }

    /// Adds a question and its answer.
    pub(crate) fn add_turn(&mut self, user: &str, assistant: &str) {
        self.turns.push(Message::new("user", user));
        self.turns.push(Message::new("assistant", assistant));
    }

    /// The prompt that asks for an answer to `user`.
    pub(crate) fn prompt(&self, template: &ChatTemplate, user: &str) -> Result<String> {
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        template.render(&self.messages(user), &options)
    }

    fn messages(&self, user: &str) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        let turns = self.turns.iter().cloned();
        system.chain(turns).chain([Message::new("user", user)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_begins_with_the_one_before() {
        let template = ChatTemplate::chatml().unwrap();
        let mut conversation = Conversation::new(Some("Be brief.".into()));
        let first = conversation.prompt(&template, "Hi").unwrap();
        assert_eq!(
            first,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
             <|im_start|>assistant\n"
        );
        conversation.add_turn("Hi", "Hello!");
        let second = conversation.prompt(&template, "Bye").unwrap();
        assert!(second.starts_with(&format!("{first}Hello!<|im_end|>\n")), "{second}");

        conversation.reset();
        assert_eq!(conversation.prompt(&template, "Hi").unwrap(), first);
        conversation.add_turn("Hi", "Hello!");
        conversation.set_system(None);
        let messages = conversation.messages("Hi");
        assert_eq!(messages, [Message::new("user", "Hi")]);
    }
}
