//! What of every row is stored: one file a method.
//!
//! A projection makes rows shorter before a codec sees them. [`Think`] drops channels of a prompt's keys, which ones
//! is chosen for each prompt.

mod think;

pub use think::Think;
pub(crate) use think::{Channels, RECENT};

use crate::error::Result;
use crate::select::Options;

/// The projections that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Project {
    /// [`Think`].
    Think(Think),
}

impl Project {
    /// Names and parameters, as `--kv-cache` takes them.
    pub(crate) const KNOWN: [&str; 1] = [Think::USAGE];

    /// One of each kind, with its usual parameters.
    pub const ALL: [Self; 1] = [Self::Think(Think::USUAL)];

    /// Reads one stage of a recipe; `None` if its name is not a projection's.
    ///
    /// # Errors
    /// [`crate::CacheError::Option`] for a parameter that is out of range or not known.
    pub(crate) fn parse(stage: &str) -> Result<Option<Self>> {
        let options = Options::new(stage);
        Ok(Some(match options.name() {
            Think::NAME => Self::Think(Think::parse(options)?),
            _ => return Ok(None),
        }))
    }
}

impl std::fmt::Display for Project {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Think(think) => think.fmt(f),
        }
    }
}
