//! The whole path on real models: pulled, loaded, served over HTTP.
//!
//! Models come from the pull cache and are pulled into it when they are not there (once: 92 and 238 MB).
#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

mod client;
mod command_line;
mod golden;
mod identities;
mod models;
mod serving;
mod speed_does_not_change_tokens;
mod the_openai_client;
