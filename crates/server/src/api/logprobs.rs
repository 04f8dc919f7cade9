//! Log probabilities in the shapes of the two APIs, and vLLM's shape for prompts.

use kvasir_engine::{TokenId, TokenLogprobs};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::text_model::TextModel;

/// How tokens are spelled in an answer.
#[derive(Clone, Copy)]
pub(crate) struct Speller<'a> {
    pub(crate) text: &'a dyn TextModel,
    /// `token_id:N` in place of the text.
    pub(crate) as_ids: bool,
}

impl Speller<'_> {
    fn bytes(&self, token: TokenId) -> Vec<u8> {
        self.text.token_bytes(token).map(|bytes| bytes.into_owned()).unwrap_or_default()
    }

    fn spell(&self, token: TokenId) -> String {
        if self.as_ids {
            format!("token_id:{token}")
        } else {
            String::from_utf8_lossy(&self.bytes(token)).into_owned()
        }
    }
}

/// JSON has no infinity; vLLM's stand-in for it.
fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { -9999.0 } else { logprob.clamp(-9999.0, 9999.0) }
}

/// `choices[].logprobs` of a chat completion.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatToken>,
    pub(crate) refusal: Option<()>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ChatToken {
    #[serde(flatten)]
    chosen: ChatAlternative,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct ChatAlternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(crate) fn new(speller: Speller<'_>, tokens: &[TokenLogprobs]) -> Self {
        let alternative = |(token, logprob)| ChatAlternative {
            token: speller.spell(token),
            logprob: finite(logprob),
            bytes: speller.bytes(token),
        };
        let token = |token: &TokenLogprobs| ChatToken {
            chosen: alternative((token.token_id, token.logprob)),
            top_logprobs: token.top.iter().copied().map(alternative).collect(),
        };
        Self { content: tokens.iter().map(token).collect(), refusal: None }
    }
}

/// `choices[].logprobs` of a text completion. All lists have one entry per token.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct CompletionLogprobs {
    /// Characters before the token.
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl CompletionLogprobs {
    /// Adds generated tokens; `offset` is the running count of characters.
    pub(crate) fn push(
        &mut self,
        speller: Speller<'_>,
        offset: &mut usize,
        tokens: &[TokenLogprobs],
    ) {
        for token in tokens {
            self.push_one(speller, offset, token.token_id, Some(token));
        }
    }

    /// Adds the tokens of an echoed prompt.
    pub(crate) fn push_prompt(
        &mut self,
        speller: Speller<'_>,
        offset: &mut usize,
        prompt: &[TokenId],
        logprobs: &[Option<TokenLogprobs>],
    ) {
        for (at, token) in prompt.iter().enumerate() {
            let known = logprobs.get(at).and_then(Option::as_ref);
            self.push_one(speller, offset, *token, known);
        }
    }

    fn push_one(
        &mut self,
        speller: Speller<'_>,
        offset: &mut usize,
        token: TokenId,
        known: Option<&TokenLogprobs>,
    ) {
        let text = speller.spell(token);
        self.text_offset.push(*offset);
        *offset += text.chars().count();
        self.token_logprobs.push(known.map(|known| finite(known.logprob)));
        self.top_logprobs.push(known.map(|known| {
            // The chosen token comes first, whether or not it is among the best.
            let mut top = Map::new();
            top.insert(text.clone(), finite(known.logprob).into());
            for (token, logprob) in &known.top {
                top.entry(speller.spell(*token)).or_insert_with(|| finite(*logprob).into());
            }
            top
        }));
        self.tokens.push(text);
    }
}

/// `prompt_logprobs` as vLLM reports them: `null` for the first token, else an object from token
/// ids to `{logprob, rank, decoded_token}`.
pub(crate) fn prompt_logprobs(speller: Speller<'_>, tokens: &[Option<TokenLogprobs>]) -> Value {
    let entry = |token: TokenId, logprob: f32, rank: usize| {
        let text = String::from_utf8_lossy(&speller.bytes(token)).into_owned();
        json!({"logprob": finite(logprob), "rank": rank, "decoded_token": text})
    };
    let one = |token: &TokenLogprobs| {
        let mut map = Map::new();
        let chosen = entry(token.token_id, token.logprob, token.rank);
        map.insert(token.token_id.to_string(), chosen);
        for (at, (id, logprob)) in token.top.iter().enumerate() {
            map.entry(id.to_string()).or_insert_with(|| entry(*id, *logprob, at + 1));
        }
        Value::Object(map)
    };
    tokens.iter().map(|token| token.as_ref().map_or(Value::Null, one)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::MockText;

    fn token(id: u8, top: &[(u8, f32)]) -> TokenLogprobs {
        let top = top.iter().map(|(id, logprob)| (u32::from(*id), *logprob)).collect();
        TokenLogprobs { token_id: id.into(), logprob: -0.5, rank: 1, top }
    }

    #[test]
    fn chat_shape() {
        let text = MockText::default();
        let speller = Speller { text: &text, as_ids: false };
        let tokens = [token(b'a', &[(b'a', -0.5), (b'b', f32::NEG_INFINITY)])];
        let json = serde_json::to_string(&ChatLogprobs::new(speller, &tokens)).unwrap();
        assert_eq!(
            json,
            r#"{"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[{"token":"a","logprob":-0.5,"bytes":[97]},{"token":"b","logprob":-9999.0,"bytes":[98]}]}],"refusal":null}"#
        );
    }

    #[test]
    fn completion_shape_counts_characters_and_keeps_the_chosen_token() {
        let text = MockText::default();
        let speller = Speller { text: &text, as_ids: false };
        let (mut logprobs, mut offset) = (CompletionLogprobs::default(), 0);
        logprobs.push_prompt(speller, &mut offset, &[104, 105], &[None, Some(token(b'i', &[]))]);
        logprobs.push(speller, &mut offset, &[token(b'c', &[(b'a', -0.25)])]);
        assert_eq!(
            serde_json::to_string(&logprobs).unwrap(),
            r#"{"text_offset":[0,1,2],"token_logprobs":[null,-0.5,-0.5],"tokens":["h","i","c"],"top_logprobs":[null,{"i":-0.5},{"c":-0.5,"a":-0.25}]}"#
        );
    }

    #[test]
    fn tokens_as_ids_do_not_collide() {
        let text = MockText::default();
        let speller = Speller { text: &text, as_ids: true };
        let mut logprobs = CompletionLogprobs::default();
        // Bytes 200 and 201 are both shown as U+FFFD.
        logprobs.push(speller, &mut 0, &[token(200, &[(201, -1.0)])]);
        let expected = ["token_id:200".to_owned()];
        assert_eq!(logprobs.tokens, expected);
        assert_eq!(logprobs.top_logprobs[0].as_ref().unwrap().len(), 2);
    }

    #[test]
    fn prompt_shape() {
        let text = MockText::default();
        let speller = Speller { text: &text, as_ids: false };
        let mut second = token(b'i', &[(b'x', -0.25), (b'i', -0.5)]);
        second.rank = 2;
        assert_eq!(
            prompt_logprobs(speller, &[None, Some(second)]).to_string(),
            r#"[null,{"105":{"logprob":-0.5,"rank":2,"decoded_token":"i"},"120":{"logprob":-0.25,"rank":1,"decoded_token":"x"}}]"#
        );
    }
}
