//! Answers in pieces: server-sent events.
//!
//! HOT PATH: runs once per token. No logging, no locks.

use kvasir_engine::SequenceOutput;
use serde::Serialize;

use super::job::{Api, Job, Progress};
use super::logprobs::{ChatLogprobs, CompletionLogprobs};
use super::response::{Answer, ChunkChoice, CompletionChoice, Delta, End, FINGERPRINT, Usage};
use crate::ApiError;

/// Turns the outputs of a job into events. Every method appends to `out` what is to be sent.
pub(crate) struct Streamer {
    job: Job,
    progress: Progress,
    /// By prompt: whether its role or echo chunks went out.
    opened: Vec<bool>,
    /// By choice: characters so far, for `text_offset`.
    offsets: Vec<usize>,
    closed: bool,
}

impl Streamer {
    pub(crate) fn new(job: Job) -> Self {
        Self {
            progress: Progress::new(&job),
            opened: vec![false; job.prompts.len()],
            offsets: vec![0; job.num_choices()],
            closed: false,
            job,
        }
    }

    /// Whether everything has been sent, the last line included.
    pub(crate) fn closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn absorb(&mut self, prompt: usize, mut output: SequenceOutput, out: &mut Vec<u8>) {
        self.job.hide(&mut output);
        let choice = self.job.choice(prompt, output.index);
        self.progress.absorb(prompt, choice, &output);
        if self.opened.get_mut(prompt).is_some_and(|opened| !std::mem::replace(opened, true)) {
            self.open(prompt, &output, out);
        }
        let end = output.finish.take().map(End::from);
        // A step that only prefilled has nothing to tell.
        if end.is_some() || !output.token_ids.is_empty() || !output.text.is_empty() {
            self.piece(choice, output, end, out);
        }
        if self.progress.done() {
            self.close(out);
        }
    }

    /// Ends what is still open.
    pub(crate) fn abort(&mut self, out: &mut Vec<u8>) {
        let open: Vec<_> = self.progress.open().collect();
        for choice in open {
            self.progress.end(choice);
            match self.job.api {
                Api::Chat => {
                    let choice = self.chat_piece(choice, Delta::default(), Some(End::aborted()));
                    self.chat_chunk(choice, false, out);
                }
                Api::Completion { .. } => {
                    let choice = self.text_piece(choice, String::new(), Some(End::aborted()));
                    self.text_chunk(choice, out);
                }
            }
        }
        self.close(out);
    }

    /// The engine failed: status 200 is already out, so the error goes into the stream.
    pub(crate) fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        if !self.closed {
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(error.to_json().as_bytes());
            out.extend_from_slice(b"\n\ndata: [DONE]\n\n");
            self.closed = true;
        }
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if self.closed {
            return;
        }
        if self.job.options.include_usage {
            let usage = Some(Some(self.progress.usage()));
            self.event::<ChunkChoice>(Vec::new(), usage, false, out);
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
        self.closed = true;
    }

    /// What comes before the first text of a prompt: the role, or the echoed prompt.
    fn open(&mut self, prompt: usize, first: &SequenceOutput, out: &mut Vec<u8>) {
        for sequence in 0..self.job.n() {
            let choice = self.job.choice(prompt, sequence);
            match self.job.api {
                Api::Chat => {
                    let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
                    let piece = self.chat_piece(choice, delta, None);
                    self.chat_chunk(piece, sequence == 0, out);
                }
                Api::Completion { echo, .. } if echo || self.job.options.return_token_ids => {
                    let Some(input) = self.job.prompts.get(prompt) else { continue };
                    let text = if echo { input.echo.clone() } else { String::new() };
                    let tokens = self.job.options.return_token_ids.then(|| input.tokens.clone());
                    let mut piece = self.text_piece(choice, text, None);
                    piece.prompt_token_ids = tokens;
                    if echo && self.job.options.params.logprobs.is_some() {
                        let known = first.prompt_logprobs.as_deref().unwrap_or_default();
                        let mut logprobs = CompletionLogprobs::default();
                        let mut offset = self.offset(choice);
                        let speller = self.job.speller();
                        logprobs.push_prompt(speller, &mut offset, &input.tokens, known);
                        piece.logprobs = Some(logprobs);
                        self.set_offset(choice, offset);
                    }
                    self.text_chunk(piece, out);
                }
                Api::Completion { .. } => {}
            }
        }
    }

    /// What a step made for a choice.
    fn piece(
        &mut self,
        choice: usize,
        output: SequenceOutput,
        end: Option<End>,
        out: &mut Vec<u8>,
    ) {
        let wants_logprobs = self.job.options.params.logprobs.is_some();
        let token_ids = self.job.options.return_token_ids.then_some(output.token_ids);
        match self.job.api {
            Api::Chat => {
                let delta = Delta { role: None, content: Some(output.text) };
                let mut piece = self.chat_piece(choice, delta, end);
                piece.token_ids = token_ids;
                if wants_logprobs {
                    piece.logprobs = Some(ChatLogprobs::new(self.job.speller(), &output.logprobs));
                }
                self.chat_chunk(piece, false, out);
            }
            Api::Completion { .. } => {
                let mut piece = self.text_piece(choice, output.text, end);
                piece.token_ids = token_ids;
                if wants_logprobs {
                    let mut logprobs = CompletionLogprobs::default();
                    let mut offset = self.offset(choice);
                    logprobs.push(self.job.speller(), &mut offset, &output.logprobs);
                    self.set_offset(choice, offset);
                    piece.logprobs = Some(logprobs);
                }
                self.text_chunk(piece, out);
            }
        }
    }

    fn offset(&self, choice: usize) -> usize {
        self.offsets.get(choice).copied().unwrap_or(0)
    }

    fn set_offset(&mut self, choice: usize, offset: usize) {
        if let Some(slot) = self.offsets.get_mut(choice) {
            *slot = offset;
        }
    }

    fn chat_piece(&self, index: usize, delta: Delta, end: Option<End>) -> ChunkChoice {
        let (finish_reason, cause) = end.map(|end| (end.reason, end.cause)).unzip();
        let stop_reason = cause.flatten();
        ChunkChoice { index, delta, logprobs: None, finish_reason, stop_reason, token_ids: None }
    }

    fn text_piece(&self, index: usize, text: String, end: Option<End>) -> CompletionChoice {
        let (finish_reason, cause) = end.map(|end| (end.reason, end.cause)).unzip();
        CompletionChoice {
            index,
            text,
            logprobs: None,
            finish_reason,
            stop_reason: cause.flatten(),
            prompt_logprobs: None,
            prompt_token_ids: None,
            token_ids: None,
        }
    }

    fn chat_chunk(&self, choice: ChunkChoice, first: bool, out: &mut Vec<u8>) {
        self.event(vec![choice], self.running_usage(), first, out);
    }

    fn text_chunk(&self, choice: CompletionChoice, out: &mut Vec<u8>) {
        self.event(vec![choice], self.running_usage(), false, out);
    }

    /// The usage field of chunks before the last.
    fn running_usage(&self) -> Option<Option<Usage>> {
        let options = &self.job.options;
        options.include_usage.then(|| options.continuous_usage.then(|| self.progress.usage()))
    }

    fn event<C: Serialize>(
        &self,
        choices: Vec<C>,
        usage: Option<Option<Usage>>,
        with_prompt: bool,
        out: &mut Vec<u8>,
    ) {
        let prompt = self.job.prompts.first();
        let answer = Answer {
            id: &self.job.id,
            object: match self.job.api {
                Api::Chat => "chat.completion.chunk",
                Api::Completion { .. } => "text_completion",
            },
            created: self.job.created,
            model: &self.job.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
            prompt_logprobs: None,
            prompt_token_ids: prompt
                .filter(|_| with_prompt && self.job.options.return_token_ids)
                .map(|prompt| prompt.tokens.as_slice()),
        };
        out.extend_from_slice(b"data: ");
        let start = out.len();
        // Writing to a Vec cannot fail, and no type here has a key that is not a string.
        if serde_json::to_writer(&mut *out, &answer).is_err() {
            out.truncate(start);
        }
        out.extend_from_slice(b"\n\n");
    }
}

#[cfg(test)]
mod tests {
    use super::super::job::tests::{chat, completion, output};
    use super::*;
    use kvasir_engine::FinishReason;
    use serde_json::{Value, json};

    fn lines(out: &[u8]) -> Vec<String> {
        let text = std::str::from_utf8(out).unwrap();
        assert!(text.ends_with("\n\n"));
        text.trim_end()
            .split("\n\n")
            .map(|l| l.strip_prefix("data: ").unwrap().to_owned())
            .collect()
    }

    fn parsed(out: &[u8]) -> Vec<Value> {
        let lines = lines(out);
        let (last, rest) = lines.split_last().unwrap();
        assert_eq!(last, "[DONE]");
        rest.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn chat_stream() {
        let body = r#"{"messages":[{"role":"user","content":"x"}],"stream":true,
                       "stream_options":{"include_usage":true}}"#;
        let mut streamer = Streamer::new(chat(body));
        let mut out = Vec::new();
        streamer.absorb(0, output(0, "a", 1, None), &mut out);
        assert!(!streamer.closed());
        streamer.absorb(0, output(0, "b", 2, Some(FinishReason::Stop)), &mut out);
        assert!(streamer.closed());
        let head = format!(
            r#"{{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"{FINGERPRINT}","choices":["#
        );
        let expected = [
            r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#"{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#"{"index":0,"delta":{"content":"b"},"logprobs":null,"finish_reason":"stop"}],"usage":null}"#,
            r#"],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":2},"kvasir":{"recipe":"int8","logical_bytes":30,"physical_bytes":20,"ratio":1.5}}}"#,
        ];
        let mut expected: Vec<_> = expected.iter().map(|tail| format!("{head}{tail}")).collect();
        expected.push("[DONE]".into());
        assert_eq!(lines(&out), expected);
    }

    #[test]
    fn usage_is_absent_or_continuous_as_asked() {
        let run = |options: &str| {
            let body = format!(r#"{{"prompt":"x","stream":true{options}}}"#);
            let mut streamer = Streamer::new(completion(&body));
            let mut out = Vec::new();
            streamer.absorb(0, output(0, "a", 1, Some(FinishReason::Length)), &mut out);
            parsed(&out)
        };
        let plain = run("");
        assert_eq!(plain.len(), 1);
        assert_eq!(plain[0].get("usage"), None);
        let options = r#","stream_options":{"include_usage":true,"continuous_usage_stats":true}"#;
        let continuous = run(options);
        assert_eq!(continuous[0]["usage"]["completion_tokens"], 1);
        assert_eq!(continuous[1]["usage"]["kvasir"]["recipe"], "int8");
        assert_eq!(continuous[1]["choices"], json!([]));
    }

    #[test]
    fn completion_stream_with_echo_and_logprobs_keeps_offsets() {
        let body = r#"{"prompt":"hi","stream":true,"echo":true,"logprobs":0,
                       "return_token_ids":true}"#;
        let mut streamer = Streamer::new(completion(body));
        let mut out = Vec::new();
        let mut first = output(0, "a", 1, None);
        first.prompt_logprobs = Some(vec![None, None]);
        streamer.absorb(0, first, &mut out);
        streamer.absorb(0, output(0, "b", 2, Some(FinishReason::Length)), &mut out);
        let chunks = parsed(&out);
        let texts: Vec<_> = chunks.iter().map(|c| &c["choices"][0]["text"]).collect();
        assert_eq!(texts, ["hi", "a", "b"]);
        let offsets: Vec<_> =
            chunks.iter().map(|c| &c["choices"][0]["logprobs"]["text_offset"]).collect();
        assert_eq!(offsets, [&json!([0, 1]), &json!([2]), &json!([3])]);
        assert_eq!(chunks[0]["choices"][0]["prompt_token_ids"], json!([104, 105]));
        assert_eq!(chunks[2]["choices"][0]["token_ids"], json!([98]));
        assert_eq!(chunks[2]["choices"][0]["finish_reason"], "length");
    }

    #[test]
    fn every_choice_gets_a_role_and_an_end() {
        let body = r#"{"messages":[{"role":"user","content":"x"}],"stream":true,"n":2}"#;
        let mut streamer = Streamer::new(chat(body));
        let mut out = Vec::new();
        streamer.absorb(0, output(1, "a", 1, Some(FinishReason::Stop)), &mut out);
        streamer.abort(&mut out);
        let chunks = parsed(&out);
        assert_eq!(chunks.len(), 4);
        assert_eq!(chunks[0]["choices"][0]["index"], 0);
        assert_eq!(chunks[1]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(chunks[3]["choices"][0]["finish_reason"], "abort");
    }

    #[test]
    fn a_failure_is_told_once_and_closes() {
        let mut streamer = Streamer::new(completion(r#"{"prompt":"x","stream":true}"#));
        let mut out = Vec::new();
        streamer.fail(&ApiError::engine_failed("boom"), &mut out);
        streamer.fail(&ApiError::engine_failed("boom"), &mut out);
        let chunks = parsed(&out);
        assert_eq!(chunks.len(), 1);
        assert_eq!(chunks[0]["error"]["code"], "engine_failed");
    }
}
