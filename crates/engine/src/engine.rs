//! The engine. (Skeleton: signatures are final, bodies follow.)

use std::sync::Arc;

use kvasir_model::{Model, Tokenizer};

use crate::{EngineConfig, EngineStats, Request, RequestId, Result, StepOutput};

/// See the crate's documentation.
#[derive(Debug)]
pub struct Engine {
    model: Arc<Model>,
}

impl Engine {
    /// Validates `config` against `model`.
    pub fn new(model: Arc<Model>, config: EngineConfig) -> Result<Self> {
        let _ = config;
        Ok(Self { model })
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        self.model.tokenizer()
    }

    /// Longest prompt + output in tokens.
    pub fn max_model_len(&self) -> usize {
        0
    }

    /// Puts a request in the waiting queue; refuses what can never run.
    pub fn add_request(&mut self, request: Request) -> Result<()> {
        drop(request);
        Ok(())
    }

    /// Ends a request and frees all it holds. Returns whether it was there. No output follows.
    pub fn abort(&mut self, id: &RequestId) -> bool {
        let _ = id;
        false
    }

    /// Runs one step: schedules, computes, samples. Does nothing if there is nothing to do.
    pub fn step(&mut self) -> Result<StepOutput> {
        Ok(StepOutput::default())
    }

    /// Whether any request is waiting or running.
    pub fn has_unfinished(&self) -> bool {
        false
    }

    /// A snapshot of counters and gauges.
    pub fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    /// Drops every cached prefix that no sequence uses; returns the bytes freed.
    pub fn reset_prefix_cache(&mut self) -> usize {
        0
    }

    /// Recounts references and bytes of everything; an error is a bug.
    pub fn check_integrity(&self) -> Result<()> {
        Ok(())
    }
}
