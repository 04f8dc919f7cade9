//! One HTTP request that generates: its prompts, how to answer, and how far it has come.

use std::sync::Arc;

use kvasir_engine::{SequenceOutput, TokenId};

use super::kv_usage::KvUsage;
use super::logprobs::Speller;
use super::response::Usage;
use super::sampling::Common;
use crate::text_model::TextModel;

/// Which API asked, and so which shape the answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Api {
    Chat,
    Completion {
        echo: bool,
        /// The one token generated is not shown.
        only_prompt: bool,
    },
}

/// A prompt as the engine gets it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PromptInput {
    pub(crate) tokens: Vec<TokenId>,
    /// What echo shows; empty without echo.
    pub(crate) echo: String,
}

/// A request, ready to run.
pub(crate) struct Job {
    pub(crate) api: Api,
    pub(crate) id: String,
    /// Unix time in seconds.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) options: Common,
    pub(crate) prompts: Vec<PromptInput>,
    pub(crate) text: Arc<dyn TextModel>,
}

impl Job {
    pub(crate) fn n(&self) -> usize {
        self.options.params.n
    }

    /// Choices are numbered prompt by prompt.
    pub(crate) fn choice(&self, prompt: usize, sequence: usize) -> usize {
        prompt * self.n() + sequence
    }

    pub(crate) fn num_choices(&self) -> usize {
        self.prompts.len() * self.n()
    }

    pub(crate) fn speller(&self) -> Speller<'_> {
        Speller { text: self.text.as_ref(), as_ids: self.options.tokens_as_ids }
    }

    /// Clears what an echo-only request must not show.
    pub(crate) fn hide(&self, output: &mut SequenceOutput) {
        if matches!(self.api, Api::Completion { only_prompt: true, .. }) {
            output.text.clear();
            output.token_ids.clear();
            output.logprobs.clear();
            output.num_output_tokens = 0;
        }
    }
}

/// What has arrived so far.
#[derive(Debug)]
pub(crate) struct Progress {
    prompt_tokens: usize,
    /// By prompt.
    cached: Vec<usize>,
    /// By choice.
    output_tokens: Vec<usize>,
    ended: Vec<bool>,
    kv: Option<KvUsage>,
}

impl Progress {
    pub(crate) fn new(job: &Job) -> Self {
        Self {
            prompt_tokens: job.prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
            cached: vec![0; job.prompts.len()],
            output_tokens: vec![0; job.num_choices()],
            ended: vec![false; job.num_choices()],
            kv: None,
        }
    }

    /// Counts an output of a choice.
    pub(crate) fn absorb(&mut self, prompt: usize, choice: usize, output: &SequenceOutput) {
        // The first sequence says what the prompt found; the others find what the first computed.
        if let Some(cached) = self.cached.get_mut(prompt).filter(|_| output.index == 0) {
            *cached = output.num_cached_tokens;
        }
        if let Some(tokens) = self.output_tokens.get_mut(choice) {
            *tokens = output.num_output_tokens;
        }
        if let Some(finish) = &output.finish {
            self.kv = Some(KvUsage::add(self.kv, finish));
            self.end(choice);
        }
    }

    pub(crate) fn end(&mut self, choice: usize) {
        if let Some(ended) = self.ended.get_mut(choice) {
            *ended = true;
        }
    }

    /// Choices that have not ended.
    pub(crate) fn open(&self) -> impl Iterator<Item = usize> + '_ {
        self.ended.iter().enumerate().filter(|(_, ended)| !**ended).map(|(choice, _)| choice)
    }

    pub(crate) fn done(&self) -> bool {
        self.open().next().is_none()
    }

    pub(crate) fn usage(&self) -> Usage {
        let output = self.output_tokens.iter().sum();
        let cached = self.cached.iter().sum();
        Usage { kvasir: self.kv, ..Usage::new(self.prompt_tokens, output, cached) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::api::parse;
    use crate::testkit::MockText;
    use kvasir_engine::{Finish, FinishReason, Recipe, RequestId, TokenLogprobs};
    use serde_json::json;

    /// A job for a completion body with byte tokens.
    pub(crate) fn completion(body: &str) -> Job {
        let request = parse::completion(body.as_bytes()).unwrap();
        let text: Arc<dyn TextModel> = Arc::new(MockText::default());
        let prompts = request.prompts.iter().map(|prompt| match prompt {
            crate::api::completion::Prompt::Text(t) => {
                PromptInput { tokens: text.encode(t, false).unwrap(), echo: t.clone() }
            }
            crate::api::completion::Prompt::Tokens(tokens) => {
                PromptInput { tokens: tokens.clone(), echo: text.decode(tokens, false) }
            }
        });
        Job {
            api: Api::Completion { echo: request.echo, only_prompt: request.only_prompt },
            id: "cmpl-1".into(),
            created: 7,
            model: "m".into(),
            prompts: prompts.collect(),
            options: request.common,
            text,
        }
    }

    /// A job for a chat body.
    pub(crate) fn chat(body: &str) -> Job {
        let request = parse::chat(body.as_bytes()).unwrap();
        let prompt = PromptInput { tokens: vec![1, 2, 3], echo: String::new() };
        Job {
            api: Api::Chat,
            id: "chatcmpl-1".into(),
            created: 7,
            model: "m".into(),
            prompts: vec![prompt],
            options: request.common,
            text: Arc::new(MockText::default()),
        }
    }

    /// The output of a step that made `text`, the `total`-th token of its sequence.
    pub(crate) fn output(
        index: usize,
        text: &str,
        total: usize,
        end: Option<FinishReason>,
    ) -> SequenceOutput {
        let token_ids: Vec<_> = text.bytes().map(u32::from).collect();
        SequenceOutput {
            request_id: RequestId::from("r"),
            index,
            logprobs: token_ids
                .iter()
                .map(|id| TokenLogprobs { token_id: *id, logprob: -0.5, rank: 1, top: vec![] })
                .collect(),
            token_ids,
            text: text.into(),
            prompt_logprobs: None,
            num_prompt_tokens: 3,
            num_cached_tokens: 2,
            num_output_tokens: total,
            features: None,
            finish: end.map(|reason| Finish {
                reason,
                stop: None,
                recipe: Recipe::INT8,
                risk: None,
                kv_logical_bytes: 30,
                kv_physical_bytes: 20,
                num_preemptions: 0,
            }),
        }
    }

    #[test]
    fn counts_prompts_once_and_outputs_of_all_choices() {
        let job = completion(r#"{"prompt": ["abc", "de"], "n": 2}"#);
        let mut progress = Progress::new(&job);
        assert_eq!(job.choice(1, 0), 2);
        for choice in 0..4 {
            assert!(!progress.done());
            assert_eq!(progress.usage().kvasir.is_some(), choice > 0);
            let end = Some(FinishReason::Length);
            progress.absorb(choice / 2, choice, &output(choice % 2, "x", 5, end));
        }
        assert!(progress.done());
        let usage = progress.usage();
        assert_eq!(Usage { kvasir: None, ..usage }, Usage::new(5, 20, 4));
        assert_eq!(
            json!(usage.kvasir),
            json!({"recipe": "int8", "logical_bytes": 120, "physical_bytes": 80, "ratio": 1.5})
        );
    }
}
