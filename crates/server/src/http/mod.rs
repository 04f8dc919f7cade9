//! Routes, middleware and the life of the server.

mod app;
mod cors;
mod generate;
mod info;
mod observe;
mod prepare;
mod server;
mod state;

pub use server::{Server, ServerHandle, shutdown_signal};
