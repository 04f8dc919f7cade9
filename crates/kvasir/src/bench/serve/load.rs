//! Sends the requests of a load when they are due and collects what came of each.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use crate::client::{Client, Completion, Failure};

/// A request that is ready to be sent.
#[derive(Debug, Clone)]
pub(super) struct Ready {
    /// The body of the completion.
    pub(super) body: String,
    /// Prompt tokens as far as this side knows; the server's count goes first.
    pub(super) input_tokens: usize,
}

/// When requests are sent.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    /// When each is due, from the start.
    pub(super) due: Vec<Duration>,
    /// Most requests in flight; those that are due wait.
    pub(super) max_concurrency: usize,
}

/// What came of a load.
#[derive(Debug)]
pub(super) struct Outcome {
    /// From the first request to the last answer.
    pub(super) seconds: f64,
    /// One for each request, in order.
    pub(super) results: Vec<Result<Completion, Failure>>,
    /// Most requests that were in flight at once.
    pub(super) max_in_flight: usize,
}

/// Runs the load: a thread for each request in flight. Once the server cannot be reached, requests that are
/// not sent yet fail without a try. `progress`: finished requests.
pub(super) fn run(
    client: &Client,
    requests: &[Ready],
    pace: &Pace,
    progress: &(dyn Fn(usize) + Sync),
) -> Outcome {
    let (gone, in_flight, max_in_flight) =
        (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let done = AtomicUsize::new(0);
    let start = Instant::now();
    let send = |request: &Ready| {
        max_in_flight.fetch_max(in_flight.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let result = client.complete(&request.body);
        in_flight.fetch_sub(1, Ordering::SeqCst);
        if result.as_ref().is_err_and(|failure| failure.unreachable) {
            gone.store(true, Ordering::SeqCst);
        }
        progress(done.fetch_add(1, Ordering::SeqCst) + 1);
        result
    };
    let results = thread::scope(|scope| {
        // A place for each request in flight; who has ended gives his back.
        let (give, places): (Sender<()>, Receiver<()>) = channel();
        for _ in 0..pace.max_concurrency.min(requests.len()) {
            let _ = give.send(());
        }
        let mut threads = Vec::new();
        for (request, due) in requests.iter().zip(&pace.due) {
            let may_send = places.recv().is_ok();
            if !gone.load(Ordering::SeqCst) {
                thread::sleep(due.saturating_sub(start.elapsed()));
            }
            if !may_send || gone.load(Ordering::SeqCst) {
                let _ = give.send(());
                threads.push(None);
                continue;
            }
            let (give, send) = (give.clone(), &send);
            let spawned =
                thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, move || {
                    let result = send(request);
                    let _ = give.send(());
                    result
                });
            threads.push(Some(spawned));
        }
        let failed = |what: String| Err(Failure { error: anyhow!(what), unreachable: false });
        let join = |thread: Option<std::io::Result<thread::ScopedJoinHandle<'_, _>>>| match thread {
            None => failed("not sent: the server is gone".to_owned()),
            Some(Err(error)) => failed(format!("cannot start a thread: {error}")),
            Some(Ok(thread)) => thread
                .join()
                .unwrap_or_else(|_| failed("the thread of the request ended".to_owned())),
        };
        threads.into_iter().map(join).collect()
    });
    Outcome {
        seconds: start.elapsed().as_secs_f64(),
        results,
        max_in_flight: max_in_flight.into_inner(),
    }
}
