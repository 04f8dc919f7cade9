//! A model file's bytes: memory-mapped, or owned by tests and fuzz targets. The only `unsafe` of
//! this crate is here.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{ModelError, Result};

/// The bytes of one file and the path that error messages name.
#[derive(Debug)]
pub(crate) struct FileBytes {
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl FileBytes {
    /// Maps a file read-only. The file must not be changed in place while it is mapped: another
    /// process that shortens it makes later reads fail with SIGBUS. Replacing it by renaming
    /// another file over it is harmless.
    #[allow(unsafe_code)]
    pub(crate) fn map(path: &Path) -> Result<Self> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        // Before opening: to open a named pipe is to wait for a writer.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(ModelError::NotAModel {
                path: path.to_owned(),
                what: "not a regular file".to_owned(),
            });
        }
        let file = File::open(path).map_err(io)?;
        // SAFETY: the mapping is read-only and shared with nobody who writes through it. Its bytes
        // are only ever read as plain numbers and text that is checked on each read, so a change
        // by another process can give wrong numbers but no invalid value, and the offsets in use
        // were checked against the mapping's length, which cannot change. A file shortened in
        // place gives SIGBUS, which ends the process; this limit is documented above.
        let mapping = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.to_owned(), content: Content::Mapped(mapping) })
    }

    /// Bytes already in memory; `path` is only shown in messages.
    pub(crate) fn owned(bytes: Vec<u8>, path: &Path) -> Self {
        Self { path: path.to_owned(), content: Content::Owned(bytes) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match &self.content {
            Content::Mapped(mapping) => mapping,
            Content::Owned(bytes) => bytes,
        }
    }

    /// Takes the mapping's pages out of the process's resident set. Reading them again is correct
    /// and costs a page fault. Owned bytes stay, and so do mappings on systems without `madvise`.
    /// It is advice: a refusal by the operating system is ignored.
    #[allow(unsafe_code)]
    pub(crate) fn release_pages(&self) {
        #[cfg(unix)]
        if let Content::Mapped(mapping) = &self.content {
            // SAFETY: the call is unsafe because dropping a page discards what was written to it.
            // This mapping is read-only and file-backed, so nothing was written: the next read of
            // an address, through an old borrow too, faults the same file content in again.
            let _ = unsafe { mapping.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_bytes_are_the_same_before_and_after_release() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let content: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let bytes = FileBytes::map(&path).unwrap();
        let borrowed = bytes.as_slice();
        assert_eq!(borrowed, content);
        bytes.release_pages();
        assert_eq!(borrowed, content);
    }

    #[test]
    fn an_empty_file_maps_to_no_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        assert!(FileBytes::map(&path).unwrap().as_slice().is_empty());
    }

    #[test]
    fn missing_file_and_folder_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("nothing.gguf");
        let error = FileBytes::map(&missing).unwrap_err();
        assert!(matches!(error, ModelError::Io { .. }), "{error}");
        assert!(error.to_string().contains("nothing.gguf"), "{error}");
        let error = FileBytes::map(dir.path()).unwrap_err();
        assert!(matches!(error, ModelError::NotAModel { .. }), "{error}");
    }
}
