//! GGUF key-value metadata: typed values and accessors that name the key when they fail.

use std::collections::BTreeMap;

use super::strings::Strings;
use crate::error::{ModelError, Result};

/// One metadata value. Arrays keep their element type, so a vocabulary of 262,144 strings is one
/// [`Strings`] and not as many enum values.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// Any unsigned integer type.
    Uint(u64),
    /// Any signed integer type.
    Int(i64),
    /// f32 or f64.
    Float(f64),
    /// bool.
    Bool(bool),
    /// UTF-8 string.
    String(String),
    /// Array of unsigned integers.
    UintArray(Vec<u64>),
    /// Array of signed integers.
    IntArray(Vec<i64>),
    /// Array of floats.
    FloatArray(Vec<f64>),
    /// Array of booleans.
    BoolArray(Vec<bool>),
    /// Array of strings.
    StringArray(Strings),
    /// Array of arrays: kept for `inspect`, read by nobody.
    NestedArray(Vec<Value>),
}

/// The metadata of one file, in key order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    values: BTreeMap<String, Value>,
}

impl Metadata {
    /// Adds or replaces a value.
    pub fn insert(&mut self, key: impl Into<String>, value: Value) {
        self.values.insert(key.into(), value);
    }

    /// Drops the keys that begin so.
    pub(super) fn forget(&mut self, prefix: &str) {
        self.values.retain(|key, _| !key.starts_with(prefix));
    }

    /// The value of `key`, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All keys and values in key order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// A string, if the key is there.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(bad(key, "a string", other)),
        }
    }

    /// A non-negative integer, if the key is there.
    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        let value = match self.get(key) {
            None => return Ok(None),
            Some(Value::Uint(v)) => usize::try_from(*v).ok(),
            Some(Value::Int(v)) => usize::try_from(*v).ok(),
            Some(_) => None,
        };
        match (value, self.get(key)) {
            (Some(v), _) => Ok(Some(v)),
            (None, Some(other)) => Err(bad(key, "a non-negative integer", other)),
            (None, None) => Ok(None),
        }
    }

    /// A number, if the key is there.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(v)) => Ok(Some(*v as f32)),
            Some(Value::Uint(v)) => Ok(Some(*v as f32)),
            Some(Value::Int(v)) => Ok(Some(*v as f32)),
            Some(other) => Err(bad(key, "a number", other)),
        }
    }

    /// A boolean, if the key is there.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(bad(key, "a boolean", other)),
        }
    }

    /// An array of strings, if the key is there.
    pub fn strings(&self, key: &str) -> Result<Option<&Strings>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::StringArray(v)) => Ok(Some(v)),
            Some(other) => Err(bad(key, "an array of strings", other)),
        }
    }

    /// `read(key)` or an error naming the key.
    pub fn require<'a, T>(
        &'a self,
        key: &str,
        read: impl FnOnce(&'a Self, &str) -> Result<Option<T>>,
    ) -> Result<T> {
        read(self, key)?.ok_or_else(|| ModelError::MissingKey { key: key.to_owned() })
    }
}

fn bad(key: &str, expected: &str, found: &Value) -> ModelError {
    let mut found = format!("{found:?}");
    if found.len() > 80 {
        let cut = (0..=80).rev().find(|i| found.is_char_boundary(*i)).unwrap_or(0);
        found.truncate(cut);
        found.push('…');
    }
    ModelError::BadKey { key: key.to_owned(), expected: expected.to_owned(), found }
}
