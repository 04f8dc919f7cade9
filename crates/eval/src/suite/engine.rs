//! Answers from an engine in this process.

use std::collections::HashMap;
use std::sync::Arc;

use kvasir_cache::Recipe;
use kvasir_engine::guard::{Guard, RiskModel};
use kvasir_engine::{Engine, FinishReason, PromptFeatures, Request, RequestId, SamplingParams};
use kvasir_model::RenderOptions;
use serde::Serialize;

use super::{Answer, Backend, Lane};
use crate::error::{EvalError, Result};
use crate::tasks::{Question, Sample};

/// An engine that nobody else uses.
#[derive(Debug)]
pub struct EngineBackend {
    engine: Engine,
    /// What guarded lanes are decided by.
    risk_model: Option<Arc<RiskModel>>,
}

/// What is known of a sample on its way.
struct Pending<'a> {
    sample: &'a Sample,
    text: String,
    features: Option<PromptFeatures>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
}

impl EngineBackend {
    /// Takes it over.
    pub fn new(engine: Engine, risk_model: Option<Arc<RiskModel>>) -> Self {
        Self { engine, risk_model }
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
        let model = self.risk_model.clone().filter(|_| lane.risk.is_some());
        let guard = lane.risk.zip(model);
        self.engine.set_guard(guard.map(|(most_risk, model)| Guard { model, most_risk }))?;
        let mut pending: HashMap<RequestId, Pending<'_>> = HashMap::new();
        for sample in samples {
            let prompt = self.prompt(&sample.question)?;
            let id = RequestId::from(&*sample.id);
            let params = SamplingParams {
                temperature: lane.temperature,
                seed: Some(lane.seed_of(&sample.id)),
                stop: sample.stop.clone(),
                ..SamplingParams::greedy(sample.max_tokens)
            };
            self.engine.add_request(Request {
                id: id.clone(),
                prompt,
                params: params.into(),
                cache_salt: None,
                kv_cache: recipe,
            })?;
            pending.insert(id, Pending { sample, text: String::new(), features: None });
        }
        while self.engine.has_unfinished() {
            for output in self.engine.step()?.outputs {
                let Some(one) = pending.get_mut(&output.request_id) else { continue };
                one.text.push_str(&output.text);
                if let Some(features) = output.features {
                    one.features = Some(*features);
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
                    features: one.features.take().filter(|_| !lane.is_drawn()),
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
