//! The one error type of this crate. Every variant names what was read, where, and the operands
//! that disagree, so that one line tells a user what is wrong with a file.

use std::path::PathBuf;

/// What can go wrong while a model is read or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    // --- files -----------------------------------------------------------------------------
    /// The operating system refused.
    #[error("cannot read {path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Neither a GGUF file nor a safetensors folder.
    #[error("{path} is not a model: {what}")]
    NotAModel {
        /// File or folder.
        path: PathBuf,
        /// What was found instead.
        what: String,
    },
    /// A GGUF or safetensors file that breaks its own format.
    #[error("{path}: damaged model file at byte {offset}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where reading stopped.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// The operating system refused.
    #[error("cannot write {path}: {source}")]
    Write {
        /// File that was to be written.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file of statistics that is damaged, or of another model or version.
    #[error("statistics {path} refused: {what}")]
    Statistics {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    // --- metadata --------------------------------------------------------------------------
    /// An architecture this build has no file for in `arch/`.
    #[error("unknown architecture '{name}' (known: {known})")]
    UnknownArchitecture {
        /// As the file names it.
        name: String,
        /// What this build runs, comma separated.
        known: String,
    },
    /// A key the architecture needs is absent.
    #[error("model metadata lacks '{key}'")]
    MissingKey {
        /// GGUF key or config.json field.
        key: String,
    },
    /// A key is there with a value that cannot be used.
    #[error("model metadata '{key}': expected {expected}, found {found}")]
    BadKey {
        /// GGUF key or config.json field.
        key: String,
        /// Type or range.
        expected: String,
        /// What stands there.
        found: String,
    },
    // --- tensors ---------------------------------------------------------------------------
    /// A tensor the architecture needs is absent.
    #[error("model has no tensor '{name}'")]
    MissingTensor {
        /// Tensor name as searched.
        name: String,
    },
    /// A tensor has another shape than the metadata asks for.
    #[error("tensor '{name}' has shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// Tensor name.
        name: String,
        /// Row-major shape, outermost first.
        expected: Vec<usize>,
        /// Row-major shape, outermost first.
        found: Vec<usize>,
    },
    /// A tensor type that cannot be read.
    #[error("tensor '{name}' has type {ty}, which this build cannot read")]
    TensorType {
        /// Tensor name.
        name: String,
        /// Type as the file names or numbers it.
        ty: String,
    },
    // --- text ------------------------------------------------------------------------------
    /// The tokenizer cannot be built, or cannot encode a text.
    #[error("tokenizer: {what}")]
    Tokenizer {
        /// What is wrong.
        what: String,
    },
    /// A chat template does not parse, or refused the messages (`raise_exception`).
    #[error("chat template: {what}")]
    Template {
        /// What is wrong.
        what: String,
    },
    // --- use -------------------------------------------------------------------------------
    /// A feature of the model that this build does not have.
    #[error("not supported: {what}")]
    Unsupported {
        /// The feature.
        what: String,
    },
    /// The cache refused (budget, geometry).
    #[error(transparent)]
    Cache(#[from] kvasir_cache::CacheError),
}

/// Shorthand of this crate.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;
