//! What generating needs of an engine.

use kvasir_engine::{Engine, EngineStats, Request, RequestId, Result, StepOutput};

/// The part of [`Engine`] that [`crate::generate`] drives; tests put a script in its place.
pub(crate) trait StepEngine {
    /// See [`Engine::add_request`].
    fn add_request(&mut self, request: Request) -> Result<()>;
    /// See [`Engine::abort`].
    fn abort(&mut self, id: &RequestId) -> bool;
    /// See [`Engine::step`].
    fn step(&mut self) -> Result<StepOutput>;
    /// See [`Engine::has_unfinished`].
    fn has_unfinished(&self) -> bool;
    /// See [`Engine::stats`].
    fn stats(&self) -> EngineStats;
}

impl StepEngine for Engine {
    fn add_request(&mut self, request: Request) -> Result<()> {
        Engine::add_request(self, request)
    }

    fn abort(&mut self, id: &RequestId) -> bool {
        Engine::abort(self, id)
    }

    fn step(&mut self) -> Result<StepOutput> {
        Engine::step(self)
    }

    fn has_unfinished(&self) -> bool {
        Engine::has_unfinished(self)
    }

    fn stats(&self) -> EngineStats {
        Engine::stats(self)
    }
}
