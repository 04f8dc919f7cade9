//! The one error type of this crate.

/// What can go wrong in the cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// `--kv-cache` names nothing.
    #[error("unknown KV cache recipe '{name}' (known: {known})")]
    UnknownRecipe {
        /// As given.
        name: String,
        /// Comma separated.
        known: String,
    },
    /// `--kv-sharing` names nothing, or its limit is out of range.
    #[error(
        "unknown sharing '{given}' (known: off, tokens, sketch, tree; but for off with a limit from 0 to below 1, as in tokens:0.05)"
    )]
    UnknownSharing {
        /// As given.
        given: String,
    },
    /// A parameter of a stage of a recipe that is missing, out of range or unknown.
    #[error("'{stage}': '{given}' is not {expected}")]
    Option {
        /// The stage as given.
        stage: String,
        /// What is wrong in it.
        given: String,
        /// What could stand there.
        expected: String,
    },
    /// Stages of a recipe that cannot work together.
    #[error("recipe '{name}': {what}")]
    Combination {
        /// As given.
        name: String,
        /// Why not.
        what: String,
    },
    /// Clients may ask for recipes of their own, each of which takes memory for good.
    #[error("this cache has met {most} different recipes and takes no more")]
    TooManyRecipes {
        /// How many it takes.
        most: usize,
    },
    /// A recipe that the tree cannot fuse.
    #[error("tree sharing holds f16 and f32 recipes only, not {recipe}")]
    TreeRecipe {
        /// The recipe.
        recipe: String,
    },
    /// Blocks that cannot be compared.
    #[error("sharing: {0}")]
    Sharing(#[from] crate::sharing::SharingError),
    /// A rate that no joint recipe can have.
    #[error(
        "a rate of '{given}' bits a channel: joint and rotation recipes take {least} to {most}"
    )]
    Rate {
        /// As given.
        given: String,
        /// Smallest rate.
        least: f32,
        /// Largest rate.
        most: f32,
    },
    /// Statistics that are missing, or not of this cache's model.
    #[error("statistics: {what}")]
    Statistics {
        /// What is wrong.
        what: String,
    },
    /// A table of a method that is missing, or not of this cache's model.
    #[error("table of {method}: {what}")]
    Table {
        /// The method's name.
        method: &'static str,
        /// What is wrong.
        what: String,
    },
    /// More different projections than a cache holds matrices for.
    #[error(
        "{most} different projections are in use, and this server takes no more of them until it is restarted"
    )]
    TooManyProjections {
        /// How many a cache takes.
        most: usize,
    },
    /// A rank that a layer does not have.
    #[error("{stage}: rank {rank} is above the {most} channels of layer {layer}")]
    Rank {
        /// The stage of the recipe.
        stage: String,
        /// As given.
        rank: usize,
        /// The first layer that is too small.
        layer: usize,
        /// Channels of its keys, over all KV heads.
        most: usize,
    },
    /// `--block-size` is not one of the sizes.
    #[error("block size must be 16, 32 or 64 tokens, got {found}")]
    BlockSize {
        /// As given.
        found: usize,
    },
    /// A model whose heads the cache cannot hold.
    #[error("layer {layer}: {what}")]
    Geometry {
        /// Layer index.
        layer: usize,
        /// What is wrong.
        what: String,
    },
    /// No room for more blocks, even after evicting every unused prefix. The engine preempts.
    #[error(
        "the block pool has no room for {needed} more blocks of {slot_bytes} bytes ({used_bytes} of {budget_bytes} bytes in use)"
    )]
    Exhausted {
        /// Slots asked for.
        needed: usize,
        /// Bytes of one.
        slot_bytes: usize,
        /// Bytes in use.
        used_bytes: usize,
        /// The budget.
        budget_bytes: usize,
    },
    /// A sequence that is not, or no longer, in the cache: a bug of the caller.
    #[error("sequence {id} is not in the cache")]
    UnknownSequence {
        /// Index and generation.
        id: String,
    },
    /// Tokens were written or committed that nothing was reserved for: a bug of the caller.
    #[error("sequence {id} reserved {reserved} tokens, but {used} were used")]
    NotReserved {
        /// Index and generation.
        id: String,
        /// Tokens reserved, cached ones included.
        reserved: usize,
        /// Tokens used.
        used: usize,
    },
    /// Bookkeeping that does not add up: a bug, with the numbers that show it.
    #[error("cache integrity: {what}")]
    Integrity {
        /// Which numbers disagree.
        what: String,
    },
}

/// Shorthand of this crate.
pub type Result<T, E = CacheError> = std::result::Result<T, E>;
