//! Answers in one piece.

use kvasir_engine::{SequenceOutput, TokenId, TokenLogprobs};
use serde::Serialize;

use super::job::{Api, Job, Progress};
use super::logprobs::{ChatLogprobs, CompletionLogprobs, prompt_logprobs};
use super::response::{Answer, ChatChoice, CompletionChoice, End, FINGERPRINT, Message};
use crate::ApiError;

/// Gathers the outputs of a job until all its choices have ended.
pub(crate) struct Collector {
    job: Job,
    progress: Progress,
    choices: Vec<Gathered>,
    /// By prompt.
    prompt_logprobs: Vec<Option<Vec<Option<TokenLogprobs>>>>,
}

#[derive(Debug, Clone, Default)]
struct Gathered {
    text: String,
    token_ids: Vec<TokenId>,
    logprobs: Vec<TokenLogprobs>,
    end: Option<End>,
}

impl Collector {
    pub(crate) fn new(job: Job) -> Self {
        Self {
            progress: Progress::new(&job),
            choices: vec![Gathered::default(); job.num_choices()],
            prompt_logprobs: vec![None; job.prompts.len()],
            job,
        }
    }

    pub(crate) fn absorb(&mut self, prompt: usize, mut output: SequenceOutput) {
        self.job.hide(&mut output);
        let choice = self.job.choice(prompt, output.index);
        self.progress.absorb(prompt, choice, &output);
        if let Some(logprobs) = output.prompt_logprobs
            && let Some(slot) = self.prompt_logprobs.get_mut(prompt)
        {
            *slot = Some(logprobs);
        }
        let Some(gathered) = self.choices.get_mut(choice) else { return };
        gathered.text.push_str(&output.text);
        gathered.token_ids.extend(output.token_ids);
        gathered.logprobs.extend(output.logprobs);
        gathered.end = output.finish.map(End::from);
    }

    /// Ends what is still open.
    pub(crate) fn abort(&mut self) {
        let open: Vec<_> = self.progress.open().collect();
        for choice in open {
            self.progress.end(choice);
            if let Some(gathered) = self.choices.get_mut(choice) {
                gathered.end = Some(End::aborted());
            }
        }
    }

    pub(crate) fn done(&self) -> bool {
        self.progress.done()
    }

    /// The answer's body.
    pub(crate) fn into_json(mut self) -> Result<Vec<u8>, ApiError> {
        let choices = std::mem::take(&mut self.choices);
        match self.job.api {
            Api::Chat => {
                let make = |(index, choice)| self.chat_choice(index, choice);
                self.answer("chat.completion", choices.into_iter().enumerate().map(make).collect())
            }
            Api::Completion { echo, .. } => {
                let make = |(index, choice)| self.completion_choice(index, choice, echo);
                self.answer("text_completion", choices.into_iter().enumerate().map(make).collect())
            }
        }
    }

    fn answer<C: Serialize>(
        &self,
        object: &'static str,
        choices: Vec<C>,
    ) -> Result<Vec<u8>, ApiError> {
        let chat = self.job.api == Api::Chat;
        let prompt = self.job.prompts.first();
        let answer = Answer {
            id: &self.job.id,
            object,
            created: self.job.created,
            model: &self.job.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage: Some(Some(self.progress.usage())),
            prompt_logprobs: if chat { self.shown_prompt_logprobs(0) } else { None },
            prompt_token_ids: prompt
                .filter(|_| chat && self.job.options.return_token_ids)
                .map(|prompt| prompt.tokens.as_slice()),
        };
        serde_json::to_vec(&answer).map_err(|error| ApiError::internal(error.to_string()))
    }

    fn shown_prompt_logprobs(&self, prompt: usize) -> Option<serde_json::Value> {
        let logprobs = self.prompt_logprobs.get(prompt)?.as_ref()?;
        let shown = self.job.options.show_prompt_logprobs;
        shown.then(|| prompt_logprobs(self.job.speller(), logprobs))
    }

    fn chat_choice(&self, index: usize, choice: Gathered) -> ChatChoice {
        let options = &self.job.options;
        let logprobs = options.params.logprobs;
        let (reason, cause) = choice.end.map(|end| (end.reason, end.cause)).unzip();
        ChatChoice {
            index,
            message: Message { role: "assistant", content: choice.text, refusal: None },
            logprobs: logprobs.map(|_| ChatLogprobs::new(self.job.speller(), &choice.logprobs)),
            finish_reason: reason,
            stop_reason: cause.flatten(),
            token_ids: options.return_token_ids.then_some(choice.token_ids),
        }
    }

    fn completion_choice(&self, index: usize, choice: Gathered, echo: bool) -> CompletionChoice {
        let options = &self.job.options;
        let prompt_index = index / self.job.n();
        let prompt = self.job.prompts.get(prompt_index);
        let echoed = prompt.filter(|_| echo);
        let logprobs = options.params.logprobs.map(|_| {
            let (mut logprobs, mut offset) = (CompletionLogprobs::default(), 0);
            if let Some(prompt) = echoed {
                let known = self.prompt_logprobs.get(prompt_index).and_then(Option::as_deref);
                let speller = self.job.speller();
                let known = known.unwrap_or_default();
                logprobs.push_prompt(speller, &mut offset, &prompt.tokens, known);
            }
            logprobs.push(self.job.speller(), &mut offset, &choice.logprobs);
            logprobs
        });
        let mut text = echoed.map(|prompt| prompt.echo.clone()).unwrap_or_default();
        text.push_str(&choice.text);
        let (reason, cause) = choice.end.map(|end| (end.reason, end.cause)).unzip();
        CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason: reason,
            stop_reason: cause.flatten(),
            prompt_logprobs: self.shown_prompt_logprobs(prompt_index),
            prompt_token_ids: prompt
                .filter(|_| options.return_token_ids)
                .map(|prompt| prompt.tokens.clone()),
            token_ids: options.return_token_ids.then_some(choice.token_ids),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::job::tests::{chat, completion, output};
    use super::*;
    use kvasir_engine::FinishReason;
    use serde_json::{Value, json};

    fn finish(collector: Collector) -> Value {
        assert!(collector.done());
        serde_json::from_slice(&collector.into_json().unwrap()).unwrap()
    }

    #[test]
    fn chat_answer() {
        let body = r#"{"messages":[{"role":"user","content":"x"}],"return_token_ids":true}"#;
        let mut collector = Collector::new(chat(body));
        collector.absorb(0, output(0, "a", 1, None));
        collector.absorb(0, output(0, "b", 2, Some(FinishReason::Stop)));
        let expected = json!({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 7, "model": "m",
            "system_fingerprint": FINGERPRINT,
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "ab", "refusal": null},
                "logprobs": null, "finish_reason": "stop", "stop_reason": null,
                "token_ids": [97, 98],
            }],
            "usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2,
                      "prompt_tokens_details": {"cached_tokens": 2},
                      "kvasir": {"recipe": "int8", "logical_bytes": 30, "physical_bytes": 20,
                                 "ratio": 1.5}},
            "prompt_token_ids": [1, 2, 3],
        });
        assert_eq!(finish(collector), expected);
    }

    #[test]
    fn completion_answer_numbers_choices_by_prompt() {
        let mut collector = Collector::new(completion(r#"{"prompt": ["x", "y"], "n": 2}"#));
        for (prompt, index, text) in [(1, 1, "d"), (0, 0, "a"), (1, 0, "c"), (0, 1, "b")] {
            collector.absorb(prompt, output(index, text, 1, Some(FinishReason::Length)));
        }
        let answer = finish(collector);
        let texts: Vec<_> =
            answer["choices"].as_array().unwrap().iter().map(|c| &c["text"]).collect();
        assert_eq!(texts, ["a", "b", "c", "d"]);
        assert_eq!(answer["choices"][3]["index"], 3);
        assert_eq!(answer["usage"]["completion_tokens"], 4);
    }

    #[test]
    fn echo_of_the_prompt_alone() {
        let body = r#"{"prompt": "hi", "echo": true, "logprobs": 1, "max_tokens": 0}"#;
        let mut collector = Collector::new(completion(body));
        let mut first = output(0, "x", 1, Some(FinishReason::Length));
        let second =
            TokenLogprobs { token_id: 105, logprob: -2.0, rank: 3, top: vec![(120, -1.0)] };
        first.prompt_logprobs = Some(vec![None, Some(second)]);
        collector.absorb(0, first);
        let answer = finish(collector);
        let choice = &answer["choices"][0];
        assert_eq!(choice["text"], "hi");
        assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -2.0]));
        assert_eq!(choice["logprobs"]["top_logprobs"][1], json!({"i": -2.0, "x": -1.0}));
        assert_eq!(answer["usage"]["completion_tokens"], 0);
        assert_eq!(choice.get("prompt_logprobs"), None);
    }

    #[test]
    fn an_abort_ends_what_is_open() {
        let mut collector = Collector::new(completion(r#"{"prompt": "x", "n": 2}"#));
        collector.absorb(0, output(0, "a", 1, Some(FinishReason::Length)));
        collector.abort();
        let answer = finish(collector);
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        assert_eq!(answer["choices"][1]["finish_reason"], "abort");
    }
}
