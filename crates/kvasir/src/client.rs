//! An OpenAI-compatible server, as a client sees it.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use ureq::http::header::{AUTHORIZATION, CONTENT_TYPE};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

/// Longest line of a stream that is read, and most of an answer that is shown or parsed.
const MAX_LINE_BYTES: u64 = 1 << 20;
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// Makes requests. Cheap to clone; clones may be used from several threads.
#[derive(Clone)]
pub(crate) struct Client {
    agent: Agent,
    /// Without `/v1` and without a slash at the end.
    base_url: String,
    api_key: Option<String>,
}

/// Keys are secrets.
impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("base_url", &self.base_url).finish_non_exhaustive()
    }
}

/// What came of a streamed completion.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Completion {
    /// Prompt tokens, if the server counted them.
    pub(crate) input_tokens: Option<usize>,
    /// Tokens generated: the server's count, else one for each piece.
    pub(crate) output_tokens: usize,
    /// From sending to each piece of output.
    pub(crate) pieces: Vec<Duration>,
}

/// Why a completion failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: anyhow::Error,
    /// No connection could be made: the next request need not try.
    pub(crate) unreachable: bool,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { error, unreachable: false }
    }
}

impl Client {
    /// A client of the server at `base_url`, which may end in `/v1`. A server that is silent for `timeout`
    /// has failed.
    pub(crate) fn new(base_url: &str, api_key: Option<&str>, timeout: Duration) -> Result<Self> {
        let base_url = base_url.trim_end_matches('/');
        let base_url = base_url.strip_suffix("/v1").unwrap_or(base_url).trim_end_matches('/');
        let uri: Uri =
            base_url.parse().with_context(|| format!("--base-url '{base_url}' is not a URL"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            bail!("--base-url '{base_url}' is not an http or https URL");
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("kvasir/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(timeout.min(Duration::from_secs(20))))
            .timeout_recv_response(Some(timeout))
            .timeout_per_read(Some(timeout))
            // A connection that the server closes while it waits here would look like a failed request.
            .max_idle_connections(0)
            .build();
        let api_key = api_key.map(str::to_owned).filter(|key| !key.is_empty());
        Ok(Self { agent: config.into(), base_url: base_url.to_owned(), api_key })
    }

    /// As messages show it.
    pub(crate) fn base_url(&self) -> &str {
        &self.base_url
    }

    /// The text at `path`, of a server that answers 200.
    pub(crate) fn get(&self, path: &str) -> Result<String> {
        let mut request = self.agent.get(format!("{}{path}", self.base_url));
        if let Some(key) = &self.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let response = request.call().map_err(|error| self.refused(error).error)?;
        text(self.accepted(path, response)?)
    }

    /// The JSON at `path`.
    pub(crate) fn get_json(&self, path: &str) -> Result<Value> {
        self.parsed(path, &self.get(path)?)
    }

    /// What `path` answers to `body`.
    pub(crate) fn post_json(&self, path: &str, body: &Value) -> Result<Value> {
        let response = self.post(path, &body.to_string()).map_err(|failure| failure.error)?;
        self.parsed(path, &text(response)?)
    }

    /// Sends `body` to `/v1/completions` and reads the stream to its end.
    pub(crate) fn complete(&self, body: &str) -> Result<Completion, Failure> {
        const PATH: &str = "/v1/completions";
        let start = Instant::now();
        let response = self.post(PATH, body)?;
        let mut stream = BufReader::new(response.into_body().into_reader());
        let mut completion = Completion { input_tokens: None, output_tokens: 0, pieces: vec![] };
        let mut line = Vec::new();
        let mut counted = None;
        let mut ended = false;
        loop {
            line.clear();
            let read = stream.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
            let read = read.with_context(|| format!("{} broke off the stream", self.base_url))?;
            if read == 0 {
                break;
            }
            let now = start.elapsed();
            let Some(event) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { continue };
            if event == b"[DONE]" {
                ended = true;
                continue;
            }
            let event: Value = serde_json::from_slice(event)
                .with_context(|| format!("{} streams what is not JSON", self.base_url))?;
            if let Some(message) = error_of(&event) {
                return Err(anyhow!("{} ended the stream: {message}", self.base_url).into());
            }
            let choice = &event["choices"][0];
            let finished = choice["finish_reason"].is_string();
            ended |= finished;
            // Some servers end with a piece that says why and holds nothing. Pieces without text that say
            // nothing stand for tokens whose text is held back.
            let empty = choice["text"].as_str().is_none_or(str::is_empty);
            if choice.is_object() && !(finished && empty) {
                completion.pieces.push(now);
            }
            let count = |name: &str| event["usage"][name].as_u64().and_then(|n| n.try_into().ok());
            completion.input_tokens = count("prompt_tokens").or(completion.input_tokens);
            counted = count("completion_tokens").or(counted);
        }
        if !ended {
            return Err(anyhow!("{} broke off the stream", self.base_url).into());
        }
        completion.output_tokens = counted.unwrap_or(completion.pieces.len());
        if completion.pieces.is_empty() {
            return Err(anyhow!("{} ended the stream without a token", self.base_url).into());
        }
        Ok(completion)
    }

    /// Token ids of `text`, by the server's tokenizer. vLLM and Kvasir call the text `prompt`, llama.cpp
    /// `content`; fields that a server does not know it leaves alone.
    pub(crate) fn tokenize(&self, model: &str, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let body = json!({
            "model": model, "prompt": text, "content": text,
            "add_special_tokens": add_special, "add_special": add_special,
        });
        let mut answer = self.post_json("/tokenize", &body)?;
        serde_json::from_value(answer["tokens"].take())
            .with_context(|| format!("{}/tokenize answered without token ids", self.base_url))
    }

    /// The text of token ids, by the server's tokenizer.
    pub(crate) fn detokenize(&self, model: &str, tokens: &[u32]) -> Result<String> {
        let answer = self.post_json("/detokenize", &json!({"model": model, "tokens": tokens}))?;
        let text = answer["prompt"].as_str().or(answer["content"].as_str());
        let text =
            text.with_context(|| format!("{}/detokenize answered no text", self.base_url))?;
        Ok(text.to_owned())
    }

    fn post(&self, path: &str, body: &str) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.post(format!("{}{path}", self.base_url));
        request = request.header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let response = request.send(body).map_err(|error| self.refused(error))?;
        Ok(self.accepted(path, response)?)
    }

    /// A connection that failed.
    fn refused(&self, error: ureq::Error) -> Failure {
        use std::io::ErrorKind;
        let unreachable = match &error {
            ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => true,
            ureq::Error::Io(error) => error.kind() == ErrorKind::ConnectionRefused,
            _ => false,
        };
        let what = if unreachable { "cannot reach" } else { "no answer from" };
        let error = anyhow::Error::new(error).context(format!("{what} {}", self.base_url));
        Failure { error, unreachable }
    }

    fn accepted(&self, path: &str, response: Response<Body>) -> Result<Response<Body>> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = text(response).unwrap_or_default();
        let json = serde_json::from_str::<Value>(&body).ok();
        let message = json.as_ref().and_then(error_of).unwrap_or_else(|| shortened(&body));
        let separator = if message.is_empty() { "" } else { ": " };
        bail!("{}{path} answered {status}{separator}{message}", self.base_url)
    }

    fn parsed(&self, path: &str, text: &str) -> Result<Value> {
        serde_json::from_str(text)
            .with_context(|| format!("{}{path} answered what is not JSON", self.base_url))
    }
}

fn text(response: Response<Body>) -> Result<String> {
    let mut text = String::new();
    response.into_body().into_reader().take(MAX_ANSWER_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// What an answer of the usual form says went wrong: `{"error": {"message": …}}`, or `{"error": …}`, or
/// `{"detail": …}`.
fn error_of(answer: &Value) -> Option<String> {
    let error = answer.get("error").or_else(|| answer.get("detail")).filter(|e| !e.is_null())?;
    let message = error.get("message").unwrap_or(error);
    Some(message.as_str().map_or_else(|| shortened(&message.to_string()), shortened))
}

/// The beginning of a long text.
fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(300).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let base = |url: &str| {
            Client::new(url, None, Duration::from_secs(1)).map(|c| c.base_url().to_owned())
        };
        for url in ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"] {
            assert_eq!(base(url).unwrap(), "http://a:1");
        }
        assert_eq!(base("https://a.example/x/v1").unwrap(), "https://a.example/x");
        for url in ["", "127.0.0.1:8000", "ftp://a", "not a url"] {
            let error = base(url).unwrap_err().to_string();
            assert!(error.starts_with("--base-url"), "{error}");
        }
    }

    #[test]
    fn keys_are_not_printed() {
        let client = Client::new("http://a", Some("hush"), Duration::from_secs(1)).unwrap();
        assert!(!format!("{client:?}").contains("hush"));
    }

    #[test]
    fn errors_of_servers() {
        for (answer, message) in [
            (json!({"error": {"message": "too long", "code": 1}}), Some("too long")),
            (json!({"error": "no"}), Some("no")),
            (json!({"detail": [{"msg": "x"}]}), Some("[{\"msg\":\"x\"}]")),
            (json!({"error": null}), None),
            (json!({"choices": []}), None),
        ] {
            assert_eq!(error_of(&answer).as_deref(), message, "{answer}");
        }
        assert_eq!(shortened(&"é".repeat(400)).chars().count(), 301);
    }
}
