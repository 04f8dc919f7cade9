//! What of every row is stored: one file a method.
//!
//! A projection makes rows shorter before a codec sees them. [`Think`] drops channels of a prompt's keys, which ones
//! is chosen for each prompt; [`LowRank`] keeps some axes of keys and values that were found once for the model. [`KvSharer`]
//! stores nothing of some layers, and goes with the others.

mod kv_sharer;
mod low_rank;
mod think;

pub use kv_sharer::KvSharer;
pub(crate) use kv_sharer::Owners;
pub use low_rank::LowRank;
pub use think::Think;
pub(crate) use think::{Channels, RECENT};

use crate::error::Result;
use crate::offline::Method;
use crate::select::Options;

/// The projections that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Project {
    /// [`Think`].
    Think(Think),
    /// [`LowRank`].
    LowRank(LowRank),
}

impl Project {
    /// Names and parameters, as `--kv-cache` takes them.
    pub(crate) const KNOWN: [&str; 3] = [Think::USAGE, LowRank::LORC_USAGE, LowRank::RECALKV_USAGE];

    /// One of each kind, with its usual parameters.
    pub const ALL: [Self; 3] =
        [Self::Think(Think::USUAL), Self::LowRank(LowRank::LORC), Self::LowRank(LowRank::RECALKV)];

    /// Reads one stage of a recipe; `None` if its name is not a projection's.
    ///
    /// # Errors
    /// [`crate::CacheError::Option`] for a parameter that is out of range or not known.
    pub(crate) fn parse(stage: &str) -> Result<Option<Self>> {
        let options = Options::new(stage);
        Ok(Some(match options.name() {
            Think::NAME => Self::Think(Think::parse(options)?),
            "lorc" => Self::LowRank(LowRank::parse(Method::Lorc, options)?),
            "recalkv" => Self::LowRank(LowRank::parse(Method::ReCalKv, options)?),
            _ => return Ok(None),
        }))
    }
}

impl std::fmt::Display for Project {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Think(think) => think.fmt(f),
            Self::LowRank(low_rank) => low_rank.fmt(f),
        }
    }
}
