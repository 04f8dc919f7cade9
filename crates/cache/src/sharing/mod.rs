//! Sharing one stored block between several readers: who may share, and what it costs.
//!
//! Read first: [`tree::fuse`] (which blocks of a batch of requests, or of the chunks of one prompt, go
//! together) and [`theory::Model`] (ratio and distortion to expect at a threshold, and the threshold
//! for a distortion budget). Both follow "Joint Encoding of KV-Cache Blocks for Scalable LLM Serving"
//! (arXiv 2601.03067); their documentation says where they depart from it.
//!
//! Everything here is a pure function of vectors and ids. Not its job: slots, tables, reference
//! counts, tenants, which layers take part (the paper leaves out the first and last two). The caller
//! ([`crate::KvCache::fuse`]) passes blocks of one layer and one tenant only, and applies the redirects
//! to its own tables.

pub(crate) mod batch;
pub(crate) mod online;
mod policy;
mod similarity;
pub(crate) mod sketch;
pub mod theory;
pub mod tree;

pub use batch::{FusionReport, LayerFusion};
pub use policy::{Sharing, SharingMode};

/// What can be wrong with the input of this module.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SharingError {
    /// Vectors that do not have the shape that the ids say.
    #[error("group {group}: {found} numbers for {blocks} blocks of {dim}")]
    Shape {
        /// Index of the group.
        group: usize,
        /// Numbers given.
        found: usize,
        /// Blocks of the group.
        blocks: usize,
        /// Numbers per block.
        dim: usize,
    },
    /// Another number of groups than were fused.
    #[error("{found} groups of vectors for {expected} groups of blocks")]
    NumGroups {
        /// Groups that were fused.
        expected: usize,
        /// Groups given.
        found: usize,
    },
    /// Values are to be checked, but a group has none.
    #[error("group {group} has no values to check")]
    NoValues {
        /// Index of the group.
        group: usize,
    },
    /// Thresholds are cosines of at least 0: below, a mean of matching vectors may vanish.
    #[error("similarity threshold {found} is not between 0 and 1")]
    Threshold {
        /// As given.
        found: f32,
    },
    /// A similarity that is no cosine.
    #[error("pair {index}: {found} is not a cosine")]
    Cosine {
        /// Index of the pair.
        index: usize,
        /// As given.
        found: f32,
    },
    /// A share of pairs, or a number of blocks, that cannot be.
    #[error("{what}")]
    Sample {
        /// Which numbers are wrong.
        what: String,
    },
}
