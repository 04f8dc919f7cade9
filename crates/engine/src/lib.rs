//! Requests in, tokens out: continuous batching over the jointly encoded KV cache.
//!
//! Read first: [`Request`], [`Engine`], [`StepOutput`]. The engine is synchronous and
//! deterministic: no clock, no thread of its own but the compute pool, no I/O. `server` drives it from a
//! thread.
//!
//! Not its job: HTTP, JSON, time, text templates.
#![forbid(unsafe_code)]

mod config;
mod engine;
mod error;
pub mod guard;
mod random;
mod request;
mod sampler;
mod sampling_params;
mod scheduler;
mod sequence;
mod stats;
mod text;
mod work;

pub use config::EngineConfig;
pub use engine::Engine;
pub use error::{EngineError, Result};
pub use guard::PromptFeatures;
pub use kvasir_cache::{CacheError, Recipe};
pub use request::{
    Finish, FinishReason, Request, RequestId, SequenceOutput, StepOutput, StopReason, TokenId,
    TokenLogprobs,
};
pub use sampling_params::{
    MAX_LOGPROBS, MAX_N, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKENS, SamplingParams,
};
pub use stats::EngineStats;
pub use work::StepWork;
