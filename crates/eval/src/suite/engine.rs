//! Answers from an engine in this process.

use std::collections::HashMap;

use kvasir_cache::Recipe;
use kvasir_engine::{Engine, FinishReason, Request, RequestId, SamplingParams};
use kvasir_model::RenderOptions;
use serde::Serialize;

use super::{Answer, Backend, Lane};
use crate::error::{EvalError, Result};
use crate::predict::PromptFeatures;
use crate::tasks::{Question, Sample};

/// An engine that nobody else uses.
#[derive(Debug)]
pub struct EngineBackend {
    engine: Engine,
}

/// What is known of a sample on its way.
struct Pending<'a> {
    sample: &'a Sample,
    text: String,
    prompt: Vec<u32>,
    features: Option<PromptFeatures>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
}

impl EngineBackend {
    /// Takes it over.
    pub fn new(engine: Engine) -> Self {
        Self { engine }
    }

    /// Tokens of a question, as the model wants it asked.
    fn prompt(&self, question: &Question) -> Result<Vec<u32>> {
        let tokenizer = self.engine.tokenizer();
        Ok(match question {
            Question::Text(text) => tokenizer.encode(text, true)?,
            Question::Message(text) => {
                let options =
                    RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
                let messages = [Message { role: "user", content: text }];
                let text = self.engine.model().chat_template().render(&messages, &options)?;
                tokenizer.encode(&text, false)?
            }
        })
    }
}

impl Backend for EngineBackend {
    fn answer(
        &mut self,
        lane: &Lane,
        samples: &[&Sample],
        answered: &mut dyn FnMut(Answer) -> Result<()>,
    ) -> Result<()> {
        let recipe: Option<Recipe> = lane.recipe.as_deref().map(str::parse).transpose()?;
        let mut pending: HashMap<RequestId, Pending<'_>> = HashMap::new();
        // What is known of a prompt is known of it without compression.
        let watched = !lane.is_drawn() && recipe == Some(Recipe::F16);
        for sample in samples {
            let prompt = self.prompt(&sample.question)?;
            let id = RequestId::from(&*sample.id);
            let params = SamplingParams {
                temperature: lane.temperature,
                seed: Some(lane.seed_of(&sample.id)),
                stop: sample.stop.clone(),
                logprobs: watched.then_some(PromptFeatures::ALTERNATIVES),
                ..SamplingParams::greedy(sample.max_tokens)
            };
            self.engine.add_request(Request {
                id: id.clone(),
                prompt: prompt.clone(),
                params: params.into(),
                cache_salt: None,
                kv_cache: recipe,
            })?;
            pending.insert(id, Pending { sample, text: String::new(), prompt, features: None });
        }
        while self.engine.has_unfinished() {
            for output in self.engine.step()?.outputs {
                let Some(one) = pending.get_mut(&output.request_id) else { continue };
                one.text.push_str(&output.text);
                if let Some(first) = output.logprobs.first().filter(|_| one.features.is_none()) {
                    let top: Vec<f32> = first.top.iter().map(|(_, logprob)| *logprob).collect();
                    let features = PromptFeatures::new(&one.prompt, one.sample.max_tokens, &top);
                    one.features = Some(features);
                }
                let Some(finish) = output.finish else { continue };
                answered(Answer {
                    sample: one.sample.id.clone(),
                    lane: lane.name.clone(),
                    score: one.sample.score(&one.text),
                    text: std::mem::take(&mut one.text),
                    prompt_tokens: output.num_prompt_tokens,
                    output_tokens: output.num_output_tokens,
                    capped: finish.reason == FinishReason::Length,
                    logical_bytes: Some(finish.kv_logical_bytes),
                    physical_bytes: Some(finish.kv_physical_bytes),
                    features: one.features,
                })?;
                pending.remove(&output.request_id);
            }
        }
        match pending.keys().next() {
            None => Ok(()),
            Some(id) => Err(EvalError::NoResult { request: id.to_string() }),
        }
    }
}
