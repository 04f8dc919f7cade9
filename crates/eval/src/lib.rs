//! Measurements on the engine's public API: speed and quality, always with the uncompressed cache as
//! control.
//!
//! Read first: [`latency`], [`throughput`] and [`kernels`] (`kvasir bench`), [`quality`] (`kvasir eval quality`),
//! [`perplexity`] (`kvasir eval perplexity`),
//! [`corpus`] (what texts may come in), [`dataset`] (requests of a load).
//!
//! Not its job: printing, plotting to a terminal, HTTP.
#![forbid(unsafe_code)]

pub mod analysis;
pub mod arrivals;
pub mod corpus;
pub mod dataset;
mod error;
pub mod kernels;
pub mod latency;
pub mod metrics;
mod percentiles;
pub mod perplexity;
pub mod predict;
pub mod profile;
pub mod quality;
mod random;
pub mod report;
pub mod simulate;
pub mod suite;
pub mod tasks;
pub mod throughput;

pub use error::{EvalError, Result};
pub use percentiles::{Percentiles, median};
