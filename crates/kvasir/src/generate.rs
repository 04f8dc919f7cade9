//! One request through an engine that nobody else uses: `run` and `chat`.

use std::time::Instant;

use anyhow::{Result, bail};
use kvasir_engine::{FinishReason, Request, SequenceOutput, TokenId};
use kvasir_server::StepEngine;
use serde::Serialize;

use crate::interrupt::Interrupt;

/// What came out.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generation {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<TokenId>,
    pub(crate) finish_reason: FinishReason,
    pub(crate) num_prompt_tokens: usize,
    /// Prompt tokens found in the prefix cache.
    pub(crate) num_cached_tokens: usize,
    /// Bytes the sequence's tokens would take in f16, and those it took.
    pub(crate) kv: KvBytes,
    /// Seconds from the request to its first token.
    pub(crate) first_token_s: f64,
    /// Seconds from the first token to the last.
    pub(crate) rest_s: f64,
}

/// The KV cache of a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct KvBytes {
    pub(crate) logical_bytes: usize,
    pub(crate) physical_bytes: usize,
}

impl KvBytes {
    /// Logical over physical; `None` for an empty cache.
    pub(crate) fn ratio(self) -> Option<f64> {
        (self.physical_bytes > 0).then(|| self.logical_bytes as f64 / self.physical_bytes as f64)
    }
}

impl Generation {
    /// Prompt tokens that were computed, per second.
    pub(crate) fn prompt_tokens_per_second(&self) -> f64 {
        per_second(
            self.num_prompt_tokens.saturating_sub(self.num_cached_tokens),
            self.first_token_s,
        )
    }

    /// Tokens after the first, per second.
    pub(crate) fn generation_tokens_per_second(&self) -> f64 {
        per_second(self.token_ids.len().saturating_sub(1), self.rest_s)
    }
}

fn per_second(tokens: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
}

/// Runs `request` (of one sequence) to its end, to Ctrl-C, or to an error, and hands out text as
/// it becomes certain. The engine holds nothing of the request afterwards.
pub(crate) fn generate(
    engine: &mut impl StepEngine,
    request: Request,
    interrupt: &Interrupt,
    mut on_text: impl FnMut(&str) -> Result<()>,
) -> Result<Generation> {
    let id = request.id.clone();
    let start = Instant::now();
    let mut generation = Generation {
        text: String::new(),
        token_ids: Vec::new(),
        finish_reason: FinishReason::Abort,
        num_prompt_tokens: request.prompt.len(),
        num_cached_tokens: 0,
        kv: KvBytes::default(),
        first_token_s: 0.0,
        rest_s: 0.0,
    };
    engine.add_request(request)?;
    let mut first_token = None;
    while !interrupt.is_pressed() {
        let step = match engine.step() {
            Ok(step) => step,
            Err(error) => {
                engine.abort(&id);
                return Err(error.into());
            }
        };
        for output in step.outputs.into_iter().filter(|output| output.request_id == id) {
            if !output.token_ids.is_empty() && first_token.is_none() {
                first_token = Some(Instant::now());
            }
            let finished = generation.take(output, &mut on_text);
            if !matches!(finished, Ok(false)) {
                generation.set_times(start, first_token);
            }
            match finished {
                Ok(true) => return Ok(generation),
                Ok(false) => {}
                Err(error) => {
                    engine.abort(&id);
                    return Err(error);
                }
            }
        }
        if !engine.has_unfinished() {
            bail!("the engine ended request '{id}' without an answer");
        }
    }
    let stats = engine.stats();
    generation.kv = KvBytes {
        logical_bytes: stats.kv_logical_bytes,
        physical_bytes: stats.kv_physical_bytes.saturating_sub(stats.kv_evictable_bytes),
    };
    engine.abort(&id);
    generation.set_times(start, first_token);
    Ok(generation)
}

impl Generation {
    /// Adds the output of a step; returns whether it was the last.
    fn take(
        &mut self,
        output: SequenceOutput,
        on_text: &mut impl FnMut(&str) -> Result<()>,
    ) -> Result<bool> {
        self.token_ids.extend(output.token_ids);
        self.num_prompt_tokens = output.num_prompt_tokens;
        self.num_cached_tokens = output.num_cached_tokens;
        if !output.text.is_empty() {
            self.text.push_str(&output.text);
            on_text(&output.text)?;
        }
        let Some(finish) = output.finish else { return Ok(false) };
        self.finish_reason = finish.reason;
        self.kv = KvBytes {
            logical_bytes: finish.kv_logical_bytes,
            physical_bytes: finish.kv_physical_bytes,
        };
        Ok(true)
    }

    fn set_times(&mut self, start: Instant, first_token: Option<Instant>) {
        let first = first_token.unwrap_or_else(Instant::now);
        self.first_token_s = first.duration_since(start).as_secs_f64();
        self.rest_s = first.elapsed().as_secs_f64();
    }
}

/// The name of a finish reason in the API.
pub(crate) fn finish_reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_engine::{EngineError, EngineStats, Finish, RequestId, SamplingParams, StepOutput};

    /// An engine that plays back outputs.
    #[derive(Default)]
    struct Script {
        steps: Vec<Result<Vec<SequenceOutput>, EngineError>>,
        aborted: Vec<String>,
    }

    impl StepEngine for Script {
        fn add_request(&mut self, request: Request) -> Result<(), EngineError> {
            if request.prompt.is_empty() { Err(EngineError::EmptyPrompt) } else { Ok(()) }
        }

        fn abort(&mut self, id: &RequestId) -> bool {
            self.aborted.push(id.to_string());
            true
        }

        fn step(&mut self) -> Result<StepOutput, EngineError> {
            let outputs = if self.steps.is_empty() { Ok(Vec::new()) } else { self.steps.remove(0) };
            Ok(StepOutput { outputs: outputs?, ..StepOutput::default() })
        }

        fn has_unfinished(&self) -> bool {
            !self.steps.is_empty()
        }

        fn reset_prefix_cache(&mut self) -> usize {
            0
        }

        fn stats(&self) -> EngineStats {
            EngineStats {
                kv_logical_bytes: 70,
                kv_physical_bytes: 50,
                kv_evictable_bytes: 10,
                ..EngineStats::default()
            }
        }
    }

    fn request(prompt: Vec<TokenId>) -> Request {
        Request {
            id: "r".into(),
            prompt,
            params: SamplingParams::default().into(),
            cache_salt: None,
            kv_cache: None,
        }
    }

    fn output(id: &str, tokens: &[TokenId], text: &str, last: bool) -> SequenceOutput {
        SequenceOutput {
            request_id: id.into(),
            index: 0,
            token_ids: tokens.to_vec(),
            text: text.into(),
            logprobs: Vec::new(),
            prompt_logprobs: None,
            num_prompt_tokens: 3,
            num_cached_tokens: 2,
            num_output_tokens: 0,
            features: None,
            finish: last.then_some(Finish {
                reason: FinishReason::Length,
                stop: None,
                recipe: kvasir_engine::Recipe::F16,
                risk: None,
                kv_logical_bytes: 200,
                kv_physical_bytes: 100,
                num_preemptions: 0,
            }),
        }
    }

    #[test]
    fn text_streams_until_the_end() {
        let mut engine = Script {
            steps: vec![
                Ok(vec![]),
                Ok(vec![output("other", &[9], "x", true), output("r", &[1], "", false)]),
                Ok(vec![output("r", &[2, 3], "ab", false)]),
                Ok(vec![output("r", &[4], "c", true)]),
                Ok(vec![output("r", &[5], "never", true)]),
            ],
            ..Script::default()
        };
        let mut pieces = Vec::new();
        let done = generate(&mut engine, request(vec![1, 2, 3]), &Interrupt::default(), |text| {
            pieces.push(text.to_owned());
            Ok(())
        })
        .unwrap();
        assert_eq!(pieces, ["ab", "c"]);
        assert_eq!(done.text, "abc");
        assert_eq!(done.token_ids, [1, 2, 3, 4]);
        assert_eq!(done.finish_reason, FinishReason::Length);
        assert_eq!((done.num_prompt_tokens, done.num_cached_tokens), (3, 2));
        assert_eq!(done.kv.ratio(), Some(2.0));
        assert!(engine.aborted.is_empty());
    }

    #[test]
    fn an_interrupt_keeps_what_is_there_and_frees_the_rest() {
        let mut engine = Script {
            steps: (0..3).map(|_| Ok(vec![output("r", &[1], "a", false)])).collect(),
            ..Script::default()
        };
        let interrupt = Interrupt::default();
        let done = generate(&mut engine, request(vec![1]), &interrupt, |_| {
            interrupt.press();
            Ok(())
        })
        .unwrap();
        assert_eq!((done.text.as_str(), done.finish_reason), ("a", FinishReason::Abort));
        assert_eq!(done.kv, KvBytes { logical_bytes: 70, physical_bytes: 40 });
        assert_eq!(engine.aborted, ["r"]);
    }

    #[test]
    fn failures_free_the_request() {
        let mut engine = Script {
            steps: vec![Err(EngineError::Integrity { what: "x".into() })],
            ..Script::default()
        };
        let fail = |engine: &mut Script, prompt, result: fn(&str) -> Result<()>| {
            generate(engine, request(prompt), &Interrupt::default(), result).unwrap_err()
        };
        assert!(fail(&mut engine, vec![1], |_| Ok(())).to_string().contains("integrity"));
        assert_eq!(engine.aborted, ["r"]);

        let mut engine = Script {
            steps: (0..2).map(|_| Ok(vec![output("r", &[1], "a", false)])).collect(),
            ..Script::default()
        };
        fail(&mut engine, vec![1], |_| bail!("stdout is gone"));
        assert_eq!(engine.aborted, ["r"]);

        let mut engine = Script::default();
        assert!(fail(&mut engine, vec![], |_| Ok(())).to_string().contains("prompt is empty"));
        // An engine that forgets a request must not be waited for.
        assert!(fail(&mut engine, vec![1], |_| Ok(())).to_string().contains("without an answer"));
    }
}
