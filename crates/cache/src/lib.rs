//! The KV cache: where keys and values of all requests live, and how attention reads them.
//!
//! Read first: [`KvCache`] (what the engine and the model call), [`BlockPool`] (who owns the bytes),
//! [`codec::Codec`] (how a block is stored).
//!
//! A cache belongs to one model and one recipe. A sequence appends un-rotated keys and values layer
//! by layer; they are stored per (layer, KV head) in blocks of [`Geometry::block_size`] tokens,
//! **keys rotated by their offset inside the block only** ("block-relative frame"): rotary scores
//! depend on distances, so the query is rotated by its distance from the block's start instead. Equal
//! content then has equal bytes at any position, which is what sharing needs.
//!
//! Not its job: requests, scheduling policy, sampling, model weights.
#![forbid(unsafe_code)]

mod admission;
mod append;
mod attention;
mod books;
pub mod codec;
mod config;
mod error;
mod format;
mod frame;
mod fuse;
mod geometry;
mod kv_cache;
pub mod offline;
mod pool;
mod prefix;
mod pressure;
mod project;
mod recipe_text;
mod recode;
mod residual;
mod seal;
mod select;
mod sequence;
pub mod sharing;
pub mod stats;
mod store;
mod table;

pub use attention::{AttentionScratch, BatchSlice};
pub use books::CacheStats;
pub use config::{KeyFrame, Recipe};
pub use error::{CacheError, Result};
pub use format::FormatId;
pub use geometry::{Geometry, LayerGeometry};
pub use kv_cache::{CacheConfig, KvCache};
pub use pool::{BlockPool, ClassId, SlotId};
pub use prefix::BlockHash;
pub use project::{KvSharer, LowRank, Project, Think};
pub use seal::SharingCounts;
pub use select::{
    Budget, ChunkKv, ClusterKv, Compactor, DBudget, H2o, Less, Select, SnapKv, Streaming,
};
pub use sequence::SequenceId;
pub use sharing::{FusionReport, LayerFusion, Sharing, SharingMode};
pub use table::{BlockTable, Entry};
