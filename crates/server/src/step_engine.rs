//! What the driver needs of an engine.

use kvasir_engine::{Engine, EngineError, EngineStats, Request, RequestId, StepOutput};

/// A synchronous engine that a thread of the server drives. The contracts are those of
/// [`kvasir_engine::Engine`]; tests put a scripted one in its place.
pub trait StepEngine: Send + 'static {
    /// Puts a request in the waiting queue.
    fn add_request(&mut self, request: Request) -> Result<(), EngineError>;
    /// Ends a request without further output. Returns whether it was there.
    fn abort(&mut self, id: &RequestId) -> bool;
    /// Runs one step. An error is taken as the end of the engine.
    fn step(&mut self) -> Result<StepOutput, EngineError>;
    /// Whether a request is waiting or running.
    fn has_unfinished(&self) -> bool;
    /// A snapshot of counters and gauges; called after every step.
    fn stats(&self) -> EngineStats;
    /// Drops cached prefixes that no sequence uses; returns the bytes freed.
    fn reset_prefix_cache(&mut self) -> usize;
    /// Recounts the bookkeeping; an error is a bug.
    fn check_integrity(&self) -> Result<(), EngineError> {
        Ok(())
    }
}

impl StepEngine for Engine {
    fn add_request(&mut self, request: Request) -> Result<(), EngineError> {
        Engine::add_request(self, request)
    }

    fn abort(&mut self, id: &RequestId) -> bool {
        Engine::abort(self, id).unwrap_or_else(|error| {
            report(&error);
            true
        })
    }

    fn step(&mut self) -> Result<StepOutput, EngineError> {
        Engine::step(self)
    }

    fn has_unfinished(&self) -> bool {
        Engine::has_unfinished(self)
    }

    fn stats(&self) -> EngineStats {
        Engine::stats(self)
    }

    fn reset_prefix_cache(&mut self) -> usize {
        Engine::reset_prefix_cache(self).unwrap_or_else(|error| {
            report(&error);
            0
        })
    }

    fn check_integrity(&self) -> Result<(), EngineError> {
        Engine::check_integrity(self)
    }
}

/// Freeing can only fail on broken bookkeeping; the idle check that follows ends the engine then.
fn report(error: &EngineError) {
    tracing::error!(%error, "freeing blocks failed");
}
