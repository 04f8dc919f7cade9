//! Measurements on the engine's public API: speed and quality, always with the uncompressed cache as
//! control.
//!
//! Read first: [`latency`], [`throughput`] and [`kernels`] (`kvasir bench`), [`quality`] (`kvasir eval quality`),
//! [`perplexity`] (`kvasir eval perplexity`),
//! [`corpus`] (what texts may come in), [`dataset`] (requests of a load).
//!
//! Not its job: printing, plotting to a terminal, HTTP.
#![forbid(unsafe_code)]

pub mod arrivals;
pub mod corpus;
pub mod dataset;
mod error;
pub mod kernels;
pub mod latency;
mod percentiles;
pub mod perplexity;
pub mod quality;
mod random;
pub mod throughput;

pub use error::{EvalError, Result};
pub use percentiles::{Percentiles, median};
