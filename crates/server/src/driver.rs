//! The thread that owns the engine.
//!
//! Commands come in over a channel; outputs go out over one channel per job. The thread sleeps
//! on the command channel when nothing runs, and looks into it between steps when something
//! does, so an abort takes effect within one step.
//!
//! An engine that returns an error or panics is never called again: every open job is told,
//! every later one is refused, and the server goes on answering.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use kvasir_engine::{EngineError, EngineStats, Request, RequestId, SequenceOutput};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::metrics::Metrics;
use crate::step_engine::StepEngine;
use crate::timing::Timing;
use crate::{ApiError, ServerError};

/// What a job hears from the driver.
#[derive(Debug)]
pub(crate) enum Event {
    /// An output of the job's prompt of this number.
    Output(usize, Box<SequenceOutput>),
    /// The operator ended the job; no output follows.
    Aborted,
    /// The engine failed; no output follows.
    Failed(Arc<str>),
}

/// Names a job inside the driver.
type Ticket = u64;

enum Command {
    Add(Submission),
    /// The client is gone.
    Drop(Ticket),
    /// End the jobs of these names, or all; answers with how many.
    Abort(Option<Vec<String>>, oneshot::Sender<usize>),
    ResetPrefixCache(oneshot::Sender<usize>),
    Stop,
}

struct Submission {
    ticket: Ticket,
    name: Arc<str>,
    /// One per prompt.
    requests: Vec<Request>,
    received: Instant,
    events: UnboundedSender<Event>,
    reply: oneshot::Sender<Result<(), EngineError>>,
}

#[derive(Default)]
struct Shared {
    stats: Mutex<EngineStats>,
    failure: OnceLock<Arc<str>>,
}

/// The async side of the driver. Cheap to clone.
#[derive(Clone)]
pub(crate) struct DriverHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    next_ticket: Arc<AtomicU64>,
}

/// A job the engine has accepted. Dropping it ends the job.
pub(crate) struct Running {
    pub(crate) events: UnboundedReceiver<Event>,
    guard: Guard,
}

struct Guard {
    ticket: Ticket,
    commands: Sender<Command>,
    armed: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.armed {
            // The driver is gone: then so is the job.
            let _ = self.commands.send(Command::Drop(self.ticket));
        }
    }
}

impl Running {
    /// The next event; a driver that vanished counts as a failure.
    pub(crate) async fn next(&mut self) -> Event {
        let gone = || Event::Failed("the engine's thread has ended".into());
        self.events.recv().await.unwrap_or_else(gone)
    }

    /// All outputs are in: there is nothing left to end.
    pub(crate) fn finished(&mut self) {
        self.guard.armed = false;
    }
}

impl DriverHandle {
    /// Hands requests to the engine, all of them or, if it refuses one, none. Dropping the
    /// future or its result ends them. The requests get ids of their own: `name` comes from the
    /// client, who may use it twice.
    pub(crate) async fn submit(
        &self,
        name: &str,
        mut requests: Vec<Request>,
        received: Instant,
    ) -> Result<Running, ApiError> {
        if let Some(cause) = self.failure() {
            return Err(ApiError::engine_down(&cause));
        }
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        for (at, request) in requests.iter_mut().enumerate() {
            request.id = RequestId(format!("{name}-{ticket:x}-{at}").into());
        }
        let (events, receiver) = unbounded_channel();
        let (reply, answer) = oneshot::channel();
        // Made before sending: the client may vanish at any await.
        let guard = Guard { ticket, commands: self.commands.clone(), armed: true };
        let name = name.into();
        let add = Submission { ticket, name, requests, received, events, reply };
        let mut running = Running { events: receiver, guard };
        let sent = self.commands.send(Command::Add(add));
        let answer = match sent {
            Ok(()) => answer.await.ok(),
            Err(_) => None,
        };
        match answer {
            Some(Ok(())) => Ok(running),
            Some(Err(error)) => {
                running.finished();
                Err(ApiError::admission(&error))
            }
            None => Err(ApiError::engine_failed(&self.failure().unwrap_or_else(|| "".into()))),
        }
    }

    /// Ends jobs by name, or all. Returns how many.
    pub(crate) async fn abort(&self, names: Option<Vec<String>>) -> usize {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Abort(names, reply));
        answer.await.unwrap_or(0)
    }

    /// Drops cached prefixes that nothing uses. Returns the bytes freed.
    pub(crate) async fn reset_prefix_cache(&self) -> Result<usize, ApiError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::ResetPrefixCache(reply));
        let down = || ApiError::engine_down(&self.failure().unwrap_or_else(|| "".into()));
        answer.await.map_err(|_| down())
    }

    /// The numbers after the last step.
    pub(crate) fn stats(&self) -> EngineStats {
        self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why the engine takes no more requests, if so.
    pub(crate) fn failure(&self) -> Option<Arc<str>> {
        self.shared.failure.get().cloned()
    }

    /// Ends the thread after its current step; open jobs hear [`Event::Aborted`].
    pub(crate) fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }
}

/// Starts the thread.
pub(crate) fn start<E: StepEngine>(
    engine: E,
    metrics: Arc<Metrics>,
    check_integrity: bool,
) -> Result<(DriverHandle, JoinHandle<()>), ServerError> {
    let (commands, receiver) = mpsc::channel();
    let shared = Arc::new(Shared::default());
    let handle = DriverHandle { commands, shared: shared.clone(), next_ticket: Arc::default() };
    let driver = Driver {
        engine,
        commands: receiver,
        shared,
        metrics,
        jobs: HashMap::new(),
        check_integrity,
        unchecked: true,
    };
    driver.publish();
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || driver.run())
        .map_err(|source| ServerError::Io { what: "cannot start the engine's thread", source })?;
    Ok((handle, thread))
}

/// A request of the engine and the job it belongs to.
struct Tracked {
    ticket: Ticket,
    name: Arc<str>,
    prompt: usize,
    events: UnboundedSender<Event>,
    timing: Timing,
}

struct Driver<E> {
    engine: E,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    jobs: HashMap<RequestId, Tracked>,
    check_integrity: bool,
    /// Whether something happened since the last integrity check.
    unchecked: bool,
}

#[derive(PartialEq)]
enum Flow {
    Continue,
    Stop,
}

impl<E: StepEngine> Driver<E> {
    fn run(mut self) {
        let cause = loop {
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(Ok(Flow::Continue)) => {}
                Ok(Ok(Flow::Stop)) => return,
                Ok(Err(error)) => break error.to_string(),
                Err(panic) => break format!("panic: {}", panic_message(panic.as_ref())),
            }
        };
        tracing::error!("the engine failed: {cause}");
        self.fail(&cause.into());
    }

    /// Handles what has been asked, then runs a step if there is work.
    fn turn(&mut self) -> Result<Flow, EngineError> {
        if !self.engine.has_unfinished() {
            if std::mem::take(&mut self.unchecked) && self.check_integrity {
                self.engine.check_integrity()?;
            }
            match self.commands.recv() {
                Ok(command) => {
                    if self.handle(command) == Flow::Stop {
                        return Ok(Flow::Stop);
                    }
                }
                Err(_) => return Ok(Flow::Stop),
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if self.handle(command) == Flow::Stop {
                        return Ok(Flow::Stop);
                    }
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(Flow::Stop),
            }
        }
        if self.engine.has_unfinished() {
            self.step()?;
        }
        Ok(Flow::Continue)
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let started = Instant::now();
        let step = self.engine.step()?;
        let now = Instant::now();
        for id in &step.scheduled {
            if let Some(job) = self.jobs.get_mut(id) {
                job.timing.schedule(started);
            }
        }
        let tokens = step.num_prefill_tokens + step.num_decode_tokens;
        if tokens > 0 {
            self.metrics.requests.iteration_tokens.observe(tokens as f64);
        }
        // Before the outputs: a client that has seen its last token sees it counted.
        self.publish();
        for output in step.outputs {
            self.deliver(output, now);
        }
        Ok(())
    }

    fn deliver(&mut self, output: SequenceOutput, now: Instant) {
        // Absent if the job was ended while the step ran.
        let Some(job) = self.jobs.get_mut(&output.request_id) else { return };
        let id = output.request_id.clone();
        let done = job.timing.observe(&output, now, &self.metrics.requests);
        let gone = job.events.send(Event::Output(job.prompt, Box::new(output))).is_err();
        if done {
            self.jobs.remove(&id);
        } else if gone {
            self.end(&id);
        }
    }

    fn handle(&mut self, command: Command) -> Flow {
        self.unchecked = true;
        match command {
            Command::Add(submission) => self.add(submission),
            Command::Drop(ticket) => {
                self.end_where(|job| job.ticket == ticket);
            }
            Command::Abort(names, reply) => {
                let wanted = |job: &Tracked| match &names {
                    Some(names) => names.iter().any(|name| **name == *job.name),
                    None => true,
                };
                let _ = reply.send(self.end_where(wanted));
            }
            Command::ResetPrefixCache(reply) => {
                let freed = self.engine.reset_prefix_cache();
                let _ = reply.send(freed);
            }
            Command::Stop => {
                self.end_where(|_| true);
                return Flow::Stop;
            }
        }
        self.publish();
        Flow::Continue
    }

    fn add(&mut self, submission: Submission) {
        let Submission { ticket, name, requests, received, events, reply } = submission;
        for (prompt, request) in requests.into_iter().enumerate() {
            let id = request.id.clone();
            let timing = Timing::new(received, &request.params);
            if let Err(error) = self.engine.add_request(request) {
                if matches!(error, EngineError::QueueFull { .. }) {
                    self.metrics.requests.admission_rejections.inc();
                }
                self.end_where(|job| job.ticket == ticket);
                let _ = reply.send(Err(error));
                return;
            }
            let (name, events) = (name.clone(), events.clone());
            self.jobs.insert(id, Tracked { ticket, name, prompt, events, timing });
        }
        // A client that hung up meanwhile is followed by a Drop command.
        let _ = reply.send(Ok(()));
    }

    /// Ends the jobs that `wanted` picks; returns how many jobs (not requests) that were.
    fn end_where(&mut self, wanted: impl Fn(&Tracked) -> bool) -> usize {
        let picked = self.jobs.iter().filter(|(_, job)| wanted(job));
        let mut picked: Vec<_> = picked.map(|(id, job)| (job.ticket, id.clone())).collect();
        for (_, id) in &picked {
            self.end(id);
        }
        picked.sort_unstable();
        picked.dedup_by_key(|(ticket, _)| *ticket);
        picked.len()
    }

    fn end(&mut self, id: &RequestId) {
        self.engine.abort(id);
        if let Some(job) = self.jobs.remove(id) {
            job.timing.cut("abort", &self.metrics.requests);
            let _ = job.events.send(Event::Aborted);
        }
    }

    fn publish(&self) {
        let stats = self.engine.stats();
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }

    /// Tells every job, then refuses commands until the server stops. The engine is not touched.
    fn fail(&mut self, cause: &Arc<str>) {
        let _ = self.shared.failure.set(cause.clone());
        for (_, job) in self.jobs.drain() {
            job.timing.cut("error", &self.metrics.requests);
            let _ = job.events.send(Event::Failed(cause.clone()));
        }
        while let Ok(command) = self.commands.recv() {
            // Dropping a command drops its reply, which the asker takes for a failure.
            if matches!(command, Command::Stop) {
                return;
            }
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown")
}
