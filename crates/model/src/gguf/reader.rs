//! A cursor over a file's bytes that cannot run past the end: every length is compared with what
//! is left before anything is allocated, and every failure says where it stands and what it read.

use std::fmt::Arguments;
use std::path::Path;

use crate::error::{ModelError, Result};

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], path: &'a Path) -> Self {
        Self { bytes, position: 0, path }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Bytes from the cursor to the end of the file.
    pub(super) fn remaining(&self) -> u64 {
        self.bytes.len().saturating_sub(self.position) as u64
    }

    /// [`ModelError::Damaged`] at `offset`.
    pub(super) fn damaged(&self, offset: usize, what: impl Into<String>) -> ModelError {
        ModelError::Damaged { path: self.path.to_owned(), offset: offset as u64, what: what.into() }
    }

    /// The next `len` bytes.
    pub(super) fn take(&mut self, len: u64, what: Arguments<'_>) -> Result<&'a [u8]> {
        let end = usize::try_from(len).ok().and_then(|len| self.position.checked_add(len));
        match end.and_then(|end| self.bytes.get(self.position..end)) {
            Some(taken) => {
                self.position += taken.len();
                Ok(taken)
            }
            None => Err(self.damaged(
                self.position,
                format!(
                    "the file ends inside {what}: {len} bytes needed, {} left",
                    self.remaining()
                ),
            )),
        }
    }

    fn fixed<const N: usize>(&mut self, what: Arguments<'_>) -> Result<[u8; N]> {
        let taken = self.take(N as u64, what)?;
        let mut fixed = [0; N];
        fixed.copy_from_slice(taken);
        Ok(fixed)
    }

    pub(super) fn u32(&mut self, what: Arguments<'_>) -> Result<u32> {
        self.fixed(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: Arguments<'_>) -> Result<u64> {
        self.fixed(what).map(u64::from_le_bytes)
    }

    /// A number of items of at least `min_bytes` each; an error if so many cannot follow.
    pub(super) fn count(&mut self, min_bytes: u64, what: Arguments<'_>) -> Result<usize> {
        let start = self.position;
        let count = self.u64(what)?;
        let fits = count.checked_mul(min_bytes).is_some_and(|bytes| bytes <= self.remaining());
        match usize::try_from(count) {
            Ok(count) if fits => Ok(count),
            _ => Err(self.damaged(
                start,
                format!("{what} is {count}, but only {} bytes are left", self.remaining()),
            )),
        }
    }

    /// A string: 64-bit length and UTF-8 bytes, at most `max_bytes` of them.
    pub(super) fn string(&mut self, max_bytes: u64, what: Arguments<'_>) -> Result<&'a str> {
        let start = self.position;
        let len = self.u64(format_args!("the length of {what}"))?;
        if len > max_bytes {
            return Err(
                self.damaged(start, format!("{what} is {len} bytes long, limit {max_bytes}"))
            );
        }
        let text_start = self.position;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|error| {
            let valid = error.valid_up_to();
            self.damaged(
                text_start + valid,
                format!(
                    "{what} is not UTF-8 after {valid} bytes ('{}')",
                    shown(&String::from_utf8_lossy(bytes))
                ),
            )
        })
    }
}

/// Text from a file as part of a one-line message: control characters escaped, at most 64
/// characters.
pub(super) fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(64).flat_map(char::escape_debug).collect();
    if text.chars().nth(64).is_some() {
        out.push('…');
    }
    out
}
