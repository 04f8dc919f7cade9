//! The bodies of requests and responses: JSON in, JSON out, no I/O.

pub(crate) mod chat;
pub(crate) mod collect;
pub(crate) mod completion;
pub(crate) mod fields;
pub(crate) mod job;
pub(crate) mod kv_usage;
pub(crate) mod logprobs;
pub(crate) mod openapi;
pub(crate) mod parse;
pub(crate) mod response;
pub(crate) mod sampling;
pub(crate) mod stream;
pub(crate) mod tokenize;
