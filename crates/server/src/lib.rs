//! OpenAI-compatible HTTP API and metrics over any [`StepEngine`].
//!
//! Read first: [`Server`] (bind, give it a model, run, drain), [`StepEngine`] (what it drives),
//! [`TextModel`] (texts to tokens and back). The engine runs on a thread of its own; handlers
//! talk to it over channels, and a client that hangs up ends its request within one step.
//!
//! Not its job: loading models, sampling, deciding what runs when.
#![forbid(unsafe_code)]

mod api;
mod auth;
mod config;
mod driver;
mod error;
mod http;
mod metrics;
mod model_text;
mod step_engine;
#[cfg(any(test, feature = "testkit"))]
#[doc(hidden)]
pub mod testkit;
mod text_model;
mod timing;

#[doc(hidden)]
pub use api::parse::{RequestKind, parse_request};
pub use auth::ApiKeys;
pub use config::{ModelInfo, ServerConfig};
pub use error::{ApiError, ServerError};
pub use http::{Server, ServerHandle, shutdown_signal};
pub use model_text::ModelText;
pub use step_engine::StepEngine;
pub use text_model::{ChatPrompt, TextModel};
