//! One fetch of a file at a time, across processes.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use anyhow::{Context, Result};

use super::progress::Progress;

/// An advisory lock; dropping it (or the end of the process, however it ends) releases it.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock at `path`, waiting for another holder. The lock file stays: removing it
    /// would let two processes hold locks on two files of the same name.
    pub(crate) fn acquire(path: &Path, progress: Progress) -> Result<Self> {
        let locking = || format!("cannot lock {}", path.display());
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(locking)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress.note("waiting for another kvasir that is fetching the same file");
                file.lock().with_context(locking)?;
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(locking),
        }
        Ok(Self { _file: file })
    }
}
