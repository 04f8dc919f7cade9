//! Groups of options that several commands share. Spelling follows vLLM.

mod cache;
mod encoding;
mod model;
mod sampling;
mod serve;

pub(crate) use cache::{CacheArgs, parse_block_size, parse_chance};
pub(crate) use encoding::EncodingArgs;
pub(crate) use model::{DtypeArg, LoadArgs, ModelArgs};
pub(crate) use sampling::SamplingArgs;
pub(crate) use serve::{LogLevel, ServeArgs};
