//! Which tokens of a sequence stay: one file a policy.
//!
//! A prompt is computed whole, over an uncompressed cache (a policy must see what it gives up). When its last token is
//! committed, the policy names the tokens that each KV head keeps, from the attention that the prompt's last queries,
//! or all of them, paid to every token ([`observe`]), and from the keys; [`compact`] moves those into blocks of their
//! own, coded by the recipe's codec, and frees the rest. What is generated afterwards is appended and
//! coded as always. Policies that go on choosing while tokens are generated say how wide their recent window is
//! ([`Policy::recent`]).
//!
//! [`ClusterKv`] gives nothing up: what does not stay goes to a file, sorted by cluster ([`cold`]), and queries attend to
//! some of it.
//!
//! Layers with a sliding window keep what their window holds, whatever the policy.

mod budget;
mod choose;
mod chunkkv;
mod chunks;
mod clusterkv;
mod cold;
pub(crate) mod compact;
mod compactor;
mod dbudget;
mod h2o;
mod kept;
mod less;
mod observe;
mod options;
mod policy;
mod rank;
mod snapkv;
mod state;
mod streaming;
#[cfg(test)]
mod tests;

pub use budget::Budget;
pub use chunkkv::ChunkKv;
pub use clusterkv::ClusterKv;
pub(crate) use cold::Cold;
pub use compactor::Compactor;
pub use dbudget::DBudget;
pub use h2o::H2o;
pub(crate) use kept::Kept;
pub use less::Less;
pub(crate) use observe::Selection;
pub(crate) use options::Options;
pub(crate) use policy::{Policy, Whole};
pub(crate) use rank::top;
pub use snapkv::SnapKv;
pub use streaming::Streaming;

use crate::error::Result;

/// The policies that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Select {
    /// [`Streaming`].
    Streaming(Streaming),
    /// [`H2o`].
    H2o(H2o),
    /// [`SnapKv`].
    SnapKv(SnapKv),
    /// [`ChunkKv`].
    ChunkKv(ChunkKv),
    /// [`Compactor`].
    Compactor(Compactor),
    /// [`DBudget`].
    DBudget(DBudget),
    /// [`ClusterKv`].
    ClusterKv(ClusterKv),
    /// [`Less`].
    Less(Less),
}

impl Select {
    /// Names and parameters, as `--kv-cache` takes them.
    pub(crate) const KNOWN: [&str; 8] = [
        Streaming::USAGE,
        H2o::USAGE,
        SnapKv::USAGE,
        ChunkKv::USAGE,
        Compactor::USAGE,
        DBudget::USAGE,
        ClusterKv::USAGE,
        Less::USAGE,
    ];

    /// One policy of each kind, with its usual parameters.
    pub const ALL: [Self; 8] = [
        Self::Streaming(Streaming::HALF),
        Self::H2o(H2o::HALF),
        Self::SnapKv(SnapKv::HALF),
        Self::ChunkKv(ChunkKv::HALF),
        Self::Compactor(Compactor::HALF),
        Self::DBudget(DBudget::USUAL),
        Self::ClusterKv(ClusterKv::QUARTER),
        Self::Less(Less::HALF),
    ];

    /// Reads one stage of a recipe; `None` if its name is not a policy's.
    ///
    /// # Errors
    /// [`crate::CacheError::Option`] for a parameter that is out of range or not known.
    pub(crate) fn parse(stage: &str) -> Result<Option<Self>> {
        let options = Options::new(stage);
        Ok(Some(match options.name() {
            Streaming::NAME => Self::Streaming(Streaming::parse(options)?),
            H2o::NAME => Self::H2o(H2o::parse(options)?),
            SnapKv::NAME => Self::SnapKv(SnapKv::parse(options)?),
            ChunkKv::NAME => Self::ChunkKv(ChunkKv::parse(options)?),
            Compactor::NAME => Self::Compactor(Compactor::parse(options)?),
            DBudget::NAME => Self::DBudget(DBudget::parse(options)?),
            ClusterKv::NAME => Self::ClusterKv(ClusterKv::parse(options)?),
            Less::NAME => Self::Less(Less::parse(options)?),
            _ => return Ok(None),
        }))
    }

    /// What the policy does.
    pub(crate) fn policy(&self) -> &(dyn Policy + Sync) {
        match self {
            Self::Streaming(policy) => policy,
            Self::H2o(policy) => policy,
            Self::SnapKv(policy) => policy,
            Self::ChunkKv(policy) => policy,
            Self::Compactor(policy) => policy,
            Self::DBudget(policy) => policy,
            Self::ClusterKv(policy) => policy,
            Self::Less(policy) => policy,
        }
    }
}

impl std::fmt::Display for Select {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.policy().fmt(f)
    }
}
