//! The one error type of this crate.

use std::path::PathBuf;

/// What can go wrong while measuring.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A corpus file that cannot be read.
    #[error("cannot read corpus {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A line of a .jsonl file that is no object with a text, or with a prompt.
    #[error("{path}, line {line}: {what}")]
    Corpus {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// Settings that make no sense, whatever the corpus.
    #[error("{what}")]
    Settings {
        /// Which, and what they must be.
        what: String,
    },
    /// Nothing to measure.
    #[error("{what}")]
    TooShort {
        /// What there is, and what is needed.
        what: String,
    },
    /// A directory that is no run's, or not this one's.
    #[error("{} {what}", path.display())]
    RunDir {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Something that cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A server refused or failed.
    #[error("{what}")]
    Server {
        /// What happened.
        what: String,
    },
    /// A tokenizer that is elsewhere refused or failed.
    #[error("{what}")]
    Tokenizer {
        /// What happened.
        what: String,
    },
    /// The engine ended a request without its result: a bug.
    #[error("the engine gave no result for '{request}'")]
    NoResult {
        /// Request id.
        request: String,
    },
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] kvasir_engine::EngineError),
    /// The cache refused or failed.
    #[error(transparent)]
    Cache(#[from] kvasir_cache::CacheError),
    /// The model refused or failed.
    #[error(transparent)]
    Model(#[from] kvasir_model::ModelError),
}

/// Shorthand of this crate.
pub type Result<T, E = EvalError> = std::result::Result<T, E>;
