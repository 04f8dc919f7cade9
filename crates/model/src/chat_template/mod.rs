//! Chat messages to a prompt, by the model's Jinja template, as transformers renders it.

mod json;
mod python;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::SystemTime;

use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use serde::Serialize;

use crate::error::{ModelError, Result};
use crate::tokenizer::Tokenizer;

/// A value of the template language.
pub use minijinja::Value;

const NAME: &str = "chat_template";

/// The template of models whose tokens are `<|im_start|>` and `<|im_end|>`.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' \
    + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// For models that know no roles: they may go on in the style of the prompt.
const PLAIN: &str = "{% for message in messages %}{{ message['role'] + ': ' \
    + message['content'] + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";

/// Stands at the end of the final message while it is rendered, to be found again. The space at its
/// end shows whether the template trims messages.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A parsed chat template. Rendering changes nothing in it.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<&'static str, String>,
}

/// What to render beside the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// End with what starts the assistant's answer.
    pub add_generation_prompt: bool,
    /// End within the final message, which the model then goes on with. Not together with
    /// `add_generation_prompt`.
    pub continue_final_message: bool,
    /// The tools a model may call, in OpenAI's JSON shape.
    pub tools: Option<Value>,
    /// Documents to answer from.
    pub documents: Option<Value>,
    /// Variables of the template (`chat_template_kwargs`). They replace the special tokens, but not
    /// the messages and what the fields above set.
    pub extra: BTreeMap<String, Value>,
    /// What `strftime_now` takes for now (UTC); `None` is the time of the call.
    pub now: Option<SystemTime>,
}

/// `value` for a template, the order of its keys kept.
pub fn to_value<T: Serialize>(value: &T) -> Value {
    Value::from(Serde(value))
}

impl ChatTemplate {
    /// Parses a template. `bos_token` and `eos_token` are the texts of these tokens.
    ///
    /// # Errors
    /// A syntax error, with its line.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| python::template_error(&e))?);
        python::add_to(&mut environment);
        environment.add_filter("tojson", json::tojson);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| python::template_error(&e))?;
        let tokens = [("bos_token", bos_token), ("eos_token", eos_token)];
        let special_tokens =
            tokens.into_iter().filter_map(|(name, text)| Some((name, text?.to_owned()))).collect();
        Ok(Self { environment, special_tokens })
    }

    /// The template of models with `<|im_start|>` and `<|im_end|>`.
    ///
    /// # Errors
    /// None in practice: the template is a constant.
    pub fn chatml() -> Result<Self> {
        Self::new(CHATML, None, None)
    }

    /// The template of a model: its own; without one ChatML if it has the tokens for it; else lines
    /// of `role: content`.
    ///
    /// # Errors
    /// A syntax error in the model's own template.
    pub fn for_tokenizer(tokenizer: &Tokenizer) -> Result<Self> {
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_str(id));
        let bos = text(tokenizer.bos_id());
        let eos = text(tokenizer.eos_ids().first().copied());
        match tokenizer.chat_template() {
            Some(source) => Self::new(source, bos, eos),
            None if tokenizer.token_to_id("<|im_start|>").is_some() => Self::chatml(),
            None => Self::new(PLAIN, bos, eos),
        }
    }

    /// Renders `messages`, a list of objects with `role` and `content` (and whatever else the
    /// template reads). The result holds the special tokens as text, BOS included where the template
    /// writes it.
    ///
    /// # Errors
    /// What the template refuses (`raise_exception`: its own words), a mistake in the template with
    /// its line, or a final message that cannot be continued.
    pub fn render<M: Serialize>(&self, messages: &M, options: &RenderOptions) -> Result<String> {
        let messages = if options.continue_final_message {
            if options.add_generation_prompt {
                return Err(refused(
                    "continue_final_message and add_generation_prompt exclude each other",
                ));
            }
            with_continue_tag(messages)?
        } else {
            to_value(messages)
        };
        let optional = |value: &Option<Value>| value.clone().unwrap_or_else(|| Value::from(()));
        let now = options.now.unwrap_or_else(SystemTime::now);

        let mut context: BTreeMap<String, Value> = BTreeMap::new();
        for (name, text) in &self.special_tokens {
            context.insert((*name).to_owned(), Value::from(text.as_str()));
        }
        context.insert("strftime_now".to_owned(), python::strftime_now(now));
        context.extend(options.extra.iter().map(|(name, value)| (name.clone(), value.clone())));
        for (name, value) in [
            ("messages", messages),
            ("tools", optional(&options.tools)),
            ("documents", optional(&options.documents)),
            ("add_generation_prompt", Value::from(options.add_generation_prompt)),
        ] {
            context.insert(name.to_owned(), value);
        }

        let rendered = self
            .environment
            .get_template(NAME)
            .and_then(|template| template.render(Value::from_pairs(context)))
            .map_err(|e| python::template_error(&e))?;
        if options.continue_final_message { cut_at_continue_tag(&rendered) } else { Ok(rendered) }
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

fn refused(what: &str) -> ModelError {
    ModelError::Template { what: what.to_owned() }
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which mark the assistant's words for
/// training, by a block that does nothing and treats the whitespace around it alike.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inner = tag.get(2..end).unwrap_or_default();
        let name = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag[..end + 2].replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag[..end + 2].replace("endgeneration", "endif")),
            // Only the opening is passed over: the rest may be an expression with "%}" in a string.
            _ => {
                out.push_str("{%");
                rest = tag.get(2..).unwrap_or_default();
                continue;
            }
        }
        rest = tag.get(end + 2..).unwrap_or_default();
    }
    out.push_str(rest);
    out
}

/// The messages with [`CONTINUE_TAG`] after the text of the last one.
fn with_continue_tag<M: Serialize>(messages: &M) -> Result<Value> {
    let mut messages = serde_json::to_value(messages)
        .map_err(|e| ModelError::Template { what: format!("messages: {e}") })?;
    let content = messages
        .as_array_mut()
        .and_then(|messages| messages.last_mut())
        .and_then(|message| message.get_mut("content"));
    let text = match content {
        Some(serde_json::Value::Array(parts)) => {
            parts.iter_mut().rev().find_map(|part| part.get_mut("text"))
        }
        other => other,
    };
    match text {
        Some(serde_json::Value::String(text)) => text.push_str(CONTINUE_TAG),
        _ => return Err(refused("continue_final_message: the final message has no text")),
    }
    Ok(to_value(&messages))
}

/// The rendering up to the end of the final message.
fn cut_at_continue_tag(rendered: &str) -> Result<String> {
    let Some(at) = rendered.rfind(CONTINUE_TAG.trim_end()) else {
        return Err(refused(
            "continue_final_message: the template leaves the final message out, or changes it",
        ));
    };
    let (before, rest) = rendered.split_at(at);
    // A template that trims messages would have trimmed this one's end too.
    let kept = if rest.starts_with(CONTINUE_TAG) { before } else { before.trim_end() };
    Ok(kept.to_owned())
}
