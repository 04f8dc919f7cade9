//! `kvasir run`: a prompt as it is, continued.

use std::io::Read;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;
use kvasir_engine::{Engine, Request, TokenId};
use serde::Serialize;

use crate::generate::{Generation, KvBytes, finish_reason_name, generate};
use crate::interrupt::Interrupt;
use crate::options::{CacheArgs, ModelArgs, SamplingArgs};
use crate::output::{print_json, print_line, print_text};
use crate::pull::Progress;
use crate::session::load_engine;

/// Continue a prompt, as it is, without a chat template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir run \"The capital of France is\"
  kvasir run --temperature 0 --max-tokens 32 --json \"The capital of France is\"
  kvasir run --model ./model.gguf --stop . \"Once upon a time\"
  head -c 2000 README.md | kvasir run --max-tokens 100 -")]
pub(crate) struct RunCommand {
    /// The prompt; - reads it from stdin (without the line ending at its end)
    prompt: String,
    /// Print one JSON object at the end instead of streaming text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct RunReport<'a> {
    model: &'a str,
    prompt: &'a str,
    text: &'a str,
    token_ids: &'a [TokenId],
    finish_reason: &'static str,
    usage: Usage,
    timings: Timings,
    kv: KvBytes,
}

#[derive(Debug, Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

#[derive(Debug, Serialize)]
struct Timings {
    load_s: f64,
    prompt_s: f64,
    prompt_tokens_per_second: f64,
    generation_s: f64,
    generation_tokens_per_second: f64,
    time_to_first_token_s: f64,
}

/// Runs the command.
pub(crate) fn execute(command: &RunCommand) -> Result<()> {
    let prompt = read_prompt(&command.prompt)?;
    let start = Instant::now();
    let (_, mut engine) = load_engine(&command.model, &command.cache, Progress::stderr())?;
    let load_s = start.elapsed().as_secs_f64();
    let request = completion(&engine, &prompt, &command.sampling)?;
    let interrupt = Interrupt::listen()?;
    let generation = generate(&mut engine, request, &interrupt, |text| {
        if command.json { Ok(()) } else { print_text(text) }
    })?;
    if command.json {
        print_json(&report(&command.model.model, &prompt, &generation, load_s))
    } else {
        print_line("")
    }
}

fn completion(engine: &Engine, prompt: &str, sampling: &SamplingArgs) -> Result<Request> {
    Ok(Request {
        id: "run".into(),
        prompt: engine.tokenizer().encode(prompt, true)?,
        params: sampling.sampling_params(fresh_seed()).into(),
        cache_salt: None,
        kv_cache: None,
    })
}

fn report<'a>(
    model: &'a str,
    prompt: &'a str,
    generation: &'a Generation,
    load_s: f64,
) -> RunReport<'a> {
    let completion_tokens = generation.token_ids.len();
    RunReport {
        model,
        prompt,
        text: &generation.text,
        token_ids: &generation.token_ids,
        finish_reason: finish_reason_name(generation.finish_reason),
        usage: Usage {
            prompt_tokens: generation.num_prompt_tokens,
            completion_tokens,
            total_tokens: generation.num_prompt_tokens + completion_tokens,
        },
        timings: Timings {
            load_s,
            prompt_s: generation.first_token_s,
            prompt_tokens_per_second: generation.prompt_tokens_per_second(),
            generation_s: generation.rest_s,
            generation_tokens_per_second: generation.generation_tokens_per_second(),
            time_to_first_token_s: generation.first_token_s,
        },
        kv: generation.kv,
    }
}

fn read_prompt(argument: &str) -> Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("cannot read the prompt from stdin")?;
    let text = String::from_utf8(bytes).context("the prompt on stdin is not UTF-8")?;
    // `echo` adds it, and a prompt that ends in a new line continues differently.
    let text = text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t)).unwrap_or(&text);
    Ok(text.to_owned())
}

/// A seed that differs from run to run.
pub(crate) fn fresh_seed() -> u64 {
    // Nanoseconds since 1970 fit in 64 bits until the year 2554; before 1970 any seed will do.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvasir_engine::FinishReason;

    #[test]
    fn the_json_object_has_all_fields() {
        let generation = Generation {
            text: " Paris".into(),
            token_ids: vec![7, 8, 9],
            finish_reason: FinishReason::Length,
            num_prompt_tokens: 5,
            num_cached_tokens: 1,
            kv: KvBytes { logical_bytes: 20, physical_bytes: 10 },
            first_token_s: 0.5,
            rest_s: 0.25,
        };
        let json = serde_json::to_value(report("m", "p", &generation, 1.5)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "model": "m",
                "prompt": "p",
                "text": " Paris",
                "token_ids": [7, 8, 9],
                "finish_reason": "length",
                "usage": { "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8 },
                "timings": {
                    "load_s": 1.5,
                    "prompt_s": 0.5,
                    "prompt_tokens_per_second": 8.0,
                    "generation_s": 0.25,
                    "generation_tokens_per_second": 8.0,
                    "time_to_first_token_s": 0.5,
                },
                "kv": { "logical_bytes": 20, "physical_bytes": 10 },
            })
        );
    }
}
