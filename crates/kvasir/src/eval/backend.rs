//! Answers from servers with OpenAI's API.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvasir_cache::Recipe;
use kvasir_eval::EvalError;
use kvasir_eval::suite::{Answer, Backend, Lane};
use kvasir_eval::tasks::{Question, Sample};
use serde_json::{Value, json};

use crate::client::Client;
use crate::failure::one_line;

/// Requests in flight.
const IN_FLIGHT: usize = 8;

/// Servers by name, each with a model.
#[derive(Debug)]
pub(super) struct Servers {
    all: Vec<Server>,
}

#[derive(Debug)]
struct Server {
    name: String,
    model: String,
    client: Client,
}

impl Servers {
    /// Asks every server for its model. `NAME=URL`, or a URL alone, which is then the name too.
    pub(super) fn connect(
        given: &[String],
        api_key: Option<&str>,
        timeout: Duration,
    ) -> Result<Self> {
        let server = |given: &String| {
            let (name, url) = match given.split_once('=') {
                Some((name, url)) if !name.contains(['/', ':']) => (name, url),
                _ => (given.as_str(), given.as_str()),
            };
            let client =
                Client::new(url, api_key, timeout).with_context(|| format!("--server {given}"))?;
            let models = client.get_json("/v1/models")?;
            let model = models["data"][0]["id"].as_str();
            let model = model.with_context(|| format!("{url}/v1/models names no model"))?;
            Ok(Server { name: name.to_owned(), model: model.to_owned(), client })
        };
        Ok(Self { all: given.iter().map(server).collect::<Result<_>>()? })
    }

    /// The first one's model.
    pub(super) fn model(&self) -> &str {
        self.all.first().map_or("", |server| &server.model)
    }

    /// One lane a server; or, of one server, one lane a recipe.
    pub(super) fn lanes(&self, recipes: &[Recipe]) -> Result<Vec<Lane>> {
        let lane = |server: &Server, name: String, recipe: Option<String>| Lane {
            server: Some(server.name.clone()),
            recipe,
            ..Lane::greedy(&name)
        };
        if recipes.is_empty() {
            return Ok(self.all.iter().map(|one| lane(one, one.name.clone(), None)).collect());
        }
        let [server] = &self.all[..] else {
            bail!("--recipes goes with one --server: they are asked of it with every request");
        };
        let of = |recipe: &Recipe| {
            let name = recipe.to_string();
            lane(server, name.clone(), Some(name))
        };
        Ok(recipes.iter().map(of).collect())
    }
}

/// Has servers answer.
#[derive(Debug)]
pub(super) struct HttpBackend {
    servers: Servers,
}

impl HttpBackend {
    pub(super) fn new(servers: Servers) -> Self {
        Self { servers }
    }
}

fn failed(error: &anyhow::Error) -> EvalError {
    EvalError::Server { what: one_line(error) }
}

impl Backend for HttpBackend {
    fn answer(
        &mut self,
        lane: &Lane,
        samples: &[&Sample],
        answered: &mut dyn FnMut(Answer) -> kvasir_eval::Result<()>,
    ) -> kvasir_eval::Result<()> {
        let server = self.servers.all.iter().find(|one| Some(&one.name) == lane.server.as_ref());
        let server = server.context("the lane names no server").map_err(|error| failed(&error))?;
        let queue = Mutex::new(samples.iter().copied().collect::<VecDeque<&Sample>>());
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            for _ in 0..IN_FLIGHT.min(samples.len()) {
                let (sender, queue) = (sender.clone(), &queue);
                scope.spawn(move || {
                    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    while let Some(sample) = next() {
                        let answer = ask(server, lane, sample);
                        let failed = answer.is_err();
                        // Nobody listens any more once an answer has failed.
                        if sender.send(answer).is_err() || failed {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            let mut result = Ok(());
            for answer in receiver {
                let taken = answer.map_err(|error| failed(&error)).and_then(&mut *answered);
                if taken.is_err() && result.is_ok() {
                    result = taken;
                    queue.lock().unwrap_or_else(PoisonError::into_inner).clear();
                }
            }
            result
        })
    }
}

fn ask(server: &Server, lane: &Lane, sample: &Sample) -> Result<Answer> {
    let mut body = json!({
        "model": server.model,
        "max_tokens": sample.max_tokens,
        "temperature": lane.temperature,
        "seed": lane.seed_of(&sample.id),
    });
    if !sample.stop.is_empty() {
        body["stop"] = json!(sample.stop);
    }
    if let Some(recipe) = &lane.recipe {
        body["kv_cache"] = json!(recipe);
    }
    let path = match &sample.question {
        Question::Text(text) => {
            body["prompt"] = json!(text);
            "/v1/completions"
        }
        Question::Message(text) => {
            body["messages"] = json!([{"role": "user", "content": text}]);
            "/v1/chat/completions"
        }
    };
    let answer = server.client.post_json(path, &body)?;
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().or(choice["message"]["content"].as_str());
    let text = text.with_context(|| format!("{} answered without a text", server.name))?;
    let count = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let usage = &answer["usage"];
    Ok(Answer {
        sample: sample.id.clone(),
        lane: lane.name.clone(),
        text: text.to_owned(),
        score: sample.score(text),
        prompt_tokens: count(&usage["prompt_tokens"]).unwrap_or(0),
        output_tokens: count(&usage["completion_tokens"]).unwrap_or(0),
        capped: choice["finish_reason"] == "length",
        logical_bytes: count(&usage["kvasir"]["logical_bytes"]),
        physical_bytes: count(&usage["kvasir"]["physical_bytes"]),
        features: None,
    })
}
