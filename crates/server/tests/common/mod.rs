//! A server with a scripted engine on a loopback port, and a client that shows every byte.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvasir_engine::{Engine, EngineConfig};
use kvasir_model::ChatTemplate;
use kvasir_model::testkit::tiny_model;
use kvasir_server::testkit::{MockConfig, MockControl, MockEngine, MockText};
use kvasir_server::{
    ApiKeys, ModelInfo, ModelText, Server, ServerConfig, ServerError, ServerHandle,
};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const MODEL: &str = "mock";

/// A running server. Dropping it stops it without draining.
pub struct TestServer {
    pub addr: SocketAddr,
    pub control: Arc<MockControl>,
    pub handle: ServerHandle,
    runtime: Runtime,
    shutdown: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<Result<(), ServerError>>>,
}

pub fn config() -> ServerConfig {
    ServerConfig {
        port: 0,
        served_model_names: vec![MODEL.into(), "alias".into()],
        max_body_bytes: 2 << 20,
        check_integrity: true,
        ..ServerConfig::default()
    }
}

pub fn with_keys(keys: &[&str]) -> ServerConfig {
    ServerConfig { api_keys: ApiKeys::new(keys).unwrap(), ..config() }
}

pub fn start() -> TestServer {
    start_with(config(), MockConfig::default())
}

pub fn gated() -> TestServer {
    start_with(config(), MockConfig { gated: true, ..MockConfig::default() })
}

pub fn start_with(config: ServerConfig, mock: MockConfig) -> TestServer {
    let server = start_unready(config, &mock);
    server.make_ready(mock)
}

/// A server without a model.
pub fn start_unready(config: ServerConfig, mock: &MockConfig) -> TestServer {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = runtime.block_on(Server::bind(config)).unwrap();
    let (addr, handle) = (server.local_addr(), server.handle());
    let (shutdown, signal) = oneshot::channel::<()>();
    let serving = runtime.spawn(server.run(async {
        let _ = signal.await;
    }));
    let (_, control) = MockEngine::new(mock.clone());
    TestServer { addr, control, handle, runtime, shutdown: Some(shutdown), serving: Some(serving) }
}

impl TestServer {
    pub fn make_ready(mut self, mock: MockConfig) -> Self {
        let text = Arc::new(MockText { max_model_len: mock.max_model_len });
        let (engine, control) = MockEngine::new(mock);
        self.control = control;
        let info = ModelInfo {
            root: "mock.gguf".into(),
            cache_config: vec![("block_size".into(), "32".into())],
            machine: vec![("isa".into(), "avx2".into())],
            settings: serde_json::Map::new(),
        };
        self.handle.set_ready(engine, text, info).unwrap();
        self
    }

    /// Gives the server a real engine on a tiny random model.
    pub fn with_tiny_model(self, config: EngineConfig) -> Self {
        let model = tiny_model(1);
        let engine = Engine::new(Arc::clone(&model), config).unwrap();
        let mut text = ModelText::new(&model, engine.max_model_len());
        let template = ChatTemplate::new("{{ messages[0].content }}", None, None).unwrap();
        text.chat_template = Arc::new(template);
        self.handle.set_ready(engine, Arc::new(text), ModelInfo::default()).unwrap();
        self
    }

    /// Sends the signal to stop.
    pub fn stop(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    /// Waits until `run` has returned.
    pub fn join(&mut self) {
        let serving = self.serving.take().unwrap();
        self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(20), serving).await.unwrap().unwrap().unwrap();
        });
    }

    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &str) -> Reply {
        self.send("POST", path, &[], body.as_bytes())
    }

    pub fn post_json(&self, path: &str, body: &Value) -> Reply {
        self.post(path, &body.to_string())
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.open(method, path, headers, body).finish()
    }

    /// Sends a request and leaves the answer unread.
    pub fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Connection {
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n",
            body.len()
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut connection = self.connect();
        connection.write(head.as_bytes());
        connection.write(body);
        connection
    }

    pub fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Connection { stream, seen: Vec::new() }
    }

    /// Waits until a sample has this value: the driver counts a moment after the engine acts.
    #[track_caller]
    pub fn await_metric(&self, series: &str, value: f64) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.metric(series) != value {
            assert!(Instant::now() < deadline, "{series} is {}", self.metric(series));
            std::thread::yield_now();
        }
    }

    /// A sample of `/metrics`, by name and labels other than the model's.
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find(|line| line.starts_with(series));
        let line = line.unwrap_or_else(|| panic!("no {series} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// An open connection.
pub struct Connection {
    stream: TcpStream,
    seen: Vec<u8>,
}

impl Connection {
    pub fn write(&mut self, bytes: &[u8]) {
        // A server that refuses early may close before it has read everything.
        let _ = self.stream.write_all(bytes);
    }

    /// Reads until `text` has come.
    pub fn read_until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let mut buffer = [0; 4096];
            let count = self.stream.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "closed after {}", String::from_utf8_lossy(&self.seen));
            self.seen.extend_from_slice(&buffer[..count]);
        }
    }

    /// Reads until the server closes.
    pub fn finish(mut self) -> Reply {
        let mut buffer = [0; 65536];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => self.seen.extend_from_slice(&buffer[..count]),
                // Reset after the answer: the server did not want the rest of the body.
                Err(_) if !self.seen.is_empty() => break,
                Err(error) => panic!("no answer: {error}"),
            }
        }
        Reply::parse(&self.seen)
    }
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|part| part == b"\r\n\r\n").expect("no head");
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: Vec<_> = lines
            .map(|line| {
                let (name, value) = line.split_once(": ").unwrap();
                (name.to_ascii_lowercase(), value.to_owned())
            })
            .collect();
        let chunked =
            headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let body = &bytes[end + 4..];
        let body = if chunked { dechunk(body) } else { body.to_vec() };
        Self { status, headers, body }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    /// The JSON of a 200.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// Checks status and shape of an error; returns its `param` and `code`.
    #[track_caller]
    pub fn error(&self, status: u16) -> (Option<String>, Option<String>) {
        assert_eq!(self.status, status, "{}", self.text());
        let json = self.json();
        let error = json["error"].as_object().expect("an error object");
        assert!(!error["message"].as_str().unwrap().is_empty());
        assert!(!error["type"].as_str().unwrap().is_empty());
        let text = |name: &str| error[name].as_str().map(str::to_owned);
        (text("param"), text("code"))
    }

    /// The events of a stream, without the closing `[DONE]`.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        let text = self.text();
        let lines: Vec<_> =
            text.split_terminator("\n\n").map(|l| l.strip_prefix("data: ").unwrap()).collect();
        let (last, events) = lines.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// Undoes chunked transfer; a missing end is a cut connection.
fn dechunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|part| part == b"\r\n").expect("chunk size");
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        bytes = &bytes[end + 2..];
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&bytes[..size]);
        bytes = &bytes[size + 2..];
    }
}
