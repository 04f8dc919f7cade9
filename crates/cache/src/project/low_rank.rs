//! LoRC and ReCalKV: latents of keys before RoPE, and of values, instead of rows.
//!
//! Which axes there are is in a [`LowRankTable`]; how many stay is the recipe's to say, as a share of all channels, which each
//! method spreads over layers in its own way, or as a rank for every layer.
//!
//! Differences from the papers: weights stay as they are, and projections are computed whole and then projected; the
//! factor of values is applied to sums, or rows, in attention and not folded into the output projection, which is the same
//! product. So a request may choose. Tokens are read exactly until their block is full. ReCalKV's ranks follow energies and
//! not Fisher information, which would need gradients.

use crate::codec::{CodecKind, LowRankCodec, Part, Turns};
use crate::error::{CacheError, Result};
use crate::geometry::{Geometry, LayerGeometry};
use crate::offline::{LowRankTable, Method};
use crate::select::{Budget, Options};

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LowRank {
    method: Method,
    share: Budget,
    /// For every layer, instead of a share.
    rank: Option<u16>,
}

impl LowRank {
    pub(crate) const LORC_USAGE: &str = "lorc:SHARE or lorc:rank=N";
    pub(crate) const RECALKV_USAGE: &str = "recalkv:SHARE or recalkv:rank=N";
    /// LoRC with half of all channels.
    pub const LORC: Self = Self { method: Method::Lorc, share: Budget::HALF, rank: None };
    /// ReCalKV with half of all channels.
    pub const RECALKV: Self = Self { method: Method::ReCalKv, share: Budget::HALF, rank: None };

    pub(crate) fn parse(method: Method, mut options: Options<'_>) -> Result<Self> {
        let usage = match method {
            Method::ReCalKv => Self::RECALKV_USAGE,
            _ => Self::LORC_USAGE,
        };
        let (share, rank) = match options.has("rank") {
            true => (Budget::HALF, Some(options.whole("rank", 1, 1..=u16::MAX)?)),
            false => (Budget::parse(&mut options)?, None),
        };
        options.done(usage)?;
        Ok(Self { method, share, rank })
    }

    /// Whose axes it needs.
    pub fn method(self) -> Method {
        self.method
    }

    /// Axes that stay, by layer, part and group.
    ///
    /// # Errors
    /// [`CacheError::Rank`] for a rank beyond a layer's channels.
    pub(crate) fn ranks(
        self,
        table: &LowRankTable,
        geometry: &Geometry,
    ) -> Result<Vec<[Vec<usize>; 2]>> {
        let share = f64::from(self.share.share());
        if let Some(rank) = self.rank.map(usize::from) {
            for (layer, l) in geometry.layers().iter().enumerate() {
                let most = l.kv_heads * l.head_dim;
                if rank > most {
                    return Err(CacheError::Rank { stage: self.to_string(), rank, layer, most });
                }
            }
        }
        let even = |rank: usize, part: &crate::offline::Axes| -> Vec<usize> {
            // What does not divide goes to the first groups.
            let n = part.groups.len();
            let own = |i: usize, g: &crate::offline::HeadGroup| {
                (rank / n + usize::from(i < rank % n)).clamp(1, g.energies.len())
            };
            part.groups.iter().enumerate().map(|(i, g)| own(i, g)).collect()
        };
        let layers = table.layers.iter();
        Ok(match (self.rank, self.method) {
            (Some(rank), _) => {
                layers.map(|parts| [0, 1].map(|p| even(usize::from(rank), &parts[p]))).collect()
            }
            (None, Method::ReCalKv) => table.by_energy(share),
            (None, _) => {
                let shares = table.progressive(share);
                let layers = layers.zip(shares).zip(geometry.layers());
                let rank = |share: f64, l: &LayerGeometry| {
                    let rank = share * (l.kv_heads * l.head_dim) as f64;
                    // Sixteen at a time, as vectors hold them.
                    if rank < 16.0 {
                        rank.round() as usize
                    } else {
                        (rank / 16.0).round() as usize * 16
                    }
                };
                layers.map(|((parts, s), l)| [0, 1].map(|p| even(rank(s, l), &parts[p]))).collect()
            }
        })
    }

    /// The codecs of a layer's keys and values.
    pub(crate) fn codecs(
        table: &LowRankTable,
        layer: usize,
        ranks: &[Vec<usize>; 2],
        head_dim: usize,
        turns: Option<Turns>,
        kind: CodecKind,
    ) -> [LowRankCodec; 2] {
        let [keys, values] = &table.layers[layer];
        let codec = |axes, ranks, turns, part| {
            LowRankCodec::new(axes, ranks, head_dim, turns, (kind, part))
        };
        [codec(keys, &ranks[0], turns, Part::Keys), codec(values, &ranks[1], None, Part::Values)]
    }
}

impl std::fmt::Display for LowRank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "{}:rank={rank}", self.method),
            None => write!(f, "{}:{}", self.method, self.share),
        }
    }
}
