//! KVSharer (arXiv 2410.18517): some layers neither project nor store keys and values, and read those of a layer before
//! them.
//!
//! Which ones is searched once for a model (`kvasir calibrate --method kvsharer`), and kept as a list of pairs in the order in
//! which they were accepted ([`KvSharerTable`]): a search for fewer would have accepted the first of them. The number is the
//! share of layers that store their own, as everywhere in recipes: the paper's usual "25 % shared" is `kvsharer:0.75`.
//!
//! A sequence knows the owner of every layer. Tables of a layer that owns nothing stay empty: no slot, no bytes.

use std::sync::Arc;

use crate::attention::BatchSlice;
use crate::error::{CacheError, Result};
use crate::geometry::Geometry;
use crate::kv_cache::KvCache;
use crate::offline::KvSharerTable;
use crate::select::{Budget, Options};

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvSharer {
    share: Budget,
}

/// By layer: the layer whose keys and values it reads; its own number if it stores them.
pub(crate) type Owners = Arc<[usize]>;

impl KvSharer {
    pub(crate) const NAME: &str = "kvsharer";
    pub(crate) const USAGE: &str = "kvsharer:SHARE";
    /// A quarter of all layers read another's.
    pub const USUAL: Self = Self { share: Budget::THREE_QUARTERS };

    pub(crate) fn parse(mut options: Options<'_>) -> Result<Self> {
        let share = Budget::parse(&mut options)?;
        options.done(Self::USAGE)?;
        Ok(Self { share })
    }

    /// The owners of all layers.
    ///
    /// # Errors
    /// [`CacheError::Table`] if the search found fewer layers that may go, or the table is of another model.
    pub(crate) fn owners(self, table: &KvSharerTable, geometry: &Geometry) -> Result<Owners> {
        let layers = geometry.layers().len();
        let wrong = |what| CacheError::Table { method: Self::NAME, what };
        if table.layers != layers {
            return Err(wrong(format!("made for {} layers, not {layers}", table.layers)));
        }
        let replaced = layers - self.share.of_rounded_up(layers);
        if replaced > table.pairs.len() {
            return Err(wrong(format!(
                "{self} replaces {replaced} of {layers} layers, and the search found {} that may be replaced",
                table.pairs.len()
            )));
        }
        Ok(table.owners(replaced).into())
    }
}

impl std::fmt::Display for KvSharer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", Self::NAME, self.share)
    }
}

impl KvCache {
    /// Whether no sequence of a step stores keys and values of this layer, so that nobody need project them.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn reads_others(&self, layer: usize, slices: &[BatchSlice]) -> Result<bool> {
        for slice in slices {
            if self.sequence(slice.sequence)?.owns(layer) {
                return Ok(false);
            }
        }
        Ok(!slices.is_empty())
    }
}
