//! The one error type of this crate.

use kvasir_cache::{CacheError, Recipe};

/// What can go wrong in the engine. The first group is the client's fault and concerns one
/// request; the second is the operator's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    // --- a request -------------------------------------------------------------------------
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no room for a token.
    #[error(
        "the prompt has {prompt_tokens} tokens, but the model's length is {max_model_len} tokens \
         (prompt and output together)"
    )]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt_tokens: usize,
        /// `--max-model-len`.
        max_model_len: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token_id} is outside the vocabulary of {vocab_size} tokens")]
    UnknownToken {
        /// The token.
        token_id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A sampling parameter out of range.
    #[error("{param} must be {expected}, got {found}")]
    BadParam {
        /// Name as in the API.
        param: &'static str,
        /// Range.
        expected: String,
        /// Value.
        found: String,
    },
    /// A recipe of the request's own that this engine cannot store it by.
    #[error("KV cache recipe '{recipe}': {source}")]
    Recipe {
        /// As asked for.
        recipe: Recipe,
        /// Why not.
        source: CacheError,
    },
    /// A recipe of the request's own that needs statistics, and the engine has none.
    #[error(
        "KV cache recipe '{recipe}' needs statistics of the model: the server must be started with \
         them (`kvasir calibrate`, or a joint --kv-cache)"
    )]
    NoStatistics {
        /// As asked for.
        recipe: Recipe,
    },
    /// A sequence that can never fit the budget by the request's own recipe.
    #[error(
        "KV cache recipe '{recipe}': a sequence of {tokens} tokens needs {needed_bytes} bytes, and \
         the budget is {budget_bytes} bytes"
    )]
    RecipeTooLarge {
        /// As asked for.
        recipe: Recipe,
        /// Prompt and output, or the prompt and one token if `max_tokens` was not given.
        tokens: usize,
        /// Bytes for them.
        needed_bytes: usize,
        /// The budget.
        budget_bytes: usize,
    },
    /// Two unfinished requests with one id.
    #[error("request id '{id}' is already in use")]
    DuplicateRequest {
        /// The id.
        id: String,
    },
    /// The waiting queue is full; try again later.
    #[error("the server is busy: {waiting} requests are waiting (--max-num-queued-reqs {limit})")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
        /// `--max-num-queued-reqs`.
        limit: usize,
    },
    // --- the engine ------------------------------------------------------------------------
    /// A configuration value out of range.
    #[error("{option} must be {expected}, got {found}")]
    BadConfig {
        /// Name of the flag.
        option: &'static str,
        /// Range.
        expected: String,
        /// Value.
        found: String,
    },
    /// A file of risks that is damaged or not for this program.
    #[error("risk model: {what}")]
    RiskModel {
        /// What is wrong.
        what: String,
    },
    /// Compute threads could not be started.
    #[error(transparent)]
    Threads(#[from] kvasir_model::ThreadsError),
    /// Budget too small to hold a single sequence.
    #[error(
        "a budget of {budget_bytes} bytes cannot hold one sequence of {tokens} tokens, which \
         needs {needed_bytes} bytes: raise --kv-cache-memory or lower --max-model-len"
    )]
    BudgetTooSmall {
        /// The budget.
        budget_bytes: usize,
        /// Tokens that must fit at least.
        tokens: usize,
        /// Bytes for them.
        needed_bytes: usize,
    },
    /// Bookkeeping that does not add up: a bug, with the numbers that show it.
    #[error("integrity check failed: {what}")]
    Integrity {
        /// Which numbers disagree.
        what: String,
    },
    /// The model failed.
    #[error(transparent)]
    Model(#[from] kvasir_model::ModelError),
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// Shorthand of this crate.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;
