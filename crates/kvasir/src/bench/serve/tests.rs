//! The load generator against servers that say what a test wants them to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use clap::Parser;

use super::load::Outcome;
use super::*;

/// A request as it arrived.
#[derive(Debug, Clone)]
struct Seen {
    path: String,
    authorization: Option<String>,
    body: String,
}

/// What a server does with the `n`th request.
type Answer = dyn Fn(&Seen, usize) -> Vec<String> + Send + Sync;

/// A server that writes what its closure returns, a piece at a time, and closes. Dropping it stops it.
struct Scripted {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
}

impl Scripted {
    /// Takes `limit` connections, then refuses.
    fn start(
        limit: usize,
        answer: impl Fn(&Seen, usize) -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let stop: Arc<AtomicBool> = Arc::default();
        let answer: Arc<Answer> = Arc::new(answer);
        let (log, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        thread::spawn(move || {
            // The last one is answered when nobody listens any more.
            let mut last = None;
            for n in 0..limit {
                let Ok((stream, _)) = listener.accept() else { return };
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                if n + 1 == limit {
                    last = Some((stream, n));
                    break;
                }
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                thread::spawn(move || converse(stream, n, &log, &*answer));
            }
            drop(listener);
            if let Some((stream, n)) = last {
                converse(stream, n, &log, &*answer);
            }
        });
        Self { address, seen, stop }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn client(&self) -> Client {
        Client::new(&self.url(), Some("key"), Duration::from_secs(20)).unwrap()
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

/// Answers one request. A client that goes away is its own business.
fn converse(mut stream: TcpStream, n: usize, log: &Mutex<Vec<Seen>>, answer: &Answer) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut seen = Seen { path, authorization: None, body: String::new() };
    let mut length = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().unwrap(),
            "authorization" => seen.authorization = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    seen.body = String::from_utf8(body).unwrap();
    log.lock().unwrap().push(seen.clone());
    for piece in answer(&seen, n) {
        let _ = stream.write_all(piece.as_bytes()).and_then(|()| stream.flush());
    }
}

const OK: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";

fn json(value: &Value) -> Vec<String> {
    vec![OK.to_owned(), value.to_string()]
}

fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}

fn piece(text: &str, finish: Option<&str>) -> String {
    event(&json!({"choices": [{"index": 0, "text": text, "finish_reason": finish}]}))
}

/// A stream of three tokens, as vLLM's.
fn stream() -> Vec<String> {
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}});
    vec![
        OK.to_owned(),
        piece("a", None),
        piece("", None),
        piece("b", Some("length")),
        event(&usage),
        "data: [DONE]\n\n".to_owned(),
    ]
}

fn ready(count: usize) -> Vec<Ready> {
    vec![Ready { body: "{}".to_owned(), input_tokens: 4 }; count]
}

fn run(client: &Client, count: usize, max_concurrency: usize) -> Outcome {
    let pace = Pace { due: vec![Duration::ZERO; count], max_concurrency };
    load::run(client, &ready(count), &pace, &|_| {})
}

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
fn streams_are_counted() {
    let server = Scripted::start(usize::MAX, |_, n| match n {
        0 => stream(),
        // As llama.cpp: comments, no count, and an end that holds nothing.
        1 => [OK, ": wait\n\n", &piece("a", None), &piece("b", None), &piece("", Some("stop"))]
            .map(str::to_owned)
            .to_vec(),
        // Lines that arrive in parts.
        _ => stream().concat().split_inclusive(['t', '"']).map(str::to_owned).collect(),
    });
    let client = server.client();
    let first = client.complete("{\"x\":1}").unwrap();
    assert_eq!((first.input_tokens, first.output_tokens, first.pieces.len()), (Some(9), 3, 3));
    assert!(first.pieces.is_sorted());
    let second = client.complete("{}").unwrap();
    assert_eq!((second.input_tokens, second.output_tokens, second.pieces.len()), (None, 2, 2));
    assert_eq!(client.complete("{}").unwrap().output_tokens, 3);
    let seen = &server.seen()[0];
    assert_eq!((seen.path.as_str(), seen.body.as_str()), ("/v1/completions", "{\"x\":1}"));
    assert_eq!(seen.authorization.as_deref(), Some("Bearer key"));
}

#[test]
fn what_goes_wrong_is_said() {
    let refused = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
    let script: [(&[&str], &str); 6] = [
        (&[refused, "{\"error\":{\"message\":\"too long\"}}"], "400 Bad Request: too long"),
        (&["HTTP/1.1 500 Oops\r\nConnection: close\r\n\r\n"], "answered 500"),
        (&[OK, &piece("a", None), "data: {\"error\":{\"message\":\"boom\"}}\n\n"], "stream: boom"),
        (&[OK, &piece("a", None)], "broke off the stream"),
        (&[OK, "data: {\"choi"], "not JSON"),
        (&[OK, "data: [DONE]\n\n"], "without a token"),
    ];
    let answers = script.map(|(pieces, _)| pieces.iter().map(|p| (*p).to_owned()).collect());
    let answers: Vec<Vec<String>> = answers.to_vec();
    let server = Scripted::start(usize::MAX, move |_, n| answers[n].clone());
    for (_, message) in script {
        let failure = server.client().complete("{}").unwrap_err();
        assert!(!failure.unreachable);
        let line = one_line(&failure.error);
        assert!(line.contains(message), "{line}");
    }
}

#[test]
fn a_server_that_dies_leaves_what_was_finished() {
    // The third answer is cut, and nobody listens any more.
    let server = Scripted::start(3, |_, n| if n < 2 { stream() } else { stream()[..2].to_vec() });
    let outcome = run(&server.client(), 6, 1);
    assert_eq!(server.seen().len(), 3);
    let lines: Vec<String> = outcome
        .results
        .iter()
        .map(|result| result.as_ref().map_or_else(|f| one_line(&f.error), |_| "done".to_owned()))
        .collect();
    assert_eq!(lines[..2], ["done", "done"]);
    assert!(lines[2].contains("broke off the stream"), "{lines:?}");
    assert!(lines[3].starts_with("cannot reach http://127.0.0.1:"), "{lines:?}");
    // The fourth gave its place back after it had failed.
    assert_eq!(lines[4..], ["not sent: the server is gone", "not sent: the server is gone"]);
}

#[test]
fn no_more_requests_are_in_flight_than_asked() {
    let (now, most) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    // Answers come in pairs: no client gets one while it has a single request in flight.
    let pair = Barrier::new(2);
    let seen = Arc::clone(&most);
    let server = Scripted::start(usize::MAX, move |_, _| {
        seen.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        pair.wait();
        now.fetch_sub(1, Ordering::SeqCst);
        stream()
    });
    let outcome = run(&server.client(), 6, 2);
    assert!(outcome.results.iter().all(Result::is_ok));
    assert_eq!((outcome.max_in_flight, most.load(Ordering::SeqCst)), (2, 2));
}

/// A server that knows a model, token ids and texts, and has no pages of Kvasir's.
fn knowing() -> Scripted {
    Scripted::start(usize::MAX, |seen, _| match seen.path.as_str() {
        "/v1/models" => json(&json!({"data": [{"id": "first"}, {"id": "second"}]})),
        "/tokenize" => {
            let body: Value = serde_json::from_str(&seen.body).unwrap();
            let bos = body["add_special_tokens"].as_bool().unwrap().then_some(256);
            let text = body["prompt"].as_str().unwrap().bytes().map(u32::from);
            json(&json!({"tokens": bos.into_iter().chain(text).collect::<Vec<_>>()}))
        }
        "/detokenize" => {
            let body: Value = serde_json::from_str(&seen.body).unwrap();
            json(&json!({"prompt": body["tokens"].to_string()}))
        }
        _ => vec!["HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n".to_owned()],
    })
}

#[test]
fn a_seed_gives_the_same_requests() {
    let server = knowing();
    let bodies = |args: &str| -> Vec<Value> {
        let command = parse(&format!("--num-prompts 3 --output-len 7 {args}"));
        let client = server.client();
        let model = command.model(&client).unwrap();
        let requests = command.requests(&client, &model).unwrap();
        requests.iter().map(|request| serde_json::from_str(&request.body).unwrap()).collect()
    };
    for args in ["--input-len 5", "--dataset retrieval --passages 2 --passage-len 16"] {
        let first = bodies(args);
        assert_eq!(first, bodies(args), "{args}");
        assert_ne!(first, bodies(&format!("{args} --seed 1")), "{args}");
    }
    let first = &bodies("--input-len 5")[0];
    let prompt = first["prompt"].as_array().unwrap();
    assert_eq!(prompt.len(), 5);
    assert!(prompt.iter().all(|token| token.as_u64().unwrap() < 32_000), "{prompt:?}");
    assert_eq!((&first["model"], &first["max_tokens"]), (&json!("first"), &json!(7)));
    assert_eq!((&first["stream"], first.get("ignore_eos")), (&json!(true), None));
    let other = &bodies("--input-len 5 --model second --ignore-eos --text --vocab-size 10")[0];
    assert_eq!((&other["model"], &other["ignore_eos"]), (&json!("second"), &json!(true)));
    assert!(other["prompt"].as_str().unwrap().starts_with('['), "{other}");
    // The first token of a retrieval prompt gives way to the server's BOS.
    let retrieval = &bodies("--dataset retrieval --passages 2 --passage-len 16")[0];
    assert_eq!(
        (&retrieval["prompt"][0], retrieval["prompt"].as_array().unwrap().len()),
        (&json!(256), 32)
    );
}

#[test]
fn rates() {
    assert_eq!(parse_rate("2.5"), Ok(2.5));
    assert_eq!(parse_rate("inf"), Ok(f64::INFINITY));
    for wrong in ["0", "-1", "nan", "fast", ""] {
        assert!(parse_rate(wrong).is_err(), "{wrong}");
    }
}
