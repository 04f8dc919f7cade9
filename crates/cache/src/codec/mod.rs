//! Codecs: how one block of keys or values is stored in a slot. One file a codec; all pass the
//! `conformance` suite.
//!
//! A codec sees a block as f32 rows `[tokens, head_dim]`, keys already in the block-relative frame,
//! and writes exactly [`Codec::slot_bytes`] bytes. It does not know about sequences, tables or the
//! pool.

#[cfg(test)]
pub(crate) mod conformance;
mod int8;
mod kivi;
mod pack;
mod raw;

pub use int8::Int8;
pub use kivi::{KiviKeys, KiviValues};
pub use raw::{RawF16, RawF32};

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
}

impl CodecKind {
    /// As in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Int8 => "int8",
            Self::Kivi4 => "kivi4",
            Self::Kivi2 => "kivi2",
        }
    }

    /// What a sequence's unsealed block is stored as.
    pub fn tail(self) -> &'static dyn TailCodec {
        match self {
            Self::F32 => &RawF32,
            Self::F16 | Self::Int8 | Self::Kivi4 | Self::Kivi2 => &RawF16,
        }
    }

    /// What a sealed block is stored as; `None` keeps the tail's slot.
    pub fn sealed(self, part: Part) -> Option<&'static dyn Codec> {
        match (self, part) {
            (Self::F16 | Self::F32, _) => None,
            (Self::Int8, _) => Some(&Int8),
            (Self::Kivi4, Part::Keys) => Some(&KiviKeys::<4>),
            (Self::Kivi4, Part::Values) => Some(&KiviValues::<4>),
            (Self::Kivi2, Part::Keys) => Some(&KiviKeys::<2>),
            (Self::Kivi2, Part::Values) => Some(&KiviValues::<2>),
        }
    }
}
