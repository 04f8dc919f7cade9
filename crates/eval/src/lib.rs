//! Measurements on the engine's public API: speed and quality, always with the uncompressed cache as
//! control.
//!
//! Read first: [`latency`], [`throughput`] and [`kernels`] (`kvasir bench`), [`quality`] (`kvasir eval quality`),
//! [`perplexity`] (`kvasir eval perplexity`),
//! [`corpus`] (what texts may come in).
//!
//! Not its job: printing, plotting to a terminal, HTTP.
#![forbid(unsafe_code)]

pub mod corpus;
mod error;
pub mod kernels;
pub mod latency;
pub mod perplexity;
pub mod quality;
pub mod throughput;

pub use error::{EvalError, Result};
