//! A file on its way into the cache folder: written beside its place, hashed on the way, and
//! renamed into place only when it is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// Bytes moved at a time.
pub(crate) const CHUNK_BYTES: usize = 128 << 10;

/// Length and checksum of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileDigest {
    /// Length.
    pub(crate) bytes: u64,
    /// SHA-256 in lower-case hex.
    pub(crate) sha256: String,
}

/// What a file must be, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Expected {
    /// Length.
    pub(crate) bytes: Option<u64>,
    /// SHA-256 in lower-case hex.
    pub(crate) sha256: Option<String>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct StagedFile {
    file: File,
    path: PathBuf,
    hash: Sha256,
    len: u64,
}

impl StagedFile {
    /// Starts an empty file at `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let mut staged = Self::open(path)?;
        staged.restart()?;
        Ok(staged)
    }

    /// Opens what is at `path` to append to it, hashing what is there already.
    pub(crate) fn resume(path: &Path) -> Result<Self> {
        let mut staged = Self::open(path)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let n = staged
                .file
                .read(&mut chunk)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let Some(read) = chunk.get(..n).filter(|read| !read.is_empty()) else { break };
            staged.hash.update(read);
            staged.len += read.len() as u64;
        }
        Ok(staged)
    }

    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| cannot_write(path))?;
        Ok(Self { file, path: path.to_owned(), hash: Sha256::new(), len: 0 })
    }

    /// Bytes written so far.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Appends `bytes`.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| cannot_write(&self.path))?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Throws away what was written.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .with_context(|| cannot_write(&self.path))?;
        self.hash = Sha256::new();
        self.len = 0;
        Ok(())
    }

    /// Checks the content against `expected`, forces it to disk, calls `before_rename` and renames
    /// the file to `to`. The file is removed where it is not what was expected.
    pub(crate) fn finish(
        self,
        expected: &Expected,
        to: &Path,
        before_rename: impl FnOnce(&FileDigest) -> Result<()>,
    ) -> Result<FileDigest> {
        let digest = FileDigest { bytes: self.len, sha256: hex(&self.hash.finalize()) };
        if let Err(error) = expected.check(&digest) {
            drop(self.file);
            let _ = fs::remove_file(&self.path);
            return Err(error);
        }
        self.file.sync_all().with_context(|| cannot_write(&self.path))?;
        before_rename(&digest)?;
        fs::rename(&self.path, to).with_context(|| cannot_write(to))?;
        // The rename itself must survive a power cut too; where a folder cannot be opened as a
        // file, the file system orders it without help.
        if let Some(folder) = to.parent().and_then(|folder| File::open(folder).ok()) {
            let _ = folder.sync_all();
        }
        Ok(digest)
    }
}

impl Expected {
    /// An error that names both values where `digest` is not what was expected.
    pub(crate) fn check(&self, digest: &FileDigest) -> Result<()> {
        match self.bytes {
            Some(bytes) if bytes != digest.bytes => {
                bail!("wrong length: expected {bytes} bytes, got {}", digest.bytes)
            }
            _ => {}
        }
        match &self.sha256 {
            Some(sha256) if *sha256 != digest.sha256 => {
                bail!("wrong checksum: expected SHA-256 {sha256}, got {}", digest.sha256)
            }
            _ => Ok(()),
        }
    }
}

/// Length and checksum of the file at `path`.
pub(crate) fn hash_file(path: &Path) -> Result<FileDigest> {
    let reading = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(reading)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut chunk).with_context(reading)?;
        let Some(read) = chunk.get(..n).filter(|read| !read.is_empty()) else { break };
        hash.update(read);
        bytes += read.len() as u64;
    }
    Ok(FileDigest { bytes, sha256: hex(&hash.finalize()) })
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC_SHA256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn expect(bytes: u64, sha256: &str) -> Expected {
        Expected { bytes: Some(bytes), sha256: Some(sha256.to_owned()) }
    }

    #[test]
    fn a_whole_file_is_renamed() {
        let folder = tempfile::tempdir().unwrap();
        let (part, to) = (folder.path().join("f.part"), folder.path().join("f"));
        let mut staged = StagedFile::create(&part).unwrap();
        staged.write(b"ab").unwrap();
        staged.write(b"c").unwrap();
        let digest = staged.finish(&expect(3, ABC_SHA256), &to, |_| Ok(())).unwrap();
        assert_eq!(digest, FileDigest { bytes: 3, sha256: ABC_SHA256.into() });
        assert_eq!(fs::read(&to).unwrap(), b"abc");
        assert!(!part.exists());
        assert_eq!(hash_file(&to).unwrap(), digest);
    }

    #[test]
    fn resume_counts_and_hashes_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let (part, to) = (folder.path().join("f.part"), folder.path().join("f"));
        fs::write(&part, b"ab").unwrap();
        let mut staged = StagedFile::resume(&part).unwrap();
        assert_eq!(staged.len(), 2);
        staged.write(b"c").unwrap();
        staged.finish(&expect(3, ABC_SHA256), &to, |_| Ok(())).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"abc");
    }

    #[test]
    fn restart_forgets() {
        let folder = tempfile::tempdir().unwrap();
        let (part, to) = (folder.path().join("f.part"), folder.path().join("f"));
        fs::write(&part, b"something longer").unwrap();
        let mut staged = StagedFile::resume(&part).unwrap();
        staged.restart().unwrap();
        staged.write(b"abc").unwrap();
        staged.finish(&expect(3, ABC_SHA256), &to, |_| Ok(())).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"abc");
    }

    #[test]
    fn a_wrong_file_leaves_nothing() {
        for expected in [expect(4, ABC_SHA256), expect(3, &"0".repeat(64))] {
            let folder = tempfile::tempdir().unwrap();
            let mut staged = StagedFile::create(&folder.path().join("f.part")).unwrap();
            staged.write(b"abc").unwrap();
            let error = staged.finish(&expected, &folder.path().join("f"), |_| Ok(())).unwrap_err();
            assert!(error.to_string().starts_with("wrong "), "{error}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_said() {
        let mut staged = StagedFile::resume(Path::new("/dev/null")).unwrap();
        staged.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = format!("{:#}", staged.write(b"abc").unwrap_err());
        assert!(error.contains("cannot write") && error.contains("No space left"), "{error}");
    }
}
