//! The log: to stderr, our own crates at the level asked for, others when something is wrong.

use std::io::IsTerminal;

use tracing::Level;
use tracing_subscriber::EnvFilter;

use crate::options::LogLevel;

/// Starts logging; a second call changes nothing.
pub(crate) fn start(level: LogLevel, json: bool) {
    let level = Level::from(level);
    let others = level.min(Level::WARN);
    let filter = EnvFilter::new(format!("{others},kvasir={level}"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // The one error is that a subscriber is there already.
    let _ = if json { builder.json().try_init() } else { builder.try_init() };
}
