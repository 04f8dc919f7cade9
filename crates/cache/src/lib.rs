//! The KV cache (skeleton).
#![forbid(unsafe_code)]
#![allow(missing_docs)]

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    #[error("unknown KV cache recipe '{name}' (known: {known})")]
    UnknownRecipe { name: String, known: String },
}

/// How the cache is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Recipe {
    #[default]
    F16,
}

impl std::str::FromStr for Recipe {
    type Err = CacheError;
    fn from_str(name: &str) -> Result<Self, CacheError> {
        match name {
            "f16" => Ok(Self::F16),
            _ => Err(CacheError::UnknownRecipe { name: name.into(), known: "f16".into() }),
        }
    }
}
impl std::fmt::Display for Recipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("f16")
    }
}
