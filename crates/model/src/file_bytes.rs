//! A model file's bytes: memory-mapped, read piece by piece, or owned by tests and fuzz targets. The only `unsafe` of
//! this crate is here.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
    /// The mapping is for headers; pieces are read.
    Read(Mmap, File),
    Owned(Vec<u8>),
}

/// How the tensors of a file come into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// The file is mapped: tensors are read where the operating system has them, and what is only looked up stays there.
    #[default]
    Mapped,
    /// Tensors are read piece by piece into memory of the process, which a file that changes or a disk that is slow does not reach afterwards. (The
    /// header is read through a mapping all the same.)
    Read,
}

impl FileBytes {
    /// Opens a file. It must not be changed in place while it is mapped: another
    /// process that shortens it makes later reads fail with SIGBUS. Replacing it by renaming
    /// another file over it is harmless.
    #[allow(unsafe_code)]
    pub(crate) fn open(path: &Path, access: Access) -> Result<Self> {
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
        let content = match access {
            Access::Mapped => Content::Mapped(mapping),
            Access::Read => Content::Read(mapping, file),
        };
        Ok(Self { path: path.to_owned(), content })
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
            Content::Mapped(mapping) | Content::Read(mapping, _) => mapping,
            Content::Owned(bytes) => bytes,
        }
    }

    /// Whether pieces stay readable without memory of the process.
    pub(crate) fn stays_mapped(&self) -> bool {
        matches!(self.content, Content::Mapped(_))
    }

    /// A piece of the file, which takes memory as long as it lives.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::Damaged`] for a range beyond the file.
    pub(crate) fn piece(self: &Arc<Self>, range: Range<usize>) -> Result<Piece> {
        if self.as_slice().get(range.clone()).is_none() {
            return Err(ModelError::Damaged {
                path: self.path.clone(),
                offset: range.start as u64,
                what: format!("the file ends before byte {}", range.end),
            });
        }
        #[cfg(unix)]
        if let Content::Read(_, file) = &self.content {
            use std::os::unix::fs::FileExt;
            let mut bytes = vec![0; range.len()];
            file.read_exact_at(&mut bytes, range.start as u64)
                .map_err(|source| ModelError::Io { path: self.path.clone(), source })?;
            return Ok(Piece(Held::Read(bytes)));
        }
        Ok(Piece(Held::InFile(Arc::clone(self), range)))
    }

    /// Takes a range of the mapping's pages out of the process's resident set. Reading them again is correct
    /// and costs a page fault. Owned bytes stay, and so do mappings on systems without `madvise`.
    /// It is advice: a refusal by the operating system is ignored.
    #[allow(unsafe_code)]
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Content::Mapped(mapping) | Content::Read(mapping, _) = &self.content {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the call is unsafe because dropping a page discards what was written to it.
            // This mapping is read-only and file-backed, so nothing was written: the next read of
            // an address, through an old borrow too, faults the same file content in again.
            let _ = unsafe { mapping.unchecked_advise_range(advice, range.start, range.len()) };
        }
    }

    /// [`Self::release`] of the whole file.
    pub(crate) fn release_pages(&self) {
        self.release(0..self.as_slice().len());
    }
}

/// See [`FileBytes::piece`]. Pages of a mapping are released when it is dropped.
#[derive(Debug)]
pub(crate) struct Piece(Held);

#[derive(Debug)]
enum Held {
    InFile(Arc<FileBytes>, Range<usize>),
    Read(Vec<u8>),
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Held::InFile(file, range) => file.as_slice().get(range.clone()).unwrap_or_default(),
            Held::Read(bytes) => bytes,
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Held::InFile(file, range) = &self.0 {
            file.release(range.clone());
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
        let bytes = FileBytes::open(&path, Access::Mapped).unwrap();
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
        assert!(FileBytes::open(&path, Access::Mapped).unwrap().as_slice().is_empty());
    }

    #[test]
    fn missing_file_and_folder_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("nothing.gguf");
        let error = FileBytes::open(&missing, Access::Mapped).unwrap_err();
        assert!(matches!(error, ModelError::Io { .. }), "{error}");
        assert!(error.to_string().contains("nothing.gguf"), "{error}");
        let error = FileBytes::open(dir.path(), Access::Mapped).unwrap_err();
        assert!(matches!(error, ModelError::NotAModel { .. }), "{error}");
    }

    #[test]
    fn pieces_are_the_same_however_a_file_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let content: Vec<u8> = (0..50_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let files = [
            FileBytes::open(&path, Access::Mapped).unwrap(),
            FileBytes::open(&path, Access::Read).unwrap(),
            FileBytes::owned(content.clone(), &path),
        ];
        for file in files.map(Arc::new) {
            for range in [0..0, 0..1, 4000..9000, 49_999..50_000, 0..50_000] {
                assert_eq!(*file.piece(range.clone()).unwrap(), content[range]);
            }
            for range in [50_000..50_001, 7..60_000] {
                let error = file.piece(range).unwrap_err();
                assert!(matches!(error, ModelError::Damaged { .. }), "{error}");
            }
        }
    }
}
