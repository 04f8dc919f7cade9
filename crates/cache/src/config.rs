//! Recipes: how a cache is encoded. One name (`--kv-cache`) selects one.

use crate::codec::CodecKind;
use crate::error::{CacheError, Result};

/// How a cache is encoded. Later steps add selection, sharing and statistics here; today a recipe is
/// its codec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Recipe {
    codec: CodecKind,
}

impl Recipe {
    /// Uncompressed half precision: exact for every practical purpose, and the control of every
    /// experiment.
    pub const F16: Self = Self { codec: CodecKind::F16 };
    /// Single precision: twice the bytes; separates rounding from every other effect in tests.
    pub const F32: Self = Self { codec: CodecKind::F32 };

    /// Every named recipe.
    pub const ALL: [Self; 2] = [Self::F16, Self::F32];

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
        assert_eq!(message, "unknown KV cache recipe 'f15' (known: f16, f32)");
    }
}
