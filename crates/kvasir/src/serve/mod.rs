//! `kvasir serve`: the server crate on an engine, with options from the command line.

mod log;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use kvasir_engine::{Engine, EngineConfig};
use kvasir_model::{ChatTemplate, Machine, Model};
use kvasir_server::{
    ApiKeys, ModelInfo, ModelText, Server, ServerConfig, ServerHandle, shutdown_signal,
};
use serde_json::json;

use crate::interrupt::exit_interrupted;
use crate::options::{CacheArgs, ModelArgs, ServeArgs};
use crate::pull::{Progress, resolve_model};
use crate::session::{load_model, with_statistics};

/// Threads for connections; the engine computes on its own.
const HTTP_THREADS: usize = 2;

/// Serve a model over HTTP, as OpenAI's API does
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvasir serve
  kvasir serve gemma3-270m --kv-cache-memory 1GiB --max-model-len 8k
  kvasir serve ./model.gguf --host 0.0.0.0 --port 8080 --served-model-name tiny
  KVASIR_API_KEY=secret kvasir serve --max-num-queued-reqs 100

Then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'")]
pub(crate) struct ServeCommand {
    /// The model, as --model
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    positional_model: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    serve: ServeArgs,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Runs the command.
pub(crate) fn execute(mut command: ServeCommand) -> Result<()> {
    if let Some(model) = command.positional_model.take() {
        command.model.model = model;
    }
    log::start(command.serve.log_level, command.serve.log_json);
    let config = server_config(&command)?;
    let template = match &command.serve.chat_template {
        None => None,
        Some(path) => Some(read_template(path)?),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let result = runtime.block_on(serve(command, config, template));
    // A model that is still being read is not waited for.
    runtime.shutdown_background();
    result
}

async fn serve(
    command: ServeCommand,
    config: ServerConfig,
    template: Option<String>,
) -> Result<()> {
    // Before the model, so that a port in use is told at once and probes get an answer.
    let server = Server::bind(config).await?;
    let address = server.local_addr();
    tracing::info!("listening on http://{address}");
    let handle = server.handle();
    let signal = shutdown_signal()?;
    let shutdown = async move {
        signal.await;
        if let Ok(second) = shutdown_signal() {
            tokio::spawn(async move {
                second.await;
                exit_interrupted();
            });
        }
    };
    let run = server.run(shutdown);
    let load = tokio::task::spawn_blocking(move || load(&command, template, &handle));
    tokio::pin!(run);
    tokio::select! {
        ended = &mut run => return Ok(ended?),
        loaded = load => loaded.context("loading the model ended unexpectedly")??,
    }
    tracing::info!("ready: http://{address}/v1");
    Ok(run.await?)
}

/// Loads the model and gives it to the server.
fn load(command: &ServeCommand, template: Option<String>, handle: &ServerHandle) -> Result<()> {
    let start = Instant::now();
    let path = resolve_model(&command.model.model)?;
    let progress = Progress::stderr();
    let model = load_model(&path, command.model.load.options(command.cache.threads()), progress)?;
    let config = with_statistics(engine_config(command), &model, &path, &command.cache, progress)?;
    let engine = Engine::new(Arc::clone(&model), config.clone())?;
    let Machine { processor, isa, .. } = Machine::this();
    let threads = engine.num_threads();
    tracing::info!(%processor, %isa, weights = model.weight_form(), threads, "computing");
    tracing::info!(
        path = %path.display(),
        seconds = start.elapsed().as_secs_f64(),
        weight_bytes = model.weight_bytes(),
        max_model_len = engine.max_model_len(),
        "model loaded"
    );
    let mut text = ModelText::new(&model, engine.max_model_len());
    if let Some(source) = template {
        text.chat_template = Arc::new(parse_template(&source, &model)?);
    }
    let machine = [
        ("processor", processor),
        ("isa", isa),
        ("weights", model.weight_form()),
        ("threads", threads.to_string()),
    ];
    let machine = machine.map(|(name, value)| (name.to_owned(), value)).to_vec();
    let info = model_info(&path, &config, engine.max_model_len(), machine);
    Ok(handle.set_ready(engine, Arc::new(text), info)?)
}

fn server_config(command: &ServeCommand) -> Result<ServerConfig> {
    let serve = &command.serve;
    let served_model_names = if serve.served_model_name.is_empty() {
        vec![command.model.model.clone()]
    } else {
        serve.served_model_name.clone()
    };
    Ok(ServerConfig {
        host: serve.host.clone(),
        port: serve.port,
        served_model_names,
        api_keys: ApiKeys::new(&serve.api_key)?,
        allowed_origins: serve.allowed_origins.clone(),
        max_body_bytes: serve.max_body_bytes,
        shutdown_timeout: Duration::from_secs(serve.shutdown_timeout),
        // Costs a walk over the tables while nobody waits.
        check_integrity: true,
    })
}

fn engine_config(command: &ServeCommand) -> EngineConfig {
    EngineConfig {
        max_num_queued_reqs: command.serve.max_num_queued_reqs,
        ..command.cache.engine_config()
    }
}

fn model_info(
    path: &Path,
    config: &EngineConfig,
    max_model_len: usize,
    machine: Vec<(String, String)>,
) -> ModelInfo {
    let settings = json!({
        "kv_cache": config.kv_cache.to_string(),
        "kv_sharing": config.kv_sharing.to_string(),
        "kv_cache_memory": config.kv_cache_memory,
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": max_model_len,
        "enable_prefix_caching": config.enable_prefix_caching,
        "max_num_queued_reqs": config.max_num_queued_reqs,
    });
    ModelInfo {
        root: path.display().to_string(),
        cache_config: vec![
            ("block_size".to_owned(), config.block_size.to_string()),
            ("cache_dtype".to_owned(), config.kv_cache.to_string()),
            ("kv_sharing".to_owned(), config.kv_sharing.to_string()),
            ("enable_prefix_caching".to_owned(), config.enable_prefix_caching.to_string()),
            ("kv_cache_memory_bytes".to_owned(), config.kv_cache_memory.to_string()),
        ],
        machine,
        settings: settings.as_object().cloned().unwrap_or_default(),
    }
}

fn read_template(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the chat template {}", path.display()))
}

fn parse_template(source: &str, model: &Model) -> Result<ChatTemplate> {
    let tokenizer = model.tokenizer();
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_str(id));
    let (bos, eos) = (tokenizer.bos_id(), tokenizer.eos_ids().first().copied());
    Ok(ChatTemplate::new(source, text(bos), text(eos))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        serve: ServeCommand,
    }

    fn parse(args: &str) -> ServeCommand {
        let args = std::iter::once("x").chain(args.split_whitespace());
        Line::try_parse_from(args).unwrap().serve
    }

    #[test]
    fn options_reach_the_server_and_the_engine() {
        let command = parse(
            "--model m --host 0.0.0.0 --port 0 --api-key k --served-model-name a b \
             --max-num-queued-reqs 7 --shutdown-timeout 3 --allowed-origins https://a.example \
             --max-body-bytes 1MiB --block-size 16",
        );
        let config = server_config(&command).unwrap();
        assert_eq!((config.host.as_str(), config.port), ("0.0.0.0", 0));
        assert_eq!(config.served_model_names, ["a", "b"]);
        assert!(config.api_keys.required());
        assert_eq!(config.allowed_origins, ["https://a.example"]);
        assert_eq!(config.max_body_bytes, 1 << 20);
        assert_eq!(config.shutdown_timeout, Duration::from_secs(3));
        let engine = engine_config(&command);
        assert_eq!((engine.max_num_queued_reqs, engine.block_size), (Some(7), 16));
    }

    #[test]
    fn defaults() {
        let config = server_config(&parse("")).unwrap();
        let theirs = ServerConfig::default();
        assert_eq!((&config.host, config.port), (&theirs.host, theirs.port));
        assert_eq!(config.max_body_bytes, theirs.max_body_bytes);
        assert_eq!(config.shutdown_timeout, theirs.shutdown_timeout);
        assert_eq!(config.served_model_names, ["smollm2"]);
        assert!(!config.api_keys.required());
    }

    #[test]
    fn a_model_is_named_once() {
        assert_eq!(parse("m").positional_model.as_deref(), Some("m"));
        assert!(Line::try_parse_from(["x", "m", "--model", "n"]).is_err());
    }

    #[test]
    fn keys_are_not_among_the_settings() {
        let command = parse("--api-key hush");
        let info = model_info(Path::new("m"), &engine_config(&command), 8, Vec::new());
        assert!(!format!("{info:?}").contains("hush"));
        assert_eq!(info.settings["max_model_len"], 8);
    }
}
