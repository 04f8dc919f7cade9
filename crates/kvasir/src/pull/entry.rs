//! One file of the cache folder and the small files beside it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::staged::hash_file;

/// Where a model file lies in the cache folder. Beside `FILE` there may be `FILE.part` (what has
/// arrived so far), `FILE.resume` (how to continue it), `FILE.record` (what is known of the
/// finished file), `FILE.lock` and `FILE.wheels` (packages while they are fetched).
#[derive(Debug, Clone)]
pub(crate) struct CacheEntry {
    path: PathBuf,
}

/// What is known of a finished file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Where it came from.
    pub(crate) source: String,
    /// Length.
    pub(crate) bytes: u64,
    /// SHA-256 in lower-case hex.
    pub(crate) sha256: String,
}

impl CacheEntry {
    /// An entry whose finished file is `path`.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The finished file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn part_path(&self) -> PathBuf {
        self.beside(".part")
    }

    pub(crate) fn resume_path(&self) -> PathBuf {
        self.beside(".resume")
    }

    pub(crate) fn record_path(&self) -> PathBuf {
        self.beside(".record")
    }

    pub(crate) fn lock_path(&self) -> PathBuf {
        self.beside(".lock")
    }

    pub(crate) fn wheels_path(&self) -> PathBuf {
        self.beside(".wheels")
    }

    /// Creates the folder that holds the entry.
    pub(crate) fn create_folder(&self) -> Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).with_context(|| {
            format!(
                "cannot create the cache folder {} (set KVASIR_HOME to a folder that can be \
                 written)",
                folder.display()
            )
        })
    }

    /// The record of the finished file, if there is a readable one.
    pub(crate) fn record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.record_path()).ok()?).ok()
    }

    /// Writes the record. Done before the file itself appears, so that a file always has one.
    pub(crate) fn write_record(&self, record: &Record) -> Result<()> {
        write_json(&self.record_path(), record)
    }

    /// The record of the finished file if that file is there, has the recorded length (and, with
    /// `verify`, the recorded checksum), and is the one that `known` describes.
    pub(crate) fn cached(
        &self,
        known: Option<(u64, &str)>,
        verify: bool,
    ) -> Result<Option<Record>> {
        let Ok(metadata) = fs::metadata(&self.path) else { return Ok(None) };
        let Some(record) = self.record() else { return Ok(None) };
        let (bytes, sha256) = known.unwrap_or((record.bytes, &record.sha256));
        if !metadata.is_file() || metadata.len() != bytes || record.sha256 != sha256 {
            return Ok(None);
        }
        if verify && hash_file(&self.path)?.sha256 != sha256 {
            return Ok(None);
        }
        Ok(Some(record))
    }

    /// Removes what an unfinished fetch left behind.
    pub(crate) fn discard_part(&self) {
        // A file that is not there is what is wanted; one that cannot be removed shows up when
        // the next fetch opens it.
        let _ = fs::remove_file(self.part_path());
        let _ = fs::remove_file(self.resume_path());
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(suffix);
        PathBuf::from(name)
    }
}

/// Writes a small JSON file so that a reader sees the old or the new one, never a half.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let text = serde_json::to_vec(value)?;
    fs::write(&temporary, text)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC_SHA256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn entry_with(content: &[u8]) -> (tempfile::TempDir, CacheEntry) {
        let folder = tempfile::tempdir().unwrap();
        let entry = CacheEntry::new(folder.path().join("m.gguf"));
        fs::write(entry.path(), content).unwrap();
        let record = Record { source: "test".into(), bytes: 3, sha256: ABC_SHA256.into() };
        entry.write_record(&record).unwrap();
        (folder, entry)
    }

    #[test]
    fn cached_when_length_agrees() {
        let (_folder, entry) = entry_with(b"abc");
        assert!(entry.cached(None, true).unwrap().is_some());
        assert!(entry.cached(Some((3, ABC_SHA256)), true).unwrap().is_some());
        assert!(entry.cached(Some((4, ABC_SHA256)), false).unwrap().is_none());
        assert!(entry.cached(Some((3, "00")), false).unwrap().is_none());
    }

    #[test]
    fn damage_of_equal_length_is_found_by_verify_only() {
        let (_folder, entry) = entry_with(b"abd");
        assert!(entry.cached(None, false).unwrap().is_some());
        assert!(entry.cached(None, true).unwrap().is_none());
    }

    #[test]
    fn a_cut_file_or_one_without_record_is_not_cached() {
        let (_folder, entry) = entry_with(b"ab");
        assert!(entry.cached(None, false).unwrap().is_none());
        let (_folder, entry) = entry_with(b"abc");
        fs::write(entry.record_path(), b"{").unwrap();
        assert!(entry.cached(None, false).unwrap().is_none());
    }
}
