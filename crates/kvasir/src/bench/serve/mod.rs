//! `kvasir bench serve`: requests to a server over HTTP.

mod load;
mod report;
mod watch;

use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use kvasir_eval::EvalError;
use kvasir_eval::arrivals;
use kvasir_eval::dataset::{LoadRequest, Prompt};
use serde_json::{Value, json};

use super::dataset::{DatasetArgs, dataset_help};
use crate::client::Client;
use crate::failure::one_line;
use crate::output::print_json;
use crate::pull::Progress;
use load::{Pace, Ready};
use report::{Asked, ServeReport, ServerReport};
use watch::Watcher;

/// Random tokens are below this on servers that do not tell the size of their vocabulary; hardly any has
/// less.
const SMALL_VOCABULARY: usize = 32_000;

/// Speed of a server: sends requests over HTTP, to any server with OpenAI's API
#[derive(Args)]
#[command(after_help = concat!("\
Sends streaming completions (/v1/completions) with temperature 0. Prompts are arrays of token ids, which vLLM,
llama.cpp and Kvasir take; --text is for servers that take text only, to which random tokens are seldom
as many as before. Texts become tokens, and tokens text, on the server (/tokenize, /detokenize).

", dataset_help!(), "

TTFT is the time to the first token, TPOT that of each further one, on average over a request, ITL the
time between two pieces of a stream, E2E that to the last token. A warm-up request goes ahead and does not
count. Exit code 1 if any request failed; those that finished are reported all the same.

Examples:
  kvasir bench serve --num-prompts 64 --input-len 512 --output-len 128 --ignore-eos
  kvasir bench serve --base-url http://127.0.0.1:8001 --request-rate 4 --num-prompts 200 --json
  kvasir bench serve --max-concurrency 16 --dataset prefix-repetition --prefix-len 384
  kvasir bench serve --dataset jsonl --dataset-path prompts.jsonl"))]
pub(super) struct ServeCommand {
    /// Where the server is; /v1 at the end may be there or not
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    base_url: String,
    /// Name of the model [default: the first that the server has]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Key to present
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests a second, at random times (Poisson); inf sends all at once
    #[arg(long, value_name = "RATE", default_value = "inf", value_parser = parse_rate)]
    request_rate: f64,
    /// Most requests in flight; further ones wait until one has ended [default: no limit]
    #[arg(long, value_name = "N")]
    max_concurrency: Option<NonZeroUsize>,
    /// Go on to --output-len whatever the model says
    #[arg(long)]
    ignore_eos: bool,
    /// Send prompts as text
    #[arg(long)]
    text: bool,
    /// Random tokens are below this [default: what the server says, or 32000]
    #[arg(long, value_name = "TOKENS")]
    vocab_size: Option<NonZeroUsize>,
    /// Seconds after which a silent server has failed
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    timeout: NonZeroUsize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    dataset: DatasetArgs,
}

/// Keys are secrets: they stay out of whatever prints options.
impl std::fmt::Debug for ServeCommand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServeCommand").field("base_url", &self.base_url).finish_non_exhaustive()
    }
}

/// Reads `--request-rate`.
pub(crate) fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 => Ok(rate),
        _ => Err("must be a number above 0, or inf".to_owned()),
    }
}

/// Runs the command.
pub(super) fn execute(command: &ServeCommand) -> Result<()> {
    let timeout = Duration::from_secs(command.timeout.get() as u64);
    let client = Client::new(&command.base_url, command.api_key.as_deref(), timeout)?;
    let model = command.model(&client)?;
    let progress = Progress::stderr();
    let requests = command.requests(&client, &model)?;
    let asked = command.asked(&client, &model)?;
    let warm_up = command.warm_up(&client, &model)?;
    client.complete(&warm_up.body).map_err(|failure| failure.error).context("the first request")?;
    let size = command.dataset.size();
    let pace = Pace {
        due: arrivals::poisson(size.num_prompts, command.request_rate, size.seed),
        max_concurrency: command.max_concurrency.map_or(usize::MAX, NonZeroUsize::get),
    };
    let bar = progress.steps("requests");
    bar.set_length(requests.len() as u64);
    let watcher = Watcher::start(client.clone());
    let outcome = load::run(&client, &requests, &pace, &|done| bar.set_position(done as u64));
    let watched = watcher.stop();
    bar.finish_and_clear();
    let report = ServeReport::new(asked, &requests, &outcome, watched);
    if command.json {
        print_json(&report)?;
    } else {
        report.print()?;
    }
    match report.failure() {
        Some(failure) => bail!(failure),
        None => Ok(()),
    }
}

impl ServeCommand {
    /// `--model`, or the first that the server has.
    fn model(&self, client: &Client) -> Result<String> {
        if let Some(model) = &self.model {
            return Ok(model.clone());
        }
        let models = client.get_json("/v1/models")?;
        let first = models["data"][0]["id"].as_str();
        let none = || format!("{}/v1/models names no model; give --model", client.base_url());
        Ok(first.with_context(none)?.to_owned())
    }

    /// What was asked of whom.
    fn asked(&self, client: &Client, model: &str) -> Result<Asked> {
        // Other servers have no such page, or say other things there.
        let info = client.get_json("/server_info").unwrap_or_default();
        let setting = |name: &str| info["config"][name].as_str().map(str::to_owned);
        let server = ServerReport { recipe: setting("kv_cache"), sharing: setting("kv_sharing") };
        Ok(Asked {
            base_url: client.base_url().to_owned(),
            model: model.to_owned(),
            server,
            load: self.dataset.report(&self.dataset.dataset()?),
            request_rate: Some(self.request_rate).filter(|rate| rate.is_finite()),
            max_concurrency: self.max_concurrency.map(NonZeroUsize::get),
        })
    }

    /// All requests, ready to be sent.
    fn requests(&self, client: &Client, model: &str) -> Result<Vec<Ready>> {
        let mut encode = |text: &str, add_special: bool| {
            client
                .tokenize(model, text, add_special)
                .map_err(|error| EvalError::Tokenizer { what: one_line(&error) })
        };
        let dataset = self.dataset.dataset()?;
        let vocab_size = self.vocab_size(client);
        let requests = dataset.requests(self.dataset.size(), vocab_size, &mut encode)?;
        requests.iter().map(|request| self.ready(client, model, request)).collect()
    }

    /// A short request that no other begins like.
    fn warm_up(&self, client: &Client, model: &str) -> Result<Ready> {
        let prompt = Prompt::Tokens(vec![0; 8]);
        self.ready(client, model, &LoadRequest { prompt, output_len: 2 })
    }

    fn vocab_size(&self, client: &Client) -> usize {
        if let Some(size) = self.vocab_size {
            return size.get();
        }
        let info = client.get_json("/server_info").unwrap_or_default();
        let size = info["vocab_size"].as_u64().and_then(|size| size.try_into().ok());
        size.filter(|size| *size > 0).unwrap_or(SMALL_VOCABULARY)
    }

    fn ready(&self, client: &Client, model: &str, request: &LoadRequest) -> Result<Ready> {
        let (prompt, input_tokens) = match &request.prompt {
            Prompt::Text(text) => (json!(text), 0),
            Prompt::Tokens(tokens) if self.text => {
                (json!(client.detokenize(model, tokens)?), tokens.len())
            }
            Prompt::Tokens(tokens) => (json!(tokens), tokens.len()),
        };
        let mut body = json!({
            "model": model,
            "prompt": prompt,
            "max_tokens": request.output_len,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        // Not OpenAI's: sent only where it is asked for.
        if self.ignore_eos {
            body["ignore_eos"] = Value::Bool(true);
        }
        Ok(Ready { body: body.to_string(), input_tokens })
    }
}

#[cfg(test)]
mod tests;
