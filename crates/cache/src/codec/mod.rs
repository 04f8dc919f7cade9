//! Codecs: how one block of keys or values is stored in a slot. One file a codec; all pass the
//! `conformance` suite.
//!
//! A codec sees a block as f32 rows `[tokens, head_dim]`, keys already in the block-relative frame,
//! and writes exactly [`Codec::slot_bytes`] bytes. It does not know about sequences, tables or the
//! pool.

#[cfg(test)]
pub(crate) mod conformance;
mod gear;
mod int8;
mod joint;
mod kivi;
mod low_rank;
mod pack;
mod raw;

pub use gear::{Gear, GearCodec};
pub use int8::Int8;
pub use joint::JointCodec;
pub(crate) use joint::{Basis, LevelScratch};
pub use kivi::{KiviKeys, KiviValues};
pub use low_rank::LowRankCodec;
pub(crate) use low_rank::Turns;
pub use raw::{RawF16, RawF32};

use half::f16;
use kvasir_kernels::StoredRows;

use crate::error::{CacheError, Result};

/// Stores blocks of rows.
pub trait Codec: Send + Sync + std::fmt::Debug {
    /// As in recipes.
    fn name(&self) -> &'static str;

    /// Bytes of a slot for `tokens` rows of `dim` channels. What [`Self::encode`] writes, no more and
    /// no less: the pool's accounting rests on it.
    fn slot_bytes(&self, tokens: usize, dim: usize) -> usize;

    /// Encodes whole rows. `rows`: `[tokens, dim]`; `slot`: `slot_bytes(tokens, dim)` bytes. NaN and
    /// infinity must not disturb other channels or rows than their own.
    fn encode(&self, rows: &[f32], dim: usize, slot: &mut [u8]);

    /// Decodes the first `out.len() / dim` rows of a block of `tokens` rows. `out`: `[n, dim]`.
    fn decode(&self, slot: &[u8], tokens: usize, dim: usize, out: &mut [f32]);

    /// The rows of a slot as they lie there, `[n, dim]`, if they are numbers that attention reads without
    /// decoding.
    fn stored_rows<'a>(&self, _slot: &'a [u8], _dim: usize) -> Option<StoredRows<'a>> {
        None
    }

    /// The same of a slot of `tokens` rows, if products of integers read them.
    fn stored_bytes<'a>(
        &self,
        _slot: &'a [u8],
        _tokens: usize,
        _dim: usize,
    ) -> Option<StoredRows<'a>> {
        None
    }

    /// Decodes the first `out.len() / dim` rows to f16 instead, `[n, dim]`, if the codec is quicker at that: attention of
    /// few queries reads them as it reads uncompressed blocks. False if it is not.
    fn decode_halves(&self, _slot: &[u8], _tokens: usize, _dim: usize, _out: &mut [f16]) -> bool {
        false
    }

    /// Expected relative squared error of a round trip on Gaussian rows; 0 for an exact codec. The
    /// conformance suite holds the codec to it.
    fn expected_error(&self) -> f32;
}

/// A codec whose rows can be written one by one: what tails are made of.
pub trait TailCodec: Codec {
    /// Overwrites row `row`. `x`: `[dim]`, within ±[`Self::largest`].
    fn write_row(&self, row: usize, x: &[f32], slot: &mut [u8]);

    /// The largest magnitude a row can hold.
    fn largest(&self) -> f32;
}

/// Which half of the cache a block belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Keys, rotated in the recipe's frame.
    Keys,
    /// Values.
    Values,
}

/// Bits a channel, in hundredths; multiples of a twentieth, so that clients cannot ask for more than a
/// hundred different codecs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rate(u16);

impl Rate {
    /// Least and most bits a channel.
    pub const RANGE: (f32, f32) = (1.0, 6.0);

    /// A rate of whole bits, without a check.
    pub(crate) const fn whole(bits: u16) -> Self {
        Self(bits * 100)
    }

    /// As a number.
    pub fn bits(self) -> f32 {
        f32::from(self.0) / 100.0
    }
}

impl std::str::FromStr for Rate {
    type Err = CacheError;

    fn from_str(text: &str) -> Result<Self> {
        let (least, most) = Self::RANGE;
        let rate: Option<f32> = text.parse().ok();
        rate.filter(|r| (least..=most).contains(r))
            .map(|r| Self((r * 20.0).round() as u16 * 5))
            .ok_or_else(|| CacheError::Rate { given: text.to_owned(), least, most })
    }
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.bits())
    }
}

/// The codecs that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CodecKind {
    /// [`RawF16`].
    F16,
    /// [`RawF32`].
    F32,
    /// [`Int8`] for both.
    Int8,
    /// [`KiviKeys`] and [`KiviValues`] at 4 bits.
    Kivi4,
    /// The same at 2 bits.
    Kivi2,
    /// [`GearCodec`] for both.
    Gear(Gear),
    /// [`JointCodec`] against the model's statistics.
    Joint(Rate),
    /// A fixed rotation without statistics, at whole bits a coefficient: a control.
    Rotation(u8),
}

impl CodecKind {
    /// Whether it codes against the model's statistics of all channels together.
    pub(crate) fn is_joint(self) -> bool {
        matches!(self, Self::Joint(_))
    }

    /// Whether it needs the model's statistics.
    pub fn needs_statistics(self) -> bool {
        matches!(self, Self::Joint(_))
    }

    /// The codec of a kind that needs nothing but rows of one head; tails for the rest.
    pub(crate) fn stateless(self, part: Part) -> &'static dyn Codec {
        match (self, part) {
            (Self::F16 | Self::Gear(_) | Self::Joint(_) | Self::Rotation(_), _) => &RawF16,
            (Self::F32, _) => &RawF32,
            (Self::Int8, _) => &Int8,
            (Self::Kivi4, Part::Keys) => &KiviKeys::<4>,
            (Self::Kivi4, Part::Values) => &KiviValues::<4>,
            (Self::Kivi2, Part::Keys) => &KiviKeys::<2>,
            (Self::Kivi2, Part::Values) => &KiviValues::<2>,
        }
    }
}

impl std::fmt::Display for CodecKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::F16 => f.write_str("f16"),
            Self::F32 => f.write_str("f32"),
            Self::Int8 => f.write_str("int8"),
            Self::Kivi4 => f.write_str("kivi4"),
            Self::Kivi2 => f.write_str("kivi2"),
            Self::Gear(gear) => gear.fmt(f),
            Self::Joint(rate) if rate.0.is_multiple_of(100) => write!(f, "joint{rate}"),
            Self::Joint(rate) => write!(f, "joint:{rate}"),
            Self::Rotation(bits) => write!(f, "rotation{bits}"),
        }
    }
}
