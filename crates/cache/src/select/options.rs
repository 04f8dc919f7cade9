//! The text of a stage of a recipe: `name:number:option=number:…`.

use crate::error::{CacheError, Result};

/// A stage that is being read.
#[derive(Debug, Clone)]
pub(crate) struct Options<'a> {
    stage: &'a str,
    name: &'a str,
    number: Option<&'a str>,
    options: Vec<(&'a str, &'a str)>,
}

impl<'a> Options<'a> {
    /// Splits a stage at its colons.
    pub(crate) fn new(stage: &'a str) -> Self {
        let mut parts = stage.split(':');
        let name = parts.next().unwrap_or_default();
        let mut number = None;
        let mut options = Vec::new();
        for part in parts {
            match part.split_once('=') {
                Some(pair) => options.push(pair),
                None if number.is_none() && options.is_empty() => number = Some(part),
                None => options.push((part, "")),
            }
        }
        Self { stage, name, number, options }
    }

    pub(crate) fn name(&self) -> &'a str {
        self.name
    }

    fn wrong(&self, given: &str, expected: &str) -> CacheError {
        CacheError::Option {
            stage: self.stage.to_owned(),
            given: given.to_owned(),
            expected: expected.to_owned(),
        }
    }

    /// The number after the name.
    ///
    /// # Errors
    /// [`CacheError::Option`] if it is missing or not `good`.
    pub(crate) fn number(&mut self, expected: &str, good: impl Fn(f32) -> bool) -> Result<f32> {
        let given = self.number.take().unwrap_or_default();
        let number = given.parse().ok().filter(|n: &f32| good(*n));
        number.ok_or_else(|| self.wrong(given, expected))
    }

    /// The number after the name, if there is one.
    pub(crate) fn has_number(&self) -> bool {
        self.number.is_some()
    }

    /// Whether a named option is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.options.iter().any(|(n, _)| *n == name)
    }

    /// A named option, taken out.
    pub(crate) fn take(&mut self, name: &str) -> Option<&'a str> {
        let at = self.options.iter().position(|(n, _)| *n == name)?;
        Some(self.options.remove(at).1)
    }

    /// A whole number by name; `usual` if it is not there.
    ///
    /// # Errors
    /// [`CacheError::Option`] if it is out of `range`.
    pub(crate) fn whole(
        &mut self,
        name: &str,
        usual: u16,
        range: std::ops::RangeInclusive<u16>,
    ) -> Result<u16> {
        let Some(given) = self.take(name) else { return Ok(usual) };
        let number = given.parse().ok().filter(|n| range.contains(n));
        number.ok_or_else(|| {
            let expected = format!("{name} from {} to {}", range.start(), range.end());
            self.wrong(given, &expected)
        })
    }

    /// One of some words by name; the first if it is not there.
    ///
    /// # Errors
    /// [`CacheError::Option`] for another word.
    pub(crate) fn word(&mut self, name: &str, words: &[&str]) -> Result<usize> {
        let Some(given) = self.take(name) else { return Ok(0) };
        words
            .iter()
            .position(|word| *word == given)
            .ok_or_else(|| self.wrong(given, &format!("{name}={}", words.join(" or "))))
    }

    /// Everything was read.
    ///
    /// # Errors
    /// [`CacheError::Option`] naming what was not.
    pub(crate) fn done(self, usage: &str) -> Result<()> {
        match self.number.or(self.options.first().map(|(name, _)| *name)) {
            None => Ok(()),
            Some(left) => Err(self.wrong(left, usage)),
        }
    }
}
