//! Groups of options that several commands share. Spelling follows vLLM.

mod cache;
mod model;
mod sampling;
mod serve;

pub(crate) use cache::{CacheArgs, parse_block_size};
pub(crate) use model::{DtypeArg, ModelArgs};
pub(crate) use sampling::SamplingArgs;
pub(crate) use serve::{LogLevel, ServeArgs};
