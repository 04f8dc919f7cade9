//! Recipes: how a cache is encoded. One name (`--kv-cache`) selects one.

use crate::codec::CodecKind;
use crate::error::{CacheError, Result};

/// The frame keys are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyFrame {
    /// Rotated by the offset inside the block: equal content has equal bytes at any position.
    BlockRelative,
    /// Rotated by the position, as published methods store them.
    Absolute,
}

/// How a cache is encoded: a codec and the frame its keys are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Recipe {
    codec: CodecKind,
    frame: KeyFrame,
}

impl Recipe {
    /// Uncompressed half precision: exact for every practical purpose, and the control of every
    /// experiment.
    pub const F16: Self = Self::of(CodecKind::F16, KeyFrame::BlockRelative);
    /// Single precision: twice the bytes; separates rounding from every other effect in tests.
    pub const F32: Self = Self::of(CodecKind::F32, KeyFrame::BlockRelative);

    /// Sealed blocks in 8 bits.
    pub const INT8: Self = Self::of(CodecKind::Int8, KeyFrame::BlockRelative);
    /// KIVI at 4 bits: a control.
    pub const KIVI4: Self = Self::of(CodecKind::Kivi4, KeyFrame::Absolute);
    /// KIVI at 2 bits: a control.
    pub const KIVI2: Self = Self::of(CodecKind::Kivi2, KeyFrame::Absolute);

    /// Every named recipe.
    pub const ALL: [Self; 5] = [Self::F16, Self::F32, Self::INT8, Self::KIVI4, Self::KIVI2];

    const fn of(codec: CodecKind, frame: KeyFrame) -> Self {
        Self { codec, frame }
    }

    /// The frame keys are stored in.
    pub fn frame(self) -> KeyFrame {
        self.frame
    }

    /// How sealed blocks are stored.
    pub fn codec(self) -> CodecKind {
        self.codec
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Self::F16
    }
}

impl std::str::FromStr for Recipe {
    type Err = CacheError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|r| r.to_string() == name).ok_or_else(|| {
            CacheError::UnknownRecipe {
                name: name.to_owned(),
                known: Self::ALL.map(|r| r.to_string()).join(", "),
            }
        })
    }
}

impl std::fmt::Display for Recipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.codec.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for recipe in Recipe::ALL {
            assert_eq!(recipe.to_string().parse::<Recipe>().unwrap(), recipe);
        }
    }

    #[test]
    fn unknown_names_list_what_exists() {
        let message = "f15".parse::<Recipe>().unwrap_err().to_string();
        assert_eq!(message, "unknown KV cache recipe 'f15' (known: f16, f32, int8, kivi4, kivi2)");
    }
}
